"""Daily values of local days: means, the largest mean of eight hours, and what follows from them."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from trainer.scores.errors import ErrorSums
from trainer.verification.standards import CLASSES, EIGHT_HOURS, Index, Limit, class_of

HOURS_OF_A_DAY = 20  # that a daily mean needs (GB 3095-2012, table 4)
HOURS_OF_EIGHT, WINDOWS_OF_A_DAY = 6, 14  # eight hours that end at 8 .. 24 h (GB 3095-2012, HJ 663-2013)
RATIOS = (0.25, 0.5, 0.75, 1.0, 1.25, 1.5, 2.0)  # of a forecast to a limit
SYSTEMS = ("forecast", "persistence")


def daily_mean(hours: Tensor) -> Tensor:
    """(24, ...) hourly values -> fp64 mean, NaN where there are too few."""
    known = ~torch.isnan(hours)
    count = known.sum(0)
    mean = torch.nansum(hours, 0, dtype=torch.float64) / count.clamp(min=1)
    return torch.where(count >= HOURS_OF_A_DAY, mean, torch.nan)


def largest_of_eight_hours(hours: Tensor) -> Tensor:
    """(24, ...) hourly values -> fp64 largest mean of eight hours that lie within the day, NaN where there are too few."""
    known = ~torch.isnan(hours)
    sums, counts = (values.double().cumsum(0) for values in (hours.nan_to_num(0.0), known))
    sums[8:], counts[8:] = sums[8:] - sums[:-8], counts[8:] - counts[:-8]  # of the eight hours that end at each
    enough = counts[7:] >= HOURS_OF_EIGHT
    largest = torch.where(enough, sums[7:] / counts[7:], -torch.inf).amax(0)
    return torch.where(enough.sum(0) >= WINDOWS_OF_A_DAY, largest, torch.nan)


class Days:
    """Hourly forecasts of one local day at a time, and the sums over daily values of all days that are complete.

    A day of a lead time is made of the forecasts that are valid in it, each that many hours old.
    """

    def __init__(
        self,
        targets: list[str],
        lead_hours: list[int],
        weights: Tensor,
        days: int,
        limits: Sequence[Limit],
        indices: Sequence[Index],
        reference: Tensor | float = 0.0,
    ) -> None:
        """
        Args:
            weights: (R, H, W), of the domain first.
            limits: of daily values, each of a target.
            reference: (T, 1, 1) about which the index of agreement is taken; of ozone, too, a mean of hours.
        """
        self.targets, self.lead_hours, self.weights = targets, lead_hours, weights.double()
        self.limits, self.indices, self._reference = list(limits), list(indices), reference
        leads, regions, device = len(lead_hours), len(weights), weights.device
        self.errors = ErrorSums(len(targets), lead_hours, device, ("persistence",), regions, days)

        def zeros(*shape: int) -> Tensor:
            return torch.zeros(shape, dtype=torch.float64, device=device)

        systems = len(SYSTEMS)
        self.sums = {
            "daily_errors": self.errors.sums,
            "daily_events": zeros(len(limits), systems, leads, regions, 4),  # neither, false alarm, miss, hit
            "reliability": zeros(len(limits), leads, len(RATIOS) + 1, 2),  # weight, and of it exceeded
            "index_errors": zeros(len(indices), systems, leads, regions, 3),  # weight, error, absolute error
            "index_classes": zeros(len(indices), systems, leads, regions, len(CLASSES), len(CLASSES)),  # truth, forecast
            "primary": zeros(len(indices), systems, leads, regions, 2),  # weight where polluted, and of it right
        }
        self._day = -1
        shape = (leads, 24, len(targets), *weights.shape[1:])
        self._hours = {name: torch.full(shape, torch.nan, device=device) for name in (*SYSTEMS, "truth")}

    def add(self, day: int, hour: int, lead: int, forecast: Tensor, persistence: Tensor, truth: Tensor) -> None:
        """A forecast (T, H, W), nowhere missing, that is valid at a local hour of a local day; days come in their order."""
        if day != self._day:
            self.close()
            self._day = day
        row = self.lead_hours.index(lead)
        for name, field in (("forecast", forecast), ("persistence", persistence), ("truth", truth)):
            self._hours[name][row, hour] = field

    def close(self) -> None:
        """Add the day that was being filled."""
        if self._day < 0:
            return
        truth = self._hours["truth"]  # NaN where no forecast is, so that both are of the same hours
        daily = {name: self._daily(hours.masked_fill_(torch.isnan(truth), torch.nan)) for name, hours in self._hours.items()}
        leads = torch.tensor(self.lead_hours, device=truth.device)
        block = torch.full_like(leads, self._day)
        unchanged = {"persistence": daily["persistence"]}
        self.errors.add(daily["forecast"], daily["truth"], unchanged, self.weights, leads, block, self._reference)
        places = [self.targets.index(limit.pollutant) for limit in self.limits]
        values = torch.tensor([limit.value for limit in self.limits], dtype=torch.float64, device=truth.device)
        for system, name in enumerate(SYSTEMS):
            counts = contingency(daily[name][:, places], daily["truth"][:, places], values, self.weights)
            self.sums["daily_events"][:, system] += counts.transpose(0, 1)
        for number, limit in enumerate(self.limits):
            self._add_reliability(number, limit, daily)
        for number, index in enumerate(self.indices):
            self._add_index(number, index, daily)
        for hours in self._hours.values():
            hours.fill_(torch.nan)
        self._day = -1

    def _daily(self, hours: Tensor) -> Tensor:
        """(L, 24, T, H, W) -> (L, T, H, W)."""
        of_day = hours.transpose(0, 1)  # (24, L, T, H, W)
        daily = daily_mean(of_day)
        if "o3" in self.targets:
            ozone = self.targets.index("o3")
            daily[:, ozone] = largest_of_eight_hours(of_day[:, :, ozone])
        return daily

    def _add_reliability(self, number: int, limit: Limit, daily: dict[str, Tensor]) -> None:
        place = self.targets.index(limit.pollutant)
        truth = daily["truth"][:, place]
        ours = daily["forecast"][:, place]
        known = (torch.isfinite(ours) & torch.isfinite(truth)).double() * self.weights[0]
        ratios = torch.tensor(RATIOS, dtype=torch.float64, device=ours.device)
        band = torch.bucketize(ours.nan_to_num(0.0) / limit.value, ratios)
        for row in range(len(self.lead_hours)):
            sums = self.sums["reliability"][number, row]
            sums[:, 0].index_add_(0, band[row].flatten(), known[row].flatten())
            sums[:, 1].index_add_(0, band[row].flatten(), (known[row] * (truth[row] > limit.value)).flatten())

    def _add_index(self, number: int, index: Index, daily: dict[str, Tensor]) -> None:
        def individual(of: Tensor) -> Tensor:
            """(P, L, H, W)."""
            return torch.stack([index.individual(name, of[:, self.targets.index(name)]) for name in self.judged(index)])

        truth = individual(daily["truth"])
        whole_truth = truth.amax(0)  # NaN where one of them is
        for system, name in enumerate(SYSTEMS):
            ours = individual(daily[name])
            whole = ours.amax(0)
            known = torch.isfinite(whole) & torch.isfinite(whole_truth)
            error = torch.where(known, whole - whole_truth, 0.0)
            spread = self.weights.flatten(1).T  # (HW, R)
            parts = torch.stack([known.double(), error, error.abs()], -1)  # (L, H, W, 3)
            self.sums["index_errors"][number, system] += torch.einsum("lhwk,rhw->lrk", parts, self.weights)
            polluted = known & (whole_truth > 50.0)
            chosen = truth.gather(0, ours.nan_to_num(0.0).argmax(0, keepdim=True))[0]  # the truth of the forecast's primary one
            right = torch.stack([polluted.double(), (polluted & (chosen == whole_truth)).double()], -1)
            self.sums["primary"][number, system] += torch.einsum("lhwk,rhw->lrk", right, self.weights)
            pair = class_of(whole_truth) * len(CLASSES) + class_of(whole)
            for row in range(len(self.lead_hours)):
                table = torch.zeros((len(CLASSES) ** 2, spread.shape[1]), dtype=torch.float64, device=spread.device)
                table.index_add_(0, pair[row].flatten(), spread * known[row].reshape(-1, 1))
                self.sums["index_classes"][number, system, row] += table.T.reshape(-1, len(CLASSES), len(CLASSES))

    def judged(self, index: Index) -> list[str]:
        """The targets that an index is made of."""
        return [name for name in self.targets if name in index.breaks]


def contingency(forecast: Tensor, truth: Tensor, limits: Tensor, weights: Tensor) -> Tensor:
    """Weight of neither, false alarms, misses and hits of exceeding limits.

    Args:
        forecast, truth: (B, E, H, W), NaN where missing.
        limits: (E,).
        weights: (R, H, W).

    Returns:
        (B, E, R, 4) fp64.
    """
    known = torch.isfinite(forecast) & torch.isfinite(truth)
    ours, own = forecast > limits[:, None, None], truth > limits[:, None, None]
    kinds = torch.stack([~ours & ~own, ours & ~own, ~ours & own, ours & own]) & known
    return torch.einsum("kbep,rp->berk", kinds.double().flatten(3), weights.double().flatten(1))


def of_days(limits: Sequence[Limit], targets: list[str]) -> list[Limit]:
    """Limits of daily values of the targets."""
    whole = {name: EIGHT_HOURS if name == "o3" else "24 h" for name in targets}
    return [limit for limit in limits if whole.get(limit.pollutant) == limit.averaging]
