"""Which samples a split has, and in which order all ranks together see them.

A sample is (analysis at t, lead time h, pollutants at t + h). All samples of a split have a global index; epoch e
visits them in a permutation that is a pure function of (seed, e); epochs follow one another without a seam. So one
integer, `samples_seen`, is the whole state of the stream, whatever the number of ranks.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np

from data import DataError
from data.channels.channels import Read
from data.store.layout import Store
from data.wind_scan.cache import ScanCache

AT_T = (Read("weather"), Read("chemistry"))


@dataclass(frozen=True)
class SampleIndex:
    """All usable samples of one split: hour indices `t` (M,) and lead hours `lead` (M,)."""

    t: np.ndarray
    lead: np.ndarray
    seed: int

    def __len__(self) -> int:
        return len(self.t)

    def __hash__(self) -> int:
        return id(self)

    @lru_cache(maxsize=2)  # noqa: B019 - two epochs meet in a batch; the index lives as long as the run
    def order(self, epoch: int) -> np.ndarray:
        """(M,) permutation of epoch `epoch`: argsort of raw Philox words, which no library release may change."""
        words = np.random.Philox(key=[self.seed, epoch]).random_raw(len(self))
        return np.argsort(words, kind="stable")

    def shuffled(self, positions: np.ndarray) -> np.ndarray:
        """Sample numbers at global stream positions (any number of epochs)."""
        epochs, offsets = np.divmod(positions, len(self))
        return np.array([self.order(int(e))[o] for e, o in zip(epochs, offsets, strict=True)], dtype=np.int64)

    def evenly(self, count: int) -> np.ndarray:
        """`count` sample numbers spread evenly over the split, each lead time equally often: a fixed evaluation set."""
        leads = np.unique(self.lead)
        share = -(-count // len(leads))
        chosen = []
        for lead in leads:
            mine = np.flatnonzero(self.lead == lead)
            chosen.append(mine[np.linspace(0, len(mine) - 1, min(share, len(mine))).round().astype(int)])
        return np.concatenate(chosen)


def index_samples(
    store: Store,
    split: str,
    lead_hours: list[int],
    scan: ScanCache | None,
    mode: str,
    seed: int,
    reads: Sequence[Read] = AT_T,
) -> SampleIndex:
    """All (t, h) with t and t + h inside the split, both present in the data, and a known wind at t.

    So no target of one split lies in another, nor in what is left out between them.

    Args:
        reads: what is read of every sample beside its truth.

    Raises:
        DataError: no sample is left.
    """
    inside = store.inside(split)
    groups = {"chemistry", *(read.group for read in reads)}
    present = {group: np.less(store.missing[group], 1.0).any(axis=1) for group in groups}
    usable = np.ones(len(inside), bool)
    for read in reads:
        if read.back is not None:
            usable[read.back :] &= present[read.group][: len(usable) - read.back]
            usable[: read.back] = False
    later = ["chemistry", *(read.group for read in reads if read.back is None)]
    if scan is not None:
        usable &= scan.usable(mode)
    pairs = []
    for lead in lead_hours:
        t = np.flatnonzero(inside[: max(0, len(inside) - lead)] & inside[lead:])
        t = t[np.logical_and.reduce([usable[t], *(present[group][t + lead] for group in later)])]
        pairs.append((t, np.full(len(t), lead)))
    t, lead_of = (np.concatenate(column) for column in zip(*pairs, strict=True))
    missing = [lead for lead, (times, _) in zip(lead_hours, pairs, strict=True) if not len(times)]
    if missing:
        raise DataError(f"{store.path}: split '{split}' ({inside.sum()} hours) has no sample with lead times {missing} h.")
    return SampleIndex(t, lead_of, seed)


def positions_of_rank(samples_seen: int, micro: int, accumulation: int, world: int, rank: int) -> np.ndarray:
    """Global stream positions (accumulation, micro) that `rank` reads for the step that starts at `samples_seen`.

    The step takes positions samples_seen .. samples_seen + accumulation*world*micro; every rank gets an equal,
    disjoint share and together they are complete, whatever the world size.
    """
    base = samples_seen + np.arange(accumulation)[:, None] * (world * micro) + rank * micro
    return base + np.arange(micro)[None]


def step_start(samples_seen: int, total: int, stepped_over: Iterable[list[int]]) -> int:
    """Stream position of the next step of `total` samples: `samples_seen`, or past the [first, last) ranges in its way."""
    for first, last in sorted(stepped_over):
        if first < samples_seen + total and samples_seen < last:
            samples_seen = last
    return samples_seen
