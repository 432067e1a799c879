"""Means of the training split by hour of the day, and by month where the split has enough of it: a forecast of no skill."""

from __future__ import annotations

import os

import numpy as np
import torch
from rich.console import Console
from rich.progress import track
from torch import Tensor

from data.store.reader import ShardReader
from trainer.dataset import Dataset

ENOUGH_DAYS = 20  # of a month in the training split, for means of its own; other months get those of all months
FILE = "climatology.npz"


class Climatology:
    """The forecast that knows the time of the day and the season alone."""

    def __init__(self, dataset: Dataset, means: np.ndarray, months: np.ndarray) -> None:
        """
        Args:
            means: (M + 1, 24, V, H, W) of every pollutant of the store, of all months first; NaN where there is none.
            months: (12,) which row of `means` each month has.
        """
        store = dataset.store
        self._means = torch.from_numpy(means)
        self._months = torch.from_numpy(months)
        self._channels = [store.contents.channel(name) for name in dataset.normalizer.targets]
        when = store.times.astype("datetime64[h]")
        self._first = int((when[0] - np.datetime64("1970-01-01T00", "h")).astype(int))
        self._device = dataset.device

    def forecast(self, hours: np.ndarray, lead_hours: Tensor) -> Tensor:
        """(B, T, H, W) ug m-3 at time indices `hours` + lead."""
        valid = np.datetime64("1970-01-01T00", "h") + self._first + hours + lead_hours.cpu().numpy().astype("i8")
        month = self._months[torch.from_numpy(month_of(valid))]
        hour = torch.from_numpy(hour_of_day(valid))
        return self._means[month, hour][:, self._channels].to(self._device)


def month_of(times: np.ndarray) -> np.ndarray:
    """0 for January."""
    return times.astype("datetime64[M]").astype("i8") % 12


def hour_of_day(times: np.ndarray) -> np.ndarray:
    return times.astype("datetime64[h]").astype("i8") % 24


def climatology(dataset: Dataset) -> Climatology:
    """Of the run's training split: read once, and kept in the run directory."""
    identity = f"{dataset.store.fingerprint} {dataset.store.chosen}"
    path = dataset.run.run_dir / FILE
    if path.exists():
        with np.load(path, allow_pickle=False) as file:
            if str(file["identity"]) == identity:
                return Climatology(dataset, file["means"], file["months"])
    means, months = _measured(dataset)
    being_written = path.with_name(f"{FILE}.{os.getpid()}.npz")
    np.savez(being_written, means=means, months=months, identity=np.array(identity))
    being_written.rename(path)
    return Climatology(dataset, means, months)


def _measured(dataset: Dataset) -> tuple[np.ndarray, np.ndarray]:
    store = dataset.store
    training = np.flatnonzero(store.inside("train"))
    month = month_of(store.times[training])
    enough = [number for number in range(12) if (month == number).sum() >= 24 * ENOUGH_DAYS]
    months = np.zeros(12, "i8")
    months[enough] = np.arange(len(enough)) + 1
    reader = ShardReader(store, "chemistry")
    sums = np.zeros((len(enough) + 1, 24, *reader.shape), "f8")
    counts = np.zeros(sums.shape, "i4")
    places = zip(training, months[month], hour_of_day(store.times[training]), strict=True)
    for hour, row, of_day in track(places, "climatology", total=len(training), console=Console(stderr=True)):
        field = reader.read(np.array([hour]))[0]
        known = np.isfinite(field)
        value = np.where(known, field, 0.0)
        for place in {0, int(row)}:
            sums[place, of_day] += value
            counts[place, of_day] += known
    means = np.divide(sums, counts, out=np.full(sums.shape, np.nan), where=counts > 0)
    return means.astype("f4"), months
