"""Sources learned along the paths of the air.

The source-receptor relation of dispersion modelling (Seibert and Frank 2004, Atmos. Chem. Phys. 4, 51; footprints: Lin et
al. 2003, J. Geophys. Res. 108, 4493) as a layer. Air that arrives at x at time t was at X(a) a hours before. To the forecast
of pollutant c it adds

    sum_b  integral_0^L  f_b(X(a), t - a)  S_cb(X(a))  exp(-a / T_c)  da

S_cb are maps on the grid, zero at the start; f_b factors of time and weather (1, wind, night, ...), known; T_c a lifetime of
each pollutant; L the lead time. Maps are what explains the data along these paths, which is not an inventory of emissions.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from trainer.model.architecture import Architecture

FIRST_LIFETIME = 24.0  # h


class Sources(nn.Module):
    """Maps of sources and lifetimes of the targets; adds nothing until they are learned."""

    def __init__(self, arch: Architecture) -> None:
        super().__init__()
        self.arch = arch
        targets = len(arch.target_channels)
        self.source_maps = nn.Parameter(torch.zeros(targets, len(arch.sources), *arch.grid))
        self.log_lifetime = nn.Parameter(torch.full((targets,), math.log(FIRST_LIFETIME)))

    def forward(self, places: Tensor, factors: Tensor, ages: Tensor, counts: Sequence[int]) -> Tensor:
        """What the air has taken up.

        Args:
            places: (B, K, N, 2) x and y of the points of every cell's path, as `grid_sample` with align_corners has them;
                of maps whose first column stands once more behind the last one.
            factors: (B, F, K, N) of `arch.sources`, times the hours that each point stands for; 0 where nobody knows.
            ages: (K,) hours before the valid time.
            counts: how many of the K points each sample has; the others are not looked at.

        Returns:
            (B, T, H, W) float32 in units of the normalised targets.

        Raises:
            ValueError: factors are not those of the architecture.
        """
        targets, kinds = self.source_maps.shape[:2]
        if factors.shape[1] != kinds:
            raise ValueError(f"factors must be {', '.join(self.arch.sources)}, got {factors.shape[1]}")
        maps = self.source_maps.float().flatten(0, 1)[None]
        maps = torch.cat([maps, maps[..., :1]], -1)
        left = torch.exp(-ages[None] / self.log_lifetime.float().exp()[:, None])  # (T, K)
        taken_up = []
        for sample, count in enumerate(counts):  # a short way costs less
            at = places[sample : sample + 1, :count]
            sampled = F.grid_sample(maps, at, padding_mode="border", align_corners=True)
            given_off = (sampled.view(targets, kinds, count, -1) * factors[sample, :, :count]).sum(1)
            taken_up.append((given_off * left[:, :count, None]).sum(1))
        return torch.stack(taken_up).view(-1, targets, *self.arch.grid)
