"""NetCDF files as CAQRA and CAMS publish them, with made-up fields, and the static files a preparation needs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import netCDF4
import numpy as np
import xarray as xr

# name -> (least, greatest) of the made-up values, in the file's units
CAQRA = {
    "u": (-12, 12),
    "v": (-12, 12),
    "temp": (250, 310),
    "rh": (20, 95),
    "psfc": (60_000, 103_000),
    "pm2_5": (5, 150),
    "pm10": (10, 300),
    "so2": (1, 60),
    "no2": (1, 90),
    "co": (0.1, 3.0),
    "o3": (10, 180),
}
CAQRA_UNITS = {"u": "m/s", "v": "m s-1", "temp": "K", "rh": "%", "psfc": "Pa", "co": "mg/m3"}
CAMS_SURFACE = {
    "u10": (-12, 12, "m s**-1"),
    "v10": (-12, 12, "m s**-1"),
    "t2m": (250, 310, "K"),
    "d2m": (235, 249, "K"),
    "sp": (6e4, 1.03e5, "Pa"),
    "pm2p5": (5e-9, 1.5e-7, "kg m**-3"),
    "pm10": (1e-8, 3e-7, "kg m**-3"),
}
CAMS_LEVEL = {"so2": (1e-9, 6e-8), "no2": (1e-9, 9e-8), "co": (1e-7, 3e-6), "go3": (1e-8, 1.5e-7)}


def smooth(shape: tuple[int, ...], low: float, high: float, rng: np.random.Generator) -> np.ndarray:
    """(T, H, W) float32 waves with a little noise, between low and high."""
    time, rows, cols = np.meshgrid(*(np.linspace(0, 1, n) for n in shape), indexing="ij", sparse=True)
    a, b, c, d = rng.uniform(1, 5, 4)
    wave = np.sin(6 * a * rows + 9 * time) * np.cos(5 * b * cols - 7 * time) + 0.5 * np.sin(c * 4 * (rows + cols) + d)
    wave = wave + 0.1 * rng.standard_normal(shape)
    return np.asarray(low + (high - low) * (np.clip(wave, -1.7, 1.7) + 1.7) / 3.4, "f4")


def lambert(rows: int, cols: int, kilometres: float = 15.0) -> tuple[np.ndarray, np.ndarray]:
    """(H, W) latitude and longitude of a Lambert conformal grid over China, as CAQRA's."""
    standard, middle, radius = np.deg2rad([25.0, 40.0]), np.deg2rad([35.0, 103.0]), 6370.0
    n = np.log(np.cos(standard[0]) / np.cos(standard[1])) / np.log(
        np.tan(np.pi / 4 + standard[1] / 2) / np.tan(np.pi / 4 + standard[0] / 2)
    )
    f = np.cos(standard[0]) * np.tan(np.pi / 4 + standard[0] / 2) ** n / n
    origin = radius * f / np.tan(np.pi / 4 + middle[0] / 2) ** n
    x, y = np.meshgrid((np.arange(cols) - (cols - 1) / 2) * kilometres, (np.arange(rows) - (rows - 1) / 2) * kilometres)
    rho = np.sign(n) * np.hypot(x, origin - y)
    lat = 2 * np.arctan((radius * f / rho) ** (1 / n)) - np.pi / 2
    return np.rad2deg(lat), np.rad2deg(middle[1] + np.arctan2(x, origin - y) / n)


def write_caqra(
    path: Path,
    *,
    start: str,
    hours: int,
    grid: tuple[int, int] = (40, 52),
    seed: int = 0,
    kilometres: float = 100.0,
    missing: float = 0.02,
    without: tuple[int, ...] = (),
    names: dict[str, str] | None = None,
    zlib: bool = True,
    units: dict[str, str] | None = None,
    scale: dict[str, float] | None = None,
) -> None:
    """Hourly fields on a curvilinear grid, float32 with declared fill values; the hours `without` are left out."""
    rng = np.random.default_rng(seed)
    lat, lon = lambert(*grid, kilometres)
    kept = np.array([h for h in range(hours) if h not in without])
    with netCDF4.Dataset(path, "w") as file:
        for dim, size in (("time", None), ("y", grid[0]), ("x", grid[1])):
            file.createDimension(dim, size)
        time = file.createVariable("time", "f8", ("time",))
        time.units, time.calendar = f"hours since {start} 00:00:00", "gregorian"
        time[:] = kept
        for name, values, unit in (("lat2d", lat, "degrees_north"), ("lon2d", lon, "degrees_east")):
            variable = file.createVariable(name, "f4", ("y", "x"))
            variable.units = unit
            variable[:] = values
        for name, (low, high) in CAQRA.items():
            fields = smooth((hours, *grid), low, high, rng)[kept] * (scale or {}).get(name, 1.0)
            fields[rng.random(fields.shape) < missing] = -999.0
            variable = file.createVariable(
                (names or {}).get(name, name),
                "f4",
                ("time", "y", "x"),
                zlib=zlib,
                complevel=1,
                fill_value=-999.0,
                chunksizes=(1, *grid),
            )
            variable.units = (CAQRA_UNITS | (units or {})).get(name, "ug/m3")
            variable.coordinates = "lat2d lon2d"
            variable[:] = fields


def write_cams(folder: Path, *, start: str, days: int, seed: int = 0, step: float = 0.75) -> list[Path]:
    """Three-hourly global-style files, latitudes descending, longitudes 0..360, packed; surface and level apart."""
    rng = np.random.default_rng(seed)
    times = np.datetime64(start, "ns") + np.arange(0, 24 * days, 3).astype("timedelta64[h]")
    lat, lon = np.arange(60.0, 4.9, -step), np.arange(60.0, 150.1, step)
    shape = (len(times), len(lat), len(lon))
    coordinates: dict[str, Any] = {
        "time": times,
        "latitude": ("latitude", lat, {"units": "degrees_north"}),
        "longitude": ("longitude", lon, {"units": "degrees_east"}),
    }
    surface = {
        name: (("time", "latitude", "longitude"), smooth(shape, low, high, rng), {"units": units})
        for name, (low, high, units) in CAMS_SURFACE.items()
    }
    level = {
        name: (("time", "level", "latitude", "longitude"), smooth(shape, low, high, rng)[:, None], {"units": "kg kg**-1"})
        for name, (low, high) in CAMS_LEVEL.items()
    }
    written = []
    for kind, fields, more in (("surface", surface, {}), ("level", level, {"level": [60]})):
        dataset = xr.Dataset(fields, coordinates | more)
        packing = {}
        for name, (_, values, _) in fields.items():
            low, high = float(values.min()), float(values.max())
            packing[name] = {
                "dtype": "i2",
                "_FillValue": -32767,
                "zlib": True,
                "scale_factor": (high - low) / 60_000,
                "add_offset": (high + low) / 2,
            }
        dataset.to_netcdf(
            folder / f"{kind}.nc", encoding=packing | {"time": {"units": "hours since 1900-01-01", "dtype": "i4"}}
        )
        written.append(folder / f"{kind}.nc")
    return written


def write_static(path: Path, step: float = 0.5) -> None:
    """Elevation with sea floor, population with NaN at sea, and a land mask, on a global-style regular grid."""
    lat, lon = np.arange(-5.0, 70.0, step), np.arange(50.0, 160.0, step)
    y, x = np.meshgrid(lat, lon, indexing="ij")
    elevation = 3000 * np.exp(-(((x - 95) / 15) ** 2 + ((y - 33) / 9) ** 2)) + 40 * (115 - x)
    land = (x < 118).astype("f4")
    population = np.where(land > 0, 300 * np.exp(-(((x - 112) / 9) ** 2 + ((y - 32) / 8) ** 2)), np.nan)
    dims = ("lat", "lon")
    xr.Dataset(
        {"z": (dims, np.where(land > 0, np.abs(elevation), -2000.0)), "people": (dims, population), "land": (dims, land)},
        {"lat": ("lat", lat, {"units": "degrees_north"}), "lon": ("lon", lon, {"units": "degrees_east"})},
    ).to_netcdf(path)
