"""The relative position bias of the release of 2026: a learned number a head for every bucket of distances.

Buckets are those of T5 (Raffel et al. 2020, https://arxiv.org/abs/1910.10683, section 2.1), along columns and along rows: the
nearest distances have one each, further ones share them by the logarithm. The bias of all pairs is a table over pairs of
rows and pairs of columns, so a chunk of queries takes what it needs from it and nothing is held for all pairs of patches.
"""

from __future__ import annotations

import torch
from torch import Tensor

from trainer.model.architecture import RELATIVE_BUCKETS

LONGEST = 128  # a coordinate of 1, as a whole number
EXACT = 8  # distances of either sign with a bucket of their own


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
