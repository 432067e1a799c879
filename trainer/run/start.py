"""Where a run begins: at its newest checkpoint, with foreign weights, or with random ones.

What can be refused here is refused alike by `preflight`, which calls `look_back` without any ranks.
"""

from __future__ import annotations

import logging
import sys
from dataclasses import dataclass, field, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from trainer import engine as engines
from trainer.checkpoint import consistency, loading, same_run, saving, state, store
from trainer.checkpoint.manifest import CheckpointError, Memory, Progress
from trainer.checkpoint.state import Named
from trainer.config import Run
from trainer.config_file import validate
from trainer.dataset import Dataset
from trainer.foreign.records import write_report
from trainer.foreign.weights import import_weights
from trainer.model.topoflow import TopoFlow

log = logging.getLogger("trainer")


@dataclass
class Start:
    """What the engine gets before its next step."""

    progress: Progress
    checkpoint: Path | None = None
    named: Named = field(default_factory=Named)  # on rank 0
    recorded: dict[str, str] = field(default_factory=dict)  # on rank 0: hashes from the manifest


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


def begin(run: Run, network: TopoFlow, present: Memory, allow_change: list[str], earlier: tuple[str, ...] = ()) -> Start:
    """Read on rank 0 what the run begins with; collective.

    Raises:
        CheckpointError: on every rank, if there are checkpoints but none is valid, the run would not be the same run, or
            foreign weights do not load completely.
    """
    begun = Start(Progress())

    def read() -> tuple[Progress, Path | None]:
        saving.mend(run.run_dir)
        found, progress = look_back(run, present, allow_change, earlier)
        if found is not None:
            with store.reading(found):
                begun.named, begun.recorded = loading.load(found), store.manifest(found).tensors
        else:
            begun.named = Named(_foreign_weights(network, run) or _own_weights(network))
        return progress, found

    begun.progress, begun.checkpoint = consistency.on_main(read)
    return begun


def load(engine: Any, start: Start) -> None:
    """Put what was read into the engine of every rank, and prove that it is there; collective.

    Raises:
        CheckpointError: on every rank, naming the first tensor that differs and where.
    """
    consistency.on_main(lambda: _require_as_saved(start))
    state.restore(engine, start.named)
    state.prove(engine, state.hashes_of(start.named, engine))
    start.named, start.recorded = Named(), {}  # gigabytes, for a large network


def look_back(
    run: Run, present: Memory, allow_change: list[str], earlier: tuple[str, ...] = ()
) -> tuple[Path | None, Progress]:
    """The newest valid checkpoint of the run directory, if there is one, and how far it is; warns of what cannot act.

    Raises:
        CheckpointError: there are checkpoints but none is valid, the run would not be the same run, or `init_from` does
            not exist.
    """
    if run.init_from is not None and not run.init_from.path.exists():
        raise CheckpointError(f"init_from: no weights at {run.init_from.path}.")
    found = store.newest_valid(run.run_dir)
    if found is None:
        return None, Progress()
    if run.resume == "never":
        raise CheckpointError(f"{run.run_dir} holds checkpoints and resume is 'never': choose another run_dir.")
    remembered = store.manifest(found)
    before = validate(remembered.config, str(found / "manifest.json"))
    remembered.config = before.model_dump(mode="json")  # with what keys that came later mean where they are not written
    changes = same_run.compare(found, remembered, present, allow_change, earlier)
    progress = replace(remembered.progress)
    _warn_of_ignored(run, before, found)
    rates = [engines.learning_rate(r.optimizer.lr, progress.step, r.steps, r.schedule) for r in (before, run)]
    if rates[0] != rates[1]:
        log.info(
            "WARNING: the learning rate continues at %.3g, not %.3g: the schedule's length or form has changed", *rates[::-1]
        )
        changes.append({"name": "learning rate at resume", "before": rates[0], "after": rates[1]})
    progress.changes = [*progress.changes, *({"step": progress.step, **change} for change in changes)]
    return found, progress


def of_another_directory(run_dir: Path, config: Path) -> Path | None:
    """A run of the same relative name, with checkpoints, beside the configuration or above it: a start from another
    directory than before would silently begin a second run."""
    here = Path.cwd()
    if not run_dir.is_relative_to(here):
        return None
    name = run_dir.relative_to(here)
    candidates = [parent / name for parent in config.absolute().parents if parent != here]
    return next((candidate for candidate in candidates if store.committed(candidate)), None)


def _warn_of_ignored(run: Run, before: Run, found: Path) -> None:
    for key in ("init_from", "expect"):
        now = getattr(run, key)
        if now is not None and now != getattr(before, key):
            said = ", ".join(f"{k}={v}" for k, v in now.model_dump(mode="json").items() if v)
            log.info(
                "WARNING: %s (%s) is ignored: the run continues from %s. For another start choose another run_dir",
                key,
                said,
                found,
            )


def _require_as_saved(start: Start) -> None:
    wrong = state.changed(start.named, start.recorded) if start.recorded else []
    if wrong:
        raise CheckpointError(
            f"{start.checkpoint}: '{wrong[0]}' is not what was saved ({len(wrong)} such tensors): nothing "
            "was trained. Remove it to use an older one."
        )


def _own_weights(network: TopoFlow) -> dict[str, torch.Tensor]:
    return {name: tensor.detach().to("cpu", torch.float32, copy=True) for name, tensor in network.state_dict().items()}


def _foreign_weights(network: TopoFlow, run: Run) -> dict[str, torch.Tensor] | None:
    """All weights in fp32 with those of `init_from` among them, or None; writes the report of the import."""
    if run.init_from is None:
        return None
    tensors, report = import_weights(network, run.init_from.path, run.init_from.allow_missing, run.data.channels().names)
    write_report(report, run.run_dir / "import.json")
    report.show(sys.stderr)
    report.refuse_unless_complete()
    return _own_weights(network) | tensors
