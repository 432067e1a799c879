"""Everything the old code did differently, quarantined: dialects of its weights, and its wind-scan arithmetic.

Nothing here is used by a new run unless it imports old weights or sets `wind_scan.mode: legacy`.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cache

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

LEGACY_REGIONS = (32, 32)
RELEASE_SECTORS = 16
# Beside weights: buffers of the old code, and counts that keepers of running means leave there.
KNOWN_BUFFERS = ("china_mask", "target_indices", "initted", "step", "n_averaged", "num_updates", "decay")
WRAPPERS = {"_orig_mod", "module", "_fsdp_wrapped_module", "_checkpoint_wrapped_module"}
WRAPPERS |= {"_forward_module"}
_RENAMED = (
    (re.compile(r"(blocks\.\d+\.mlp\.)0\.(weight|bias)$"), r"\1fc1.\2"),
    (re.compile(r"(blocks\.\d+\.mlp\.)[23]\.(weight|bias)$"), r"\1fc2.\2"),
    (re.compile(r"(blocks\.0\.attn\.)alpha$"), r"\1elevation_alpha"),
    (re.compile(r"(blocks\.0\.attn\.)rel_pos_bias\.bias_table$"), r"\1relative_position"),
    (re.compile(r"patch_embed\.norm\.(weight|bias)$"), r"token_embeds.norm_\1"),
    (re.compile(r"patch_embed\.(proj_weights|proj_biases)$"), r"token_embeds.\1"),
)
# Parameters that only some networks have, and the settings that give them to ours.
SETTINGS = {
    "blocks.0.attn.elevation_alpha": "model.elevation_bias=descent",
    "blocks.0.attn.relative_position": "model.relative_position=true, as in launch/configs/release_128x256.yaml",
    "token_embeds.norm_weight": "model.embedding_norm=true, as there",
}
_RELEASE_NAMES = (
    ("token_embeds.norm_", "patch_embed.norm."),
    ("token_embeds.", "patch_embed."),
    (".attn.elevation_alpha", ".attn.alpha"),
    (".attn.relative_position", ".attn.rel_pos_bias.bias_table"),
)
_ONE_PROJECTION = re.compile(r"(.*token_embeds)\.(\d+)\.proj\.(weight|bias)$")


@dataclass
class Translation:
    """Foreign weights under our names, and what was done to them."""

    state: dict[str, Tensor]
    remapped: dict[str, str] = field(default_factory=dict)  # foreign name -> our name, where they differ
    ignored: list[str] = field(default_factory=list)  # buffers that are not weights


def translate(foreign: dict[str, Tensor], expected: dict[str, torch.Size]) -> Translation:
    """Bring a state dict of any known dialect to our names and shapes; decides nothing about completeness.

    The prefix is the one under which most expected parameters are found. A key that no rule touches keeps its name.

    Args:
        foreign: tensors as read.
        expected: names and shapes of the network to fill.
    """
    stacked, remapped = _stack_projections(_unwrapped(foreign))
    renamed: dict[str, Tensor] = {}
    for key, tensor in stacked.items():
        new = key
        for pattern, replacement in _RENAMED:
            new = pattern.sub(replacement, new)
        if new.endswith("elevation_alpha") and tensor.shape == (1,):
            tensor = tensor.reshape(())
        renamed[new] = tensor
        if new != key:
            remapped[key] = new
    prefix = _best_prefix(renamed, expected)
    result = Translation({}, {old: new.removeprefix(prefix) for old, new in remapped.items()})
    for key, tensor in renamed.items():
        if key.rsplit(".", 1)[-1] in KNOWN_BUFFERS:
            result.ignored.append(key)
            continue
        result.state[key.removeprefix(prefix)] = tensor
        if prefix and key.startswith(prefix):
            result.remapped.setdefault(key, key.removeprefix(prefix))
    return result


def foreign_names(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """Weights under the names that their own old code loads: the release's, where only the release has such a network."""
    if not {"blocks.0.attn.relative_position", "token_embeds.norm_weight"} & weights.keys():
        return {f"model.climax.{name}": tensor for name, tensor in weights.items()}
    released = {}
    for name, tensor in weights.items():
        foreign = name
        for ours, theirs in _RELEASE_NAMES:
            foreign = foreign.replace(ours, theirs)
        if not name.endswith("H_scale"):
            released[f"model.{foreign}"] = tensor.view(1) if name.endswith("elevation_alpha") else tensor
    return released


def legacy_orders(x: Tensor, patches: tuple[int, int]) -> Tensor:
    """The old code's wind scan: (B, V, H, W) model input -> (B, N) int64, new position -> old raster token.

    Per region of the true grid the speed-weighted mean of channels 0 and 1 *as given* (normalised) makes an angle; the
    patches of one region, placed in the grid's upper left corner and scaled by the whole grid, are sorted along it; the
    resulting order permutes the *contiguous* strip of tokens with the region's number. Faults included.
    """
    rows, cols = LEGACY_REGIONS
    u, v = (x[:, c].float().unflatten(1, (rows, -1)).unflatten(3, (cols, -1)) for c in (0, 1))
    speed = (u * u + v * v).sqrt()
    total = speed.sum((2, 4))
    mean_u, mean_v = ((c * speed).sum((2, 4)) / total.where(total > 0, 1.0) for c in (u, v))
    angle = torch.atan2(mean_v.where(total > 0, 0.0), mean_u.where(total > 0, 0.0)).flatten(1)  # (B, R)

    gh, gw = patches
    rh, rw = gh // rows, gw // cols
    k = torch.arange(rh * rw, device=x.device)
    r = (k // rw).double() / (gh - 1) * 2 - 1
    c = (k % rw).double() / (gw - 1) * 2 - 1
    exact = angle.double()[..., None]
    projection = c * exact.cos() + (-r) * exact.sin()  # (B, R, P)
    order = projection.argsort(dim=-1, stable=True)
    strips = torch.arange(rows * cols, device=x.device)[:, None] * (rh * rw)
    return (order + strips).flatten(1)


def release_orders(x: Tensor, patches: tuple[int, int]) -> Tensor:
    """The wind scan of the release of 2026: (B, V, H, W) model input -> (B, N) int64, new position -> old raster token.

    The plain mean of channels 0 and 1 *as given*, of the whole grid, makes an angle, its sector of 16 the order: patches sorted
    along it (rows counted southward, v northward, as there), cut into as many bands as the grid is long, and every band
    sorted by raster number, plus 1000 where row + column is odd. (The release averages the quarters of the grid separately
    and then stops at patches of 2 x 2 pixels; one mean is what the rest of it is written for.)
    """
    rows, cols = patches
    mean_u, mean_v = (x[:, channel].float().mean((1, 2)) for channel in (0, 1))
    turns = torch.atan2(mean_v, mean_u) / (2 * math.pi) % 1.0
    sectors = (turns * RELEASE_SECTORS).long() % RELEASE_SECTORS
    return _release_tables(rows, cols, x.device)[sectors]


@cache
def _release_tables(rows: int, cols: int, device: torch.device) -> Tensor:
    """(16, N) int64; copied to a device once, since a copy waits for it."""
    row, col = (numbers.ravel() for numbers in np.mgrid[:rows, :cols])
    bands = max(rows, cols)
    band = np.minimum(np.arange(rows * cols) // (rows * cols // bands), bands - 1)  # of places along the wind
    within = (row + col) % 2 * 1000 + row * cols + col
    tables = []
    for sector in range(RELEASE_SECTORS):
        angle = 2 * math.pi * sector / RELEASE_SECTORS
        order = np.argsort(row * math.sin(angle) + col * math.cos(angle), kind="stable")
        tables.append(order[np.lexsort((within[order], band))])
    return torch.from_numpy(np.stack(tables)).to(device)


def moved_arguments(
    x: Tensor, lead_hours: Tensor, elevation: Tensor, patch: int, orders: Callable[[Tensor, tuple[int, int]], Tensor]
) -> tuple[Tensor, ...]:
    """Arguments under which `TopoFlow.forward` repeats a forward pass of old code.

    Tokens are permuted (here as patches of pixels, which is the same); position embedding, elevation and output stay in
    raster order.

    Returns:
        x with permuted patches, lead_hours, elevation, rank (B, N).
    """
    batch, _, height, width = x.shape
    rows, cols = height // patch, width // patch
    order = orders(x, (rows, cols))
    pixels = F.pixel_unshuffle(x, patch).flatten(2)  # (B, V*p*p, N)
    moved = pixels.gather(2, order[:, None].expand_as(pixels)).view(batch, -1, rows, cols)
    raster = torch.arange(rows * cols, device=x.device).expand(batch, -1)
    return F.pixel_shuffle(moved, patch), lead_hours, elevation, raster


def _unwrapped(foreign: dict[str, Tensor]) -> dict[str, Tensor]:
    """Names without what compiling and distributing wrappers put into them, where that is unique."""
    parts = {key: [part for part in key.split(".") if part not in WRAPPERS] for key in foreign}
    short = {key: ".".join(part) for key, part in parts.items()}
    once = {name for name, count in Counter(short.values()).items() if count == 1}
    return {short[key] if short[key] in once else key: tensor for key, tensor in foreign.items()}


def _stack_projections(foreign: dict[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, str]]:
    """`token_embeds.i.proj.{weight,bias}` of every variable -> the stacked `proj_weights`, `proj_biases`."""
    kept: dict[str, Tensor] = {}
    parts: dict[str, dict[int, Tensor]] = {}
    remapped: dict[str, str] = {}
    for key, tensor in foreign.items():
        match = _ONE_PROJECTION.match(key)
        if match is None:
            kept[key] = tensor
            continue
        name = f"{match[1]}.{'proj_weights' if match[3] == 'weight' else 'proj_biases'}"
        parts.setdefault(name, {})[int(match[2])] = tensor
        remapped[key] = name
    for name, numbered in parts.items():
        tensors = [numbered[i] for i in sorted(numbered)]
        if len({tensor.shape for tensor in tensors}) > 1:  # then they stay as they are, and are listed as unexpected
            kept |= {old: foreign[old] for old, new in remapped.items() if new == name}
            remapped = {old: new for old, new in remapped.items() if new != name}
            continue
        kept[name] = torch.stack(tensors)
    return kept, remapped


def _best_prefix(keys: dict[str, Tensor], expected: dict[str, torch.Size]) -> str:
    found: dict[str, int] = {}
    for key in keys:
        for name, shape in expected.items():
            if key == name or key.endswith("." + name):
                prefix = key[: len(key) - len(name)]
                found[prefix] = found.get(prefix, 0) + int(np.prod(shape))
    return max(found, key=lambda p: (found[p], -len(p))) if found else ""
