"""Reads a rank's micro-batches ahead of their use."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from data.batch import Batch
from data.channels.channels import EVERY_H, Read
from data.samples import AT_T, SampleIndex, positions_of_rank, step_start
from data.store.layout import Store
from data.store.reader import ShardReader
from data.wind_paths.cache import GONE, PathCache, records_of
from data.wind_paths.trajectories import PathGrid
from data.wind_scan.cache import ScanCache

READERS = 4  # threads; on a network file system one micro-batch waits for the servers while others are read


@dataclass(frozen=True)
class _Planned:
    """One micro-batch before it is read."""

    numbers: np.ndarray  # (micro,) sample numbers
    position: int
    counted: np.ndarray  # (micro,) bool


class _Later:
    """A group of another store, by the time indices and in the channels of the store that a run was trained on."""

    def __init__(self, store: Store, later: Store, group: str) -> None:
        self._reader = ShardReader(later, group)
        self._shift = hours_between(store, later)
        own = later.contents.names(group)
        self._places = {channel: own.index(name) for channel, name in enumerate(store.contents.names(group)) if name in own}
        self._shape = (len(store.contents.names(group)), *store.grid)

    def read(self, hours: np.ndarray) -> np.ndarray:
        fields = np.full((len(hours), *self._shape), np.nan, "f4")
        fields[:, list(self._places)] = self._reader.read(hours - self._shift)[:, list(self._places.values())]
        return fields


def hours_between(store: Store, later: Store) -> int:
    """From the first hour of one store to that of another."""
    return int((later.times[0].astype("datetime64[h]") - store.times[0].astype("datetime64[h]")).astype(int))


class Stream:
    """Reads micro-batches ahead of their use, in threads of this process (reading releases the interpreter's lock)."""

    def __init__(
        self,
        store: Store,
        index: SampleIndex,
        scan: ScanCache | None,
        mode: str,
        prefetch: int,
        patches: int,
        pin: bool,
        reads: Sequence[Read] = AT_T,
        later: Store | None = None,
        paths: PathCache | None = None,
    ) -> None:
        """
        Args:
            later: where what is read at the valid time comes from, instead of `store`: forecast weather, of the same grid.
        """
        self.store, self.index, self.scan, self.mode, self.paths = store, index, scan, mode, paths
        self.prefetch, self.patches, self.pin = prefetch, patches, pin
        self.reads = reads
        self._readers = {group: ShardReader(store, group) for group in {"chemistry", *(read.group for read in reads)}}
        self._later = (
            {} if later is None else {read.group: _Later(store, later, read.group) for read in reads if read.back is None}
        )
        self._winds = [] if later is None or paths is None else [_Later(store, later, "weather")]
        self._threads = ThreadPoolExecutor(min(READERS, prefetch + 1), thread_name_prefix="reader")

    def training(
        self,
        samples_seen: int,
        micro: int,
        accumulation: int,
        world: int,
        rank: int,
        stepped_over: Iterable[list[int]] = (),
    ) -> Iterator[Batch]:
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
        hours = {read: t + lead if read.back is None else t - read.back for read in self.reads}
        fields = {read.key: self._read(read, at) for read, at in hours.items()}
        target = self._fields(self._readers["chemistry"], t + lead)
        if self.scan is None:
            rank = np.broadcast_to(np.arange(self.patches), (len(t), self.patches)).copy()
        else:
            rank = self.scan.ranks(self.mode, t)
        return Batch(
            fields,
            target,
            torch.from_numpy(lead).float(),
            torch.from_numpy(rank),
            t,
            t + lead,
            plan.position,
            torch.from_numpy(plan.counted),
            None if self.paths is None else torch.from_numpy(self._records(self.paths, t, lead)),
        )

    def _records(self, paths: PathCache, t: np.ndarray, lead: np.ndarray) -> np.ndarray:
        """(B, points, 2, P) int8 ways of the air from t to t + lead; of forecast weather, along its own winds."""
        if not self._winds:
            return paths.read(t + lead, lead // EVERY_H)
        records = np.full((len(t), int(lead.max()) // EVERY_H, 2, paths.patches), GONE, "i1")
        channels = [self.store.contents.channel(name) for name in ("u", "v")]
        for record, start, hours in zip(records, t.tolist(), lead.tolist(), strict=True):
            winds = self._winds[0].read(np.arange(start, start + hours + 1))[:, channels]
            record[: hours // EVERY_H] = records_of(winds, paths.geometry, PathGrid.of(self.store))
        return records

    def _read(self, read: Read, hours: np.ndarray) -> Tensor:
        if read.back is None and read.group in self._later:
            return torch.from_numpy(self._later[read.group].read(hours))
        return self._fields(self._readers[read.group], hours)

    def _fields(self, reader: ShardReader, hours: np.ndarray) -> Tensor:
        fields = torch.empty((len(hours), *reader.shape), pin_memory=self.pin)
        known = hours < reader.hours  # the truth of a forecast may not be known yet
        if known.all():
            reader.read(hours, out=fields.numpy())
        else:
            fields.fill_(torch.nan)
            for slot in np.flatnonzero(known):
                reader.read(hours[slot : slot + 1], out=fields[slot : slot + 1].numpy())
        return fields
