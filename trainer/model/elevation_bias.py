"""The elevation bias of the first block, never held as an (N x N) tensor, by the way that is right on a device.

bias_ij = -slope * relu(z_j - z_i): looking at a higher patch j from a lower patch i costs slope per unit of height. Given -z,
what costs is looking at a lower patch, whose air must climb. With tokens sorted by elevation, keys before the query have no
bias, and for keys after it -slope * z_j belongs to the key and +slope * z_i is constant along a row. So attention falls into
parts that flash kernels compute, merged by their log-sum-exp; the backward pass runs the kernels with the merged output and
log-sum-exp, as ring attention does (Liu et al. 2023, https://arxiv.org/abs/2310.01889). The kernels of the two devices can
do different things, hence two ways to cut:

- CPU: halves of halves. Every half looks at the other as a whole, and only small squares on the diagonal are left.
- GPU: two causal triangles, the upper one reversed; its kernels take no bias, so that is one more dimension of the keys.

Beside it the relative position bias of the release of 2026: a learned number a head for every bucket of distances. Buckets are
those of T5 (Raffel et al. 2020, https://arxiv.org/abs/1910.10683, section 2.1), along columns and along rows: the nearest
distances have one each, further ones share them by the logarithm. The bias of all pairs is a table over pairs of rows and
pairs of columns, so a chunk of queries takes what it needs from it and nothing is held for all pairs of patches.
"""

from __future__ import annotations

import logging
from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from trainer.model.architecture import RELATIVE_BUCKETS
from trainer.model.flash import FLASH_WIDTH_LIMIT, FLASH_WIDTH_MULTIPLE, Halves, Triangles, _flash, climb, inverse

QUERY_CHUNK = 512
LONGEST = 128  # a coordinate of 1, as a whole number
EXACT = 8  # distances of either sign with a bucket of their own

log = logging.getLogger("trainer")


@cache
def kernel_name(device_type: str, dtype: torch.dtype, width: int) -> str:
    """How the elevation bias is computed for heads of this width: "flash halves", "flash triangles" or "query chunks";
    chosen once, and logged.

    On a GPU the triangles are taken only after they have agreed with the plain formula there, gradients included: the
    operators under them are not torch's public interface.
    """
    if device_type == "cpu":
        return "flash halves"
    if dtype not in (torch.bfloat16, torch.float16):
        return "query chunks"  # flash kernels of GPUs take 16 bits only
    if width % FLASH_WIDTH_MULTIPLE or width + FLASH_WIDTH_MULTIPLE > FLASH_WIDTH_LIMIT:
        log.warning(
            "WARNING: heads of width %d are not for the flash kernels of a GPU (a multiple of %d, at most %d): the "
            "elevation bias uses slower query chunks",
            width,
            FLASH_WIDTH_MULTIPLE,
            FLASH_WIDTH_LIMIT - FLASH_WIDTH_MULTIPLE,
        )
        return "query chunks"
    try:
        error = _triangles_error(torch.device(device_type), dtype, width)
    except (RuntimeError, AttributeError, TypeError) as problem:  # an operator that is absent or has another signature
        log.warning("WARNING: no flash triangles on %s (%s): the elevation bias uses slower query chunks", device_type, problem)
        return "query chunks"
    if not error < 0.05:
        log.warning(
            "WARNING: flash triangles on %s are off by %.3g: the elevation bias uses slower query chunks", device_type, error
        )
        return "query chunks"
    return "flash triangles"


def _triangles_error(device: torch.device, dtype: torch.dtype, width: int) -> float:
    """Largest relative difference of output and gradients between both implementations, on 256 random tokens."""
    generator = torch.Generator(device).manual_seed(0)
    qkv = torch.randn(1, 256, 3, 2, width, generator=generator, device=device, dtype=dtype)
    z = (torch.rand(1, 256, generator=generator, device=device) * 4000.0).sort(1).values
    results = []
    for attend in (Triangles.apply, chunked_attention):
        with torch.enable_grad():  # a forecast asks for the kernel, too
            given = qkv.detach().requires_grad_()
            slope = torch.tensor(1e-3, device=device, requires_grad=True)
            out = attend(given, z, slope)
            results.append((out, *torch.autograd.grad(out.float().square().sum(), (given, slope))))
    pairs = [(a.detach().float(), b.detach().float()) for a, b in zip(*results, strict=True)]
    return max(float((a - b).norm() / b.norm()) for a, b in pairs)


def elevation_biased_attention(qkv: Tensor, z: Tensor, slope: Tensor, floor: float | None = None) -> Tensor:
    """softmax(q k^T / sqrt(d) - slope * relu(z_j - z_i)) v, memory linear in N.

    Args:
        qkv: (B, N, 3, H, d) queries, keys and values.
        z: (B, N) elevations.
        slope: () bias per unit of z; any sign, and differentiable, also at 0.
        floor: the bias is clamped to floor .. 0, as the old code did; None for new runs. Not separable, so chunked.

    Returns:
        (B, N, H, d).
    """
    kernel = "query chunks" if floor is not None else kernel_name(qkv.device.type, qkv.dtype, qkv.shape[-1])
    if kernel == "query chunks":
        return chunked_attention(qkv, z, slope, floor)
    order = torch.argsort(z, dim=1, stable=True)
    attend = Halves.apply if kernel == "flash halves" else Triangles.apply
    out = _Reordered.apply(attend(_Reordered.apply(qkv, order), z.gather(1, order), slope), inverse(order))
    if kernel == "flash halves" and slope == 0:
        # Looking at a number is free on a CPU, and an inert bias must equal the plain block to the last bit.
        with torch.no_grad():
            plain = _flash(qkv.unbind(2))[0]
        out = plain + (out - out.detach())
    return out


def chunked_attention(
    qkv: Tensor,
    z: Tensor,
    slope: Tensor | None,
    floor: float | None = None,
    relative: Tensor | None = None,
    buckets: tuple[Tensor, Tensor] | None = None,
    dropout: float = 0.0,
) -> Tensor:
    """The plain formula on QUERY_CHUNK queries at a time, recomputed in the backward pass; memory linear in N.

    Args:
        relative: (1024, H) table of the relative position bias, with `buckets`, (R, R) of rows and (C, C) of columns of the
            grid whose cells the tokens are, in raster order.
    """
    q, k, v = (part.transpose(1, 2) for part in qkv.unbind(2))
    rows, cols = buckets or (z.new_empty(z.shape[1], 0), z.new_empty(1, 0))
    at_a_time = max(1, QUERY_CHUNK // len(cols))  # whole rows of the grid

    def attend(q: Tensor, z_query: Tensor, rows: Tensor, k: Tensor, v: Tensor) -> Tensor:
        scores = q @ k.transpose(-1, -2) * q.shape[-1] ** -0.5
        if slope is not None:
            bias = -slope * climb(z_query, z)
            scores = scores + (bias if floor is None else bias.clamp(floor, 0.0)).to(q.dtype)[:, None]
        if relative is not None:
            scores = scores + relative_bias(relative, rows, cols).to(q.dtype)
        return F.dropout(scores.softmax(-1), dropout) @ v

    queries = at_a_time * len(cols)
    chunks = zip(q.split(queries, 2), z.split(queries, 1), rows.split(at_a_time), strict=True)
    parts = [checkpoint(attend, *chunk, k, v, use_reentrant=False) for chunk in chunks]
    return torch.cat(parts, dim=2).transpose(1, 2)


class _Reordered(torch.autograd.Function):
    """x (B, N, ...), order (B, N) -> x[b, order[b]]; the backward is a gather by the inverse."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, order: Tensor) -> Tensor:
        ctx.save_for_backward(order)
        return _gather(x, order)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        (order,) = ctx.saved_tensors
        return _gather(grads[0], inverse(order)), None


def _gather(x: Tensor, order: Tensor) -> Tensor:
    rows = order + torch.arange(len(order), device=order.device)[:, None] * order.shape[1]
    return x.flatten(0, 1).index_select(0, rows.flatten()).view_as(x)


def cell_numbers(cells: int) -> Tensor:
    """(cells,) places of rows or columns, 0 .. 1, as whole numbers 0 .. 127."""
    return (torch.arange(cells, device="cpu") / cells * LONGEST).long()


def bucket_of(places: Tensor) -> Tensor:
    """(n,) whole numbers -> (n, n) int64 bucket of every pair, query first: 16 for keys at or after it, 16 for those before.

    Distance d >= 8 lies in bucket 8 + floor(8 log(d / 8) / log(128 / 8)), at most 15: that is, one more for every doubling
    of (d / 8)^2, which needs no logarithm that could round to the wrong side.
    """
    distance = places[None, :] - places[:, None]
    size = distance.abs()
    doublings = sum((size**2 >= EXACT**2 * 2**k).long() for k in range(1, RELATIVE_BUCKETS // 2 - EXACT))
    return torch.where(size < EXACT, size, EXACT + doublings) + (distance < 0) * (RELATIVE_BUCKETS // 2)


def relative_bias(table: Tensor, rows: Tensor, cols: Tensor) -> Tensor:
    """Bias of the queries in some rows of the grid against all keys.

    Args:
        table: (1024, H), column bucket times 32 plus row bucket.
        rows: (r, R) buckets of the query rows against all rows.
        cols: (C, C) buckets of columns.

    Returns:
        (H, r * C, R * C). Products with 0 and 1 instead of indices: exact, and the gradient is a product, too.
    """
    (own, all_rows), columns = rows.shape, len(cols)
    by_row = table.view(RELATIVE_BUCKETS, RELATIVE_BUCKETS, -1).permute(2, 0, 1) @ _chosen(rows, table)  # (H, 32, r * R)
    bias = by_row.transpose(1, 2) @ _chosen(cols, table)  # (H, r * R, C * C)
    bias = bias.view(-1, own, all_rows, columns, columns)
    return bias.transpose(2, 3).reshape(-1, own * columns, all_rows * columns)


def _chosen(buckets: Tensor, table: Tensor) -> Tensor:
    """(n, m) -> (32, n * m), 1 where a pair has the bucket; torch's own one_hot would make the host wait for a GPU."""
    every = torch.arange(RELATIVE_BUCKETS, device=buckets.device)[:, None]
    return (every == buckets.flatten()).to(table.dtype)
