"""What a store could hold instead of plain float32: bytes an hour and processor time a sample, on synthetic reanalysis.

A sample is three inner chunks of one hour (weather and chemistry at t, chemistry at t + lead), in memory, decoded into
float32 tensors; reading from disk adds the same to all in proportion to their bytes.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from numcodecs import Blosc, Zstd

from data.store.opening import open_store
from data.store.reader import ShardReader
from data.synthetic.recipe import Recipe
from data.synthetic.synthesize import synthesize

HOURS, ROUNDS = 48, 7
Codec = tuple[Callable[[np.ndarray], bytes], Callable[[bytes], torch.Tensor]]


def compressed(codec: Blosc | Zstd, dtype: str) -> Codec:
    def decode(data: bytes) -> torch.Tensor:
        return torch.from_numpy(np.frombuffer(codec.decode(data), dtype)).float()

    return lambda chunk: codec.encode(np.ascontiguousarray(chunk.astype(dtype))), decode


def plain(dtype: str) -> Codec:
    def decode(data: bytes) -> torch.Tensor:
        stored = np.frombuffer(data, dtype)
        return torch.from_numpy(stored.copy() if dtype == "f4" else stored).float()

    return lambda chunk: chunk.astype(dtype).tobytes(), decode


CODECS = {
    "float32": plain("f4"),
    "float32, blosc lz4 + byte shuffle": compressed(Blosc("lz4", 5, Blosc.SHUFFLE), "f4"),
    "float32, blosc zstd + byte shuffle": compressed(Blosc("zstd", 3, Blosc.SHUFFLE), "f4"),
    "float32, zstd": compressed(Zstd(1), "f4"),
    "float16 of normalised values": plain("f2"),
    "float16, blosc lz4 + byte shuffle": compressed(Blosc("lz4", 5, Blosc.SHUFFLE), "f2"),
}


def main() -> None:
    argparse.ArgumentParser(
        description=__doc__,
        epilog="example: python -m benchmarks.store_layouts",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    ).parse_args()
    with tempfile.TemporaryDirectory(prefix="layouts-") as folder:
        synthesize(Path(folder) / "s.zarr", Recipe(days=4, rows=128, cols=256))
        store = open_store(Path(folder) / "s.zarr")
        weather, chemistry = (ShardReader(store, group).read(np.arange(HOURS)) for group in ("weather", "chemistry"))

    def normalised(fields: np.ndarray) -> np.ndarray:
        return (fields - np.nanmean(fields, (0, 2, 3), keepdims=True)) / np.nanstd(fields, (0, 2, 3), keepdims=True)

    chosen = np.random.default_rng(0).integers(0, HOURS, (ROUNDS, 40, 2))
    for name, (encode, decode) in CODECS.items():
        stored = [[encode(hour) for hour in (normalised(f) if "float16" in name else f)] for f in (weather, chemistry)]
        size = sum(len(data) for group in stored for data in group) / HOURS
        seconds = []
        for pairs in chosen.tolist():
            started = time.process_time()
            for t, later in pairs:
                decode(stored[0][t])
                decode(stored[1][t])
                decode(stored[1][later])
            seconds.append((time.process_time() - started) / len(pairs))
        print(f"{name:36s} {size / 1e6:5.2f} MB an hour   {1e3 * statistics.median(seconds):6.3f} ms of processor a sample")


if __name__ == "__main__":
    main()
