"""What one pass over samples sums up: everything that scores are made of, and nothing that grows with their number."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from torch import Tensor

from data.batch import Batch
from data.given.stations import Observations
from trainer.dataset import Dataset
from trainer.forecaster import finite
from trainer.scores.errors import ErrorSums
from trainer.verification.days import SYSTEMS, Days, contingency, of_days
from trainer.verification.spectra import Spectra
from trainer.verification.standards import Index, Limit, standards

AT_STATIONS = ("persistence", "reanalysis")
MAPS = ("squared", "persistence_squared", "persistence_forecast", "weight")


@dataclass
class Setting:
    """What is alike for all samples of an evaluation."""

    dataset: Dataset
    baselines: dict[str, Callable[[Batch], Tensor]]  # name -> forecasts (B, T, H, W) ug m-3 of a batch
    regions: dict[str, np.ndarray]  # name -> (H, W) bool, the domain first
    utc_offset: int  # h, of local days and hours
    first_day: int  # local day, since 1970, of the first valid time
    days: int
    samples: int
    stations: Observations | None = None

    @property
    def targets(self) -> list[str]:
        return self.dataset.normalizer.targets

    @property
    def lead_hours(self) -> list[int]:
        return self.dataset.run.data.lead_hours

    @cached_property
    def weights(self) -> Tensor:
        """(R, H, W)."""
        masks = np.stack(list(self.regions.values()))
        return torch.from_numpy(masks).to(self.dataset.device) * self.dataset.normalizer.area

    @cached_property
    def spectra(self) -> Spectra:
        return Spectra(self.dataset.store, self.dataset.device)

    @cached_property
    def limits(self) -> list[Limit]:
        """Of daily values."""
        return of_days(standards()[0], self.targets)

    @cached_property
    def hourly_limits(self) -> list[Limit]:
        return [limit for limit in standards()[0] if limit.averaging == "1 h" and limit.pollutant in self.targets]

    @cached_property
    def indices(self) -> list[Index]:
        return [index for index in standards()[1] if set(index.breaks) & set(self.targets)]

    def local(self, valid_hours: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Day, counted from the first, and hour of the day at time indices of the store, in local time."""
        first = int(self.dataset.store.times[0].astype("datetime64[h]").astype("i8"))
        day, hour = np.divmod(first + valid_hours + self.utc_offset, 24)
        return day - self.first_day, hour


class Tally:
    """The sums over some samples; those of several parts add up to those of the whole."""

    def __init__(self, setting: Setting) -> None:
        self.setting = setting
        targets, leads, device = len(setting.targets), len(setting.lead_hours), setting.dataset.device
        regions, grid = len(setting.regions), setting.dataset.store.grid

        def zeros(*shape: int) -> Tensor:
            return torch.zeros(shape, dtype=torch.float64, device=device)

        self.errors = ErrorSums(targets, setting.lead_hours, device, tuple(setting.baselines), regions, setting.days)
        statistics = setting.dataset.normalizer.statistics
        means = [statistics[name]["mean"] for name in setting.targets]
        self._reference = torch.tensor(means, dtype=torch.float64, device=device)[:, None, None]
        judged = (setting.limits, setting.indices, self._reference)
        self._days = Days(setting.targets, setting.lead_hours, setting.weights, setting.days, *judged)
        self.sums = {
            "errors": self.errors.sums,
            **self._days.sums,
            "hourly_events": zeros(len(setting.hourly_limits), len(SYSTEMS), leads, regions, 4),
            "spectra": zeros(2, targets, leads, setting.spectra.count),  # of truth and forecast
            "spectra_samples": zeros(leads),
            "diurnal": zeros(4, targets, leads, regions, 24),  # weight, error, truth, forecast
            "maps": zeros(len(MAPS), targets, leads, *grid),
            "case_loss": zeros(setting.samples),
            "case_known": zeros(setting.samples),  # weight of the cells with a truth
        }
        self._at_stations = ErrorSums(targets, setting.lead_hours, device, AT_STATIONS, 1, setting.days)
        if setting.stations is not None:
            self.sums["stations"] = self._at_stations.sums

    def add(self, batch: Batch, forecast: Tensor, numbers: np.ndarray) -> None:
        """Add the counted samples of a batch, one local day after the other.

        Args:
            forecast: (B, T, H, W) ug m-3.
            numbers: (B,) places of the samples in the whole evaluation.
        """
        setting, normalizer = self.setting, self.setting.dataset.normalizer
        truth = torch.where(batch.counted[:, None, None, None], normalizer.truth(batch), torch.nan)
        baselines = {name: baseline(batch) for name, baseline in setting.baselines.items()}
        day, hour = setting.local(batch.valid_hours)
        block = torch.from_numpy(day).to(truth.device)
        per_sample = self.errors.add(
            forecast, truth, baselines, setting.weights, batch.lead_hours, block, self._reference
        )  # (kind, B, T, R)
        if setting.stations is not None:
            self._add_stations(setting.stations, batch, forecast, truth, baselines["persistence"], block)
        of_kind = dict(zip(self.errors.kinds, per_sample, strict=True))
        diurnal = torch.stack([of_kind[kind] for kind in ("weight", "error", "truth", "forecast")])
        scaled = of_kind["squared"][..., 0] / of_kind["weight"][..., 0].clamp(min=1e-30)
        case_loss = (scaled / normalizer.target_std.flatten().double() ** 2).sum(1)
        case_known = of_kind["weight"][..., 0]
        known = torch.isfinite(truth) & (setting.weights[0] > 0)
        spectra = torch.stack([setting.spectra.of(fields, known) for fields in (truth, forecast)]).double()
        maps = self._maps(forecast, truth, baselines["persistence"])
        for slot in np.flatnonzero(batch.counted.cpu().numpy()):
            column = setting.lead_hours.index(int(batch.lead_hours[slot]))
            self.sums["diurnal"][:, :, column, :, int(hour[slot])] += diurnal[:, slot]
            self.sums["spectra"][:, :, column] += spectra[:, slot]
            self.sums["spectra_samples"][column] += 1.0
            self.sums["maps"][:, :, column] += maps[:, slot]
            self.sums["case_loss"][int(numbers[slot])] = case_loss[slot] / (case_known[slot] > 0).sum().clamp(min=1)
            self.sums["case_known"][int(numbers[slot])] = case_known[slot].sum()
            place, lead = (int(day[slot]), int(hour[slot])), int(batch.lead_hours[slot])
            self._days.add(*place, lead, forecast[slot], baselines["persistence"][slot], truth[slot])
        limits = torch.tensor([limit.value for limit in setting.hourly_limits], device=truth.device)
        places = [setting.targets.index(limit.pollutant) for limit in setting.hourly_limits]
        for system, fields in enumerate((forecast, baselines["persistence"])):
            counts = contingency(fields[:, places], truth[:, places], limits, setting.weights)
            for column, lead in enumerate(setting.lead_hours):
                self.sums["hourly_events"][:, system, column] += counts[batch.lead_hours == lead].sum(0)

    def _add_stations(
        self, stations: Observations, batch: Batch, forecast: Tensor, truth: Tensor, persistence: Tensor, block: Tensor
    ) -> None:
        """Everything in the cells of the stations, the reanalysis as one more baseline."""
        cells = [torch.from_numpy(axis).to(forecast.device) for axis in (stations.rows, stations.columns)]
        ours, analysed, unchanged = (field[:, :, cells[0], cells[1]][:, :, None] for field in (forecast, truth, persistence))
        observed = torch.from_numpy(stations.at(batch.valid_hours)).to(forecast.device)[:, :, None]
        observed = torch.where(batch.counted[:, None, None, None], observed, torch.nan)
        each = torch.ones((1, observed.shape[-1]), device=forecast.device)
        compared = {"persistence": unchanged, "reanalysis": analysed}
        self._at_stations.add(ours, observed, compared, each, batch.lead_hours, block, self._reference)

    @staticmethod
    def _maps(forecast: Tensor, truth: Tensor, persistence: Tensor) -> Tensor:
        """(MAPS, B, T, H, W) of one batch."""
        error = (forecast - truth).nan_to_num(0.0)
        unchanged = persistence - truth
        both = torch.isfinite(unchanged)
        return torch.stack([error**2, unchanged.nan_to_num(0.0) ** 2, error**2 * both, torch.isfinite(truth).float()]).double()

    def finished(self) -> dict[str, np.ndarray]:
        """All sums, once no more samples are added."""
        self._days.close()
        return {name: values.cpu().numpy() for name, values in self.sums.items()}


@torch.no_grad()
def tally(
    model: Callable[..., Tensor], batches: Iterable[Batch], numbers: np.ndarray, setting: Setting
) -> dict[str, np.ndarray]:
    """Sums over the samples with the given places in the evaluation, in the order of the batches."""
    sums, dataset = Tally(setting), setting.dataset
    for raw in batches:
        batch, _, arguments = dataset.prepare(raw)
        times = dataset.store.times[batch.hours]
        what = f"a forecast from {times.min()} to {times.max()}"
        computed = finite(model(*arguments).float(), what)
        forecast = dataset.normalizer.physical(computed)
        places = numbers[np.arange(batch.position, batch.position + len(batch.hours)) % len(numbers)]
        sums.add(batch, forecast, places)
    return sums.finished()
