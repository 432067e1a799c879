"""Random access to the hours of a store: each is one `preadv` from its place in a shard, straight into the batch.

The store's layout makes this possible (docs/data.md): one hour of one group is one uncompressed inner chunk, and a shard
ends with the index of its chunks (zarr v3 specification, sharding codec 1.0). It costs a quarter of the processor time
that general zarr readers need (docs/benchmarks.md).
"""

from __future__ import annotations

import json
import math
import os
from functools import lru_cache
from pathlib import Path
from typing import IO

import google_crc32c
import numpy as np

from data import DataError
from data.store.layout import Store

EMPTY_CHUNK = 2**64 - 1  # in both numbers of a chunk that was never written: every value is the fill value, NaN
OPEN_SHARDS = 128  # of one group, fewer than a process may hold; six years are about 440
LITTLE_ENDIAN = {"name": "bytes", "configuration": {"endian": "little"}}


class ShardReader:
    """Reads hours of one group; safe to use from several threads."""

    def __init__(self, store: Store, group: str) -> None:
        """
        Raises:
            DataError: the array is stored in another way than docs/data.md specifies.
        """
        self.folder = store.path / group
        layout = json.loads((self.folder / "zarr.json").read_text())
        hours, *shape = layout["shape"]
        sharding = layout["codecs"][0]["configuration"]
        if (layout["data_type"], sharding["codecs"], sharding["chunk_shape"]) != ("float32", [LITTLE_ENDIAN], [1, *shape]):
            raise DataError(f"{self.folder} is not float32 in plain chunks of one hour (docs/data.md): prepare it again.")
        self.hours, self.shape = hours, tuple(shape)
        self.shard_hours = layout["chunk_grid"]["configuration"]["chunk_shape"][0]
        self._bytes = 4 * math.prod(shape)
        self._present = np.less(store.missing[group], 1.0).any(1)
        self._open = lru_cache(maxsize=OPEN_SHARDS)(self._open_shard)  # an evicted file is closed when nobody reads it

    def read(self, hours: np.ndarray, out: np.ndarray | None = None) -> np.ndarray:
        """(B, V, H, W) float32 at the time indices `hours` (B,), into `out` where it is given.

        Raises:
            DataError: a shard is truncated or its index is damaged.
            OSError: a shard cannot be read.
        """
        if out is None:
            out = np.empty((len(hours), *self.shape), "f4")
        into = memoryview(out.data).cast("B")
        for slot, hour in enumerate(hours.tolist()):
            shard, place = divmod(hour, self.shard_hours)
            found = self._open(shard)
            if found is None or int(found[1][place, 0]) == EMPTY_CHUNK:
                if self._present[hour]:
                    raise DataError(
                        f"{self.folder} lacks hour {hour} of the store, in shard {shard}, which was there when it "
                        "was written. Run `python -m data verify`, and copy the store again."
                    )
                out[slot] = math.nan
                continue
            file, index = found
            offset, size = index[place].tolist()
            if size != self._bytes:
                raise DataError(f"{file.name}: hour {hour} has {size} bytes, not {self._bytes}. Run `python -m data verify`.")
            self._fill(into[slot * size : (slot + 1) * size], file, offset)
        return out

    def _fill(self, target: memoryview, file: IO[bytes], offset: int) -> None:
        done = 0
        while done < len(target):  # a read may be cut short by a signal
            got = os.preadv(file.fileno(), [target[done:]], offset + done)
            if got == 0:
                raise DataError(f"{file.name} is truncated. Run `python -m data verify`.")
            done += got

    def _open_shard(self, shard: int) -> tuple[IO[bytes], np.ndarray] | None:
        """The file and its index (shard hours, 2) of offset and size; None where every hour is missing."""
        path = Path(self.folder, "c", str(shard), "0", "0", "0")
        if not path.exists():
            return None
        file = path.open("rb", buffering=0)
        length = 16 * self.shard_hours + 4
        tail = os.pread(file.fileno(), length, max(0, os.fstat(file.fileno()).st_size - length))
        if len(tail) != length or google_crc32c.value(tail[:-4]) != int.from_bytes(tail[-4:], "little"):
            raise DataError(f"the index of {path} is damaged. Run `python -m data verify`.")
        return file, np.frombuffer(tail[:-4], "<u8").reshape(self.shard_hours, 2)
