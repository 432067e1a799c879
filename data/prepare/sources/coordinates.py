"""THE opinion on place: where the cells of a field lie, and on which level.

CF decides first (standard_name, units, axis), then the names that are known, and a bare axis in
degrees last. Nothing else in the project looks at these attributes. Datasets come undecoded
(opening.py): numbers as they are stored.
"""

from __future__ import annotations

import re
from collections.abc import Hashable
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import xarray as xr
from cf_xarray.criteria import coordinate_criteria

from data import DataError
from data.prepare.grids.grid import Grid
from data.prepare.sources.times import TIME_LIKE, Hours

LATITUDES = ("lat", "latitude", "lat2d", "LAT", "Latitude", "XLAT", "XLAT_M", "nav_lat")
LONGITUDES = ("lon", "longitude", "lon2d", "LON", "Longitude", "XLONG", "XLONG_M", "nav_lon")
NAMES = {"latitude": (LATITUDES, "y"), "longitude": (LONGITUDES, "x")}
DEGREES = re.compile(r"deg|°", re.IGNORECASE)
OF_A_PROJECTION = ("grid_latitude", "grid_longitude", "projection_x_coordinate", "projection_y_coordinate")
LEVELS = ("level", "lev", "plev", "pressure_level", "isobaricInhPa", "height", "heightAboveGround", "bottom_top", "z")
PIECES = "expver"  # ERA5's final and its preliminary analyses, each missing where the other one is
UNMOVED = 1e-4  # degrees between two descriptions of one axis


class Layout(NamedTuple):
    """How a file lays out one field."""

    name: str  # in the file
    y: str  # northward dimension
    x: str  # eastward dimension
    times: tuple[str, ...] = ()  # dimensions along which the hour changes; none for a single hour
    at: tuple[tuple[str, int], ...] = ()  # places along all other dimensions


@dataclass(frozen=True)
class Coordinates:
    """Where the cells of a field lie."""

    grid: Grid
    y: str
    x: str


def coordinates(dataset: xr.Dataset, name: str, path: Path) -> Coordinates:
    """Latitude and longitude of a field's cells, and its dimensions along them.

    Raises:
        DataError: there are none or several, they move with time, or the grid has no rows and
            columns.
    """
    lat, lon = (_found(dataset, name, kind, path) for kind in NAMES)
    if lat.ndim == 1 and lon.dims == lat.dims:
        raise DataError(
            f"{path}: '{name}' is on {lat.size} points without rows and columns (a reduced or "
            "unstructured grid): make it regular first, as with `cdo -setgridtype,regular` or `cdo "
            "remapbil,r360x180`, or ask for it in the request."
        )
    if lat.ndim == 1:
        y, x = str(lat.dims[0]), str(lon.dims[0])
    else:
        along = [abs(np.diff(_degrees(lat), axis=axis)) for axis in (0, 1)]
        y, x = (str(dim) for dim in (lat.dims if np.nanmean(along[0]) > np.nanmean(along[1]) else lat.dims[::-1]))
        lat, lon = lat.transpose(y, x), lon.transpose(y, x)
    grid = Grid(_degrees(lat), _degrees(lon))
    if np.nanmax(abs(grid.lat)) > 90.0:
        raise DataError(f"{path}: latitudes reach {np.nanmax(grid.lat):.2f}; latitude and longitude look swapped.")
    return Coordinates(grid, y, x)


def layout(
    dataset: xr.Dataset, name: str, place: Coordinates, hours: Hours, level: float | None, path: Path, field: str
) -> Layout:
    """Which part of a variable is the field: the level is found by its value, where the file states values.

    Args:
        field: what we call it, for messages.

    Raises:
        DataError: there are several levels and none was named, or not that one.
    """
    array = dataset[name]
    others = [str(dim) for dim in array.dims if dim not in (*hours.dims, place.y, place.x, PIECES)]
    for dim in others:
        if array.sizes[dim] > 1 and TIME_LIKE.fullmatch(dim):
            raise DataError(
                f"{path}: '{name}' has {array.sizes[dim]} of '{dim}' and nothing says when each is "
                f"valid: give '{dim}' times "
                "with units, as 'hours since 2015-03-01'."
            )
    several = [dim for dim in others if array.sizes[dim] > 1]
    if len(several) > 1:
        raise DataError(
            f"{path}: '{name}' has more than one of {' and of '.join(several)}: a map chooses "
            "along one of them. Cut the file "
            f"along '{several[0]}' first, as with `ncks -d {several[0]},0`."
        )
    if several and level is None:
        values = _level_values(dataset, several[0])
        listed = "" if values is None else f" ({', '.join(f'{x:g}' for x in values[:8])}{', ...' if len(values) > 8 else ''})"
        example = 0 if values is None else values[0]
        raise DataError(
            f"{path}: '{name}' has more than one of {several[0]}{listed}: say which in a map, as  "
            f"{field}: {{name: {name}, level: {example:g}}}  (`generic --map`)."
        )
    named = several or [dim for dim in others if _is_vertical(dataset, dim)]
    at = tuple((dim, _level_place(dataset, name, dim, level, path) if dim in named else 0) for dim in others)
    return Layout(name, place.y, place.x, hours.dims, at)


def level_of(dataset: xr.Dataset, name: str, at: tuple[tuple[str, int], ...]) -> float | None:
    """The height, pressure or number that a field lies on; None where its file does not say."""
    for dim, where in at:
        values = _level_values(dataset, dim)
        if values is not None:
            return float(values[where])
    told = str(dataset.variables[name].encoding.get("coordinates", " ".join(LEVELS))).split()
    known = (dataset.variables[c] for c in LEVELS if c in dataset.variables and c in told)
    return next((float(value) for value in known if value.ndim == 0 and value.dtype.kind in "iuf"), None)


def _found(dataset: xr.Dataset, name: str, kind: str, path: Path) -> xr.DataArray:
    """The latitude or longitude of a field: as CF says, as it is usually called, or a bare axis in degrees."""
    dims, (known, bare) = set(dataset[name].dims), NAMES[kind]
    here = {c: dataset[c] for c in map(str, dataset.variables) if dataset[c].ndim and c != name}
    here = {c: v for c, v in here.items() if set(v.dims[-2:]) <= dims and v.dtype.kind in "iuf"}
    by_cf = [c for c, v in here.items() if _says(v, kind)]
    by_name = [c for c in known if c in here and _in_degrees(here[c], None)]
    by_axis = [c for c in (bare,) if c in here and _in_degrees(here[c], bare)]
    for candidates in (by_cf, by_name, by_axis):
        still = [_still(here[c], path) for c in candidates]
        still = [c for c in still if set(c.dims) <= dims]
        if still:
            still.sort(key=lambda c: (c.name not in c.dims, c.ndim))  # an axis of its own, before a description of it
            alike = [c for c in still if c.ndim == still[0].ndim]
            if any(c.shape != alike[0].shape or not _close(c, alike[0]) for c in alike[1:]):
                listed = ", ".join(str(c.name) for c in alike)
                raise DataError(f"{path}: {listed} are each the {kind} of '{name}', and differ. Remove all but one.")
            return still[0]
    raise DataError(
        f"{path}: no coordinate of '{name}' is its {kind} (it has "
        f"{', '.join(map(str, dataset[name].dims))}): state one, with the units "
        f"degrees_{'north' if kind == 'latitude' else 'east'}."
    )


def _says(variable: xr.DataArray, kind: str) -> bool:
    """Whether CF's attributes make a variable the latitude or the longitude."""
    about = {key: str(value).strip() for key, value in variable.attrs.items()}
    if about.get("standard_name") in OF_A_PROJECTION:
        return False
    criteria = coordinate_criteria[kind]
    return any(about.get(key) in criteria[key] for key in ("standard_name", "units", "_CoordinateAxisType"))


def _in_degrees(variable: xr.DataArray, bare: str | None) -> bool:
    units = str(variable.attrs.get("units", "")).strip()
    if variable.attrs.get("standard_name") in OF_A_PROJECTION:
        return False
    if bare and not units:  # degrees, as of ETOPO1, unless they count cells
        values = np.asarray(variable, "f8")
        return not np.array_equal(values, values[0] + np.arange(len(values))) or values[0] not in (0.0, 1.0)
    return bool(DEGREES.search(units)) if units else True


def _degrees(coordinate: xr.DataArray) -> np.ndarray:
    """Decoded; radians, which some models write, as degrees."""
    values = np.asarray(xr.decode_cf(coordinate.to_dataset(name="values"), decode_times=False)["values"], "f8")
    return np.rad2deg(values) if str(coordinate.attrs.get("units", "")).startswith("rad") else values


def _close(one: xr.DataArray, other: xr.DataArray) -> bool:
    return bool(np.allclose(_degrees(one), _degrees(other), atol=UNMOVED, equal_nan=True))


def _still(coordinate: xr.DataArray, path: Path) -> xr.DataArray:
    """Without leading dimensions, along which it must not change."""
    for dim in coordinate.dims[:-2]:
        if coordinate.sizes[dim] > 1:
            values = coordinate.to_numpy()
            if not (np.take(values, [0], coordinate.get_axis_num(dim)) == values).all():
                raise DataError(f"{path}: '{coordinate.name}' changes along '{dim}': a grid that moves is not supported.")
        first = coordinate.isel({dim: 0})
        coordinate = first.drop_vars([c for c in first.coords if c not in first.dims])
    return coordinate


def _level_values(dataset: xr.Dataset, dim: Hashable) -> np.ndarray | None:
    """What a file calls the places along a dimension that is neither time nor place: heights, pressures, members."""
    alone = [c for c in map(str, dataset.variables) if dataset[c].dims == (dim,) and dataset[c].dtype.kind in "iuf"]
    alone.sort(key=lambda c: (c != dim, c not in LEVELS))
    if not alone or (alone[0] != dim and len(alone) > 1 and alone[0] not in LEVELS):
        return None
    return np.asarray(dataset[alone[0]].to_numpy(), "f8")


def _is_vertical(dataset: xr.Dataset, dim: str) -> bool:
    about = dataset[dim].attrs if dim in dataset.variables else {}
    return dim in LEVELS or about.get("axis") == "Z" or "positive" in about


def _level_place(dataset: xr.Dataset, name: str, dim: str, level: float | None, path: Path) -> int:
    """The place of a level along a dimension: by its value, or counted from 0 where the file states none."""
    size, values = dataset[name].sizes[dim], _level_values(dataset, dim)
    if level is None:
        return 0
    if values is None:
        if size > 1 and not (float(level).is_integer() and -size <= level < size):
            raise DataError(f"{path}: '{name}' has {size} of {dim}, not a level {level:g}: correct it in the map.")
        return int(level) % size if size > 1 else 0
    found = np.flatnonzero(np.isclose(values, level, rtol=1e-6, atol=1e-9))
    if len(found) != 1:
        listed = ", ".join(f"{x:g}" for x in values[:12])
        raise DataError(
            f"{path}: '{name}' has the levels {listed} ('{dim}'), and the map asks for level: "
            f"{level:g}. Name one of these, "
            "by its value."
        )
    return int(found[0])
