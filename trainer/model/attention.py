"""Multi-head self-attention; in the first block with the biases that a network has there."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from trainer.model.architecture import RELATIVE_BUCKETS, Architecture
from trainer.model.elevation_bias import bucket_of, cell_numbers, chunked_attention, elevation_biased_attention


class Attention(nn.Module):
    """Multi-head self-attention; in the first block with one learned scalar `elevation_alpha` per kilometre of height.

    State dict: qkv, proj; in the first block, where the architecture has them, `elevation_alpha` () with the buffer `H_scale`
    () in metres, and the table `relative_position` (1024, heads).
    """

    H_scale: Tensor
    bucket_of_columns: Tensor
    bucket_of_rows: Tensor

    def __init__(self, arch: Architecture, first: bool) -> None:
        super().__init__()
        self.heads, self.bias_floor = arch.heads, arch.bias_floor
        # A receiver looks at sources: descent charges it for higher ones, climb for lower ones, whose air must climb.
        self.sign = -1.0 if arch.elevation_bias == "climb" else 1.0
        self.dropout = arch.first_block_dropout if first else 0.0
        self.qkv = nn.Linear(arch.width, 3 * arch.width)
        self.proj = nn.Linear(arch.width, arch.width)
        self.elevation_alpha: nn.Parameter | None = None
        self.relative_position: nn.Parameter | None = None
        if first and arch.elevation_bias != "none":
            self.elevation_alpha = nn.Parameter(torch.tensor([arch.alpha_init]))
            self.register_buffer("H_scale", torch.tensor(1000.0))
            self.register_state_dict_post_hook(_store_alpha_as_scalar)
            self.register_load_state_dict_pre_hook(_load_alpha_from_scalar)
        if first and arch.relative_position:
            self.relative_position = nn.Parameter(torch.empty(RELATIVE_BUCKETS**2, arch.heads))
            rows, cols = (bucket_of(cell_numbers(count)) for count in arch.patches)
            self.register_buffer("bucket_of_rows", rows, persistent=False)
            self.register_buffer("bucket_of_columns", cols, persistent=False)

    def forward(self, x: Tensor, elevation: Tensor) -> Tensor:
        """(B, N, D) tokens and their (B, N) elevations in metres -> (B, N, D)."""
        batch, tokens, width = x.shape
        qkv = self.qkv(x).view(batch, tokens, 3, self.heads, width // self.heads)
        out = self.proj(self._attend(qkv, elevation).reshape(batch, tokens, width))
        return F.dropout(out, self.dropout, self.training)

    def _attend(self, qkv: Tensor, elevation: Tensor) -> Tensor:
        dropout = self.dropout if self.training else 0.0
        slope = None
        if self.elevation_alpha is not None:
            precise = torch.promote_types(self.elevation_alpha.dtype, torch.float32)
            slope = (self.elevation_alpha.to(precise) / self.H_scale.to(precise))[0]
        z, table = self.sign * elevation, self.relative_position
        if table is not None or dropout:  # with dropout torch itself would hold all pairs on a CPU
            buckets = None if table is None else (self.bucket_of_rows, self.bucket_of_columns)
            return chunked_attention(qkv, z, slope, self.bias_floor, table, buckets, dropout)
        if slope is not None:
            return elevation_biased_attention(qkv, z, slope, self.bias_floor)
        q, k, v = qkv.transpose(1, 3).unbind(2)
        return F.scaled_dot_product_attention(q, k, v).transpose(1, 2)


# DeepSpeed broadcasts parameters as bytes and cannot view a 0-dimensional one; files keep the published shape ().
def _store_alpha_as_scalar(module: nn.Module, state: dict[str, Tensor], prefix: str, *_: Any) -> None:
    alpha = state[f"{prefix}elevation_alpha"]
    if alpha.numel():  # empty where ZeRO 3 has partitioned it
        state[f"{prefix}elevation_alpha"] = alpha.view(())


def _load_alpha_from_scalar(module: nn.Module, state: dict[str, Tensor], prefix: str, *_: Any) -> None:
    name = f"{prefix}elevation_alpha"
    if name in state and state[name].ndim == 0:
        state[name] = state[name].view(1)
