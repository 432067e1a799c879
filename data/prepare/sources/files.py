"""Files of a source: opening, coordinates, grids, values."""

from __future__ import annotations

from collections.abc import Container, Hashable, Iterator
from contextlib import contextmanager
from pathlib import Path

import cf_xarray  # noqa: F401 - gives datasets their .cf
import numpy as np
import xarray as xr

from data import DataError
from data.prepare.grids.grid import Grid, wrapped
from data.prepare.inputs.opening import as_it_is, refused_by_name
from data.prepare.sources.spellings import Named
from data.prepare.sources.tidy import LATITUDES, LONGITUDES, tidied


@contextmanager
def opened(path: Path, encoded: bool = False) -> Iterator[xr.Dataset]:
    """A NetCDF file, one in an archive, GRIB, or a zarr store, as tidy.py leaves it; times raw, fill values and packing decoded
    unless `encoded`.

    Raises:
        DataError: it is something else, or truncated, when it is opened or while it is read.
    """
    with refused_by_name(path), as_it_is(path, encoded) as dataset:
        yield tidied(dataset, path)


def read_static(dataset: xr.Dataset, name: str, path: Path, around: Grid) -> tuple[Grid, np.ndarray]:
    """A field without time and its grid; of a regular one only what lies within a cell or two of `around`."""
    grid = grid_of(dataset, name, path)
    array = dataset[name].squeeze().transpose(*horizontal(dataset, name, path))
    if grid.lat.ndim == 1:
        middle, margin = float(around.lon.mean()), 2.0
        lon = middle + wrapped(grid.lon - middle)
        rows = np.flatnonzero((grid.lat >= around.lat.min() - margin) & (grid.lat <= around.lat.max() + margin))
        columns = np.flatnonzero((lon >= around.lon.min() - margin) & (lon <= around.lon.max() + margin))
        array = array[rows[0] : rows[-1] + 1] if rows.size else array[:0]
        array, grid = array[:, columns], Grid(grid.lat[rows], grid.lon[columns])
        if not array.size:
            raise DataError(f"{path} does not cover the target.")
    return grid, array.to_numpy()


def grid_of(dataset: xr.Dataset, name: str, path: Path) -> Grid:
    lat, lon = (_coordinate(dataset, name, kind, path) for kind in ("latitude", "longitude"))
    if lat.ndim == 2:
        y, x = horizontal(dataset, name, path)
        lat, lon = (c.transpose(y, x) for c in (lat, lon))
    values = Grid(lat.to_numpy().astype("f8"), lon.to_numpy().astype("f8"))
    if abs(values.lat).max() > 90.0:
        raise DataError(f"{path}: latitudes reach {values.lat.max():.2f}; latitude and longitude look swapped.")
    return values


def _coordinate(dataset: xr.Dataset, name: str, kind: str, path: Path) -> xr.DataArray:
    guessed = xr.Dataset(coords=dataset.coords).cf.guess_coord_axis()
    known = LATITUDES if kind == "latitude" else LONGITUDES
    candidates = [*guessed.cf.coordinates.get(kind, []), *(c for c in known if c in dataset.coords)]
    found = [c for c in dict.fromkeys(candidates) if dataset[c].ndim and set(dataset[c].dims) <= set(dataset[name].dims)]
    found.sort(key=lambda c: (c not in dataset.dims, dataset[c].ndim))  # an axis of its own, before a description of it
    different = [
        c for c in found[1:] if dataset[c].ndim == dataset[found[0]].ndim and not _equal(dataset[c], dataset[found[0]])
    ]
    if not found or different:
        raise DataError(f"{path}: {len(found)} coordinates of '{name}' are its {kind}: {found or list(dataset.coords)}.")
    return dataset[found[0]]


def _equal(a: xr.DataArray, b: xr.DataArray) -> bool:
    return a.shape == b.shape and bool(np.allclose(a.to_numpy(), b.to_numpy(), atol=1e-4))


def horizontal(dataset: xr.Dataset, name: str, path: Path) -> tuple[str, str]:
    """Names of the dimensions from south to north and from west to east."""
    lat, lon = (_coordinate(dataset, name, kind, path) for kind in ("latitude", "longitude"))
    if lat.ndim == 1:
        return str(lat.dims[0]), str(lon.dims[0])
    y, x = lat.dims
    return (
        (str(y), str(x))
        if abs(np.diff(lat.to_numpy(), axis=0)).mean() > abs(np.diff(lat.to_numpy(), axis=1)).mean()
        else (str(x), str(y))
    )


def spelling(held: Container[Hashable], named: Named) -> str | None:
    """The name of a field among those that a file holds, None if it has it not."""
    return next((name for name in named.spellings if name in held), None)
