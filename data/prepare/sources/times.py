"""Which hours a file holds, and where."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

import numpy as np
import xarray as xr

from data import DataError
from data.prepare.sources.files import horizontal
from data.prepare.sources.source import Clock
from data.prepare.sources.tidy import FROM_NAME

PERIODS = ("forecast_period", "leadtime", "lead_time", "step")


class Dimensions(NamedTuple):
    """Names of a field's dimensions; a place in time is its index along `time`, or time * periods + period."""

    time: str
    y: str  # northward
    x: str  # eastward
    period: str = ""  # of a forecast: hours since `time`, which is then the reference time


def at_places(array: xr.DataArray, dims: Dimensions, places: np.ndarray) -> xr.DataArray:
    """The fields at places in time, one after the other along `dims.time`."""
    if not dims.period:
        along = slice(places[0], places[-1] + 1) if (np.diff(places) == 1).all() else places
        return array.isel({dims.time: along})
    array = array.drop_vars(list(array.coords))  # of the reference, which is not the time of what is read
    reference, period = np.divmod(places, array.sizes[dims.period])
    if len(np.unique(period)) == 1:
        return array.isel({dims.time: reference, dims.period: period[:1]})
    if len(np.unique(reference)) == 1:
        return array.isel({dims.time: int(reference[0]), dims.period: period}).rename({dims.period: dims.time})
    fields = [array.isel({dims.time: [int(r)], dims.period: int(p)}) for r, p in zip(reference, period, strict=True)]
    return xr.concat(fields, dims.time)


def dimensions_of(dataset: xr.Dataset, name: str, path: Path) -> Dimensions:
    time, period = _time_dimension(dataset, name, path), _period(dataset, name)
    reference = _is(dataset[time], "forecast_reference_time")
    along = period is not None and reference and period.ndim == 1
    return Dimensions(time, *horizontal(dataset, name, path), str(period.dims[0]) if along and period is not None else "")


def _time_dimension(dataset: xr.Dataset, name: str, path: Path) -> str:
    found = [
        str(dim)
        for dim in dataset[name].dims
        if dim in dataset.variables and "since" in str(dataset[dim].attrs.get("units", ""))
    ]
    valid = [dim for dim in found if not _is(dataset[dim], "forecast_reference_time")]
    if not found:
        raise DataError(f"{path}: '{name}' has no time coordinate with units '... since ...'.")
    return (valid or found)[0]


def _is(coordinate: xr.DataArray, standard_name: str) -> bool:
    return standard_name in (coordinate.attrs.get("standard_name"), coordinate.name)


def _period(dataset: xr.Dataset, name: str) -> xr.DataArray | None:
    """The coordinate that says how long after its reference time a forecast is valid."""
    names = [str(v) for v in dataset.variables if v in PERIODS or dataset[v].attrs.get("standard_name") == "forecast_period"]
    found = [dataset[v] for v in names if set(dataset[v].dims) <= set(dataset[name].dims)]
    return found[0] if found else None


def hours_of(dataset: xr.Dataset, name: str, path: Path, clock: Clock) -> list[tuple[np.datetime64, int]]:
    """(hour, place) of a file's fields, hours as datetime64[h], UTC; of forecasts the hours that they are valid at."""
    dim, lead_hours = _time_dimension(dataset, name, path), clock.lead_hours
    zone = clock.name_zone if dataset[dim].attrs.get("long_name") == FROM_NAME else clock.zone
    if zone is None:
        raise DataError(
            f"{path}: its hour stands in its name only: say in which time zone, as --zone 0 for UTC (in a list of "
            "sources, zone: 0)."
        )
    times = _exact_times(dataset, dim, path) - np.timedelta64(round(3600 * zone), "s")
    if clock.stamps == "centre":
        times = _ends(times, path)
    periods = _period(dataset, name)
    if not _is(dataset[dim], "forecast_reference_time"):
        if lead_hours is not None and periods is None:
            raise DataError(f"{path}: --lead is for forecasts; '{name}' has times, and no lead times.")
        return [(hour, place) for place, hour in enumerate(_whole_hours(times, path))]
    if periods is None:
        raise DataError(
            f"{path}: '{name}' has reference times of forecasts ('{dim}') and no forecast period, so nobody can "
            "know which hours it is valid at."
        )
    hours_after = _in_hours(periods, path)
    valid = _whole_hours((times[:, None] + (hours_after * 3600).round().astype("timedelta64[s]")).ravel(), path)
    wanted = np.ones(len(hours_after), bool) if lead_hours is None else np.isin(hours_after, lead_hours)
    if not wanted.any() or not np.isin(lead_hours or (), hours_after).all():
        asked, there = (", ".join(f"{x:g}" for x in hours) for hours in (lead_hours or (), hours_after))
        raise DataError(f"{path}: --lead asks for {asked} h, its lead times are {there} h.")
    places = np.flatnonzero(np.tile(wanted, len(times)))
    return [(valid[place], int(place)) for place in places]


def _ends(times: np.ndarray, path: Path) -> np.ndarray:
    """Ends of hours that are stamped in their middle; times on whole hours, of another product beside it, stay.

    Raises:
        DataError: the means are over more than an hour.
    """
    half = times - times.astype("datetime64[h]") == np.timedelta64(30, "m")
    if not half.all():
        return times
    if (np.diff(times) != np.timedelta64(1, "h")).any():
        raise DataError(
            f"{path}: --stamps centre is for means over one hour; its times are {np.diff(times).min().astype('i8') / 3600:g} h "
            "and more apart. State the end of each mean as its time."
        )
    return times + np.timedelta64(30, "m")


def _in_hours(periods: xr.DataArray, path: Path) -> np.ndarray:
    units = str(periods.attrs.get("units", "")).strip().lower()
    seconds = {"hours": 3600, "hour": 3600, "h": 3600, "minutes": 60, "seconds": 1, "days": 86400, "nanoseconds": 1e-9}
    if units not in seconds:
        raise DataError(f"{path}: the lead times '{periods.name}' are in '{units}', not in hours, minutes, seconds or days.")
    return np.asarray((np.atleast_1d(periods.to_numpy()).astype("f8") * seconds[units]).round() / 3600)


def _exact_times(dataset: xr.Dataset, dim: str, path: Path) -> np.ndarray:
    """(T,) datetime64[s]; dates of other calendars that exist in ours keep their name."""
    try:
        time = xr.decode_cf(dataset[[dim]])[dim]
        if time.dtype.kind != "M":
            named = [f"{t.year:04}-{t.month:02}-{t.day:02}T{t.hour:02}:{t.minute:02}:{t.second:02}" for t in time.to_numpy()]
            time = time.copy(data=[np.datetime64(text) for text in named])
    except (ValueError, OverflowError, AttributeError) as error:
        raise DataError(f"{path}: its times cannot be decoded ({error}).") from error
    return np.asarray(time.to_numpy().astype("datetime64[s]"))


def _whole_hours(exact: np.ndarray, path: Path) -> np.ndarray:
    hours = (exact + np.timedelta64(30, "m")).astype("datetime64[h]")
    off = abs((exact - hours).astype("timedelta64[s]").astype(int))
    if np.isnat(exact).any() or (off.size and off.max() > 60):
        raise DataError(
            f"{path}: {exact[np.isnat(exact).argmax() or off.argmax()]} is not on a whole hour. Of means over an hour that are "
            "stamped in its middle, say --stamps centre (stamps: centre in a list of sources)."
        )
    return np.asarray(hours)
