"""What a run does about steps that went wrong: not finite, or a spike of the loss."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import torch.distributed as dist

from data import Refusal
from trainer.checkpoint import consistency, loading
from trainer.checkpoint.manifest import Progress
from trainer.process.watchdog import Watchdog
from trainer.run.learner import Learner
from trainer.run.start import Start, load

log = logging.getLogger("trainer")
MOST_NAMED = 8  # samples in a message; the file lists all


class TrainingError(Refusal):
    """Training itself went wrong: too many steps in a row had to be skipped."""


def step_over(learner: Learner, watchdog: Watchdog) -> bool:
    """All ranks have skipped a step: write down its samples, and after a spike roll back where the policy says so; collective.

    Returns:
        Whether the run is again where its last checkpoint was; save then: what was stepped over, and how often, is to
        outlive a kill.

    Raises:
        TrainingError: `max_bad_steps` steps in a row were skipped, or it has rolled back too often.
    """
    _write_down_samples(learner)
    watchdog.enter("start")  # a roll-back reads a checkpoint
    course, spikes = learner.course, learner.course.run.spikes
    if not learner.window.spiked or spikes is None or spikes.policy != "roll_back":
        return False
    listed = course.run.run_dir / "bad_samples.jsonl"
    if course.progress.roll_backs >= spikes.most_roll_backs:
        raise TrainingError(
            f"the loss has spiked and the run has rolled back {course.progress.roll_backs} times already "
            f"(spikes.most_roll_backs); the last at step {course.step}. Lower optimizer.lr, or inspect {listed}."
        )
    return _roll_back(learner)


def _write_down_samples(learner: Learner) -> None:
    course, window = learner.course, learner.window
    run, progress = course.run, course.progress
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
    times = ", ".join(f"{s['time']}+{s['lead_hours']}h" for s in culprits[:MOST_NAMED])
    log.info("WARNING: step %d skipped on all ranks, %s; samples: %s", progress.step, reason, times)
    if progress.bad_steps >= run.max_bad_steps:
        raise TrainingError(
            f"{progress.bad_steps} steps in a row were skipped; the last at step {progress.step}, {reason}, samples {times}. "
            f"They are listed in {listed}; the last checkpoint is intact. Inspect those hours of the store, or lower "
            "optimizer.lr."
        )


def _roll_back(learner: Learner) -> bool:
    """Be again what the last checkpoint was, and step over the samples since; False where there is none yet."""
    course = learner.course
    begun = Start(Progress())

    def read() -> tuple[Progress, Path | None]:
        found = loading.newest(course.run.run_dir, step_over=True)
        if found is None:
            return begun.progress, None
        begun.named = found.named
        return found.manifest.progress, found.path

    remembered, begun.checkpoint = consistency.on_main(read)
    if begun.checkpoint is None:
        log.info("WARNING: no checkpoint to roll back to yet: the step is only skipped")
        return False
    load(learner.engine, begun)
    now = course.progress
    bad = [now.samples_seen - course.run.batch.total, now.samples_seen]
    remembered.set_validated_on(now.validated_on)
    # Not of the checkpoint but of the run: a second spike before the next save must not bring the first one back.
    remembered.stepped_over = [*now.stepped_over, bad]
    remembered.roll_backs = now.roll_backs + 1
    remembered.bad_steps, remembered.changes = now.bad_steps, now.changes
    course.progress = remembered
    learner.go_back()
    told = "WARNING: rolled back to %s, stepping over samples %d to %d of the stream"
    log.info(told, begun.checkpoint, *bad)
    return True
