"""Scores of a network over samples, on any number of ranks."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
import torch.distributed as dist
from torch import Tensor

from data.batch import Batch
from data.channels.climatology import Climatology
from data.stream import Stream
from trainer.dataset import Dataset
from trainer.scores.errors import ErrorSums, normalised_loss


@torch.no_grad()
def score(
    model: Callable[..., Tensor],
    batches: Iterable[Batch],
    dataset: Dataset,
    interrupted: Callable[[], bool] = lambda: False,
    by_day: bool = False,
    usual: Climatology | None = None,
) -> ErrorSums:
    """Errors of `model` over this rank's batches, in ug m-3; samples that are not counted are left out.

    Args:
        usual: a baseline to score beside persistence.
        by_day: keep the sums of every day of analyses apart, for intervals.
        interrupted: asked before each batch whether to end early, alike on all ranks; the sums are then of no use.
    """
    normalizer = dataset.normalizer
    days = len(dataset.store.times) // 24 + 1 if by_day else 1
    sums = ErrorSums(len(normalizer.targets), dataset.run.data.lead_hours, dataset.device, days)
    for raw in batches:
        if interrupted():
            break
        batch, _, arguments = dataset.prepare(raw)
        forecast = normalizer.physical(model(*arguments).float())
        truth = torch.where(batch.counted[:, None, None, None], normalizer.truth(batch), torch.nan)
        baseline = None if usual is None else usual.at(batch.valid_hours)
        day = torch.from_numpy(batch.hours // 24).to(dataset.device) if by_day else None
        sums.add(forecast, truth, normalizer.persistence(batch), normalizer.area, batch.lead_hours, day, baseline)
    return sums


def score_evenly(
    model: Callable[..., Tensor], stream: Stream, dataset: Dataset, interrupted: Callable[[], bool] = lambda: False
) -> ErrorSums:
    """Score the fixed validation samples, spread evenly over the stream's split and shared over ranks; collective."""
    numbers = stream.index.evenly(dataset.run.validation.samples)
    rank, size = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    sums = score(model, stream.listed(numbers, dataset.run.batch.micro, size, rank), dataset, interrupted)
    sums.all_reduce()
    return sums


def validation_loss(model: Callable[..., Tensor], dataset: Dataset) -> float:
    """Normalised loss on the fixed validation samples; collective."""
    sums = score_evenly(model, dataset.stream(dataset.index("validation")), dataset)
    return normalised_loss(sums, dataset.normalizer)
