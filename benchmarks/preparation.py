"""`data prepare` with two workers on CAQRA-like files against unpacking the same files with two processes, nothing else done.

The files are one for all hours, one an hour, or a `.tar.gz` of 24 of the latter.
"""

from __future__ import annotations

import argparse
import multiprocessing
import shutil
import statistics
import tarfile
import tempfile
import time
from dataclasses import replace
from pathlib import Path

import netCDF4
import numpy as np

from data.prepare import beginning
from data.prepare.inputs.given import expand
from data.prepare.plan import Plan
from data.prepare.preparation import Preparation, write_shard
from data.prepare.sources.source import Clock, Source, known_fields
from data.store import finishing
from tests.reanalysis import CAQRA, write_caqra, write_static

GRID = (339, 432)
WORKERS = 2
SOURCE = 4 * GRID[0] * GRID[1] * len(CAQRA)  # bytes of an hour, unpacked


def unpack(job: tuple[Path, int, int]) -> None:
    """By the NetCDF library: hours [first, last) of every variable, or all of an archive."""
    path, first, last = job
    if path.suffix != ".gz":
        return _unpack(netCDF4.Dataset(path), first, last)
    with tarfile.open(path) as tar:
        for member in tar:
            content = tar.extractfile(member)
            assert content is not None
            _unpack(netCDF4.Dataset(member.name, memory=content.read()), 0, 1)


def _unpack(file: netCDF4.Dataset, first: int, last: int) -> None:
    with file:
        file.set_auto_maskandscale(False)
        for name in CAQRA:
            file[name][first:last]


def write_hours(month: Path, folder: Path) -> list[Path]:
    """The hours of a file as CAQRA distributes them: without time and attributes, nothing missing."""
    folder.mkdir()
    with netCDF4.Dataset(month) as file:
        for hour in range(len(file["time"])):
            stamp = str(np.datetime64("2013-01-01T00") + hour).replace("-", "").replace("T", "")
            with netCDF4.Dataset(folder / f"CN-Reanalysis{stamp}.nc", "w") as one:
                for dim, size in (("bottom-top", 1), ("south-north", GRID[0]), ("west-east", GRID[1])):
                    one.createDimension(dim, size)
                for name in (*CAQRA, "lat2d", "lon2d"):
                    field = one.createVariable(name, "f4", ("bottom-top", "south-north", "west-east"), zlib=True)
                    field[0] = file[name][hour] if name in CAQRA else file[name][:]
    return sorted(folder.iterdir())


def write_archives(hours: list[Path], folder: Path) -> list[Path]:
    folder.mkdir()
    for day in range(0, len(hours), 24):
        with tarfile.open(folder / f"{hours[day].stem[:-2]}.tar.gz", "w:gz", compresslevel=1) as tar:
            for path in hours[day : day + 24]:
                tar.add(path, path.name)
    return sorted(folder.iterdir())


def compare(folder: Path, plan: Plan, files: list[Path], jobs: list[tuple[Path, int, int]], hours: int, rounds: int) -> None:
    """Print both rates, by processes that have started already, as they have for most of a year's preparation."""
    rates: dict[str, list[float]] = {"unpacking": [], "preparation": []}
    target, plan = folder / "out.zarr", replace(plan, sources=(replace(plan.sources[0], files=files),))
    for _ in range(rounds):
        begun = beginning.begin(target, plan, WORKERS)
        assert begun
        with multiprocessing.get_context("spawn").Pool(WORKERS) as pool:
            pool.map(unpack, jobs[:WORKERS], chunksize=1)
            started = time.perf_counter()
            pool.map(unpack, jobs, chunksize=1)
            rates["unpacking"].append(hours * SOURCE / (time.perf_counter() - started))
            left = begun.remaining()
            pool.map(Preparation, [target] * WORKERS, chunksize=1)
            started = time.perf_counter()
            pool.starmap(write_shard, [(target, shard) for shard in left], chunksize=1)
            rates["preparation"].append(hours * SOURCE / (time.perf_counter() - started))
        finishing.finalise(target)
        shutil.rmtree(target)
    for name, found in rates.items():
        print(f"{name:12s} {statistics.median(found) / 1e6:6.0f} MB/s of source float32 with {WORKERS} processes")
    ratios = [prepared / unpacked for unpacked, prepared in zip(*rates.values(), strict=True)]
    print(f"preparation is at {statistics.median(ratios):.2f} of unpacking", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, epilog="example: python -m benchmarks.preparation --hours 744")
    parser.add_argument("--hours", type=int, default=744)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--files", nargs="+", choices=("one", "hours", "archives"), default=("one", "hours", "archives"))
    a = parser.parse_args()
    folder = Path(tempfile.mkdtemp(prefix="preparation-"))
    try:
        static = folder / "static.nc"
        write_static(static)
        caqra, splits = (
            Source("caqra", known_fields("caqra"), [], Clock(name_zone=0.0)),
            {"train": ("2013-01-01", "2013-01-05")},
        )
        named = [f"{static}:{name}" for name in ("z", "people", "land")]
        plan = Plan((caqra,), (20, 50), (80, 130), (128, 256), splits, *named)
        month = folder / "one" / "month.nc"
        month.parent.mkdir()
        edges = [*range(0, a.hours, plan.shard_hours), a.hours]
        if "one" in a.files:
            print("one file for all hours, some of it missing")
            write_caqra(month, start="2013-01-01", hours=a.hours, grid=GRID, kilometres=15.0)
            jobs = [(month, first, last) for first, last in zip(edges, edges[1:], strict=False)]
            compare(folder, plan, [month], jobs, a.hours, a.rounds)
        write_caqra(month, start="2013-01-01", hours=a.hours, grid=GRID, kilometres=15.0, missing=0.0)
        hours = write_hours(month, folder / "hours")
        month.unlink()
        if "hours" in a.files:
            print("one file an hour")
            compare(folder, plan, hours, [(path, 0, 1) for path in hours], a.hours, a.rounds)
        if "archives" in a.files:
            print("one archive a day")
            archives = write_archives(hours, folder / "archives")
            days = [(path, 0, 24) for path in archives]
            compare(folder, plan, expand(list(map(str, archives))), days, a.hours, a.rounds)
    finally:
        shutil.rmtree(folder)


if __name__ == "__main__":
    main()
