"""THE opinion on time: at which hours a field is valid, by all that its file says.

CF decides first (standard_name, units, bounds), then the names that are known, and the name of the
file last. Nothing else in the project looks at these attributes.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import xarray as xr

from data import DataError
from data.prepare.sources.source import Clock

VALID = ("valid_time", "validtime", "verification_time")
STARTS = ("forecast_reference_time", "reference_time", "reftime", "init_time", "initial_time", "initialization_time")
LEADS = ("prediction_timedelta", "step", "lead_time", "leadtime", "lead", "forecast_period", "forecast_hour")
TIME_LIKE = re.compile(r"(valid_?)?times?\d*|tstep|date|hours?|t|" + "|".join((*STARTS, *LEADS)), re.IGNORECASE)
SECONDS = {"weeks": 604800, "days": 86400, "hours": 3600, "minutes": 60, "seconds": 1, "nanoseconds": 1e-9}
SECONDS |= {"d": 86400, "h": 3600, "hr": 3600, "hrs": 3600, "min": 60, "s": 1, "sec": 1, "ns": 1e-9}
STAMP = re.compile(r"(?<!\d)((?:19|20)\d{2})[-_.]?(\d{2})[-_.]?(\d{2})[-_.T ]?[hH]?(\d{2})(?::?0000|:?00|:00:00)?Z?(?!\d)")
EPOCH = np.datetime64("1970-01-01", "s")


@dataclass(frozen=True)
class Hours:
    """When a field is valid."""

    dims: tuple[str, ...]  # along which the hour changes
    valid: np.ndarray  # (n,) datetime64[h] UTC
    places: np.ndarray  # (n,) places in the flattened `dims`
    leads: np.ndarray | None = None  # (n,) hours since the start of the forecast
    note: str = ""  # what of it was not said in the plainest way


def valid_hours(dataset: xr.Dataset, name: str, path: Path, clock: Clock) -> Hours:
    """The hours at which a field is valid, UTC, by all that its file says.

    `valid_time` is believed first, then start and lead time together, then a single time, the name
    of the file last. A mean is valid at the end of its bounds.

    Raises:
        DataError: nothing tells, two things contradict each other, or an hour is not whole.
    """
    array, note = dataset[name], ""
    valid, lead = _stated(dataset, array, path)
    zone = clock.name_zone if valid is None else clock.zone
    if zone is None:
        raise DataError(
            f"{path}: its hour stands in its name only: say in which time zone, as --zone 0 for "
            "UTC (in a list of sources, zone: 0)."
        )
    if valid is None:
        valid = _named(array, path)
    else:
        ends = _ends_of_bounds(dataset, array, valid, path)
        if ends is not None:
            valid, note = ends, f"means are stored at the end of their bounds ('{dataset[valid.name].attrs['bounds']}')"
        elif clock.stamps == "centre":
            valid = valid.copy(data=_ends(valid.to_numpy(), path))
    if clock.lead_hours is not None and lead is None:
        raise DataError(f"{path}: --lead is for forecasts; '{name}' has times, and no lead times.")
    dims = tuple(str(dim) for dim in array.dims if dim in valid.dims or (lead is not None and dim in lead.dims))
    shape = tuple(array.sizes[dim] for dim in dims)
    seconds = _spread(valid, dims, shape) - round(3600 * zone)
    hours = _whole_hours(seconds, path)
    places = np.arange(len(hours))
    if lead is None:
        return Hours(dims, hours, places, None, note)
    leads = np.asarray(_spread(lead, dims, shape) / 3600)
    if clock.lead_hours is not None:
        if not np.isin(clock.lead_hours, leads).all():
            asked, there = (", ".join(f"{x:g}" for x in each) for each in (clock.lead_hours, np.unique(leads)))
            raise DataError(f"{path}: --lead asks for {asked} h, its lead times are {there} h.")
        places = np.flatnonzero(np.isin(leads, clock.lead_hours))
    return Hours(dims, hours[places], places, leads[places], note)


def _stated(dataset: xr.Dataset, array: xr.DataArray, path: Path) -> tuple[xr.DataArray | None, xr.DataArray | None]:
    """(valid time, lead time) that a file states of a field, seconds since 1970 and seconds; None where it does not."""
    times = _times(dataset, array, path)
    lead = _lead(dataset, array, path)
    called_valid = [t for t in times if str(t.name).lower() in VALID]
    starts = [t for t in times if _is(t, "forecast_reference_time") or str(t.name).lower() in STARTS]
    by_cf = [t for t in times if _is(t, "time") and not any(t is s for s in starts)]
    plain = [t for t in times if not any(t is other for other in (*called_valid, *starts))]
    # An axis of its own first, then what CF calls time; a date of creation, as a single value, last.
    plain.sort(key=lambda t: (t.name in t.dims, _is(t, "time"), t.ndim), reverse=True)
    if called_valid:
        return called_valid[0], lead
    if starts and lead is not None:
        return _sum(starts[0], lead), lead
    if starts and plain and set(starts[0].dims) <= set(plain[0].dims):
        return plain[0], lead
    if starts:
        raise DataError(
            f"{path}: '{array.name}' has reference times of forecasts ('{starts[0].name}') and no "
            "forecast period, so nobody can know which hours it is valid at."
        )
    if not plain and lead is not None and lead.to_numpy().any():
        raise DataError(
            f"{path}: '{array.name}' has lead times ('{lead.name}') and no time from which they "
            "count: add one, with units as 'hours since 2015-03-01'."
        )
    if not plain:
        return None, lead
    time = plain[0]
    if lead is None or not lead.to_numpy().any():
        return time, lead
    if not any(time is t for t in by_cf):
        if not set(lead.dims) & set(time.dims):  # as cfgrib and WeatherBench write forecasts
            return _sum(time, lead), lead
    elif set(lead.dims) <= set(time.dims):
        return time, lead
    raise DataError(
        f"{path}: '{array.name}' has times ('{time.name}') and lead times ('{lead.name}'), and "
        "nothing says whether forecasts "
        f"begin or are valid then: give '{time.name}' the standard_name forecast_reference_time, "
        "or add valid_time."
    )


def _sum(start: xr.DataArray, lead: xr.DataArray) -> xr.DataArray:
    return (start.drop_vars(list(start.coords)) + lead.drop_vars(list(lead.coords))).rename(start.name)


def _is(variable: xr.DataArray, standard_name: str) -> bool:
    return bool(variable.attrs.get("standard_name") == standard_name)


def _times(dataset: xr.Dataset, array: xr.DataArray, path: Path) -> list[xr.DataArray]:
    """Every variable that states times of a field, as seconds since 1970, along its dimensions or of its only hour."""
    found = []
    for name in map(str, dataset.variables):
        variable = dataset[name]
        if name == array.name or not set(variable.dims[:1]) <= set(array.dims):
            continue
        seconds = _seconds(variable, path)
        if seconds is not None and set(seconds.dims) <= set(array.dims):
            found.append(seconds)
    return found


def _seconds(variable: xr.DataArray, path: Path) -> xr.DataArray | None:
    """A variable that states times, as seconds since 1970; None for any other."""
    units, dims = str(variable.attrs.get("units", "")), variable.dims
    told = re.search(r"from (\d{4})-?(\d{2})-?(\d{2})", str(variable.attrs.get("long_name", "")))
    try:
        if " since " in f" {units} " and variable.dtype.kind in "iuf":
            exact = _decoded(variable, units)
        elif told and units.lower() in SECONDS and variable.dtype.kind in "iuf":  # the European CAMS
            exact = _decoded(variable, "{} since {}-{}-{}".format(units.lower(), *told.groups()))
        elif units.startswith("day as %Y%m%d"):
            days, share = np.divmod(np.asarray(variable, "f8"), 1.0)
            dates = [
                np.datetime64(f"{int(d):08d}"[:4] + f"-{int(d) % 10000 // 100:02d}-{int(d) % 100:02d}", "s") for d in days.flat
            ]
            exact = np.array(dates).reshape(days.shape) + (share * 86400).round().astype("timedelta64[s]")
        elif variable.name == "Times":
            texts = [t.decode() if isinstance(t, bytes) else str(t) for t in variable.to_numpy().ravel()]
            exact = np.array([np.datetime64(t.strip("\0 ").replace("_", "T"), "s") for t in texts])
        elif variable.name == "TFLAG" and variable.ndim == 3:
            dates, clock = np.asarray(variable[:, 0], "i8").T
            days = np.array([np.datetime64(f"{d // 1000:04d}", "D") + (d % 1000 - 1) for d in dates])
            exact = days.astype("datetime64[s]") + (clock // 10000 * 3600 + clock // 100 % 100 * 60 + clock % 100)
            dims = dims[:1]
        else:
            return None
    except (ValueError, OverflowError, AttributeError, UnicodeDecodeError) as error:
        raise DataError(f"{path}: its times ('{variable.name}') cannot be decoded ({error}).") from error
    if np.isnat(exact).any():
        place = int(np.isnat(exact).argmax())
        raise DataError(f"{path}: '{variable.name}' has no time at place {place}. Correct the file, or leave it out.")
    return xr.DataArray((exact - EPOCH).astype("i8"), dims=dims, attrs=variable.attrs, name=variable.name)


def _decoded(variable: xr.DataArray, units: str) -> np.ndarray:
    """datetime64[s]; dates of other calendars that exist in ours keep their name."""
    about = {key: variable.attrs[key] for key in ("calendar", "scale_factor", "add_offset") if key in variable.attrs}
    time = xr.decode_cf(xr.Dataset({"time": (variable.dims, variable.to_numpy(), about | {"units": units})}))["time"]
    if time.dtype.kind != "M":
        named = [f"{t.year:04}-{t.month:02}-{t.day:02}T{t.hour:02}:{t.minute:02}:{t.second:02}" for t in time.to_numpy().flat]
        return np.array([np.datetime64(text, "s") for text in named]).reshape(time.shape)
    return np.asarray(time.to_numpy().astype("datetime64[s]"))


def _lead(dataset: xr.Dataset, array: xr.DataArray, path: Path) -> xr.DataArray | None:
    """How long after the start of its forecast a field is valid, seconds."""
    names = [c for c in map(str, dataset.variables) if c.lower() in LEADS or _is(dataset[c], "forecast_period")]
    found = [dataset[c] for c in names if set(dataset[c].dims) <= set(array.dims) and dataset[c].dtype.kind in "iuf"]
    if not found:
        return None
    units = str(found[0].attrs.get("units", "")).strip().lower()
    factor = SECONDS.get(units, SECONDS.get(units + "s"))
    if factor is None:
        raise DataError(f"{path}: the lead times '{found[0].name}' are in '{units}', not in hours, minutes, seconds or days.")
    seconds = (found[0].to_numpy().astype("f8") * factor).round().astype("i8")
    return xr.DataArray(seconds, dims=found[0].dims, name=found[0].name)


def _named(array: xr.DataArray, path: Path) -> xr.DataArray:
    """The only hour of a file that states none, from its name.

    Raises:
        DataError: there is no hour in it, or the file has several.
    """
    several = [str(dim) for dim in array.dims if array.sizes[dim] > 1 and TIME_LIKE.fullmatch(str(dim))]
    hour = stamp_of(path)
    if several or hour is None:
        where = f"{array.sizes[several[0]]} of '{several[0]}'" if several else f"no hour in its name, as {'2015030100'}"
        raise DataError(
            f"{path}: '{array.name}' has no time coordinate with units '... since ...', and "
            f"{where}: nobody can know when "
            "it is valid."
        )
    return xr.DataArray((hour.astype("datetime64[s]") - EPOCH).astype("i8"), dims=())


def stamp_of(path: Path) -> np.datetime64 | None:
    """The hour that stands in a file's name, as 2015030100, 20150301_00 or 2015-03-01T00; hour 24 is the next day's 0."""
    stamp = STAMP.search(path.name)
    if stamp is None:
        return None
    try:
        day = np.datetime64("{}-{}-{}".format(*stamp.groups()), "h")
    except ValueError:
        return None
    hour = int(stamp[4])
    return day + hour if hour <= 24 else None


def _ends_of_bounds(dataset: xr.Dataset, array: xr.DataArray, valid: xr.DataArray, path: Path) -> xr.DataArray | None:
    """The ends of the intervals that a field is a mean over, where its file states them."""
    bounds = str(valid.attrs.get("bounds", ""))
    if bounds not in dataset.variables or "point" in str(array.attrs.get("cell_methods", "")):
        return None
    limits, units = dataset[bounds], str(dataset[bounds].attrs.get("units") or valid.attrs.get("units", ""))
    about = {"calendar": valid.attrs["calendar"]} if "calendar" in valid.attrs else {}
    exact = _seconds(limits.assign_attrs(about | {"units": units}), path)
    if exact is None or exact.dims[:-1] != valid.dims or exact.shape[-1] != 2:
        raise DataError(f"{path}: the bounds '{bounds}' of '{valid.name}' cannot be read. Correct or remove them.")
    ends = exact.max(str(exact.dims[-1]))
    return None if np.array_equal(ends.to_numpy(), valid.to_numpy()) else valid.copy(data=ends.to_numpy())


def _ends(seconds: np.ndarray, path: Path) -> np.ndarray:
    """Ends of hours that are stamped in their middle; times on whole hours, of another product beside it, stay.

    Raises:
        DataError: the means are over more than an hour.
    """
    if not (seconds % 3600 == 1800).all():
        return seconds
    apart = np.diff(np.sort(seconds, axis=None))
    if (apart != 3600).any():
        raise DataError(
            f"{path}: --stamps centre is for means over one hour; its times are "
            f"{apart.min() / 3600:g} h "
            "and more apart. State the end of each mean as its time."
        )
    return seconds + 1800


def _spread(values: xr.DataArray, dims: tuple[str, ...], shape: tuple[int, ...]) -> np.ndarray:
    """Values along some of the dimensions, repeated along the others, flat."""
    own = [dim for dim in dims if dim in values.dims]
    ordered = values.transpose(*own).to_numpy()
    wide = ordered.reshape([size if dim in own else 1 for dim, size in zip(dims, shape, strict=True)])
    return np.broadcast_to(wide, shape).ravel()


def _whole_hours(seconds: np.ndarray, path: Path) -> np.ndarray:
    hours = (seconds + 1800) // 3600
    off = abs(seconds - hours * 3600)
    if off.size and off.max() > 60:
        raise DataError(
            f"{path}: {EPOCH + seconds[off.argmax()]} is not on a whole hour. Of means over an "
            "hour that are stamped in their middle, say --stamps centre (stamps: centre in a list "
            "of sources)."
        )
    return hours.astype("datetime64[h]")
