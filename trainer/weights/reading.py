"""THE way to read weights: of a run, a checkpoint, an export, an import, or anybody else's file.

Ours are compared with the hashes that were recorded of them. Where there are several sets of
weights of equal names, the one that was scored is taken, which is their running mean; `raw` takes
the weights themselves, and either way it is said.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from torch import Tensor

from trainer.checkpoint import loading
from trainer.checkpoint.manifest import MANIFEST, CheckpointError, unreadable
from trainer.checkpoint.record import MEAN, TRAINED, Record, identity_of, of_run, read_header, require_recorded
from trainer.checkpoint.state import WEIGHTS_FILE
from trainer.config import InitFrom
from trainer.weights.directories import read_directory
from trainer.weights.files import BAD_PICKLE, first_line, read_file

log = logging.getLogger("trainer")


@dataclass
class Weights:
    """Weights in memory, and what is known of them."""

    tensors: dict[str, Tensor]  # by the names of where they come from
    source: str
    record: Record | None = None  # of ours
    told: dict[str, list[Any]] = field(default_factory=dict)  # of foreign ones (hyperparameters.py)
    taken: str = ""  # which of several sets
    also: list[str] = field(default_factory=list)  # the others
    loaded: loading.Loaded | None = None  # the checkpoint of ours that they were read from

    @property
    def made_from(self) -> str:
        """Where they come from, and the hash of what was read."""
        return f"{self.source}, sha256 {identity_of(self.tensors)}"


def wanted(source: InitFrom) -> Weights:
    """Read what a configuration starts from."""
    return read(source.path, source.raw, source.take)


def read(path: Path, raw: bool = False, take: str | None = None) -> Weights:
    """Read the weights at `path`, without executing anything in a foreign file.

    Args:
        path: a run (its newest checkpoint), a checkpoint, the directory of an import, an export, or
            what others write: safetensors, torch.save, Lightning, DeepSpeed, shards with an index.
        raw: the weights themselves, also where a running mean of them was kept.
        take: the name of the set to take from a foreign file that holds several.

    Raises:
        Unreadable: the file system refuses it now.
        CheckpointError: absent, damaged, of no known format, or it wants to execute something.
    """
    if (path / MANIFEST).exists():
        return _of_checkpoint(loading.load(path, state=False), raw)
    if path.is_dir() and (path / "checkpoints").is_dir():
        loaded = loading.newest(path, state=False)
        if loaded is None:
            raise CheckpointError(f"no checkpoint in {path}. Train one first, or name another run.")
        return _of_checkpoint(loaded, raw)
    if not path.exists():
        raise CheckpointError(f"no weights at {path}.")
    ours = path / WEIGHTS_FILE if path.is_dir() else path
    record = _record_in(ours) if ours.suffix == ".safetensors" and ours.is_file() else None
    sets = read_file(ours) if ours.is_file() else read_directory(path)
    try:
        name, tensors = sets.chosen(raw, take)
    except BAD_PICKLE as error:
        why = f"a tensor cannot be read ({first_line(error)})"
        raise CheckpointError(f"{path} is damaged: {why}. Fetch it again.") from error
    also = [other for other in sets.found if other != name]
    record = record or sets.record
    if record is None:
        return Weights(tensors, str(path), None, sets.told, name, also)
    require_recorded(tensors, record.tensors, str(path))
    asked = TRAINED if raw else MEAN
    if record.config.get("ema") is not None and record.which != asked:
        log.info("WARNING: %s holds the weights %s, not %s", path, record.which, asked)
    return Weights(tensors, str(path), record, taken=record.which, also=also)


def _of_checkpoint(loaded: loading.Loaded, raw: bool) -> Weights:
    memory, weights = loaded.manifest, loaded.named.weights
    means = loading.averages(loaded.named)
    which = MEAN if means and not raw else TRAINED
    also = [TRAINED if which == MEAN else MEAN] if means else []
    tensors = weights | means if which == MEAN else weights
    return Weights(tensors, str(loaded.path), of_run(memory, which), {}, which, also, loaded)


def _record_in(file: Path) -> Record | None:
    try:
        return read_header(file)
    except OSError as error:
        raise unreadable(file, error) from error
    except SafetensorError:  # reading the tensors says what is wrong with it
        return None
