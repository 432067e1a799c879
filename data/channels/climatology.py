"""What is usual: means of the training split by hour of the day, and by month where the split has enough of it."""

from __future__ import annotations

import errno
import hashlib
import logging
import zipfile
import zlib
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from data import DataError
from data.process.written import being_written
from data.store.layout import DAMAGE, Store
from data.store.reader import ShardReader

log = logging.getLogger("trainer")
ENOUGH_DAYS = 20  # of a month in the training split, for means of its own; other months get those of all months
FILE = "climatology.npz"


class Climatology:
    """The forecast that knows the hour of the day and the month alone."""

    def __init__(self, store: Store, targets: list[str], means: np.ndarray, months: np.ndarray, device: torch.device) -> None:
        """
        Args:
            means: (M + 1, 24, V, H, W) of every pollutant of the store, of all months first; NaN where there is none.
            months: (12,) which row of `means` each month has.
        """
        self._means = torch.from_numpy(means[:, :, [store.contents.channel(name) for name in targets]]).to(device)
        self._months = months
        self._first = store.times[0].astype("datetime64[h]")

    def at(self, hours: np.ndarray) -> Tensor:
        """(B, T, H, W) ug m-3 at time indices, which may lie beyond the store."""
        when = self._first + hours.astype("timedelta64[h]")
        month, hour = (
            torch.from_numpy(part).to(self._means.device) for part in (self._months[month_of(when)], hour_of_day(when))
        )
        return self._means[month, hour]


def month_of(times: np.ndarray) -> np.ndarray:
    """0 for January."""
    return np.asarray(times.astype("datetime64[M]").astype("i8") % 12)


def hour_of_day(times: np.ndarray) -> np.ndarray:
    return np.asarray(times.astype("datetime64[h]").astype("i8") % 24)


def kept(store: Store, run_dir: Path) -> tuple[np.ndarray, np.ndarray]:
    """Means and months of the training split: measured once, and kept in the run directory.

    Raises:
        DataError: what is kept there is not what was measured.
    """
    path, identity = run_dir / FILE, f"{store.origin} {store.chosen}"
    if path.exists():
        means, months, of = read(path)
        if of == identity:
            return means, months
    means, months = _measured(store)
    digest = np.array(_digest(means, months))
    try:
        with being_written(path) as partial, partial.open("wb") as file:
            np.savez(file, means=means, months=months, identity=np.array(identity), sha256=digest)
    except OSError as error:
        if error.errno not in (errno.EACCES, errno.EPERM, errno.EROFS):
            raise
        told = "WARNING: %s cannot be written (%s): climatology is measured again the next time"
        log.info(told, path, error.strerror)
    return means, months


def read(path: Path) -> tuple[np.ndarray, np.ndarray, str]:
    """Means, months, and of which data.

    Raises:
        DataError: it is not there, or not what was measured.
    """
    try:
        with np.load(path, allow_pickle=False) as file:
            means, months, of, sha256 = file["means"], file["months"], str(file["identity"]), str(file["sha256"])
    except (*DAMAGE, zipfile.BadZipFile, zlib.error) as error:
        raise DataError(f"{path} cannot be read ({error}). Where the store is, remove it: it is measured again.") from error
    if sha256 != _digest(means, months):
        raise DataError(f"{path} is not what was measured. Remove it: it is measured again.")
    return means, months, of


def _digest(means: np.ndarray, months: np.ndarray) -> str:
    return hashlib.sha256(np.ascontiguousarray(means).tobytes() + months.tobytes()).hexdigest()


def _measured(store: Store) -> tuple[np.ndarray, np.ndarray]:
    from rich.console import Console  # for the one rank that measures
    from rich.progress import track

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
