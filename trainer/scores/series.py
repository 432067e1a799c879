"""Forecasts from many analyses into one CF zarr: several processes share the starts, and an interruption loses nothing."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import zarr

from data import DataError
from data.process.ranks import world
from trainer.forecaster import Forecaster, forecast, given_weather, unreadable

HOURS_SINCE = {"units": "hours since 1970-01-01 00:00:00", "calendar": "proleptic_gregorian"}
WAIT_S = 300.0  # for the first rank to make the file
WRITTEN = "written"


def starts_of(forecaster: Forecaster, first: str, last: str, every: int) -> np.ndarray:
    """(n,) datetime64[h]: analyses every so many hours of the days first .. last, those that the store can give.

    Raises:
        DataError: these are no days, or the store has no analysis of them.
    """
    try:
        begin, end = np.datetime64(first, "D"), np.datetime64(last, "D") + 1
    except ValueError as error:
        raise DataError(f"--from {first} --to {last}: write days as 2018-01-01.") from error
    wanted = np.arange(begin.astype("datetime64[h]"), end.astype("datetime64[h]"), np.timedelta64(every, "h"))
    possible = [start for start in list(wanted) if not unreadable(forecaster, _index(forecaster, start))]
    if not possible:
        reason = unreadable(forecaster, _index(forecaster, wanted[0])) if len(wanted) else "the first day is after the last"
        raise DataError(f"no forecast can start from {first} to {last}: {reason}.")
    return np.array(possible)


def write_series(forecaster: Forecaster, starts: np.ndarray, out: Path) -> Iterator[int]:
    """Forecast from this process's share of the starts, those that are not there yet; the place of each as it is done.

    Raises:
        DataError: `out` holds forecasts of another checkpoint, other starts or other lead times.
    """
    rank, size = world().rank, world().size
    if rank == 0 and not out.exists():
        _create(forecaster, starts, out)
    root = _opened(out)
    _require_same(forecaster, starts, root, out)
    written = _array(root, WRITTEN)
    fields = [_array(root, name) for name in forecaster.dataset.normalizer.targets]
    leads = forecaster.run.data.lead_hours
    for place in range(rank, len(starts), size):
        if not written[place]:
            _, forecasts = forecast(forecaster, _index(forecaster, starts[place]), leads)
            for channel, array in enumerate(fields):
                array[place] = forecasts[:, channel].cpu().numpy()
            written[place] = 1  # last: what is not marked is made again
        yield place


def _array(root: zarr.Group, name: str) -> zarr.Array:
    array = root[name]
    assert isinstance(array, zarr.Array)
    return array


def _index(forecaster: Forecaster, start: Any) -> int:
    return int((start - forecaster.dataset.store.times[0]).astype(int))


def _create(forecaster: Forecaster, starts: np.ndarray, out: Path) -> None:
    """Under another name until it is whole."""
    store, leads = forecaster.dataset.store, forecaster.run.data.lead_hours
    partial = out.with_name(f"{out.name}.{os.getpid()}.partial")
    root = zarr.open_group(partial, mode="w", zarr_format=3)
    axes = {
        "time": (starts.astype("datetime64[h]").astype("i8"), {"standard_name": "forecast_reference_time", **HOURS_SINCE}),
        "prediction_timedelta": (np.array(leads, "i8"), {"standard_name": "forecast_period", "units": "hours"}),
        "lat": (np.asarray(store.lat, "f8"), {"standard_name": "latitude", "units": "degrees_north"}),
        "lon": (np.asarray(store.lon, "f8"), {"standard_name": "longitude", "units": "degrees_east"}),
    }
    for name, (values, about) in axes.items():
        root.create_array(name, data=values, dimension_names=(name,)).attrs.update(about)
    shape = len(starts), len(leads), *store.grid
    for name in forecaster.dataset.normalizer.targets:
        variable = store.contents.variable(name)
        array = root.create_array(
            name, shape=shape, dtype="float32", fill_value=float("nan"), chunks=(1, *shape[1:]), dimension_names=tuple(axes)
        )
        array.attrs.update({"units": variable.units, "standard_name": variable.standard_name, "long_name": variable.long_name})
    root.create_array(WRITTEN, shape=shape[:1], dtype="uint8", fill_value=0, chunks=(1,), dimension_names=("time",))
    root.attrs.update(_identity(forecaster) | {"Conventions": "CF-1.11"})
    partial.rename(out)


def _identity(forecaster: Forecaster) -> dict[str, str]:
    fingerprints = {f"{name}_fingerprint": value for name, value in forecaster.dataset.fingerprints().items()}
    source = f"{forecaster.checkpoint.name} of {forecaster.checkpoint.parent.parent.name}, step {forecaster.manifest.step}"
    return {"source": source, "weather": given_weather(forecaster), **fingerprints}


def _opened(out: Path) -> zarr.Group:
    deadline = time.monotonic() + WAIT_S
    while not out.exists():
        if time.monotonic() > deadline:
            raise DataError(f"{out} was not made by the first rank within {WAIT_S:.0f} s: look at its messages.")
        time.sleep(0.2)
    return zarr.open_group(out, mode="r+")


def _require_same(forecaster: Forecaster, starts: np.ndarray, root: zarr.Group, out: Path) -> None:
    own = {**_identity(forecaster), "time": starts.astype("datetime64[h]").astype("i8").tolist()}
    own["prediction_timedelta"] = forecaster.run.data.lead_hours
    there = {name: root.attrs.get(name) for name in _identity(forecaster)}
    there |= {name: np.asarray(root[name]).tolist() for name in ("time", "prediction_timedelta") if name in root}
    # Hours that were appended later change none of these forecasts.
    if forecaster.dataset.store.continues(str(there.get("data_fingerprint"))):
        there["data_fingerprint"] = own["data_fingerprint"]
    differing = [name for name, value in own.items() if there.get(name) != value]
    if differing:
        raise DataError(f"{out} holds forecasts of other {', '.join(differing)}: choose another --out, or remove it.")
