"""Where a run is, and what is due there; one clock counts everything: optimizer steps."""

from __future__ import annotations

import math
import time
from dataclasses import replace

from data.samples import step_start
from trainer.checkpoint.manifest import Progress
from trainer.config import Run


class Course:
    """The progress of a run on all ranks alike, with the rules that say what comes next."""

    def __init__(self, run: Run, progress: Progress) -> None:
        self.run, self.progress = run, progress
        self._wall_before, self._began = progress.wall_seconds, time.monotonic()

    @property
    def step(self) -> int:
        """Optimizer steps taken, skipped ones included."""
        return self.progress.step

    @property
    def finished(self) -> bool:
        return self.step >= self.run.steps

    @property
    def status_is_due(self) -> bool:
        return self.finished or self._every(self.run.telemetry.every) or self._every(self.run.checkpoint.every)

    @property
    def validation_is_due(self) -> bool:
        return self.finished or self._every(self.run.validation.every)

    @property
    def save_is_due(self) -> bool:
        return self.finished or self._every(self.run.checkpoint.every)

    @property
    def loss_limit(self) -> float | None:
        """A step's loss above this is a spike; None where nobody watches."""
        spikes, usual = self.run.spikes, self.progress.usual_loss
        if spikes is None:
            return None
        return math.inf if usual is None else spikes.factor * usual

    def count_step(self) -> None:
        """A step was taken, or skipped: its samples are behind it."""
        p, total = self.progress, self.run.batch.total
        p.step += 1
        p.samples_seen = step_start(p.samples_seen, total, p.stepped_over) + total

    def keep_step(self, loss: float | None) -> None:
        """The step was good; fold its loss, where it was looked at, into the mean that spikes are measured against."""
        p, spikes = self.progress, self.run.spikes
        p.bad_steps = 0
        if spikes is not None and loss is not None:
            usual = loss if p.usual_loss is None else p.usual_loss
            p.usual_loss = usual + (loss - usual) / min(p.step, spikes.horizon)

    def remembered(self) -> Progress:
        """What the next checkpoint says of it."""
        return replace(self.progress, wall_seconds=self._wall_before + time.monotonic() - self._began)

    def _every(self, steps: int) -> bool:
        return self.step % steps == 0
