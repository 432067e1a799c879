"""`python -m trainer` with another bias in the first block, to learn whether an idea is worth building:

    python -m benchmarks.physics_study.alternatives advection train --config ...

between    -alpha * max(0, highest ground on the straight way from key to query - z of the key), per km; a table of (N, N)
locality   -beta_h * squared distance between key and query, 1000 km
advection  -beta_h * squared distance between where the key's air goes and where the query's air comes from: half of the way
           each, with the wind of the analysis at the key and that of the valid time at the query
deaf       no attention between patches, in any block: what attention, as it is trained here, is worth

A squared distance |a_i - b_j|^2 is |b_j|^2 - 2 a_i . b_j but for a constant along the row, so the last two are three more
dimensions of queries and keys: exact in any flash kernel, without a table.
"""

from __future__ import annotations

import sys
from typing import Any, ClassVar
from unittest import mock

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from data.synthetic.atmosphere import EARTH_RADIUS
from data.synthetic.synthesize import load_static
from trainer.__main__ import main
from trainer.model import topoflow
from trainer.model.architecture import Architecture
from trainer.model.attention import Attention

WIND_NOW, WIND_THEN = (0, 1), (15, 16)  # channels of u, v among the study's inputs
DAILY_WAY = 0.4  # 1000 km that the air goes a day with one deviation of the wind, at the start


class BetweenAttention(Attention):
    """The highest ground on the way instead of the difference of heights."""

    def __init__(self, arch: Architecture, first: bool) -> None:
        super().__init__(arch, first)
        self.patches = arch.patches
        self._over: Tensor | None = None

    def _attend(self, qkv: Tensor, elevation: Tensor) -> Tensor:
        if self.elevation_alpha is None:
            return super()._attend(qkv, elevation)
        if self._over is None:  # terrain does not change
            self._over = over_the_way(elevation[0].view(self.patches))
        q, k, v = qkv.transpose(1, 3).unbind(2)
        bias = -self.elevation_alpha / self.H_scale * self._over
        return F.scaled_dot_product_attention(q, k, v, attn_mask=bias.to(q.dtype)).transpose(1, 2)


class NearAttention(Attention):
    """Attention to what is near, or will be."""

    moving = False
    now: ClassVar[tuple[Tensor, ...]]  # inputs and lead times of the forward pass

    def __init__(self, arch: Architecture, first: bool) -> None:
        super().__init__(arch, first)
        self.patch, self.beta = arch.patch, nn.Parameter(torch.full((arch.heads,), 0.5)) if first else None
        if first:
            self.register_buffer("place", places(arch), persistent=False)
            # Wind is normalised: the way of a day is a multiple of it, and the mean wind's.
            self.daily_way = nn.Parameter(torch.tensor([DAILY_WAY, 0.0, DAILY_WAY, 0.0])) if self.moving else None

    def _attend(self, qkv: Tensor, elevation: Tensor) -> Tensor:
        if self.beta is None:
            return super()._attend(qkv, elevation)
        q, k, v = qkv.unbind(2)  # (B, N, H, d)
        heads, scale = q.shape[2], q.shape[-1] ** -0.5
        wanted, going = self.place.expand(len(q), -1, -1), self.place.expand(len(q), -1, -1)
        if self.daily_way is not None:
            x, lead = self.now
            factor, mean = self.daily_way.view(2, 2).unbind(1)
            halves = (lead / 48.0)[:, None, None]  # half of the time, in days
            wanted = wanted - halves * (self._wind(x, WIND_THEN) * factor + mean)
            going = going + halves * (self._wind(x, WIND_NOW) * factor + mean)
        one = torch.ones_like(wanted[..., :1])
        more_q = torch.cat([wanted, one], -1)[:, :, None].expand(-1, -1, heads, -1)
        squared = (going**2).sum(-1, keepdim=True)
        more_k = torch.cat([2 * going, -squared], -1)[:, :, None] * (self.beta / scale)[:, None]
        wide_q, wide_k = torch.cat([q, more_q.to(q.dtype)], -1), torch.cat([k, more_k.to(k.dtype)], -1)
        return F.scaled_dot_product_attention(*(t.transpose(1, 2) for t in (wide_q, wide_k, v)), scale=scale).transpose(1, 2)

    def _wind(self, x: Tensor, channels: tuple[int, int]) -> Tensor:
        """(B, N, 2), eastward and northward."""
        return F.avg_pool2d(x[:, list(channels)].float(), self.patch).flatten(2).transpose(1, 2)


class AdvectingAttention(NearAttention):
    moving = True


class DeafAttention(Attention):
    """Every patch attends to itself alone: what a network is worth that moves nothing from patch to patch."""

    def _attend(self, qkv: Tensor, elevation: Tensor) -> Tensor:
        return qkv[:, :, 2]


KINDS = {"between": BetweenAttention, "locality": NearAttention, "advection": AdvectingAttention, "deaf": DeafAttention}


def over_the_way(height: Tensor) -> Tensor:
    """(R, C) heights, m -> (N, N) how far the highest ground on the straight way from key j to query i is above j."""
    rows, cols = height.shape
    place = torch.cartesian_prod(torch.arange(rows), torch.arange(cols)).to(height)  # (N, 2)
    highest = torch.full((len(place), len(place)), -torch.inf)
    for share in torch.linspace(0, 1, 2 * max(rows, cols) + 1).tolist():
        on_the_way = (place[:, None] * share + place[None] * (1 - share)).round().long()
        highest = torch.maximum(highest, height[on_the_way[..., 0], on_the_way[..., 1]])
    return highest - height.flatten()[None]


def places(arch: Architecture) -> Tensor:
    """(N, 2) middles of the patches, east and north, 1000 km."""
    lat, lon, _ = load_static(*arch.grid)
    north, east = np.deg2rad(lat - lat.mean()), np.deg2rad(lon - lon.mean()) * np.cos(np.deg2rad(lat.mean()))
    field = torch.from_numpy(np.stack(np.meshgrid(east, north)) * EARTH_RADIUS / 1e6).float()
    return F.avg_pool2d(field[None], arch.patch)[0].flatten(1).T


def remembered(forward: Any) -> Any:
    """The network's forward pass, whose first block also sees the wind."""

    def with_wind(self: topoflow.TopoFlow, x: Tensor, lead_hours: Tensor, *more: Tensor) -> Tensor:
        NearAttention.now = (x, lead_hours)
        out: Tensor = forward(self, x, lead_hours, *more)
        return out

    return with_wind


if __name__ == "__main__":
    with (
        mock.patch.object(topoflow, "Attention", KINDS[sys.argv[1]]),
        mock.patch.object(topoflow.TopoFlow, "forward", remembered(topoflow.TopoFlow.forward)),
    ):
        sys.exit(main(sys.argv[2:]))
