"""Forecast weather in place of the analysed weather of the valid time: what a forecast would really have been given."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from data import DataError
from data.store.layout import Store
from data.store.opening import open_store
from data.stream import hours_between
from trainer.dataset import Dataset
from trainer.forecaster import Forecaster


def forecast_weather(forecaster: Forecaster, path: Path) -> Store:
    """A store of forecast weather by valid time, as `data prepare` makes it of forecasts.

    Raises:
        DataError: the run is given no future weather, or the store lacks a variable or has another grid.
    """
    given, own = forecaster.run.data.future, forecaster.dataset.store
    if not given:
        raise DataError("--future-from: the run is given no weather of the valid time (data.future), so it would not act.")
    store = open_store(path)
    store.contents.require(given, str(path))
    for name in given:
        if store.contents.group(name) != own.contents.group(name):
            raise DataError(f"{path}: {name} is in the group {store.contents.group(name)}, not {own.contents.group(name)}.")
    if store.grid != own.grid or not (np.allclose(store.lat, own.lat) and np.allclose(store.lon, own.lon)):
        raise DataError(
            f"{path} has another grid than {own.path}: prepare the forecasts with the same --lat, --lon and --grid."
        )
    return store


def has_weather(dataset: Dataset, later: Store, valid: np.ndarray) -> np.ndarray:
    """(n,) bool: which time indices of the run's store have forecast weather.

    Raises:
        DataError: none has.
    """
    hours = valid - hours_between(dataset.store, later)
    there = (hours >= 0) & (hours < len(later.times))
    for name in dataset.run.data.future:
        present = np.less(later.missing[later.contents.group(name)][:, later.contents.channel(name)], 1.0)
        there &= present[np.clip(hours, 0, len(present) - 1)]
    if not there.any():
        raise DataError(
            f"{later.path} spans {later.times[0]} to {later.times[-1]}: no valid time of the evaluation is among them."
        )
    return np.asarray(there)
