"""Scoring of the fixed validation samples while a run goes on."""

from __future__ import annotations

import logging
import math
from typing import Any

from data import DataError
from data.samples import SampleIndex
from trainer.checkpoint.state import averaged
from trainer.dataset import Dataset
from trainer.process.stop import StopVote
from trainer.run.course import Course
from trainer.run.telemetry import Telemetry
from trainer.scores.errors import normalised_loss
from trainer.scores.scoring import score_evenly

log = logging.getLogger("trainer")


class Validation:
    """The validation samples of a run, shared over all ranks."""

    def __init__(self, engine: Any, dataset: Dataset, course: Course, held_out: SampleIndex) -> None:
        self.engine, self.dataset, self._course = engine, dataset, course
        self._held_out = dataset.stream(held_out)
        course.progress.set_validated_on(dataset.validation_set())

    def score(self, stop: StopVote) -> dict[str, float] | None:
        """Score, and remember the loss; None if any rank was told to stop meanwhile; collective.

        The last one of a run is not left: there is nothing to continue with afterwards.
        """
        interrupted = (lambda: False) if self._course.finished else stop.agree_now
        self.engine.eval()
        with averaged(self.engine):
            sums = score_evenly(self.engine, self._held_out, self.dataset, interrupted)
        self.engine.train()
        if interrupted():
            return None
        progress = self._course.progress
        progress.val_loss = normalised_loss(sums, self.dataset.normalizer)
        progress.val_step = progress.step
        if math.isnan(progress.val_loss):
            raise DataError(
                f"{self.dataset.store.path}: no validation sample has a truth: choose other splits or more samples."
            )
        progress.best_val_loss = min(progress.best_val_loss, progress.val_loss)
        table = sums.table()
        scores = {"loss": progress.val_loss}
        for row, name in enumerate(self.dataset.normalizer.targets):
            for column, lead in enumerate(sums.lead_hours):
                for kind in ("rmse", "skill"):
                    scores[f"{kind}_{name}_{lead}h"] = float(table[kind][row, column])
        return scores

    def score_and_log(self, stop: StopVote, telemetry: Telemetry) -> None:
        """`score`, written everywhere."""
        scores, progress = self.score(stop), self._course.progress
        if scores is not None:
            telemetry.record("validation", progress.step, scores)
            log.info("step %d: validation loss %.4f, best %.4f", progress.step, scores["loss"], progress.best_val_loss)
