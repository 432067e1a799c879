"""Opening a file whatever its format: NetCDF, also in an archive, zarr, GRIB, GeoTIFF; or saying what it is instead."""

from __future__ import annotations

import json
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import netCDF4
import numpy as np
import xarray as xr
from rich.console import Console

from data import DataError
from data.prepare.inputs import given, grib, netcdf3

UNREADABLE = (OSError, RuntimeError, zlib.error)  # of the libraries of NetCDF and zarr
RAW: dict[str, Any] = {"decode_times": False, "decode_timedelta": False, "mask_and_scale": False}


@contextmanager
def opened(path: Path) -> Iterator[xr.Dataset]:
    """A file as a dataset, numbers and times as they are stored.

    Raises:
        DataError: it is something else, or truncated, when it is opened or while it is read.
    """
    try:
        with _opened(path) as dataset:
            yield dataset
    except UNREADABLE as error:
        what = given.described(path) if path.is_file() else ""
        if what:
            raise DataError(f"{path} is {what}.") from error
        raise DataError(f"{path} cannot be read ({error}): it is damaged or cut off. Fetch it again.") from error


def _opened(path: Path) -> xr.Dataset:
    archive = given.archive_of(path)
    if archive is not None:
        content = netCDF4.Dataset(path.name, memory=given.read_member(path, archive))
        return xr.open_dataset(xr.backends.NetCDF4DataStore(content), cache=False, **RAW)
    if path.is_dir():
        return _from_zarr(path)
    if given.is_grib(path):
        return grib.read(path)
    if given.is_tiff(path):
        return _from_geotiff(path)
    netcdf3.require_whole(path)
    return xr.open_dataset(path, engine="netcdf4", cache=False, **RAW)


def _from_zarr(path: Path) -> xr.Dataset:
    """A store as it is now: what was consolidated may be older; zarr's own fill value, 0, marks nothing as missing."""
    dataset = xr.open_zarr(path, chunks=None, consolidated=False, **RAW)
    for name, then in _consolidated(path).items():
        if name in dataset.variables and tuple(then) != dataset[name].shape:
            Console(stderr=True).print(
                f"WARNING: {path}: '{name}' is {dataset[name].shape}, and {tuple(then)} when its "
                "metadata were consolidated: what is newer is read, too"
            )
            break
    for variable in dataset.variables.values():
        stated = variable.encoding.get("_FillValue", variable.attrs.get("_FillValue"))
        if stated is not None and np.all(stated == 0) and "missing_value" not in variable.attrs:
            variable.attrs.pop("_FillValue", None)
    return dataset


def _consolidated(path: Path) -> dict[str, list[int]]:
    """Shapes of arrays as a store's consolidated metadata have them, of either version of zarr."""
    if (path / ".zmetadata").is_file():
        about = json.loads((path / ".zmetadata").read_text())["metadata"]
        return {str(Path(name).parent): a["shape"] for name, a in about.items() if Path(name).name == ".zarray"}
    if (path / "zarr.json").is_file():
        about = (json.loads((path / "zarr.json").read_text()).get("consolidated_metadata") or {}).get("metadata", {})
        return {name: array["shape"] for name, array in about.items() if "shape" in array}
    return {}


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
