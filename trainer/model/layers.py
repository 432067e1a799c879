"""Stochastic depth, the two-layer perceptron of a block and the initial weights, with timm's names and arithmetic.

timm itself imports all of its models and torchvision, seconds on every rank; the tests hold these against it.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class DropPath(nn.Module):
    """Drops whole samples from a residual branch and scales the others up (Huang et al. 2016, stochastic depth)."""

    def __init__(self, rate: float) -> None:
        super().__init__()
        self.drop_prob = rate

    def forward(self, x: Tensor) -> Tensor:
        """(B, ...) -> (B, ...)."""
        if self.drop_prob == 0.0 or not self.training:
            return x
        keep = 1.0 - self.drop_prob
        kept = x.new_empty((len(x),) + (1,) * (x.ndim - 1)).bernoulli_(keep)
        return x * kept.div_(keep)


class Mlp(nn.Module):
    """(..., D) -> (..., D) through `hidden` units with GELU."""

    def __init__(self, width: int, hidden: int, dropout: float = 0.0) -> None:
        super().__init__()
        self.fc1 = nn.Linear(width, hidden)
        self.act = nn.GELU()
        self.fc2 = nn.Linear(hidden, width)
        self.dropout = dropout  # after either

    def forward(self, x: Tensor) -> Tensor:
        hidden = F.dropout(self.act(self.fc1(x)), self.dropout, self.training)
        return F.dropout(self.fc2(hidden), self.dropout, self.training)


@torch.no_grad()
def trunc_normal_(weight: Tensor, std: float, bound: float = 2.0) -> None:
    """Fill with N(0, std^2) inside +- `bound`, by the inverse of its distribution function."""
    reached = math.erf(bound / std / math.sqrt(2.0))
    weight.uniform_(-reached, reached).erfinv_().mul_(std * math.sqrt(2.0)).clamp_(-bound, bound)
