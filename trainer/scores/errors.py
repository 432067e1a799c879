"""Errors and skill: the training loss, and exact accumulators that merge over ranks."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

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


FEWEST = 5  # blocks that an interval is said of


class ErrorSums:
    """Weighted sums of errors per (variable, lead time, region, block); fp64, so that any order of batches agrees.

    Of the forecast: squared and absolute error, error, weight, values, their squares and product, fractional errors, how
    much is within a factor of two, and Willmott's potential error. Of each baseline, over the cells where it has a value: its
    squared error, that of the forecast, and their weight. With climatology: the anomalies' squares and product.
    """

    OWN = ("squared", "absolute", "error", "weight", "truth", "forecast", "truth_squared", "forecast_squared", "product",
           "fractional", "fractional_absolute", "within_two", "potential")  # fmt: skip
    ANOMALIES = ("anomaly_product", "anomaly_truth", "anomaly_forecast")

    def __init__(
        self,
        variables: int,
        lead_hours: list[int],
        device: torch.device,
        baselines: Sequence[str] = ("persistence",),
        regions: int = 1,
        blocks: int = 1,
    ) -> None:
        """
        Args:
            baselines: what the forecast is compared with.
            blocks: parts of the period, as days, that are resampled for intervals.
        """
        self.lead_hours, self.baselines = lead_hours, tuple(baselines)
        compared = [f"{name}_{part}" for name in baselines for part in ("squared", "forecast", "weight")]
        self.kinds = (*self.OWN, *compared, *(self.ANOMALIES if "climatology" in baselines else ()))
        shape = (len(self.kinds), variables, len(lead_hours), regions, blocks)
        self.sums = torch.zeros(shape, dtype=torch.float64, device=device)

    def add(
        self,
        forecast: Tensor,
        truth: Tensor,
        baselines: Mapping[str, Tensor],
        weights: Tensor,
        lead_hours: Tensor,
        block: Tensor | None = None,
        reference: Tensor | float = 0.0,
    ) -> Tensor:
        """Add samples, and return the sums of each, (kinds, B, T, R).

        Args:
            forecast, truth: (B, T, H, W) in the same units; NaN where a value is missing.
            baselines: forecasts of the same shape by their names, NaN where there is none.
            weights: (R, H, W), or (H, W) of one region.
            lead_hours: (B,).
            block: (B,) int64, in which block each sample lies; by default in the first.
            reference: (T, 1, 1) about which the index of agreement is taken.
        """
        known = torch.isfinite(truth)  # a forecast that is not finite must show
        truth, forecast = truth.double(), forecast.double()
        error = torch.where(known, forecast - truth, 0.0)
        truth, forecast = (torch.where(known, field, 0.0) for field in (truth, forecast))
        total, squared, distance = forecast + truth, error**2, error.abs()
        fractional = torch.where(total > 0.0, 2.0 * error / total.clamp(min=1e-30), 0.0)
        summed = {
            "squared": squared,
            "absolute": distance,
            "error": error,
            "weight": known.double(),
            "truth": truth,
            "forecast": forecast,
            "truth_squared": truth**2,
            "forecast_squared": forecast**2,
            "product": forecast * truth,
            "fractional": fractional,
            "fractional_absolute": fractional.abs(),
            "within_two": (known & (forecast <= 2.0 * truth) & (truth <= 2.0 * forecast)).double(),
            "potential": known * ((forecast - reference).abs() + (truth - reference).abs()) ** 2,
        }
        for name in self.baselines:
            both = known & torch.isfinite(baselines[name])
            baseline = baselines[name].double()
            summed[f"{name}_squared"] = torch.where(both, baseline - truth, 0.0) ** 2
            summed[f"{name}_forecast"] = squared * both
            summed[f"{name}_weight"] = both.double()
            if name == "climatology":
                ours, own = (torch.where(both, field - baseline, 0.0) for field in (forecast, truth))
                summed |= dict(zip(self.ANOMALIES, (ours * own, own**2, ours**2), strict=True))
        weights = weights.double().reshape(self.sums.shape[3], -1).T
        per_sample = torch.stack([summed[kind].flatten(2) @ weights for kind in self.kinds])  # (kind, B, T, R)
        block = torch.zeros_like(lead_hours, dtype=torch.int64) if block is None else block
        for column, lead in enumerate(self.lead_hours):
            mine = lead_hours == lead
            self.sums[:, :, column].index_add_(3, block[mine], per_sample[:, mine].permute(0, 2, 3, 1))
        return per_sample

    def all_reduce(self) -> None:
        """Sum over all ranks of the default process group, if there is one."""
        if dist.is_initialized():
            dist.all_reduce(self.sums)

    def table(self, region: int = 0) -> dict[str, Tensor]:
        """(T, L) fp64 each, NaN where no cell was valid.

        rmse, mae, bias; nmb, nme: bias and mean absolute error as a share of the mean truth; mfb, mfe: mean fractional bias and
        error, of -2 .. 2 (Boylan and Russell 2006); fac2: share within a factor of two; r: Pearson's correlation over
        cells and times; ioa: index of agreement (Willmott 1981), about `reference` in place of the mean truth, which one pass
        cannot know; acc: correlation of anomalies from climatology, not centred. For each baseline its RMSE, and skill = 1 -
        MSE / MSE of the baseline (Murphy 1988), over the cells where both have a value; plain `skill` is against persistence.
        """
        sums = dict(zip(self.kinds, self.sums[:, :, :, region].sum(-1), strict=True))
        weight, truth, forecast = sums["weight"], sums["truth"], sums["forecast"]
        covariance = sums["product"] / weight - truth * forecast / weight**2
        variances = [sums[f"{name}_squared"] / weight - (sums[name] / weight) ** 2 for name in ("truth", "forecast")]
        scores = {
            "nmb": sums["error"] / truth,
            "nme": sums["absolute"] / truth,
            "mfb": sums["fractional"] / weight,
            "mfe": sums["fractional_absolute"] / weight,
            "fac2": sums["within_two"] / weight,
            "r": covariance / (variances[0] * variances[1]).sqrt(),
            "ioa": 1.0 - sums["squared"] / sums["potential"],
            "rmse": (sums["squared"] / weight).sqrt(),
            "mae": sums["absolute"] / weight,
            "bias": sums["error"] / weight,
            "mean_truth": truth / weight,
        }
        for name in self.baselines:
            scores[f"{name}_rmse"] = (sums[f"{name}_squared"] / sums[f"{name}_weight"]).sqrt()
            scores[_skill(name)] = 1.0 - sums[f"{name}_forecast"] / sums[f"{name}_squared"]
        if "climatology" in self.baselines:
            scores["acc"] = sums["anomaly_product"] / (sums["anomaly_truth"] * sums["anomaly_forecast"]).sqrt()
        return scores

    def intervals(self, region: int = 0, resamples: int = 1000, seed: int = 0) -> dict[str, Tensor]:
        """(T, L) fp64 each: SKILL_low and SKILL_high of every baseline, the 2.5 and 97.5 % quantile of the skill when blocks
        are drawn with replacement (Efron 1979). NaN where fewer than FEWEST blocks can be compared."""
        found = {}
        for name in self.baselines:
            ours, theirs = (self.sums[self.kinds.index(f"{name}_{part}"), :, :, region] for part in ("forecast", "squared"))
            there = theirs.sum((0, 1)) > 0
            drawn = int(there.sum())
            generator = torch.Generator().manual_seed(seed)
            chosen = torch.randint(max(drawn, 1), (resamples, drawn), generator=generator)
            times = torch.zeros((resamples, drawn), dtype=torch.float64).scatter_add_(
                1, chosen, torch.ones(chosen.shape).double()
            )
            times = times.to(self.sums.device)
            sums = [torch.einsum("rb,tlb->tlr", times, part[:, :, there]) for part in (ours, theirs)]
            skill = 1.0 - sums[0] / sums[1]
            for end, share in (("low", 0.025), ("high", 0.975)):
                quantile = torch.nanquantile(skill, share, -1)  # a draw may hold none of the blocks of one lead time
                found[f"{_skill(name)}_{end}"] = quantile.masked_fill((theirs > 0).sum(-1) < FEWEST, torch.nan)
        return found


def _skill(baseline: str) -> str:
    return "skill" if baseline == "persistence" else f"{baseline}_skill"


def normalised_loss(sums: ErrorSums, normalizer: Normalizer) -> float:
    """Mean over variables of the squared error in normalised units, over valid cells: what training logs as its loss.

    A variable without any valid cell counts for nothing; NaN where that is so of all.
    """
    squared, weight = (sums.sums[sums.kinds.index(kind), :, :, 0].sum((1, 2)) for kind in ("squared", "weight"))
    deviation = normalizer.target_std.flatten().double().to(weight.device)
    return float((squared / weight / deviation**2)[weight > 0].mean())
