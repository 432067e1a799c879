"""Learning: this rank's micro-batches, forward, backward, one optimizer step after the other."""

from __future__ import annotations

import itertools
import time
from collections.abc import Iterator
from typing import Any

import torch
import torch.distributed as dist

from data.batch import Batch, ahead_on_device
from data.samples import SampleIndex
from trainer.checkpoint.zero import follow
from trainer.config import Run
from trainer.dataset import Dataset
from trainer.engine import dtype_of, guard_plain_step, set_learning_rates, step_was_skipped
from trainer.model.architecture import training_flops
from trainer.process.launch import Joined
from trainer.run.course import Course
from trainer.run.window import Window, measure_matrix_rate
from trainer.scores.errors import weighted_loss


def importance(run: Run, device: torch.device) -> torch.Tensor:
    """(T,) factor of every target in the loss; 1 in the mean."""
    weights = torch.tensor([run.loss.weights.get(name, 1.0) for name in run.data.targets], device=device)
    return weights * len(weights) / weights.sum()


class Learner:
    """The network under its engine, and the micro-batches that it learns from next."""

    def __init__(self, engine: Any, dataset: Dataset, course: Course, world: Joined, samples: SampleIndex) -> None:
        """Read the first batch; collective, so that a rank without data is found out here."""
        self.engine, self.dataset, self.course, self.world = engine, dataset, course, world
        self.accumulation = course.run.batch.accumulation(world.size)
        self._samples = samples
        self._flops = training_flops(course.run.architecture(), course.run.batch.micro)
        self._importance = importance(course.run, world.device)
        self._batches = self._from_here()
        self._matrix_rate = measure_matrix_rate(world.device, dtype_of(course.run))
        self.window = self._new_window()

    def step(self) -> bool:
        """One optimizer step: accumulate the gradients of this rank's micro-batches, clip, update.

        Returns:
            False where all ranks have skipped the update: a gradient was not finite, or the loss was a spike.
        """
        self.window.lr = set_learning_rates(self.engine, self.course.step, self.course.run)
        for number in range(self.accumulation):
            waiting = time.perf_counter()
            batch = next(self._batches)
            self.window.waited += time.perf_counter() - waiting
            self._learn_from(batch, last=number == self.accumulation - 1)
        if step_was_skipped(self.engine):
            return False
        follow(self.engine)
        return True

    def summary(self) -> dict[str, float]:
        """Metrics since the last status line; collective."""
        return self.window.summary(self.engine, self.course.run.batch.total)

    def go_back(self) -> None:
        """The run is elsewhere than it was: read and measure from there."""
        self._batches = self._from_here()
        self.window = self._new_window()

    def _learn_from(self, raw: Batch, last: bool) -> None:
        batch, example, arguments = self.dataset.prepare(raw)
        # Dropout depends on the place in the stream alone: a resumed run, on any number of ranks, draws the same.
        torch.manual_seed((self.course.run.seed << 40) + batch.position)
        computing = time.perf_counter()
        forecast = self.engine(*arguments)
        self.window.forward += time.perf_counter() - computing  # on a GPU, of launching its work
        losses = weighted_loss(forecast, example.targets, example.weight, self.course.run.loss.kind)
        self.window.add(losses.detach(), example.weight.mean((0, 2, 3)), example.missing_inputs, batch)
        loss, limit = (losses * self._importance).mean(), self.course.loss_limit
        if limit is not None and last and self.window.is_spike(limit):
            loss = loss * torch.nan  # so all ranks skip the update together
        self.engine.backward(loss)
        guard_plain_step(self.engine)
        self.engine.step()

    def _from_here(self) -> Iterator[Batch]:
        """From where the run is, without the samples that it has stepped over."""
        progress, micro = self.course.progress, self.course.run.batch.micro
        batches = self.dataset.stream(self._samples).training(
            progress.samples_seen, micro, self.accumulation, self.world.size, self.world.rank, progress.stepped_over
        )
        on_device = ahead_on_device(batches, self.world.device)
        first = next(on_device)
        dist.barrier()
        return itertools.chain([first], on_device)

    def _new_window(self) -> Window:
        return Window(self.dataset, self._flops, self._matrix_rate)
