"""Opening a file as it is: NetCDF, also in an archive, zarr, GRIB, GeoTIFF."""

from __future__ import annotations

import warnings
import zlib
from collections.abc import Iterator
from contextlib import ExitStack, closing, contextmanager, suppress
from functools import cached_property
from pathlib import Path
from typing import Any

import netCDF4
import numpy as np
import xarray as xr

from data import DataError
from data.prepare.inputs import given, hdf5, netcdf3

UNREADABLE = (OSError, RuntimeError, zlib.error)  # of the libraries of NetCDF and zarr


@contextmanager
def refused_by_name(path: Path) -> Iterator[None]:
    """
    Raises:
        DataError: the file is something else, or truncated, when it is opened or while it is read.
    """
    try:
        yield
    except UNREADABLE as error:
        what = given.described(path) if path.is_file() else ""
        if what:
            raise DataError(f"{path} is {what}.") from error
        raise DataError(f"{path} cannot be read ({error}): it is damaged or cut off. Fetch it again.") from error


class Plain:
    """A NetCDF file, values as they are stored; its own library is asked where HDF5 does not tell, and says what is wrong."""

    def __init__(self, path: Path, content: bytes | None, until: ExitStack) -> None:
        self._path, self._content, self._until = path, content, until
        self._hdf5: hdf5.Fields | None = None
        if hdf5.is_hdf5(path, content):
            with suppress(*hdf5.NOT_READ):
                self._hdf5 = until.enter_context(closing(hdf5.Fields(path, content)))
        told = self._hdf5 and self._hdf5.dimensions
        self._told = self._hdf5 if told else None
        self.dimensions = told or {name: variable.dimensions for name, variable in self._netcdf.variables.items()}

    @cached_property
    def _netcdf(self) -> netCDF4.Dataset:
        file = self._until.enter_context(netCDF4.Dataset(self._path, memory=self._content))
        file.set_auto_maskandscale(False)
        return file

    def shape(self, name: str) -> tuple[int, ...]:
        return tuple(self._netcdf[name].shape if self._told is None else self._told.shape(name))

    def attributes(self, name: str) -> dict[str, Any]:
        """What says how the numbers of a variable are to be read."""
        if self._told is not None:
            return self._told.attributes(name)
        variable = self._netcdf[name]
        return {key: variable.getncattr(key) for key in variable.ncattrs()}

    def read(self, name: str, wanted: list[tuple[int, int]]) -> np.ndarray:
        """Part of a variable, from its first place to before the last along each dimension."""
        values = None
        if self._hdf5 is not None:
            with suppress(*hdf5.NOT_READ):
                values = self._hdf5.read(name, wanted)
        return np.asarray(self._netcdf[name][tuple(slice(*places) for places in wanted)]) if values is None else values


@contextmanager
def opened_plainly(path: Path) -> Iterator[Plain]:
    """
    Raises:
        DataError: as `refused_by_name`.
    """
    archive = given.archive_of(path)
    with refused_by_name(path), ExitStack() as until:
        if archive is None:
            netcdf3.require_whole(path)
        yield Plain(path, None if archive is None else given.read_member(path, archive), until)


def as_it_is(path: Path, encoded: bool) -> xr.Dataset:
    """Any file as a dataset; times raw; fill values and packing decoded unless `encoded`.

    Raises:
        DataError: a package is missing, or the file is damaged.
    """
    how: dict[str, Any] = {"decode_times": False, "mask_and_scale": not encoded}
    archive = given.archive_of(path)
    if archive is not None:
        content = netCDF4.Dataset(path.name, memory=given.read_member(path, archive))
        return xr.open_dataset(xr.backends.NetCDF4DataStore(content), cache=False, **how)
    if path.is_dir():
        return xr.open_zarr(path, chunks=None, consolidated=(path / ".zmetadata").is_file(), **how)
    if given.is_grib(path):
        return _from_grib(path)
    if given.is_tiff(path):
        return _from_geotiff(path)
    netcdf3.require_whole(path)
    return xr.open_dataset(path, engine="netcdf4", cache=False, **how)


def _from_grib(path: Path) -> xr.Dataset:
    """The fields of a GRIB file, each without what says on which level it is."""
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
            raise DataError(f"{path} holds '{name}' more than once, as on several kinds of levels: keep one (`grib_copy`).")
        about = [c for c, value in array.coords.items() if value.ndim == 0 and c not in ("time", "step", "valid_time")]
        fields[name] = array.drop_vars(about)
    try:
        return xr.merge(fields.values(), join="exact", compat="override", combine_attrs="override")
    except ValueError as error:
        raise DataError(f"{path} holds fields of different hours or grids: split it by kind, as with `grib_copy`.") from error


class _Band:
    """One band of a raster, read window by window: the population of the world is 4 GB."""

    ndim = 2
    dtype = np.dtype("f4")

    def __init__(self, path: Path, number: int, shape: tuple[int, int]) -> None:
        self.path, self.number, self.shape = path, number, shape

    def __getitem__(self, window: tuple[slice, slice]) -> np.ndarray:
        import rasterio

        with rasterio.open(self.path) as raster:
            rows, cols = window
            read = raster.read(self.number, window=((rows.start, rows.stop), (cols.start, cols.stop)), masked=True)
        return np.asarray(read.astype("f4").filled(np.nan))


def _from_geotiff(path: Path) -> xr.Dataset:
    """The bands of a raster on latitudes and longitudes, called by their descriptions, or band_1 and so on."""
    try:
        import dask.array
        import rasterio  # an optional extra
    except ImportError as error:
        raise DataError(
            f"{path} is a GeoTIFF, which is read with one more package: pip install rasterio. Or turn it into NetCDF first, as "
            "with `gdal_translate -of netCDF`."
        ) from error
    with rasterio.open(path) as raster:
        shape, step, names = raster.shape, raster.transform, raster.descriptions
        if raster.crs is None or not raster.crs.is_geographic or step.b or step.d:
            raise DataError(f"{path} is not on latitudes and longitudes: `gdalwarp -t_srs EPSG:4326` makes it so.")
    lat, lon = step.f + step.e * (np.arange(shape[0]) + 0.5), step.c + step.a * (np.arange(shape[1]) + 0.5)
    axes = {"lat": ("lat", lat, {"units": "degrees_north"}), "lon": ("lon", lon, {"units": "degrees_east"})}
    bands = {
        name or f"band_{number}": (("lat", "lon"), dask.array.from_array(_Band(path, number, shape), chunks=(1024, 4096)))
        for number, name in enumerate(names, 1)
    }
    return xr.Dataset(bands, axes)
