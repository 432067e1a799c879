"""`data prepare` with two workers on a CAQRA-like file against decompressing the same file with two processes."""

from __future__ import annotations

import argparse
import multiprocessing
import shutil
import statistics
import tempfile
import time
from pathlib import Path

import netCDF4

from data.prepare import beginning, stages
from data.prepare.plan import Plan
from data.prepare.sources import spellings
from data.store import finishing
from tests.reanalysis import CAQRA, write_caqra, write_static

GRID = (339, 432)
WORKERS = 2


def decompress(job: tuple[Path, int, int]) -> int:
    """Bytes of float32 that the NetCDF library delivers for hours [first, last) of every variable, nothing else done."""
    path, first, last = job
    with netCDF4.Dataset(path) as file:
        file.set_auto_maskandscale(False)
        return sum(file[name][first:last].nbytes for name in CAQRA)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, epilog="example: python -m benchmarks.preparation --hours 744")
    parser.add_argument("--hours", type=int, default=744)
    parser.add_argument("--rounds", type=int, default=3)
    a = parser.parse_args()
    folder = Path(tempfile.mkdtemp(prefix="preparation-"))
    try:
        raw, static = folder / "month.nc", folder / "static.nc"
        write_static(static)
        write_caqra(raw, start="2013-01-01", hours=a.hours, grid=GRID, kilometres=15.0, without=(100, 101, 200))
        fields, splits = spellings.SOURCES["caqra"], {"train": ("2013-01-01", "2013-01-05")}
        named = [f"{static}:{name}" for name in ("z", "people", "land")]
        plan = Plan("caqra", fields, [raw], (20, 50), (80, 130), (128, 256), splits, *named)
        edges = list(range(0, a.hours - 3, plan.shard_hours)) + [a.hours - 3]
        jobs = [(raw, first, last) for first, last in zip(edges, edges[1:], strict=False)]
        rates: dict[str, list[float]] = {"decompression": [], "preparation": []}
        for _ in range(a.rounds):
            with multiprocessing.get_context("spawn").Pool(WORKERS) as pool:
                pool.map(decompress, [(raw, 0, 1)] * WORKERS)
                started = time.perf_counter()
                size = sum(pool.map(decompress, jobs, chunksize=1))
                rates["decompression"].append(size / (time.perf_counter() - started))
            target = folder / "out.zarr"
            beginning.begin(target, plan)
            started = time.perf_counter()
            stages.load(target, stages.remaining(target), WORKERS)
            rates["preparation"].append(size / (time.perf_counter() - started))
            finishing.finalise(target)
            shutil.rmtree(target)
        for name, found in rates.items():
            print(f"{name:14s} {statistics.median(found) / 1e6:6.0f} MB/s of source float32 with {WORKERS} processes")
        ratios = [b / c for c, b in zip(*rates.values(), strict=True)]
        print(f"preparation reaches {statistics.median(ratios):.2f} of decompression, with starting its workers (limit 0.6)")
    finally:
        shutil.rmtree(folder)


if __name__ == "__main__":
    main()
