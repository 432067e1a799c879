"""THE way to load a checkpoint of ours: held open meanwhile, all compared with recorded hashes."""

from __future__ import annotations

import logging
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path

from safetensors import SafetensorError, safe_open
from torch import Tensor

from trainer.checkpoint import store
from trainer.checkpoint.manifest import CheckpointError, Manifest, Unreadable, sha256_of, unreadable
from trainer.checkpoint.record import require_recorded
from trainer.checkpoint.state import WEIGHTS_FILE, Named
from trainer.checkpoint.zero import EMA, MOMENTS

log = logging.getLogger("trainer")


@dataclass(frozen=True)
class Loaded:
    """A checkpoint in memory."""

    path: Path
    manifest: Manifest
    named: Named


def load(checkpoint: Path, state: bool = True) -> Loaded:
    """Load a checkpoint.

    Args:
        state: with the optimizer's state; without it only the running mean of the weights is read
            beside them, where the run keeps one.

    Raises:
        Unreadable: the file system refuses it now.
        store.Gone: it was removed in this moment.
        CheckpointError: it is damaged.
    """
    try:
        return _load(checkpoint, state)
    except (store.Gone, Unreadable):
        raise
    except CheckpointError:  # a running job may have been about to remove it, and put it back
        return _load(checkpoint, state)


def newest(run_dir: Path, state: bool = True, step_over: bool = False) -> Loaded | None:
    """Load the newest checkpoint of a run; None where there is none at all.

    One that a running job removes meanwhile is looked for again.

    Args:
        step_over: take the next whole one where the newest is damaged, and say so.

    Raises:
        Unreadable: the file system refuses the newest one now, so nobody can tell what it holds.
        CheckpointError: the newest one is damaged, or with `step_over` every one.
    """
    candidates, damaged = store.look(run_dir), False
    while candidates:
        candidate = candidates.pop()
        try:
            return load(candidate.path, state)
        except store.Gone:
            candidates = store.look(run_dir)
        except Unreadable:
            raise
        except CheckpointError as error:
            if not step_over:
                older = (found.path for found in reversed(candidates))
                whole = next((path for path in older if not store.verify(path)), None)
                remedy = f"The newest whole one is {whole}: name it" if whole else "None is whole"
                raise CheckpointError(f"{error} {remedy}.") from error
            log.error("WARNING: %s is damaged and skipped: %s", candidate.path, error)
            damaged = True
    if damaged:
        raise CheckpointError(
            f"every checkpoint in {run_dir} is damaged (see above): bring one back from a copy of "
            "it, or start a new run with another run_dir."
        )
    return None


def averages(named: Named) -> dict[str, Tensor]:
    """The running mean of every weight that has one, by the weight's name."""
    means = {f"{name}.{EMA}": name for name in named.weights}
    return {means[key]: mean for key, mean in named.moments.items() if key in means}


def _load(checkpoint: Path, state: bool) -> Loaded:
    with store.reading(checkpoint):
        content = store.manifest(checkpoint)
        moments = {f"{name}.{kind}" for name in content.parameters for kind in (*MOMENTS, "step")}
        wanted = content.tensors.keys() - (set() if state else moments)
        averaged = any(name.endswith(f".{EMA}") for name in wanted)
        named = Named()
        for file in content.files if state or averaged else [str(WEIGHTS_FILE)]:
            into = named.weights if Path(file) == WEIGHTS_FILE else named.moments
            into |= _read(checkpoint / file, wanted, content.files[file].sha256)
    recorded = {name: content.tensors[name] for name in wanted}
    require_recorded(named.weights | named.moments, recorded, str(checkpoint))
    return Loaded(checkpoint, content, named)


def _read(file: Path, wanted: Collection[str], sha256: str) -> dict[str, Tensor]:
    """Tensors of a file, read through before it is mapped: an error then ends the process."""
    try:
        if sha256_of(file) != sha256:
            raise CheckpointError(f"{file} is damaged: it does not have the sha256 that was recorded.")
        with safe_open(file, "pt") as opened:
            return {name: opened.get_tensor(name) for name in set(opened.keys()) & set(wanted)}
    except OSError as error:
        raise unreadable(file, error) from error
    except SafetensorError as error:
        raise CheckpointError(f"{file} is damaged: {error}.") from error
