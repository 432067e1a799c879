"""Patches in order along the wind: order tables for every sector, and the sector of every wind."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from data import DataError
from data.store.layout import Store

NO_WIND = 255


@dataclass(frozen=True)
class Geometry:
    """What determines the order tables."""

    grid: tuple[int, int]  # pixels
    patch: int  # pixels a side
    regions: tuple[int, int]
    sectors: int
    aspect: float  # height of a cell on the ground over its width, at the middle latitude
    north_first: bool  # row 0 is the northern edge

    @property
    def patches(self) -> tuple[int, int]:
        return self.grid[0] // self.patch, self.grid[1] // self.patch

    @property
    def region_patches(self) -> tuple[int, int]:
        return self.patches[0] // self.regions[0], self.patches[1] // self.regions[1]


def geometry_of(store: Store, patch: int, regions: tuple[int, int], sectors: int) -> Geometry:
    """The scan geometry of a store."""
    return geometry(store.lat, store.lon, patch, regions, sectors)


def geometry(lat: np.ndarray, lon: np.ndarray, patch: int, regions: tuple[int, int], sectors: int) -> Geometry:
    """The scan geometry of a grid of cell centres, degrees.

    Raises:
        DataError: the grid is not a whole number of patches and regions.
    """
    rows, cols = len(lat), len(lon)
    if not 1 <= sectors < NO_WIND or min(*regions, patch) < 1:
        raise DataError(
            f"{sectors} sectors, {regions[0]} x {regions[1]} regions, patch {patch}: use 1 to {NO_WIND - 1} sectors, and at "
            "least one region and pixel."
        )
    if rows % (patch * regions[0]) or cols % (patch * regions[1]):
        raise DataError(
            f"a grid of {rows} x {cols} pixels with {patch} x {patch} patches has {rows / patch:g} x {cols / patch:g} "
            f"patches, not divisible into {regions[0]} x {regions[1]} regions: choose other --regions."
        )
    middle = np.deg2rad(lat.mean())
    aspect = abs(lat[1] - lat[0]) / abs(lon[1] - lon[0]) / np.cos(middle)
    return Geometry((rows, cols), patch, regions, sectors, round(float(aspect), 6), bool(lat[0] > lat[-1]))


def order_along_wind(rows: int, cols: int, geometry: Geometry) -> np.ndarray:
    """(S, rows*cols) int32: raster patches of a rows x cols block sorted upwind to downwind, for every sector.

    Distances are ground distances. Projections are rounded before the stable sort, so that patches side by side
    across the wind keep raster order on every machine.
    """
    angles = 2 * np.pi * np.arange(geometry.sectors) / geometry.sectors
    north = np.arange(rows)[:, None] * (-1.0 if geometry.north_first else 1.0) * geometry.aspect
    east = np.arange(cols)[None] * 1.0
    along = np.cos(angles)[:, None, None] * east + np.sin(angles)[:, None, None] * north
    return np.argsort(along.reshape(geometry.sectors, -1).round(6), axis=1, kind="stable").astype("i4")


def invert(orders: np.ndarray) -> np.ndarray:
    """(S, N) permutations -> their inverses, int64."""
    ranks = np.empty(orders.shape, "i8")
    np.put_along_axis(ranks, orders.astype("i8"), np.arange(orders.shape[1])[None], axis=1)
    return ranks


def sector_codes(u: np.ndarray, v: np.ndarray, regions: tuple[int, int], sectors: int) -> np.ndarray:
    """Sector of the speed-weighted mean wind, of the whole grid and of each region.

    Args:
        u, v: (T, H, W) wind in m/s; NaN where missing.

    Returns:
        (T, 1 + regions) uint8; NO_WIND where no cell has a wind.
    """
    return np.concatenate([_codes(u, v, (1, 1), sectors), _codes(u, v, regions, sectors)], axis=1)


def beyond_the_domain(codes: np.ndarray, domain_mask: np.ndarray, regions: tuple[int, int]) -> np.ndarray:
    """Sectors (T, 1 + regions) where a region without wind takes the whole grid's, if none of its cells is in the domain.

    Nothing is forecast there, so its order is free; without one, no hour of a dataset that ends at the border of a country,
    or of a source that ends inside the target, would have a regional scan. Inside the domain NO_WIND stays.
    """
    (rows, cols), (height, width) = regions, domain_mask.shape
    outside = ~(domain_mask > 0).reshape(rows, height // rows, cols, width // cols).any((1, 3)).ravel()
    local = np.where(outside & (codes[:, 1:] == NO_WIND), codes[:, :1], codes[:, 1:])
    return np.concatenate([codes[:, :1], local], axis=1)


def _codes(u: np.ndarray, v: np.ndarray, regions: tuple[int, int], sectors: int) -> np.ndarray:
    time, height, width = u.shape
    rows, cols = regions
    split = (time, rows, height // rows, cols, width // cols)
    u, v = u.astype("f8").reshape(split), v.astype("f8").reshape(split)
    valid = np.isfinite(u) & np.isfinite(v)
    u, v = np.where(valid, u, 0.0), np.where(valid, v, 0.0)
    speed = np.hypot(u, v)
    angle = np.arctan2((v * speed).sum((2, 4)), (u * speed).sum((2, 4)))
    codes = np.round(angle / (2 * np.pi / sectors)).astype(int) % sectors
    return np.where(valid.any((2, 4)), codes, NO_WIND).reshape(time, -1).astype("u1")
