"""Sample order, sharding over ranks, and prefetch.

A sample is (analysis at t, lead time h, pollutants at t + h). All samples of a split have a global index; epoch e
visits them in a permutation that is a pure function of (seed, e); epochs follow one another without a seam. So one
integer, `samples_seen`, is the whole state of the stream, whatever the number of ranks.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import torch
from torch import Tensor

from data import DataError
from data.batch import Batch
from data.reader import ShardReader
from data.store import Store
from data.wind_scan import ScanCache

READERS = 4  # threads; on a network file system one micro-batch waits for the servers while others are read


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


def index_samples(store: Store, split: str, lead_hours: list[int], scan: ScanCache | None, mode: str, seed: int) -> SampleIndex:
    """All (t, h) with t and t + h inside the split, both present in the data, and a known wind at t.

    Raises:
        DataError: no sample is left.
    """
    first, last = store.split(split)
    weather, chemistry = (np.less(store.missing[group], 1.0).any(axis=1) for group in ("weather", "chemistry"))
    usable = np.logical_and(weather, chemistry)
    if scan is not None:
        usable &= scan.usable(mode)
    pairs = []
    for lead in lead_hours:
        t = np.arange(first, max(first, last - lead))
        t = t[np.logical_and(usable[t], chemistry[t + lead])]
        pairs.append((t, np.full(len(t), lead)))
    t, lead_of = (np.concatenate(column) for column in zip(*pairs, strict=True))
    missing = [lead for lead, (times, _) in zip(lead_hours, pairs, strict=True) if not len(times)]
    if missing:
        raise DataError(f"{store.path}: split '{split}' ({last - first} hours) has no sample with lead times {missing} h.")
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


@dataclass(frozen=True)
class _Planned:
    """One micro-batch before it is read."""

    numbers: np.ndarray  # (micro,) sample numbers
    position: int
    counted: np.ndarray  # (micro,) bool


class Stream:
    """Reads micro-batches ahead of their use, in threads of this process (reading releases the interpreter's lock)."""

    def __init__(
        self, store: Store, index: SampleIndex, scan: ScanCache | None, mode: str, prefetch: int, patches: int, pin: bool
    ) -> None:
        self.store, self.index, self.scan, self.mode = store, index, scan, mode
        self.prefetch, self.patches, self.pin = prefetch, patches, pin
        self._weather, self._chemistry = ShardReader(store, "weather"), ShardReader(store, "chemistry")
        self._threads = ThreadPoolExecutor(min(READERS, prefetch + 1), thread_name_prefix="reader")

    def training(
        self, samples_seen: int, micro: int, accumulation: int, world: int, rank: int,
        stepped_over: Iterable[list[int]] = (),
    ) -> Iterator[Batch]:  # fmt: skip
        """Endless micro-batches of `rank`, from global position `samples_seen` on, without the ranges `stepped_over`."""
        ranges, total = list(stepped_over), micro * accumulation * world

        def planned() -> Iterator[_Planned]:
            seen = samples_seen
            everything = np.ones(micro, bool)
            while True:
                seen = step_start(seen, total, ranges)
                for positions in positions_of_rank(seen, micro, accumulation, world, rank):
                    yield _Planned(self.index.shuffled(positions), int(positions[0]), everything)
                seen += total

        return self._read_ahead(planned())

    def listed(self, numbers: np.ndarray, micro: int, world: int = 1, rank: int = 0) -> Iterator[Batch]:
        """This rank's share of the samples with the given numbers, in batches of `micro`.

        Every rank gets equally many batches, because each forward pass may be a collective; what is left over is
        filled with repeated samples that are not counted.
        """
        each = micro * world
        batches = -(-len(numbers) // each)
        padded = np.resize(numbers, batches * each)
        counted = np.arange(batches * each) < len(numbers)
        mine = [slice(start, start + micro) for start in range(rank * micro, batches * each, each)]
        return self._read_ahead(_Planned(padded[s], s.start, counted[s]) for s in mine)

    def _read_ahead(self, planned: Iterable[_Planned]) -> Iterator[Batch]:
        pending: deque[Future[Batch]] = deque()
        for plan in planned:
            pending.append(self._threads.submit(self._batch, plan))
            if len(pending) > self.prefetch:
                yield pending.popleft().result()
        while pending:
            yield pending.popleft().result()

    def _batch(self, plan: _Planned) -> Batch:
        t, lead = self.index.t[plan.numbers], self.index.lead[plan.numbers]
        weather, chemistry = self._fields(self._weather, t), self._fields(self._chemistry, t)
        target = self._fields(self._chemistry, t + lead)
        if self.scan is None:
            rank = np.broadcast_to(np.arange(self.patches), (len(t), self.patches)).copy()
        else:
            rank = self.scan.ranks(self.mode, t)
        return Batch(weather, chemistry, target, torch.from_numpy(lead).float(), torch.from_numpy(rank), t, plan.position,
                     torch.from_numpy(plan.counted))  # fmt: skip

    def _fields(self, reader: ShardReader, hours: np.ndarray) -> Tensor:
        fields = torch.empty((len(hours), *reader.shape), pin_memory=self.pin)
        reader.read(hours, out=fields.numpy())
        return fields
