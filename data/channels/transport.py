"""What the air met on its way, from the paths that stand in a cache: on the device, for a batch.

A path is a row of points 0, 3, ... L hours before the valid time; at the last one the air was where
it was at the analysis.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from data.channels.channels import EVERY_H
from data.channels.sun import cosine_of_zenith_at, season
from data.store.layout import Store
from data.wind_paths.cache import GONE, PathGeometry
from data.wind_paths.trajectories import PathGrid, closed, inside, sampling_grid

CALM = 6.0  # m s-1, above which the ground gives dust (Tegen and Fung 1994)
TYPICAL, GUST = 5.0, 3.0  # m s-1: factors are about 1, so that all maps are learned at one rate
FACTORS = ("one", "wind", "dust", "night", "season_cos", "season_sin")  # of sources; see `factor`
MEMORIES = (24.0, 6.0)  # h, decay times of the exposure
NEEDED = 0.5  # share of valid cells around a point


@dataclass
class Ways:
    """Points of the air of all N cells 0, 3, ... h before the valid time; K is one more than the longest way has steps."""

    positions: Tensor  # (B, K, N, 2) row and column, the last known ones where nobody knows
    known: Tensor  # (B, K, N) bool: the point is known, and not before the analysis
    ages: Tensor  # (K,) hours
    last: Tensor  # (B,) index of the point at the time of the analysis


class Transport:
    """Reads the records of a cache, and what fields were along them."""

    def __init__(self, store: Store, geometry: PathGeometry, device: torch.device) -> None:
        grid = PathGrid.of(store)
        self.geometry, self.shape, self.closes, self.device = geometry, grid.shape, grid.closes, device
        self._unit = torch.tensor([geometry.row_step, geometry.col_step], device=device)
        self._lat0, self._lat_step = float(grid.lat[0]), float(grid.lat[1] - grid.lat[0])
        self._lon0, self._lon_step = float(grid.lon[0]), float(grid.lon[1] - grid.lon[0])
        self._row_km, self._col_km = grid.row_km, grid.col_km
        population = np.log1p(store.static["population"])
        population = (population - population.mean()) / max(float(population.std()), 1e-6)
        self._population = torch.from_numpy(population.astype("f4")).to(device)[None, None]
        rows, cols = (torch.arange(size, device=device) for size in grid.shape)
        self._cells = torch.stack(torch.meshgrid(rows, cols, indexing="ij"), -1).float().view(-1, 2)  # (N, 2)

    def ways(self, records: Tensor, lead_hours: Tensor) -> Ways:
        """The points of a batch's records (B, K - 1, 2, P) int8; those of cells lie between those of patches."""
        batch, count = records.shape[:2]
        rows, cols = (size // self.geometry.patch for size in self.shape)
        gone = (records == GONE).any(2)
        moves = torch.where(gone[:, :, None], 0.0, records.float()) * self._unit[:, None]
        moves = F.pad(moves, (0, 0, 0, 0, 1, 0)).cumsum(1).view(batch * (count + 1), 2, rows, cols)
        moves = F.interpolate(moves, size=self.shape, mode="bilinear", align_corners=False)
        positions = moves.view(batch, count + 1, 2, -1).transpose(2, 3) + self._cells
        known = (F.pad(gone.int(), (0, 0, 1, 0)).cumsum(1) == 0).view(batch, count + 1, rows, cols)
        known = known.repeat_interleave(self.geometry.patch, 2).repeat_interleave(self.geometry.patch, 3).flatten(2)
        ages = EVERY_H * torch.arange(count + 1, device=self.device, dtype=torch.float32)
        known = known & (ages <= lead_hours[:, None])[..., None] & inside(positions, self.shape, self.closes)
        return Ways(positions, known, ages, (lead_hours / EVERY_H).long())

    def places(self, ways: Ways) -> Tensor:
        """(B, K, N, 2) x and y of the points, for `grid_sample` of maps whose first column stands once more behind the last."""
        return sampling_grid(ways.positions, self.shape, self.closes)

    def at(self, fields: Tensor, positions: Tensor) -> Tensor:
        """(B, C, H, W) fields, or (1, C, H, W), at (B, K, N, 2) positions: (B, C, K, N), bilinear."""
        fields = closed(fields).expand(len(positions), -1, -1, -1)
        grid = sampling_grid(positions, self.shape, self.closes)
        return F.grid_sample(fields, grid, padding_mode="border", align_corners=True)

    def carried(self, analysis: Tensor, ways: Ways) -> Tensor:
        """The analysis (B, C, H, W) where the air of every cell was then; NaN where nobody knows."""
        each = torch.arange(len(ways.last), device=self.device)
        departures, known = ways.positions[each, ways.last][:, None], ways.known[each, ways.last][:, None, None]
        valid = torch.isfinite(analysis)
        share = self.at(valid.float(), departures)
        values = self.at(torch.where(valid, analysis, 0.0), departures) / share.clamp(min=1e-6)
        return torch.where((share >= NEEDED) & known, values, torch.nan).view(analysis.shape)

    def exposure(self, ways: Ways) -> Tensor:
        """(B, 2, H, W) mean logarithm of the population along the way, weighted by exp(-age / memory), standardised."""
        population = self.at(self._population, ways.positions)[:, 0]  # (B, K, N)
        found = []
        for memory in MEMORIES:
            weight = torch.exp(-ways.ages / memory)[:, None] * ways.known
            found.append((weight * population).sum(1) / weight.sum(1))
        return torch.stack(found, 1).view(len(population), len(MEMORIES), *self.shape)

    def factors(self, ways: Ways, valid: Tensor, names: Sequence[str]) -> Tensor:
        """What sources are multiplied by along the way, (B, F, K, N): 0 where nobody knows; times the hours of each point.

        Args:
            valid: (B,) float64 hours since 1970 of the valid time.
            names: of FACTORS.
        """
        followed = F.pad(ways.known[:, 1:], (0, 0, 0, 1))  # by an older point
        hours = EVERY_H * ways.known * torch.where(followed, 1.0, 0.5)  # the trapezoid rule
        hours[:, 0] /= 2
        speed, time = self._speed(ways), valid[:, None] - ways.ages.double()  # (B, K)
        found = []
        for name in names:
            if name == "one":
                factor = torch.ones_like(speed)
            elif name == "wind":
                factor = (speed / TYPICAL) ** 2
            elif name == "dust":
                factor = ((speed - CALM).clamp(min=0.0) / GUST) ** 2
            elif name == "night":
                lat = self._lat0 + self._lat_step * ways.positions[..., 0]
                lon = self._lon0 + self._lon_step * ways.positions[..., 1]
                factor = (cosine_of_zenith_at(time[..., None], lat, lon) <= 0.0).float()
            else:
                factor = season(time)[name == "season_cos"][..., None].float().expand_as(speed)
            found.append(factor * hours)
        return torch.stack(found, 1)

    def _speed(self, ways: Ways) -> Tensor:
        """(B, K, N) m s-1 of the air at every point: its way from the older point, or to the younger one at the end."""
        moves = ways.positions[:, :-1] - ways.positions[:, 1:]
        lat = self._lat0 + self._lat_step * ways.positions[:, 1:, :, 0]
        north = moves[..., 0] * self._row_km
        east = moves[..., 1] * self._col_km * torch.cos(torch.deg2rad(lat))
        speed = torch.hypot(north, east) / (EVERY_H * 3.6)
        older, younger = F.pad(speed, (0, 0, 0, 1)), F.pad(speed, (0, 0, 1, 0))
        return torch.where(F.pad(ways.known[:, 1:], (0, 0, 0, 1)), older, younger)
