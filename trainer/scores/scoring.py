"""Errors of a network over samples, on any number of ranks."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
import torch.distributed as dist
from torch import Tensor

from data.batch import Batch
from data.stream import Stream
from trainer.dataset import Dataset
from trainer.scores.errors import ErrorSums, normalised_loss


@torch.no_grad()
def score(
    model: Callable[..., Tensor],
    batches: Iterable[Batch],
    dataset: Dataset,
    interrupted: Callable[[], bool] = lambda: False,
) -> ErrorSums:
    """Errors of `model` over this rank's batches, in ug m-3; samples that are not counted are left out.

    Args:
        interrupted: asked before each batch whether to end early, alike on all ranks; the sums are then of no use.
    """
    normalizer = dataset.normalizer
    sums = ErrorSums(len(normalizer.targets), dataset.run.data.lead_hours, dataset.device)
    for raw in batches:
        if interrupted():
            break
        batch, _, arguments = dataset.prepare(raw)
        forecast = normalizer.physical(model(*arguments).float())
        truth = torch.where(batch.counted[:, None, None, None], normalizer.truth(batch), torch.nan)
        sums.add(forecast, truth, {"persistence": normalizer.persistence(batch)}, normalizer.area, batch.lead_hours)
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
