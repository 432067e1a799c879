"""A dataset as its makers wrote it, turned into what the rest reads: coordinates of one or two dimensions, a time axis.

Nothing is read but coordinates. What is understood: coordinates among the fields (CAQRA's lat2d) or repeated along time
(WRF's XLAT), times as text (WRF's Times), beside their dimension (XTIME), scalar, in the name of the file (CAQRA), or as
hours since a day that stands in a description (the European CAMS).
"""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import xarray as xr

from data import DataError

LATITUDES = ("lat", "latitude", "lat2d", "LAT", "XLAT", "XLAT_M", "nav_lat", "y")
LONGITUDES = ("lon", "longitude", "lon2d", "LON", "XLONG", "XLONG_M", "nav_lon", "x")
STAMP = re.compile(r"(?<!\d)((?:19|20)\d{2})(\d{2})(\d{2})(\d{2})(?!\d)")
FROM_NAME = "hour in the name of the file"


def tidied(dataset: xr.Dataset, path: Path) -> xr.Dataset:
    """The same fields with coordinates and times where they are looked for.

    Raises:
        DataError: coordinates move with time, or a time that is stated cannot be read.
    """
    known = [name for name in (*LATITUDES, *LONGITUDES) if name in dataset.data_vars]
    dataset = dataset.set_coords(known)
    for name in (*LATITUDES, *LONGITUDES):
        if name in dataset.coords and dataset[name].ndim > 2:
            dataset = dataset.assign_coords({name: _still(dataset[name], path)})
    return _with_times(dataset, path)


def stamp_of(path: Path) -> str | None:
    """The hour that stands in a file's name as YYYYMMDDHH, as "2015-03-01T00"; None where none does."""
    stamp = STAMP.search(path.name)
    if stamp is None:
        return None
    hour = "{}-{}-{}T{}".format(*stamp.groups())
    try:
        np.datetime64(hour)
    except ValueError:
        return None
    return hour


def _still(coordinate: xr.DataArray, path: Path) -> xr.DataArray:
    """Without leading dimensions, along which it must not change."""
    for dim in coordinate.dims[:-2]:
        first, last = coordinate.isel({dim: 0}), coordinate.isel({dim: -1})
        if coordinate.sizes[dim] > 1 and not np.array_equal(first.to_numpy(), last.to_numpy()):
            raise DataError(f"{path}: '{coordinate.name}' changes along '{dim}': a grid that moves is not supported.")
        coordinate = first.drop_vars([c for c in first.coords if c not in first.dims])
    return coordinate


def _with_times(dataset: xr.Dataset, path: Path) -> xr.Dataset:
    times = [dim for dim in dataset.dims if dim in dataset.variables and _counts_time(dataset[dim])]
    if times:
        return dataset
    for dim in dataset.dims:
        along = _beside(dataset, str(dim), path)
        if along is not None:
            return dataset.assign_coords({dim: along})
    scalar = next((name for name, value in dataset.variables.items() if value.ndim == 0 and _counts_time(dataset[name])), None)
    if scalar is None:
        hour = stamp_of(path)
        if hour is None:
            return dataset
        scalar = "time"
        dataset = dataset.assign_coords({scalar: ((), 0, {"units": f"hours since {hour}:00", "long_name": FROM_NAME})})
    fields = [name for name in dataset.data_vars if dataset[name].ndim >= 2]
    with_axis = dataset[fields].expand_dims(scalar)
    with_axis[scalar].attrs = dict(dataset[scalar].attrs)
    return with_axis


def _beside(dataset: xr.Dataset, dim: str, path: Path) -> xr.DataArray | None:
    """Times along a dimension that are not called like it."""
    for name, variable in dataset.variables.items():
        if variable.dims != (dim,):
            continue
        if _counts_time(dataset[name]):
            return dataset[name].drop_vars(list(dataset[name].coords), errors="ignore").rename(dim)
        told = re.search(r"from (\d{4})(\d{2})(\d{2})", str(variable.attrs.get("long_name", "")))
        if told and variable.attrs.get("units") in ("hours", "hour", "h"):
            attributes = {"units": "hours since {}-{}-{}".format(*told.groups())}
            return xr.DataArray(variable.to_numpy(), dims=(dim,), attrs=attributes)
        if name == "Times":
            return xr.DataArray(_texts(variable.to_numpy(), path), dims=(dim,), attrs={"units": "seconds since 1970-01-01"})
    return None


def _texts(texts: np.ndarray, path: Path) -> np.ndarray:
    """WRF's "2015-03-01_00:00:00" as seconds since 1970."""
    try:
        times = [np.datetime64((t.decode() if isinstance(t, bytes) else str(t)).replace("_", "T"), "s") for t in texts]
    except (ValueError, UnicodeDecodeError) as error:
        raise DataError(f"{path}: its Times cannot be read ({error}).") from error
    return np.array(times).astype("i8")


def _counts_time(variable: xr.DataArray) -> bool:
    return "since" in str(variable.attrs.get("units", ""))
