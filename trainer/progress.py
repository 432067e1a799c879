"""Where a run is, and what it does about steps that went wrong: not finite, or a spike of the loss."""

from __future__ import annotations

import json
import logging
import math
from dataclasses import asdict, dataclass, field
from typing import Any

import torch.distributed as dist

from trainer import engine as engines
from trainer import runtime
from trainer.checkpoint import resume, store
from trainer.config import Run
from trainer.telemetry import Window

log = logging.getLogger("trainer")


class TrainingError(Exception):
    """Training itself went wrong: too many steps in a row had to be skipped."""


@dataclass
class Progress:
    """The whole state of a run beside weights and optimizer; dropout is seeded by position in the stream."""

    step: int = 0
    samples_seen: int = 0
    best_val_loss: float = float("inf")
    val_loss: float | None = None
    val_step: int = -1  # the step whose weights have val_loss
    bad_steps: int = 0  # non-finite ones in a row
    usual_loss: float | None = None  # running mean of the training loss, where spikes are watched for
    stepped_over: list[list[int]] = field(default_factory=list)  # [first, last) stream positions, rolled back over
    wall_seconds: float = 0.0
    changes: list[dict[str, Any]] = field(default_factory=list)  # accepted by --allow-change, when


def recall(remembered: dict[str, Any]) -> Progress:
    """The progress a manifest remembers; a field that an older version did not write keeps its start."""
    return Progress(**{name: remembered[name] for name in asdict(Progress()) if name in remembered})


def loss_limit(run: Run, progress: Progress) -> float | None:
    """A step's loss above this is a spike; None where nobody watches."""
    if run.spikes is None:
        return None
    return math.inf if progress.usual_loss is None else run.spikes.factor * progress.usual_loss


def remember_loss(loss: float | None, progress: Progress, run: Run) -> None:
    """Fold a step's loss into the running mean that spikes are measured against."""
    if run.spikes is not None and loss is not None:
        usual = loss if progress.usual_loss is None else progress.usual_loss
        progress.usual_loss = usual + (loss - usual) / min(progress.step, run.spikes.horizon)


def step_over_bad_samples(window: Window, progress: Progress, run: Run) -> None:
    """All ranks skipped a step, not finite or a spike: write down its samples, and give up after too many in a row.

    Raises:
        TrainingError: `max_bad_steps` steps in a row were skipped.
    """
    progress.bad_steps += 1
    named: list[list[dict[str, Any]]] = [[] for _ in range(dist.get_world_size())]
    dist.all_gather_object(named, window.drop_step())
    samples = [sample for share in named for sample in share]
    culprits = [s for s in samples if not s["finite"]] or samples
    reason = f"loss {window.step_loss:.4g}, usual {progress.usual_loss:.4g}" if window.spiked else "gradient not finite"
    if dist.get_rank() == 0:
        with (run.run_dir / "bad_samples.jsonl").open("a") as file:
            file.writelines(json.dumps({"step": progress.step, "reason": reason, **s}) + "\n" for s in culprits)
    times = ", ".join(f"{s['time']}+{s['lead_hours']}h" for s in culprits[:8])
    log.info("WARNING: step %d skipped on all ranks, %s; samples: %s", progress.step, reason, times)
    if progress.bad_steps >= run.max_bad_steps:
        raise TrainingError(
            f"{progress.bad_steps} steps in a row were skipped; the last at step {progress.step}, {reason}, samples {times}. "
            f"They are listed in {run.run_dir / 'bad_samples.jsonl'}; the last checkpoint is intact. Inspect those hours of "
            "the store, or lower optimizer.lr."
        )


def roll_back(engine: Any, run: Run, progress: Progress, world: runtime.World) -> bool:
    """After a spike, where the policy says so: be again what the last checkpoint was, and step over these samples.

    Returns:
        False where the step stays merely skipped.
    """
    if run.spikes is None or run.spikes.policy != "roll_back":
        return False
    found = store.newest_valid(run.run_dir)
    written_by = None if found is None else resume.written_by(store.manifest(found))
    if found is None or written_by != (world.size, engine.zero_optimization_stage()):
        log.info("WARNING: no checkpoint of these ranks to roll back to yet: the step is only skipped")
        return False
    bad = [progress.samples_seen - run.batch.total, progress.samples_seen]
    # Not of the checkpoint but of the run: a second spike before the next save must not bring the first one back.
    lasting = {"stepped_over": [*progress.stepped_over, bad], "bad_steps": progress.bad_steps, "changes": progress.changes,
               "wall_seconds": progress.wall_seconds}  # fmt: skip
    resume.load_engine(engine, found, None)
    engines.restate_hyperparameters(engine, run)
    for name, value in (asdict(recall(store.manifest(found))) | lasting).items():
        setattr(progress, name, value)
    log.info("WARNING: rolled back to %s, stepping over samples %d to %d of the stream", found, *bad)
    return True
