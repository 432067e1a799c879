"""How fast a store is read here: samples in random order as training reads them, against its plain files."""

from __future__ import annotations

import os
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from data import DataError
from data.store.layout import Store
from data.store.reader import ShardReader


@dataclass(frozen=True)
class Speed:
    what: str
    samples_per_s: float
    megabytes_per_s: float
    cpu_ms_per_sample: float


def measure(store: Store, samples: int, batch: int, lead_hours: int, seed: int = 0) -> list[Speed]:
    """Random samples cold and warm, and the same number of bytes read from the shards in order.

    A sample is weather and chemistry at t and chemistry at t + lead. "Cold" asks the system to drop the files from its
    cache first, which a network file system's servers need not follow.
    """
    rng = np.random.default_rng(seed)
    present = np.less(np.maximum(store.missing["weather"].min(1), store.missing["chemistry"].min(1)), 1.0)
    usable = np.flatnonzero(present[:-lead_hours] & present[lead_hours:])
    if not len(usable):
        raise DataError(f"{store.path} has no two analyses {lead_hours} h apart: choose another --lead-hours.")
    t = rng.choice(usable, samples)
    readers = {group: ShardReader(store, group) for group in ("weather", "chemistry")}
    size = 4 * (np.prod(readers["weather"].shape) + 2 * np.prod(readers["chemistry"].shape))
    files = sorted(f for group in readers for f in (store.path / group / "c").rglob("*") if f.is_file())

    def random_samples() -> float:
        for start in range(0, samples, batch):
            hours = t[start : start + batch]
            readers["weather"].read(hours)
            readers["chemistry"].read(hours)
            readers["chemistry"].read(hours + lead_hours)
        return float(samples * size)

    def plain_files() -> float:
        wanted, read = samples * size, 0
        buffer = bytearray(1 << 22)
        while read < wanted:
            for path in files:
                with path.open("rb", buffering=0) as file:
                    while read < wanted and (got := file.readinto(buffer)):
                        read += got
        return float(read)

    found = []
    for what, work in (("samples", random_samples), ("plain files", plain_files)):
        for state in ("cold", "warm"):
            if state == "cold":
                _forget(files)
            wall, processor = time.perf_counter(), time.process_time()
            read = work()
            wall, processor = time.perf_counter() - wall, time.process_time() - processor
            found.append(Speed(f"{what}, {state}", read / size / wall, read / wall / 1e6, 1e3 * processor * size / read))
    return found


def _forget(files: list[Path]) -> None:
    for path in files:
        with path.open("rb") as file:
            os.fsync(file.fileno())
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
