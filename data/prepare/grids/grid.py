"""Grids of latitude and longitude, regular and curvilinear."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from data import DataError

EARTH_RADIUS = 6371.0  # km


@dataclass(frozen=True)
class Grid:
    """Cell centres in degrees: lat (H,) and lon (W,), or both (H, W) where the grid is curvilinear."""

    lat: np.ndarray
    lon: np.ndarray

    @property
    def shape(self) -> tuple[int, int]:
        return (len(self.lat), len(self.lon)) if self.lat.ndim == 1 else (self.lat.shape[0], self.lat.shape[1])


def same_grid(one: Grid, other: Grid, tolerance: float) -> bool:
    """Whether all coordinates agree within `tolerance` degrees on the globe, longitudes counted to 180 or to 360."""
    if one.lat.shape != other.lat.shape or one.lon.shape != other.lon.shape:
        return False
    differences = one.lat - other.lat, wrapped(one.lon - other.lon)
    return all(np.allclose(each, 0.0, rtol=0.0, atol=tolerance) for each in map(_where_known, differences)) and all(
        np.array_equal(np.isnan(a), np.isnan(b)) for a, b in ((one.lat, other.lat), (one.lon, other.lon))
    )


def _where_known(values: np.ndarray) -> np.ndarray:
    return values[~np.isnan(values)]


def edges(centres: np.ndarray) -> np.ndarray:
    """(N + 1,) borders half-way between (N,) centres, the outer ones as far out as their neighbours."""
    middle = (centres[1:] + centres[:-1]) / 2
    return np.concatenate([[2 * centres[0] - middle[0]], middle, [2 * centres[-1] - middle[-1]]])


def spacing(grid: Grid) -> tuple[float, float]:
    """Median cell size in degrees of latitude and longitude."""
    lat, lon = grid.lat, grid.lon
    if lat.ndim == 1:
        return float(np.median(abs(np.diff(lat)))), float(np.median(abs(np.diff(lon))))
    return float(np.nanmedian(abs(np.diff(lat, axis=0)))), float(np.nanmedian(abs(wrapped(np.diff(lon, axis=1)))))


def turned(u: np.ndarray, v: np.ndarray, grid: Grid) -> tuple[np.ndarray, np.ndarray]:
    """Winds (T, H, W) along the axes of a curvilinear grid, as eastward and northward ones.

    Raises:
        DataError: the axes are turned by more than 45 degrees somewhere, so that nobody can tell which of them is u's.
    """
    steps = wrapped(np.diff(grid.lon, axis=1))
    along = np.concatenate([steps[:, :1], (steps[:, 1:] + steps[:, :-1]) / 2, steps[:, -1:]], axis=1)
    east = along * np.cos(np.deg2rad(grid.lat))
    north = np.gradient(grid.lat, axis=1)
    length = np.hypot(east, north) * (-1.0 if np.nanmedian(east) < 0 else 1.0)  # columns may be stored from east to west
    cosine, sine = (east / length).astype("f4"), (north / length).astype("f4")
    if np.nanmin(cosine) < np.cos(np.pi / 4):
        raise DataError("--winds grid: the grid is turned by more than 45 degrees against east: turn its winds beforehand.")
    return u * cosine - v * sine, u * sine + v * cosine


def areas(lat: np.ndarray, lon: np.ndarray) -> np.ndarray:
    """(H, W) km2 of the cells of a regular grid, (H,) and (W,) degrees, on a sphere."""
    height = abs(np.diff(np.sin(np.deg2rad(np.clip(edges(lat), -90.0, 90.0)))))
    return np.asarray(EARTH_RADIUS**2 * height[:, None] * abs(np.diff(np.deg2rad(edges(lon))))[None])


def wrapped(degrees: np.ndarray) -> np.ndarray:
    """The same angles in -180 .. 180."""
    return (degrees + 180.0) % 360.0 - 180.0


def as_tables(grids: list[Grid]) -> dict[str, np.ndarray]:
    """Grids as what an .npz holds."""
    return {f"{kind}/{number}": getattr(grid, kind) for number, grid in enumerate(grids) for kind in ("lat", "lon")}


def from_tables(tables: Mapping[str, np.ndarray]) -> list[Grid]:
    """The grids that `as_tables` made, perhaps among other tables."""
    count = sum(name.startswith("lat/") for name in tables)
    return [Grid(tables[f"lat/{number}"], tables[f"lon/{number}"]) for number in range(count)]
