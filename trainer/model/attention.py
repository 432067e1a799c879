"""Multi-head self-attention; in the first block with the elevation bias."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from trainer.model.elevation_bias import elevation_biased_attention


class Attention(nn.Module):
    """Multi-head self-attention; with `elevation_bias`, one learned scalar `elevation_alpha` per kilometre of climb.

    State dict: qkv, proj, and with the bias `elevation_alpha` () and the buffer `H_scale` () in metres.
    """

    H_scale: Tensor

    def __init__(
        self, width: int, heads: int, elevation_bias: bool, alpha_init: float = 0.01, bias_floor: float | None = None
    ) -> None:
        super().__init__()
        self.heads, self.bias_floor = heads, bias_floor
        self.qkv = nn.Linear(width, 3 * width)
        self.proj = nn.Linear(width, width)
        self.elevation_alpha: nn.Parameter | None = None
        if elevation_bias:
            self.elevation_alpha = nn.Parameter(torch.tensor([alpha_init]))
            self.register_buffer("H_scale", torch.tensor(1000.0))
            self.register_state_dict_post_hook(_store_alpha_as_scalar)
            self.register_load_state_dict_pre_hook(_load_alpha_from_scalar)

    def forward(self, x: Tensor, elevation: Tensor) -> Tensor:
        """(B, N, D) tokens and their (B, N) elevations in metres -> (B, N, D)."""
        batch, tokens, width = x.shape
        qkv = self.qkv(x).view(batch, tokens, 3, self.heads, width // self.heads)
        if self.elevation_alpha is None:
            q, k, v = qkv.transpose(1, 3).unbind(2)
            out = F.scaled_dot_product_attention(q, k, v).transpose(1, 2)
        else:
            precise = torch.promote_types(self.elevation_alpha.dtype, torch.float32)
            slope = self.elevation_alpha.to(precise) / self.H_scale.to(precise)
            out = elevation_biased_attention(qkv, elevation, slope[0], self.bias_floor)
        return self.proj(out.reshape(batch, tokens, width))


# DeepSpeed broadcasts parameters as bytes and cannot view a 0-dimensional one; files keep the published shape ().
def _store_alpha_as_scalar(module: nn.Module, state: dict[str, Tensor], prefix: str, *_: Any) -> None:
    alpha = state[f"{prefix}elevation_alpha"]
    if alpha.numel():  # empty where ZeRO 3 has partitioned it
        state[f"{prefix}elevation_alpha"] = alpha.view(())


def _load_alpha_from_scalar(module: nn.Module, state: dict[str, Tensor], prefix: str, *_: Any) -> None:
    name = f"{prefix}elevation_alpha"
    if name in state and state[name].ndim == 0:
        state[name] = state[name].view(1)
