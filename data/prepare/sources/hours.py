"""The fields of a file at some of its hours, as they are stored: every file is opened once for all of them.

NetCDF is read without datasets of xarray, which take more processor time than the reading; forecasts by reference
time and period, and zarr stores, are read by xarray.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import xarray as xr

from data import DataError
from data.prepare.inputs import given
from data.prepare.inputs.opening import Plain, opened_plainly
from data.prepare.sources.files import opened, spelling
from data.prepare.sources.spellings import Named
from data.prepare.sources.times import Dimensions, at_places

PIECES = "expver"  # ERA5's final and its preliminary analyses, each missing where the other one is


@dataclass(frozen=True)
class Asked:
    """A field of a file, and which of its places in time."""

    named: Named
    dims: Dimensions
    places: np.ndarray  # (n,)


@dataclass(frozen=True)
class Stored:
    """A field as it is stored: perhaps packed, with its own fill values."""

    name: str  # in the file
    values: np.ndarray  # (n, H, W)
    attributes: dict[str, Any]


def stored_hours(path: Path, asked: dict[str, Asked]) -> Iterator[tuple[str, Stored]]:
    """Every field that is asked for, one after the other.

    Raises:
        DataError: the file is damaged.
    """
    by_xarray = path.exists() and (path.is_dir() or given.is_grib(path))
    if by_xarray or any(one.dims.period for one in asked.values()):
        with opened(path, encoded=True) as dataset:
            for name, one in asked.items():
                yield name, _from_dataset(dataset, one)
        return
    with opened_plainly(path) as file:
        for name, one in asked.items():
            yield name, _from_netcdf(file, one)


def decoded(stored: Stored) -> np.ndarray:
    """(n, H, W) float32, NaN where missing; plain floats in place, in half the time."""
    packed = {"scale_factor", "add_offset"} & set(stored.attributes)
    if packed or stored.values.dtype.kind != "f":
        array = xr.Dataset({stored.name: (("time", "y", "x"), stored.values, stored.attributes)})
        return np.array(xr.decode_cf(array, decode_times=False)[stored.name].to_numpy(), "f4")
    values = np.array(stored.values, "f4", copy=stored.values.dtype != np.float32 or None)
    for fill in _fill_values(stored):
        values[values == fill] = np.nan
    return values


def _fill_values(stored: Stored) -> list[np.float32]:
    """What stands for a missing value, rounded as the data are: files state it as a double, several times, or as text."""
    stated = [value for key in ("_FillValue", "missing_value") for value in np.atleast_1d(stored.attributes.get(key, []))]
    try:
        return [np.float32(value) for value in stated]
    except ValueError as error:
        raise DataError(f"'{stored.name}': its missing value {stated} is not a number. Correct the attribute.") from error


def _from_dataset(dataset: xr.Dataset, asked: Asked) -> Stored:
    name, dims = spelling(dataset.data_vars, asked.named), asked.dims
    assert name is not None
    array = dataset[name]
    level = [d for d in array.dims if d not in (*dims, PIECES) and array.sizes[d] > 1]
    array = at_places(array.isel(dict.fromkeys(level, asked.named.level)), dims, asked.places)
    axes = _axes(list(map(str, array.dims)), dims)
    extra = [d for d in array.dims if d not in axes]
    return _joined(Stored(name, array.squeeze(extra).transpose(*axes).to_numpy(), array.attrs))


def _from_netcdf(file: Plain, asked: Asked) -> Stored:
    name, dims = spelling(file.dimensions, asked.named), asked.dims
    assert name is not None
    there = file.dimensions[name]
    first, last = int(asked.places.min()), int(asked.places.max())
    wanted, kept = [], []
    for dim, size in zip(there, file.shape(name), strict=True):
        if dim in (*dims, PIECES):
            kept.append(dim)
            wanted.append((first, last + 1) if dim == dims.time else (0, size))
        else:
            level = _level(name, dim, size, asked.named.level or 0)
            wanted.append((level, level + 1))
    others = tuple(axis for axis, dim in enumerate(there) if dim not in kept)
    values = file.read(name, wanted).squeeze(others)
    if dims.time not in kept:  # the one hour of the file stands beside its fields
        values, kept = values[None], [dims.time, *kept]
    values = values.transpose([kept.index(dim) for dim in _axes(kept, dims)])
    if last - first + 1 != len(asked.places) or (np.diff(asked.places) != 1).any():
        values = values[asked.places - first]
    assert len(values) == len(asked.places)
    return _joined(Stored(name, values, file.attributes(name)))


def _level(name: str, dim: str, size: int, level: int) -> int:
    """The place of a level, which may be counted from the end; there is one only where nobody asked."""
    if not -size <= level < size and size > 1:
        raise DataError(f"'{name}' has {size} of {dim}, not a level {level}: correct it in the map.")
    return level % max(size, 1)


def _axes(there: list[str], dims: Dimensions) -> list[str]:
    """Dimensions in our order."""
    return [dims.time, *([PIECES] if PIECES in there else []), dims.y, dims.x]


def _joined(stored: Stored) -> Stored:
    """One analysis of each hour, of several pieces (n, pieces, H, W) where the first that has a value is taken."""
    if stored.values.ndim == 3:
        return stored
    joined = stored.values[:, 0].copy()
    for piece in range(1, stored.values.shape[1]):
        missing = np.isnan(joined) if joined.dtype.kind == "f" else np.zeros(joined.shape, bool)
        for fill in _fill_values(stored):
            missing |= joined == fill
        joined[missing] = stored.values[:, piece][missing]
    return Stored(stored.name, joined, stored.attributes)
