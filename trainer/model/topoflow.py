"""TopoFlow: a ClimaX-style vision transformer with wind-scan positions and an elevation-biased first block.

One analysis of V variables on an H x W grid -> the target variables `lead_hours` later on the same grid.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from trainer.model.architecture import Architecture
from trainer.model.attention import Attention
from trainer.model.embedding import VariableAggregation, VariablePatchEmbedding, embed_and_aggregate, normalised
from trainer.model.flash import inverse
from trainer.model.layers import DropPath, Mlp, trunc_normal_
from trainer.model.sources import Sources

# Parameters with more than one dimension that need not vary.
START_AT_ZERO = ("var_query", "proj_biases", "analysis_weight", "source_maps", "scan_embed")


class Block(nn.Module):
    """The only block: pre-norm attention and MLP, each on a residual branch with stochastic depth; the first has the biases."""

    def __init__(self, arch: Architecture, first: bool, drop_path: float) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(arch.width, eps=1e-5)
        self.attn = Attention(arch, first)
        self.norm2 = nn.LayerNorm(arch.width, eps=1e-5)
        self.mlp = Mlp(arch.width, int(arch.width * arch.mlp_ratio), arch.first_block_dropout if first else 0.0)
        self.drop_path = DropPath(drop_path)
        self.recompute_attention = arch.recompute == "attention"

    def forward(self, x: Tensor, elevation: Tensor) -> Tensor:
        if self.recompute_attention and self.training:
            attended = checkpoint(self._attend, x, elevation, use_reentrant=False)
        else:
            attended = self._attend(x, elevation)
        x = x + self.drop_path(attended)
        return x + self.drop_path(self.mlp(self.norm2(x)))

    def _attend(self, x: Tensor, elevation: Tensor) -> Tensor:
        return self.attn(self.norm1(x), elevation)


class TopoFlow(nn.Module):
    """The network. `forward(x, lead_hours, elevation, rank)`; see there for shapes and units.

    Raises:
        ValueError: grid and patch, or width and heads, do not divide.
    """

    head_rows: Tensor
    leads: Tensor
    scan_embed: Tensor | None
    analysis_weight: Tensor | None
    sources: Sources | None

    def __init__(self, arch: Architecture) -> None:
        super().__init__()
        if arch.grid[0] % arch.patch or arch.grid[1] % arch.patch:
            raise ValueError(f"model.grid {arch.grid} is not a whole number of {arch.patch} x {arch.patch} patches")
        if arch.width % arch.heads or arch.width % 4:
            raise ValueError(f"model.width {arch.width} must be divisible by heads ({arch.heads}) and by 4")
        self.arch = arch
        rows, cols = arch.patches
        self.var_embed = nn.Parameter(torch.empty(1, arch.variables, arch.width))
        self.var_query = nn.Parameter(torch.zeros(1, 1, arch.width))
        self.pos_embed = nn.Parameter(torch.empty(1, rows * cols, arch.width))
        self.scan_embed = nn.Parameter(torch.zeros(1, rows * cols, arch.width)) if arch.scan_added else None
        self.token_embeds = VariablePatchEmbedding(arch.variables, arch.patch, arch.width, arch.init_std, arch.embedding_norm)
        self.var_agg = VariableAggregation(arch.width, arch.heads)
        self.lead_time_embed = nn.Linear(1, arch.width)
        self.dropout = nn.Dropout(arch.dropout)
        rates = torch.linspace(0, arch.drop_path, arch.depth, device="cpu").tolist()
        self.blocks = nn.ModuleList(Block(arch, first=i == 0, drop_path=rates[i]) for i in range(arch.depth))
        self.norm = nn.LayerNorm(arch.width, eps=1e-5)
        self.head = nn.Sequential(
            nn.Linear(arch.width, arch.width),
            nn.GELU(),
            nn.Linear(arch.width, arch.width),
            nn.GELU(),
            nn.Linear(arch.width, arch.variables * arch.patch**2),
        )
        rows_of_targets = torch.arange(arch.variables * arch.patch**2).view(arch.patch**2, arch.variables)
        self.register_buffer("head_rows", rows_of_targets[:, list(arch.target_channels)].flatten(), persistent=False)
        self.register_buffer("leads", torch.tensor(arch.leads, dtype=torch.float32), persistent=False)
        shape = len(arch.target_channels), len(arch.leads)
        self.analysis_weight = nn.Parameter(torch.zeros(shape)) if arch.leads else None
        self.sources = Sources(arch) if arch.sources else None
        self._initialise()

    def _initialise(self) -> None:
        for module in self.modules():
            if isinstance(module, nn.Linear):
                trunc_normal_(module.weight, std=self.arch.init_std)
                nn.init.zeros_(module.bias)
        rows, cols = self.arch.patches
        with torch.no_grad():
            self.pos_embed.copy_(torch.from_numpy(sincos_2d(self.arch.width, rows, cols)))
            self.var_embed.copy_(torch.from_numpy(sincos_1d(self.arch.width, np.arange(self.arch.variables))))
        # Last, so that the other weights are those of a network without it.
        for module in self.modules():
            if isinstance(module, Attention) and module.relative_position is not None:
                trunc_normal_(module.relative_position, std=0.02)

    def forward(
        self,
        x: Tensor,
        lead_hours: Tensor,
        elevation: Tensor,
        rank: Tensor,
        departure: Tensor | None = None,
        air: tuple[Tensor, Tensor, Tensor, Sequence[int]] | None = None,
    ) -> Tensor:
        """Forecast the targets.

        Args:
            x: (B, V, H, W) normalised analysis.
            lead_hours: (B,) hours ahead.
            elevation: (N,) or (B, N) mean elevation of each patch in metres, raster order.
            rank: (B, N) int64 place of each raster patch along the wind; arange(N) for no scan.
            departure: (B, 2, T, H, W), of a network of changes: the analysis' anomaly, and what is usual at the valid time.
            air: places, factors, ages and numbers of the points of the air's paths, of a network with sources (sources.py).

        Returns:
            (B, T, H, W) normalised targets, in the weights' dtype; fp32 where the analysis or sources are added.

        Raises:
            ValueError: an argument has the wrong shape.
        """
        self._check_door(x, lead_hours, elevation, rank, departure)
        if (air is None) != (self.sources is None):
            raise ValueError("air must be given to a network with sources, and be None for others")
        dtype = self.pos_embed.dtype
        table, form = self.token_embeds(self.var_embed)
        scores, values, bias = self.var_agg(self.var_query, table)
        pixels = self._pixels(x)
        tokens = embed_and_aggregate(pixels if form is None else normalised(pixels, form), scores, values, bias, dtype)
        if self.scan_embed is None:
            tokens = tokens + PositionsAlongWind.apply(self.pos_embed[0], rank)
        else:
            tokens = tokens + self.pos_embed + PositionsAlongWind.apply(self.scan_embed[0], rank)
        tokens = tokens + self.lead_time_embed(lead_hours[:, None].to(dtype))[:, None]
        tokens = self.dropout(tokens)
        elevation = elevation.expand(len(x), -1)
        for block in self.blocks:
            if self.arch.recompute == "blocks" and self.training:
                tokens = checkpoint(block, tokens, elevation, use_reentrant=False)
            else:
                tokens = block(tokens, elevation)
        hidden = self.head[:-1](self.norm(tokens))
        last = self.head[-1]
        assert isinstance(last, nn.Linear)
        forecast = self._to_map(F.linear(hidden, last.weight[self.head_rows], last.bias[self.head_rows]))
        if self.sources is not None and air is not None:
            forecast = forecast.float() + self.sources(*air)
        if self.analysis_weight is None or departure is None:
            return forecast
        # What is usual, and the share of the anomaly that is still there: a number for each target and lead time.
        place = torch.argmin((lead_hours[:, None].float() - self.leads.float()).abs(), 1)
        share = self.analysis_weight.T[place].float()[:, :, None, None]
        return forecast.float() + departure[:, 1].float() + share * departure[:, 0].float()

    def _check_door(self, x: Tensor, lead_hours: Tensor, elevation: Tensor, rank: Tensor, departure: Tensor | None) -> None:
        batch, tokens = x.shape[0], self.arch.patches[0] * self.arch.patches[1]
        expected = (self.arch.variables, *self.arch.grid)
        if x.ndim != 4 or tuple(x.shape[1:]) != expected:
            raise ValueError(f"x must have shape (B, {', '.join(map(str, expected))}), got {tuple(x.shape)}")
        if tuple(lead_hours.shape) != (batch,):
            raise ValueError(f"lead_hours must have shape ({batch},), got {tuple(lead_hours.shape)}: pass one number a sample")
        if tuple(elevation.shape) not in ((tokens,), (batch, tokens)):
            raise ValueError(f"elevation must have shape ({tokens},) or ({batch}, {tokens}), got {tuple(elevation.shape)}")
        targets = (batch, 2, len(self.arch.target_channels), *self.arch.grid)
        given = None if departure is None else tuple(departure.shape)
        if given != (targets if self.arch.leads else None):
            raise ValueError(
                f"departure must have shape {targets} for a network of changes, and be None for others, got {given}"
            )
        if tuple(rank.shape) != (batch, tokens):
            raise ValueError(f"rank must have shape ({batch}, {tokens}), got {tuple(rank.shape)}")

    def _pixels(self, x: Tensor) -> Tensor:
        """(B, V, H, W) -> (B, N, V, p*p), in fp32 at least."""
        (rows, cols), p = self.arch.patches, self.arch.patch
        x = x.view(len(x), self.arch.variables, rows, p, cols, p).permute(0, 2, 4, 1, 3, 5)
        return x.reshape(len(x), rows * cols, self.arch.variables, p * p).to(torch.promote_types(x.dtype, torch.float32))

    def _to_map(self, tokens: Tensor) -> Tensor:
        (rows, cols), p = self.arch.patches, self.arch.patch
        tokens = tokens.view(len(tokens), rows, cols, p, p, len(self.arch.target_channels))
        return tokens.permute(0, 5, 1, 3, 2, 4).reshape(len(tokens), -1, rows * p, cols * p)


class PositionsAlongWind(torch.autograd.Function):
    """pos_embed (N, D), rank (B, N) -> pos_embed[rank] (B, N, D); the backward is a gather by the inverse.

    A scan P that permutes tokens, adds positions and is undone at the output equals adding P^-1 pos in place,
    because every layer between is permutation-equivariant. Nothing moves, so nothing has to be put back.
    """

    @staticmethod
    def forward(ctx: Any, pos_embed: Tensor, rank: Tensor) -> Tensor:
        ctx.save_for_backward(rank)
        return pos_embed[rank]

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        (rank,) = ctx.saved_tensors
        return torch.stack([g[o] for g, o in zip(grads[0], inverse(rank), strict=True)]).sum(0), None


def patch_mean(field: Tensor, patch: int) -> Tensor:
    """(B, H, W) -> (B, N) means over p x p pixels, raster order."""
    return F.avg_pool2d(field.float(), patch).flatten(1)


def sincos_1d(width: int, positions: np.ndarray) -> np.ndarray:
    """(M,) positions -> (M, width) sine then cosine at geometric frequencies (Vaswani et al. 2017), float32."""
    frequency = 1.0 / 10000 ** (np.arange(width // 2) / (width / 2.0))
    angles = np.einsum("m,d->md", positions.reshape(-1).astype("f8"), frequency)
    return np.concatenate([np.sin(angles), np.cos(angles)], axis=1).astype("f4")


def sincos_2d(width: int, rows: int, cols: int) -> np.ndarray:
    """(rows*cols, width): the first half of the width encodes the column, the second the row (He et al. 2022)."""
    col, row = np.meshgrid(np.arange(cols), np.arange(rows))
    return np.concatenate([sincos_1d(width // 2, col), sincos_1d(width // 2, row)], axis=1)
