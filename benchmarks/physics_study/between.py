"""`python -m trainer` with another bias: the highest ground on the straight way between two patches, above the source.

    python -m benchmarks.physics_study.between train --config ... ; evaluate RUN

For the study's grid only: the heights of all ways are a table of (N, N). It shows whether the idea is worth a kernel.
"""

from __future__ import annotations

import sys
from unittest import mock

import torch
from torch import Tensor
from torch.nn import functional as F

from trainer.__main__ import main
from trainer.model import topoflow
from trainer.model.architecture import Architecture
from trainer.model.attention import Attention


class BetweenAttention(Attention):
    """bias_ij = -alpha * max(0, highest ground from j to i - z_j), per km."""

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


def over_the_way(height: Tensor) -> Tensor:
    """(R, C) heights, m -> (N, N) how far the highest ground on the straight way from key j to query i is above j."""
    rows, cols = height.shape
    place = torch.cartesian_prod(torch.arange(rows), torch.arange(cols)).to(height)  # (N, 2)
    highest = torch.full((len(place), len(place)), -torch.inf)
    steps = 2 * max(rows, cols)
    for share in torch.linspace(0, 1, steps + 1).tolist():
        on_the_way = (place[:, None] * share + place[None] * (1 - share)).round().long()
        highest = torch.maximum(highest, height[on_the_way[..., 0], on_the_way[..., 1]])
    return highest - height.flatten()[None]


if __name__ == "__main__":
    with mock.patch.object(topoflow, "Attention", BetweenAttention):
        sys.exit(main(sys.argv[1:]))
