"""Files of a source: opening, coordinates, grids, values."""

from __future__ import annotations

import warnings
import zlib
from collections.abc import Container, Hashable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import cf_xarray  # noqa: F401 - gives datasets their .cf
import netCDF4
import numpy as np
import xarray as xr

from data import DataError
from data.prepare.grids.grid import Grid, wrapped
from data.prepare.inputs import given, netcdf3
from data.prepare.sources.spellings import Named
from data.prepare.sources.tidy import LATITUDES, LONGITUDES, tidied

UNREADABLE = (OSError, RuntimeError, zlib.error)  # of the libraries of NetCDF and zarr


@contextmanager
def opened(path: Path, encoded: bool = False) -> Iterator[xr.Dataset]:
    """A NetCDF file, one in an archive, GRIB, or a zarr store, as tidy.py leaves it; times raw, fill values and packing decoded
    unless `encoded`.

    Raises:
        DataError: it is something else, or truncated, when it is opened or while it is read.
    """
    with _refused_by_name(path), _as_it_is(path, encoded) as dataset:
        yield tidied(dataset, path)


@contextmanager
def opened_plainly(path: Path) -> Iterator[netCDF4.Dataset]:
    """A NetCDF file as its own library gives it, values as they are stored.

    Raises:
        DataError: as `opened`.
    """
    archive = given.archive_of(path)
    with _refused_by_name(path):
        if archive is None:
            netcdf3.require_whole(path)
        content = None if archive is None else given.read_member(path, archive)
        with netCDF4.Dataset(path, memory=content) as file:
            file.set_auto_maskandscale(False)
            yield file


@contextmanager
def _refused_by_name(path: Path) -> Iterator[None]:
    try:
        yield
    except UNREADABLE as error:
        what = given.described(path) if path.is_file() else ""
        if what:
            raise DataError(f"{path} is {what}.") from error
        raise DataError(f"{path} cannot be read ({error}): it is damaged or cut off. Fetch it again.") from error


def _as_it_is(path: Path, encoded: bool) -> xr.Dataset:
    how: dict[str, Any] = {"decode_times": False, "mask_and_scale": not encoded}
    archive = given.archive_of(path)
    if archive is not None:
        content = netCDF4.Dataset(path.name, memory=given.read_member(path, archive))
        return xr.open_dataset(xr.backends.NetCDF4DataStore(content), cache=False, **how)
    if path.is_dir():
        return xr.open_zarr(path, chunks=None, consolidated=(path / ".zmetadata").is_file(), **how)
    if given.is_grib(path):
        return _from_grib(path)
    netcdf3.require_whole(path)
    return xr.open_dataset(path, engine="netcdf4", cache=False, **how)


def _from_grib(path: Path) -> xr.Dataset:
    """The fields of a GRIB file, whatever their levels: one level a field, or a map says which."""
    try:
        import cfgrib  # an optional extra
        from gribapi.errors import GribInternalError
    except ImportError as error:
        raise DataError(
            f"{path} is GRIB, which is read with two more packages: pip install cfgrib eccodes. Or turn it into NetCDF "
            "first, as with `grib_to_netcdf`."
        ) from error
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)
            parts = cfgrib.open_datasets(str(path), backend_kwargs={"indexpath": "", "errors": "raise"}, decode_times=False)
    except GribInternalError as error:
        raise DataError(f"{path} is damaged or cut off GRIB ({error}): fetch it again.") from error
    fields: dict[str, xr.DataArray] = {}
    for name, array in ((str(name), array) for part in parts for name, array in part.data_vars.items()):
        if name in fields:
            raise DataError(
                f"{path} holds '{name}' more than once, as at several kinds of levels: keep one, as with `grib_copy`."
            )
        about = [c for c, value in array.coords.items() if value.ndim == 0 and c not in ("time", "step", "valid_time")]
        fields[name] = array.drop_vars(about)
    try:
        return xr.merge(fields.values(), join="exact", compat="override", combine_attrs="override")
    except ValueError as error:
        raise DataError(f"{path} holds fields of different hours or grids: split it by kind, as with `grib_copy`.") from error


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
