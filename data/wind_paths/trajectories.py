"""Backward trajectories through hourly winds on the sphere.

Air at x at hour t was at x - w dt an hour before, with the wind w of the middle of the way: the
midpoint rule (two stages, second order in dt), bilinear in space and linear in time, which is how
trajectory models such as HYSPLIT (Stein et al. 2015, BAMS 96, 2059) and FLEXTRA do it.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from data import DataError
from data.store.layout import Store

EARTH_RADIUS_KM = 6371.0
HOUR_S = 3600.0
UNEVEN = 1e-3  # cells


@dataclass(frozen=True)
class PathGrid:
    """A regular grid of latitude and longitude, in whose rows and columns positions are counted from 0."""

    lat: np.ndarray  # (H,) degrees
    lon: np.ndarray  # (W,) degrees

    @classmethod
    def of(cls, store: Store) -> PathGrid:
        """The grid of a store.

        Raises:
            DataError: its rows or columns are not evenly spaced.
        """
        for name, axis in (("latitudes", store.lat), ("longitudes", store.lon)):
            steps = np.diff(np.asarray(axis, "f8"))
            if abs(steps - steps.mean()).max() > UNEVEN * abs(steps.mean()):
                raise DataError(f"{store.path}: its {name} are not evenly spaced: paths of the air are for regular grids.")
        return cls(np.asarray(store.lat, "f8"), np.asarray(store.lon, "f8"))

    @property
    def shape(self) -> tuple[int, int]:
        return len(self.lat), len(self.lon)

    @property
    def closes(self) -> bool:
        """Whether the last column is followed by the first one."""
        return bool(abs(len(self.lon) * (self.lon[1] - self.lon[0]) - 360.0) < abs(self.lon[1] - self.lon[0]) / 2)

    @property
    def row_km(self) -> float:
        """Southward positive height of a row, negative where row 0 is the southern one."""
        return float(-np.deg2rad(self.lat[1] - self.lat[0]) * EARTH_RADIUS_KM)

    @property
    def col_km(self) -> float:
        """Width of a column on the equator."""
        return float(np.deg2rad(self.lon[1] - self.lon[0]) * EARTH_RADIUS_KM)

    def centres(self, patch: int) -> Tensor:
        """(P, 2) row and column of the centres of patches, raster order."""
        rows, cols = (torch.arange(size // patch) * patch + (patch - 1) / 2 for size in self.shape)
        return torch.stack(torch.meshgrid(rows, cols, indexing="ij"), -1).reshape(-1, 2)


def sampling_grid(positions: Tensor, shape: tuple[int, int], closes: bool) -> Tensor:
    """(..., 2) row and column -> (..., 2) x and y of `grid_sample` with align_corners, of a field that is `closed`.

    Beyond the outer centres they stay there; columns go around where the grid does.
    """
    rows, cols = shape
    row, col = positions.unbind(-1)
    col = torch.remainder(col, cols) if closes else col.clamp(0, cols - 1)
    return torch.stack([col * 2 / cols - 1, row * 2 / (rows - 1) - 1], -1)


def closed(fields: Tensor) -> Tensor:
    """(..., W) -> (..., W + 1): the first column once more behind the last one."""
    return torch.cat([fields, fields[..., :1]], -1)


def inside(positions: Tensor, shape: tuple[int, int], closes: bool) -> Tensor:
    """(...,) bool: positions (..., 2) that lie in a cell of the grid."""
    row, col = positions.unbind(-1)
    rows = (row >= -0.5) & (row <= shape[0] - 0.5)
    return rows if closes else rows & (col >= -0.5) & (col <= shape[1] - 0.5)


def backward(winds: Tensor, count: int, hours: int, every: int, grid: PathGrid, patch: int) -> Tensor:
    """Where the air of every patch was before.

    Args:
        winds: (hours + count, 2, H, W) float32 eastward and northward wind of consecutive hours, m s-1;
            NaN where missing. The last `count` of them are the hours of arrival.
        count: hours of arrival.
        hours: length of the paths.
        every: hours between the points that are returned.

    Returns:
        (count, hours / every, 2, P) float32 row and column `every`, 2 x `every`, ... hours before
        arrival; NaN from where the wind is missing, or the air comes from outside the grid. Columns
        are counted on where a grid closes around the globe.
    """
    winds = closed(winds)
    rows, cols = grid.shape
    first_lat, lat_step = (float(np.deg2rad(degrees)) for degrees in (grid.lat[0], grid.lat[1] - grid.lat[0]))
    at = grid.centres(patch).T[:, None].repeat(1, count, 1)  # (2, count, P): memory in the order in which it is used
    scale = torch.tensor([2 / cols, 2 / (rows - 1)])[:, None, None]

    def wind(before: int, positions: Tensor) -> Tensor:
        """(2, count, P) the wind that many hours before arrival, m s-1."""
        col = torch.remainder(positions[1], cols) if grid.closes else positions[1].clamp(0, cols - 1)
        places = torch.stack([col, positions[0]]).mul_(scale).sub_(1.0)
        start = hours - before
        sampled = F.grid_sample(
            winds[start : start + count],
            places.permute(1, 2, 0)[:, None],
            padding_mode="border",
            align_corners=True,
        )
        return sampled[:, :, 0].transpose(0, 1)

    def moved(positions: Tensor, velocity: Tensor, row: Tensor, seconds: float) -> Tensor:
        """Positions after a time with a velocity; columns are as wide as in a row on the way."""
        width = torch.cos(first_lat + lat_step * row).clamp_(min=1e-3)
        rows_moved = velocity[1] * (-seconds / 1000.0 / grid.row_km)
        cols_moved = velocity[0] * (seconds / 1000.0 / grid.col_km) / width
        return positions + torch.stack([rows_moved, cols_moved])

    points = []
    for hour in range(hours):
        half = moved(at, wind(hour, at), at[0], -HOUR_S / 2)
        velocity = (wind(hour, half) + wind(hour + 1, half)) / 2
        at = moved(at, velocity, half[0], -HOUR_S)
        at = at.masked_fill_(~inside(at.movedim(0, -1), grid.shape, grid.closes), torch.nan)
        if (hour + 1) % every == 0:
            points.append(at.transpose(0, 1).clone())
    return torch.stack(points, 1)
