"""The network of the release of 2026 written out from its description, with its own names: the truth for ours.

Everything is there as a tensor: variable tokens, moved tokens, both biases, buckets by the logarithm.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn import functional as F

from trainer.model.architecture import Architecture

PREFIX = "model."
ELEVATION = 13  # its place among the published inputs


def checkpoint(arch: Architecture, seed: int = 0) -> dict[str, Tensor]:
    """A state dict with the release's names and shapes, and noise for values, fp32."""
    width, area, hidden = arch.width, arch.patch**2, int(arch.width * arch.mlp_ratio)
    shapes: dict[str, tuple[int, ...]] = {
        "patch_embed.proj_weights": (arch.variables, width, 1, arch.patch, arch.patch),
        "patch_embed.proj_biases": (arch.variables, width),
        "patch_embed.norm.weight": (width,),
        "patch_embed.norm.bias": (width,),
        "var_embed": (1, arch.variables, width),
        "var_query": (1, 1, width),
        "var_agg.in_proj_weight": (3 * width, width),
        "var_agg.in_proj_bias": (3 * width,),
        "var_agg.out_proj.weight": (width, width),
        "var_agg.out_proj.bias": (width,),
        "pos_embed": (1, arch.patches[0] * arch.patches[1], width),
        "lead_time_embed.weight": (width, 1),
        "lead_time_embed.bias": (width,),
        "blocks.0.attn.rel_pos_bias.bias_table": (1024, arch.heads),
        "blocks.0.attn.alpha": (1,),
        "norm.weight": (width,),
        "norm.bias": (width,),
    }
    sizes = {
        "attn.qkv": (3 * width, width),
        "attn.proj": (width, width),
        "mlp.fc1": (hidden, width),
        "mlp.fc2": (width, hidden),
    }
    for i in range(arch.depth):
        for layer, size in sizes.items():
            shapes |= {f"blocks.{i}.{layer}.weight": size, f"blocks.{i}.{layer}.bias": size[:1]}
        for norm in ("norm1", "norm2"):
            shapes |= {f"blocks.{i}.{norm}.weight": (width,), f"blocks.{i}.{norm}.bias": (width,)}
    for i, rows in ((0, width), (2, width), (4, arch.variables * area)):
        shapes |= {f"head.{i}.weight": (rows, width), f"head.{i}.bias": (rows,)}
    generator = torch.Generator().manual_seed(seed)
    state = {name: 0.3 * torch.randn(shape, generator=generator) for name, shape in shapes.items()}
    for name in state:
        if "norm" in name and name.endswith("weight"):
            state[name] += 1.0
    state["blocks.0.attn.alpha"] = torch.tensor([2.0])
    return {PREFIX + name: tensor for name, tensor in state.items()}


def forward(state: dict[str, Tensor], arch: Architecture, x: Tensor, lead_hours: Tensor, scan: bool) -> Tensor:
    """(B, V, H, W) input, (B,) hours -> (B, T, H, W), in the state's precision."""
    w = {name.removeprefix(PREFIX): tensor for name, tensor in state.items()}
    (rows, cols), patch, batch = arch.patches, arch.patch, len(x)
    elevation = F.avg_pool2d(x[:, ELEVATION], patch).flatten(1)
    tokens = []
    for v in range(arch.variables):
        token = F.conv2d(x[:, v : v + 1], w["patch_embed.proj_weights"][v], w["patch_embed.proj_biases"][v], stride=patch)
        tokens.append(layer_norm(token.flatten(2).transpose(1, 2), w, "patch_embed.norm"))
    embedded = torch.stack(tokens, 1)  # (B, V, N, D)
    if scan:
        embedded = torch.stack([embedded[b, :, order(x[b], rows, cols)] for b in range(batch)])
    embedded = (embedded + w["var_embed"][:, :, None]).transpose(1, 2).flatten(0, 1)  # (B * N, V, D)
    aggregate = torch.nn.MultiheadAttention(arch.width, arch.heads, batch_first=True).to(x.dtype)
    own = {name.removeprefix("var_agg."): tensor for name, tensor in w.items() if name.startswith("var_agg.")}
    query = w["var_query"].expand(len(embedded), -1, -1)
    y, _ = torch.func.functional_call(aggregate, own, (query, embedded, embedded))
    y = y.view(batch, rows * cols, arch.width) + w["pos_embed"]
    y = y + F.linear(lead_hours[:, None], w["lead_time_embed.weight"], w["lead_time_embed.bias"])[:, None]
    for i in range(arch.depth):
        bias = biases(w, arch, elevation) if i == 0 else torch.zeros((), dtype=x.dtype)
        y = y + attention(layer_norm(y, w, f"blocks.{i}.norm1"), w, f"blocks.{i}.attn.", arch.heads, bias)
        hidden = F.gelu(linear(layer_norm(y, w, f"blocks.{i}.norm2"), w, f"blocks.{i}.mlp.fc1"))
        y = y + linear(hidden, w, f"blocks.{i}.mlp.fc2")
    y = layer_norm(y, w, "norm")
    for i in (0, 2):
        y = F.gelu(linear(y, w, f"head.{i}"))
    y = linear(y, w, "head.4").view(batch, rows, cols, patch, patch, arch.variables)
    y = torch.einsum("bhwpqv->bvhpwq", y).reshape(batch, arch.variables, rows * patch, cols * patch)
    return y[:, list(arch.target_channels)]


def biases(w: dict[str, Tensor], arch: Architecture, elevation: Tensor) -> Tensor:
    """(B, heads, N, N)."""
    rows, cols = arch.patches
    climb = (elevation[:, None, :] - elevation[:, :, None]) / 1000.0
    by_height = (-w["blocks.0.attn.alpha"] * climb.relu()).clamp(-10.0, 0.0)
    column = [int(c / cols * 128) for _ in range(rows) for c in range(cols)]
    row = [int(r / rows * 128) for r in range(rows) for _ in range(cols)]
    places = [
        [bucket(cj - ci) * 32 + bucket(rj - ri) for cj, rj in zip(column, row, strict=True)]
        for ci, ri in zip(column, row, strict=True)
    ]
    by_distance = w["blocks.0.attn.rel_pos_bias.bias_table"][torch.tensor(places)].permute(2, 0, 1)
    return by_height[:, None] + by_distance


def bucket(distance: int) -> int:
    """T5's, of 16 a sign: 8 exact ones, then by the logarithm up to 128."""
    size = abs(distance)
    if size >= 8:
        size = min(15, 8 + int(math.log(size / 8) / math.log(16) * 8 + 1e-9))
    return size + 16 * (distance < 0)


def order(x: Tensor, rows: int, cols: int) -> list[int]:
    """Patches along the mean wind in bands, those of even row + column first; new position -> raster patch."""
    u, v = float(x[0].float().mean()), float(x[1].float().mean())
    sector = int(math.atan2(v, u) % (2 * math.pi) / (2 * math.pi) * 16) % 16
    angle = 2 * math.pi * sector / 16
    along = sorted(range(rows * cols), key=lambda n: n // cols * math.sin(angle) + n % cols * math.cos(angle))
    bands = max(rows, cols)
    size = len(along) // bands
    result = []
    for band in range(bands):
        inside = along[band * size : (band + 1) * size if band < bands - 1 else None]
        result += sorted(inside, key=lambda n: (n // cols + n % cols) % 2 * 1000 + n)
    return result


def attention(y: Tensor, w: dict[str, Tensor], name: str, heads: int, bias: Tensor) -> Tensor:
    q, k, v = linear(y, w, f"{name}qkv").view(*y.shape[:2], 3, heads, -1).permute(2, 0, 3, 1, 4)
    weights = (q @ k.transpose(-1, -2) * q.shape[-1] ** -0.5 + bias).softmax(-1)
    return linear((weights @ v).transpose(1, 2).flatten(2), w, f"{name}proj")


def linear(y: Tensor, w: dict[str, Tensor], name: str) -> Tensor:
    return F.linear(y, w[f"{name}.weight"], w[f"{name}.bias"])


def layer_norm(y: Tensor, w: dict[str, Tensor], name: str) -> Tensor:
    return F.layer_norm(y, y.shape[-1:], w[f"{name}.weight"], w[f"{name}.bias"])
