"""Fields as files store them, and their numbers: packing undone, missing where files say so."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import xarray as xr

from data import DataError
from data.prepare.inputs.opening import opened
from data.prepare.sources.coordinates import PIECES, Layout


@dataclass(frozen=True)
class Stored:
    """A field as it is stored: perhaps packed, with its own fill values."""

    name: str  # in the file
    values: np.ndarray  # (n, H, W), or (n, pieces, H, W) of which the first with a value is taken
    attributes: dict[str, Any]


def stored_hours(path: Path, asked: dict[str, tuple[Layout, np.ndarray]]) -> Iterator[tuple[str, Stored]]:
    """Some fields of a file, each at some places in time, one after the other.

    Raises:
        DataError: the file is damaged.
    """
    with opened(path) as dataset:
        for name, (layout, places) in asked.items():
            yield name, stored_at(dataset, layout, places)


def stored_at(dataset: xr.Dataset, layout: Layout, places: np.ndarray) -> Stored:
    """One field of an opened file at some places in time, in one reading."""
    array = dataset[layout.name].isel(dict(layout.at))
    sizes = tuple(array.sizes[dim] for dim in layout.times)
    index = np.unravel_index(places, sizes) if layout.times else ()
    box = {dim: slice(int(i.min()), int(i.max()) + 1) for dim, i in zip(layout.times, index, strict=True)}
    pieces = [PIECES] if PIECES in array.dims else []
    values = array.isel(box).transpose(*layout.times, *pieces, layout.y, layout.x).to_numpy()
    values = values[tuple(i - i.min() for i in index)] if layout.times else values[None]
    return Stored(layout.name, values, array.attrs)


def decoded(stored: Stored) -> np.ndarray:
    """(n, H, W) float32, NaN where missing; of several pieces the first that has a value."""
    packed = {"scale_factor", "add_offset"} & set(stored.attributes)
    if packed or stored.values.dtype.kind != "f":
        variable = xr.Variable([f"d{axis}" for axis in range(stored.values.ndim)], stored.values, stored.attributes)
        plain = xr.conventions.decode_cf_variable(stored.name, variable, decode_times=False, decode_timedelta=False)
        values = np.array(plain.to_numpy(), "f4")
    else:
        values = np.array(stored.values, "f4", copy=stored.values.dtype != np.float32 or None)
        for fill in _fill_values(stored):
            values[values == fill] = np.nan
    if values.ndim < 4:
        return values
    joined = values[:, 0]
    for piece in range(1, values.shape[1]):
        joined = np.where(np.isnan(joined), values[:, piece], joined)
    return joined


def _fill_values(stored: Stored) -> list[np.float32]:
    """What stands for a missing value, rounded as the data are: files state it as a double, several times, or as text."""
    stated = [value for key in ("_FillValue", "missing_value") for value in np.atleast_1d(stored.attributes.get(key, []))]
    try:
        return [np.float32(value) for value in stated]
    except ValueError as error:
        raise DataError(f"'{stored.name}': its missing value {stated} is not a number. Correct the attribute.") from error
