"""What a run does about steps that went wrong: not finite, or a spike of the loss."""

from __future__ import annotations

import json
import logging
import math
from dataclasses import fields
from typing import Any

import torch.distributed as dist

from trainer.checkpoint import consistency, store
from trainer.checkpoint.manifest import Progress
from trainer.checkpoint.state import Named
from trainer.command import TrainingError
from trainer.config import Run
from trainer.start import Start, load
from trainer.telemetry import Window

log = logging.getLogger("trainer")


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
    listed = run.run_dir / "bad_samples.jsonl"
    if dist.get_rank() == 0:
        try:
            with listed.open("a") as file:
                file.writelines(json.dumps({"step": progress.step, "reason": reason, **s}) + "\n" for s in culprits)
        except OSError as error:
            log.info("WARNING: %s cannot be written (%s)", listed, error)
    times = ", ".join(f"{s['time']}+{s['lead_hours']}h" for s in culprits[:8])
    log.info("WARNING: step %d skipped on all ranks, %s; samples: %s", progress.step, reason, times)
    if progress.bad_steps >= run.max_bad_steps:
        raise TrainingError(
            f"{progress.bad_steps} steps in a row were skipped; the last at step {progress.step}, {reason}, samples {times}. "
            f"They are listed in {listed}; the last checkpoint is intact. Inspect those hours of the store, or lower "
            "optimizer.lr."
        )


def roll_back(engine: Any, run: Run, progress: Progress) -> bool:
    """After a spike, where the policy says so: be again what the last checkpoint was, and step over these samples.

    Save afterwards: what was stepped over, and how often, is to outlive a kill.

    Returns:
        False where the step stays merely skipped.

    Raises:
        TrainingError: it has rolled back too often.
    """
    if run.spikes is None or run.spikes.policy != "roll_back":
        return False
    if progress.roll_backs >= run.spikes.most_roll_backs:
        raise TrainingError(
            f"the loss has spiked and the run has rolled back {progress.roll_backs} times already (spikes.most_roll_backs); "
            f"the last at step {progress.step}. Lower optimizer.lr, or inspect {run.run_dir / 'bad_samples.jsonl'}."
        )
    named, recorded = Named(), {}

    def read() -> tuple[Progress, Any] | None:
        nonlocal named, recorded
        found = store.newest_valid(run.run_dir)
        if found is None:
            return None
        manifest = store.manifest(found)
        named, recorded = store.load(found), manifest.tensors
        return manifest.progress, found

    back = consistency.on_main(read)
    if back is None:
        log.info("WARNING: no checkpoint to roll back to yet: the step is only skipped")
        return False
    remembered, found = back
    bad = [progress.samples_seen - run.batch.total, progress.samples_seen]
    load(engine, Start(remembered, found, named, recorded))
    remembered.set_validated_on(progress.validated_on)
    # Not of the checkpoint but of the run: a second spike before the next save must not bring the first one back.
    remembered.stepped_over = [*progress.stepped_over, bad]
    remembered.roll_backs = progress.roll_backs + 1
    remembered.bad_steps, remembered.changes = progress.bad_steps, progress.changes
    remembered.wall_seconds = progress.wall_seconds
    for f in fields(Progress):
        setattr(progress, f.name, getattr(remembered, f.name))
    log.info("WARNING: rolled back to %s, stepping over samples %d to %d of the stream", found, *bad)
    return True
