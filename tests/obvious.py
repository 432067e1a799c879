"""The network written the obvious way, from the same parameters: the independent truth for the fast one.

Variable tokens exist, tokens are really permuted into scan order and back, and the bias is an (N x N) tensor.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from trainer.model.topoflow import Block, TopoFlow


def aggregate(model: TopoFlow, x: Tensor) -> Tensor:
    """(B, V, H, W) -> (B, N, D): a convolution a variable, then torch's own multi-head attention."""
    arch = model.arch
    embed, attention = model.token_embeds, model.var_agg
    tokens = torch.stack(
        [
            F.conv2d(x[:, v : v + 1], embed.proj_weights[v], embed.proj_biases[v], stride=arch.patch).flatten(2).transpose(1, 2)
            for v in range(arch.variables)
        ],
        dim=1,
    )  # (B, V, N, D)
    tokens = (tokens + model.var_embed[:, :, None]).transpose(1, 2).flatten(0, 1)  # (B*N, V, D)
    query = model.var_query.expand(len(tokens), -1, -1).transpose(0, 1)
    keys = tokens.transpose(0, 1)
    out, _ = F.multi_head_attention_forward(
        query,
        keys,
        keys,
        arch.width,
        arch.heads,
        attention.in_proj_weight,
        attention.in_proj_bias,
        None,
        None,
        False,
        0.0,
        attention.out_proj.weight,
        attention.out_proj.bias,
        need_weights=False,
    )
    return out[0].view(len(x), -1, arch.width)


def attend(qkv: Tensor, z: Tensor, slope: Tensor, climb: bool = False) -> Tensor:
    """(B, N, 3, H, d), (B, N) -> (B, N, H, d) with the whole bias and score matrix."""
    q, k, v = (part.transpose(1, 2) for part in qkv.unbind(2))
    higher = z[:, None, :] - z[:, :, None]  # of the key over the query
    bias = -slope * (-higher if climb else higher).clamp_min(0)
    return ((q @ k.transpose(-1, -2) * q.shape[-1] ** -0.5 + bias[:, None]).softmax(-1) @ v).transpose(1, 2)


def block(layer: Block, x: Tensor, z: Tensor) -> Tensor:
    attn = layer.attn
    qkv = attn.qkv(layer.norm1(x)).view(*x.shape[:2], 3, attn.heads, -1)
    if attn.elevation_alpha is None:
        out = F.scaled_dot_product_attention(*(part.transpose(1, 2) for part in qkv.unbind(2))).transpose(1, 2)
    else:
        out = attend(qkv, z, attn.elevation_alpha / attn.H_scale, climb=attn.sign < 0)
    x = x + attn.proj(out.flatten(2))
    return x + layer.mlp(layer.norm2(x))


def encode(model: TopoFlow, x: Tensor, lead_hours: Tensor, elevation: Tensor, rank: Tensor) -> Tensor:
    """Tokens after the last norm, raster order."""
    order = rank.argsort(1)[..., None]
    tokens = aggregate(model, x)
    tokens = tokens.gather(1, order.expand_as(tokens))
    z = elevation.expand(len(x), -1).gather(1, order[..., 0])
    tokens = tokens + model.pos_embed + model.lead_time_embed(lead_hours[:, None])[:, None]
    for layer in model.blocks:
        tokens = block(layer, tokens, z)
    tokens = model.norm(tokens)
    return tokens.gather(1, rank[..., None].expand_as(tokens))


def forward(model: TopoFlow, x: Tensor, lead_hours: Tensor, elevation: Tensor, rank: Tensor) -> Tensor:
    arch = model.arch
    (rows, cols), p = arch.patches, arch.patch
    out = model.head(encode(model, x, lead_hours, elevation, rank)).view(len(x), rows, cols, p, p, arch.variables)
    out = torch.einsum("nhwpqc->nchpwq", out).reshape(len(x), arch.variables, rows * p, cols * p)
    return out[:, list(arch.target_channels)]


class Obvious(TopoFlow):
    """A module with the same parameters, to train."""

    def forward(self, x: Tensor, lead_hours: Tensor, elevation: Tensor, rank: Tensor) -> Tensor:
        dtype = self.pos_embed.dtype
        return forward(self, x.to(dtype), lead_hours.to(dtype), elevation.to(dtype), rank)
