"""Errors and skill: the training loss, and exact accumulators that merge over ranks."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor

from data.batch import Normalizer


def weighted_loss(forecast: Tensor, target: Tensor, weight: Tensor, kind: str = "squared") -> Tensor:
    """Loss of each variable, averaged over samples and the weighted area: squared or absolute error, or Huber's (1964).

    The divisor is the number of cells, not of valid ones: weights have mean one over a complete domain, so a missing
    cell contributes nothing, and a batch split over ranks has the mean of its parts.

    Args:
        forecast, target, weight: (B, T, H, W); normalised units.

    Returns:
        (T,) fp32.
    """
    error = forecast.float() - target
    if kind == "squared":
        each = error**2
    elif kind == "absolute":
        each = error.abs()
    else:  # squared up to one deviation, and from there on a line with the same slope
        each = torch.where(error.abs() < 1.0, error**2, 2.0 * error.abs() - 1.0)
    return (weight * each).mean(dim=(0, 2, 3))


class ErrorSums:
    """Weighted sums of errors per (variable, lead time, block); fp64, so that any order of ranks and batches agrees.

    Kinds: squared error, absolute error and error of the forecast, and their weight; squared errors of persistence and
    of the forecast where both exist, and their weight; values, their squares and product; fractional errors, and how much of
    the forecast is within a factor of two.
    """

    KINDS = (
        "squared",
        "absolute",
        "error",
        "persistence_squared",
        "weight",
        "comparable_squared",
        "comparable_weight",
        "truth",
        "forecast",
        "truth_squared",
        "forecast_squared",
        "product",
        "fractional",
        "fractional_absolute",
        "within_two",
        "climatology_squared",
    )

    def __init__(self, variables: int, lead_hours: list[int], device: torch.device, blocks: int = 1) -> None:
        """
        Args:
            blocks: parts of the period, as days, that are resampled for intervals.
        """
        self.lead_hours = lead_hours
        shape = (len(self.KINDS), variables, len(lead_hours), blocks)
        self.sums = torch.zeros(shape, dtype=torch.float64, device=device)

    def add(
        self,
        forecast: Tensor,
        truth: Tensor,
        persistence: Tensor,
        area: Tensor,
        lead_hours: Tensor,
        block: Tensor | None = None,
        climatology: Tensor | None = None,
    ) -> None:
        """Add samples.

        Args:
            forecast, truth, persistence, climatology: (B, T, H, W) in the same units; NaN where a value is missing. Without
                climatology, its scores mean nothing.
            area: (H, W) weights.
            lead_hours: (B,).
            block: (B,) int64, in which block each sample lies; by default in the first.
        """
        climatology = truth if climatology is None else climatology
        truth, forecast, persistence = truth.double(), forecast.double(), persistence.double()
        known = torch.isfinite(truth)
        comparable = known & torch.isfinite(persistence) & torch.isfinite(climatology)
        climatology_error = torch.where(comparable, climatology.double() - truth, 0.0)
        error = torch.where(known, forecast - truth, 0.0)
        persistence_error = torch.where(comparable, persistence - truth, 0.0)
        weight, both = area.double() * known, area.double() * comparable
        truth, forecast = (torch.where(known, field, 0.0) for field in (truth, forecast))
        total = forecast + truth
        fractional = torch.where(total > 0.0, 2.0 * error / total.clamp(min=1e-30), 0.0)
        within = (forecast <= 2.0 * truth) & (truth <= 2.0 * forecast)
        one = torch.ones_like(error)
        summed = {
            "squared": weight * error**2,
            "absolute": weight * error.abs(),
            "error": weight * error,
            "persistence_squared": both * persistence_error**2,
            "weight": weight * one,
            "comparable_squared": both * error**2,
            "comparable_weight": both * one,
            "truth": weight * truth,
            "forecast": weight * forecast,
            "truth_squared": weight * truth**2,
            "forecast_squared": weight * forecast**2,
            "product": weight * forecast * truth,
            "fractional": weight * fractional,
            "fractional_absolute": weight * fractional.abs(),
            "within_two": weight * within,
            "climatology_squared": both * climatology_error**2,
        }
        per_sample = torch.stack([summed[kind].sum((2, 3)) for kind in self.KINDS])  # (kind, B, T)
        block = torch.zeros_like(lead_hours, dtype=torch.int64) if block is None else block
        for column, lead in enumerate(self.lead_hours):
            mine = lead_hours == lead
            self.sums[:, :, column].index_add_(2, block[mine], per_sample[:, mine].transpose(1, 2))

    def all_reduce(self) -> None:
        """Sum over all ranks of the default process group, if there is one."""
        if dist.is_initialized():
            dist.all_reduce(self.sums)

    def table(self) -> dict[str, Tensor]:
        """(T, L) fp64 each, NaN where no cell was valid.

        rmse, mae, bias, persistence_rmse, climatology_rmse; skill and climatology_skill = 1 - MSE / MSE of persistence or of
        climatology (Murphy 1988), over the cells where both have a value; nmb, nme: bias and mean absolute error as a share of
        the mean truth; mfb, mfe: mean fractional bias and error, of -2 .. 2 (Boylan and Russell 2006); fac2: share within a
        factor of two; r: Pearson's correlation over cells and times.
        """
        squared, absolute, error, persistence, weight, comparable, comparable_weight, *values = self.sums.sum(-1)
        truth, forecast, truth_squared, forecast_squared, product, fractional, fractional_absolute, within, climate = values
        mse, persistence_mse = squared / weight, persistence / comparable_weight
        covariance = product / weight - truth * forecast / weight**2
        variances = (truth_squared / weight - (truth / weight) ** 2) * (forecast_squared / weight - (forecast / weight) ** 2)
        return {
            "nmb": error / truth,
            "nme": absolute / truth,
            "mfb": fractional / weight,
            "mfe": fractional_absolute / weight,
            "fac2": within / weight,
            "r": covariance / variances.sqrt(),
            "rmse": mse.sqrt(),
            "mae": absolute / weight,
            "bias": error / weight,
            "persistence_rmse": persistence_mse.sqrt(),
            "climatology_rmse": (climate / comparable_weight).sqrt(),
            "skill": 1.0 - comparable / persistence,
            "climatology_skill": 1.0 - comparable / climate,
        }

    def skill_interval(self, baseline: str = "persistence", resamples: int = 1000, seed: int = 0) -> tuple[Tensor, Tensor]:
        """(T, L) fp64 each: the 2.5 and 97.5 % quantile of the skill when blocks are drawn with replacement (Efron 1979).

        Args:
            baseline: "persistence" or "climatology".

        NaN where no cell was comparable.
        """
        kinds = (f"{baseline}_squared", "comparable_squared")
        unskilled, comparable = (self.sums[self.KINDS.index(kind)] for kind in kinds)
        there = comparable.sum((0, 1)) > 0
        drawn = int(there.sum())
        generator = torch.Generator().manual_seed(seed)
        chosen = torch.randint(max(drawn, 1), (resamples, drawn), generator=generator)
        times = torch.zeros((resamples, drawn), dtype=torch.float64).scatter_add_(1, chosen, torch.ones(chosen.shape).double())
        times = times.to(self.sums.device)
        sums = [torch.einsum("rb,tlb->tlr", times, part[:, :, there]) for part in (comparable, unskilled)]
        skill = 1.0 - sums[0] / sums[1]
        return torch.quantile(skill, 0.025, -1), torch.quantile(skill, 0.975, -1)


def normalised_loss(sums: ErrorSums, normalizer: Normalizer) -> float:
    """Mean over variables of the squared error in normalised units, over valid cells: what training logs as its loss."""
    squared, weight = sums.sums[0].sum((1, 2)), sums.sums[4].sum((1, 2))
    return float((squared / weight / normalizer.target_std.flatten().double() ** 2).mean())
