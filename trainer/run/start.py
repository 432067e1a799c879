"""Where a run begins: at its newest checkpoint, with foreign weights, or with random ones.

What can be refused here is refused alike by `preflight`, which calls `look_back` without any ranks.
"""

from __future__ import annotations

import json
import logging
import sys
import uuid
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from trainer import engine as engines
from trainer.baselines import blend
from trainer.checkpoint import consistency, loading, same_run, saving, state, store
from trainer.checkpoint.loading import Loaded
from trainer.checkpoint.manifest import Begun, CheckpointError, Memory, Progress
from trainer.checkpoint.state import Named
from trainer.config import Run
from trainer.config_file import validate
from trainer.dataset import Dataset
from trainer.model.topoflow import TopoFlow
from trainer.weights.fit import fit
from trainer.weights.reading import wanted

log = logging.getLogger("trainer")
IMPORT = "import.json"  # in the run directory: what was loaded before step 1


@dataclass
class Start:
    """What the engine gets before its next step."""

    progress: Progress
    checkpoint: Path | None = None
    named: Named = field(default_factory=Named)  # on rank 0


def describe(run: Run, dataset: Dataset, network: TopoFlow, deepspeed: dict[str, Any], ranks: int) -> Memory:
    """What every manifest of this run says beside its progress and its files."""
    return Memory(
        progress=Progress(),
        config=run.model_dump(mode="json"),
        deepspeed=deepspeed,
        fingerprints=dataset.fingerprints(),
        statistics=dataset.store.statistics,
        parameters=engines.grouped_parameters(network, run),
        world_size=ranks,
        zero_stage=deepspeed["zero_optimization"]["stage"],
        version=version("topoflow-trainer"),
    )


def begin(dataset: Dataset, network: TopoFlow, present: Memory, allow_change: list[str]) -> Start:
    """Read on rank 0 what the run begins with, and name this start in `present`; collective.

    Rank 0 alone looks into the run directory: another rank may see it late, or not at all.

    Raises:
        CheckpointError: on every rank, if checkpoints cannot be read or none is whole, the run
            would not be the same run, or foreign weights do not load completely.
    """
    run = dataset.run
    begun = Start(Progress())

    def read() -> tuple[Progress, Path | None, str, list[Begun]]:
        saving.mend(run.run_dir)
        found, progress = look_back(run, present, allow_change, dataset.store.continues)
        this = Begun(id=uuid.uuid4().hex, step=progress.step)
        name, starts = this.id, [this]
        if found is None:
            if run.model.predict == "change":
                blend.fit(network, dataset)
            begun.named = Named(_foreign_weights(network, run) or _own_weights(network))
        else:
            begun.named = found.named
            name, starts = found.manifest.run or this.id, [*found.manifest.starts, this]
            _put_others_aside(run.run_dir, found)
        same_run.remember(run.run_dir, name, None if found is None else progress.step)
        (run.run_dir / "checkpoints").mkdir(exist_ok=True)  # every host sees it by the first save
        return progress, None if found is None else found.path, name, starts

    begun.progress, begun.checkpoint, present.run, present.starts = consistency.on_main(read)
    return begun


def load(engine: Any, start: Start) -> None:
    """Put what was read into the engine of every rank, and prove that it is there; collective.

    Raises:
        CheckpointError: on every rank, naming the first tensor that differs and where.
    """
    new = state.restore(engine, start.named)
    state.prove(engine, state.hashes_of(start.named, engine))
    start.progress.changes += [{"step": start.progress.step, **change} for change in new]
    start.named = Named()  # gigabytes, for a large network


def look_back(
    run: Run,
    present: Memory,
    allow_change: list[str],
    same_data: Callable[[str], bool] = lambda _: False,
) -> tuple[Loaded | None, Progress]:
    """Newest whole checkpoint of the run, if there is one, and its progress; warns of what cannot act.

    Raises:
        CheckpointError: the run directory has a history and no checkpoint that can be used, the run
            would not be the same run, or `init_from` does not exist.
    """
    if run.init_from is not None and not run.init_from.path.exists():
        raise CheckpointError(f"init_from: no weights at {run.init_from.path}.")
    found = loading.newest(run.run_dir, step_over=True)
    same_run.require_own(run.run_dir, None if found is None else found.manifest)
    if found is None:
        return None, Progress()
    if run.resume == "never":
        raise CheckpointError(f"{run.run_dir} holds checkpoints and resume is 'never': choose another run_dir.")
    remembered = found.manifest.model_copy()
    before = validate(remembered.config, str(found.path / "manifest.json"))
    remembered.config = before.model_dump(mode="json")  # with the defaults of keys that came later
    changes = same_run.compare(found.path, remembered, present, allow_change, same_data)
    progress = replace(remembered.progress)
    _warn_of_ignored(run, before, found.path)
    rates = [engines.learning_rate(r.optimizer.lr, progress.step, r.steps, r.schedule) for r in (before, run)]
    if rates[0] != rates[1]:
        told = "WARNING: the learning rate continues at %.3g, not %.3g: its schedule has changed"
        log.info(told, *rates[::-1])
        changes.append({"name": "learning rate at resume", "before": rates[0], "after": rates[1]})
    progress.changes = [*progress.changes, *({"step": progress.step, **change} for change in changes)]
    return found, progress


def _put_others_aside(run_dir: Path, found: Loaded) -> None:
    """What the run neither continues from nor has grown out of gets another name, and is kept."""
    for other in store.look(run_dir):
        grown = other.step <= found.manifest.step
        if other.manifest is not None:
            grown = store.descends(found.manifest, other.manifest)
        if other.path != found.path and not grown:
            aside = store.put_aside(other.path)
            log.error("WARNING: %s is not continued, and is called %s now", other.path, aside.name)


def of_another_directory(run_dir: Path, config: Path) -> Path | None:
    """A run of the same relative name, with checkpoints, beside the configuration or above it: a start from another
    directory than before would silently begin a second run."""
    here = Path.cwd()
    if not run_dir.is_relative_to(here):
        return None
    name = run_dir.relative_to(here)
    candidates = [parent / name for parent in config.absolute().parents if parent != here]
    return next((candidate for candidate in candidates if store.look(candidate)), None)


def _warn_of_ignored(run: Run, before: Run, found: Path) -> None:
    for key in ("init_from", "expect"):
        now = getattr(run, key)
        if now is not None and now != getattr(before, key):
            said = ", ".join(f"{k}={v}" for k, v in now.model_dump(mode="json").items() if v)
            told = "%s is ignored: the run continues from %s. For another start choose another run_dir"
            log.info("WARNING: " + told, f"{key} ({said})", found)


def _own_weights(network: TopoFlow) -> dict[str, torch.Tensor]:
    return {name: tensor.detach().to("cpu", torch.float32, copy=True) for name, tensor in network.state_dict().items()}


def _foreign_weights(network: TopoFlow, run: Run) -> dict[str, torch.Tensor] | None:
    """All weights in fp32 with those of `init_from` among them, or None; writes the report of the import."""
    if run.init_from is None:
        return None
    source = run.init_from
    weights = wanted(source)
    tensors, report = fit(weights, network, run, source)
    told = report.to_json() | {"made_from": weights.made_from}
    (run.run_dir / IMPORT).write_text(json.dumps(told, indent=1))
    report.show(sys.stderr)
    report.refuse_unless_complete()
    return _own_weights(network) | tensors
