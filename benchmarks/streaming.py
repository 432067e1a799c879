"""Random samples of 128 x 256 from our store, from a memory map, and from one array a variable through xarray and dask.

A sample is 11 variables at t and 6 at t + 24 h, batches of 4, files in the system's cache. Then the share of its time that
a loop of 20 ms a batch waits for data.
"""

from __future__ import annotations

import argparse
import shutil
import statistics
import tempfile
import time
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import xarray as xr

from data.samples import SampleIndex
from data.store import finishing, layout, opening, writing
from data.store.reader import ShardReader
from data.stream import Stream
from data.synthetic.synthesize import load_static
from data.variables import PUBLISHED

GRID, HOURS, LEAD, BATCH, BATCHES, ROUNDS = (128, 256), 360, 24, 4, 25, 5
STEP_S = 0.020


def build(folder: Path) -> layout.Store:
    """A store of random values, the same as .npy files, and as one zarr array a variable in 24-hour chunks."""
    rng = np.random.default_rng(0)
    lat, lon, static = load_static(*GRID)
    times = np.datetime64("2020-01-01", "h") + np.arange(HOURS)
    writing.create(
        folder / "ours.zarr",
        times=times,
        lat=lat,
        lon=lon,
        static=static,
        splits={"train": (0, HOURS)},
        shard_hours=120,
        provenance={},
    )
    apart = xr.Dataset(coords={"time": times, "lat": lat, "lon": lon})
    for group in PUBLISHED.dynamic:
        members = PUBLISHED.groups[group]
        spans = np.array([(v.typical or (v.valid_min, v.valid_max)) for v in members])[None, :, :, None, None]
        values = spans[:, :, 0] + (spans[:, :, 1] - spans[:, :, 0]) * rng.random((HOURS, len(members), *GRID), "f4")
        values = values.astype("f4")
        for start in range(0, HOURS, 120):
            writing.write_block(folder / "ours.zarr", group, start, values[start : start + 120])
        np.save(folder / f"{group}.npy", values)
        for channel, variable in enumerate(members):
            apart[variable.name] = (("time", "lat", "lon"), values[:, channel])
    finishing.finalise(folder / "ours.zarr")
    apart.to_zarr(folder / "apart.zarr", encoding={name: {"chunks": (24, *GRID)} for name in apart.data_vars})
    return opening.open_store(folder / "ours.zarr")


def readers(folder: Path, opened: layout.Store) -> dict[str, Callable[[np.ndarray], Sequence[np.ndarray]]]:
    """name -> function that reads the batch at time indices (B,)."""
    weather, chemistry = (ShardReader(opened, group) for group in PUBLISHED.dynamic)
    mapped = {group: np.load(folder / f"{group}.npy", mmap_mode="r") for group in PUBLISHED.dynamic}
    apart = xr.open_zarr(folder / "apart.zarr")
    names = {group: [v.name for v in PUBLISHED.groups[group]] for group in PUBLISHED.dynamic}

    def per_variable(t: np.ndarray) -> Sequence[np.ndarray]:
        now = [apart[name].isel(time=t).to_numpy() for name in names["weather"] + names["chemistry"]]
        later = [apart[name].isel(time=t + LEAD).to_numpy() for name in names["chemistry"]]
        return np.stack(now, 1), np.stack(later, 1)

    return {
        "ours": lambda t: (weather.read(t), chemistry.read(t), chemistry.read(t + LEAD)),
        "memory map": lambda t: [mapped[g][at] for g, at in (("weather", t), ("chemistry", t), ("chemistry", t + LEAD))],
        "xarray + dask": per_variable,
    }


def waiting_share(opened: layout.Store) -> float:
    """Of a loop whose model computes elsewhere for 20 ms a batch."""
    t = np.arange(HOURS - LEAD)
    stream = Stream(opened, SampleIndex(t, np.full(len(t), LEAD), 0), None, "none", prefetch=4, patches=1, pin=False)
    batches = stream.training(0, BATCH, 1, 1, 0)
    batch = next(batches)
    waited, started = 0.0, time.perf_counter()
    for _ in range(150):
        time.sleep(STEP_S)
        asked = time.perf_counter()
        coming = next(batches)
        waited += time.perf_counter() - asked
        batch = coming  # the one before is freed here, as at the head of a training loop
    assert batch.position > 0
    return waited / (time.perf_counter() - started)


def main() -> None:
    warnings.filterwarnings("ignore", message="Consolidated metadata")
    argparse.ArgumentParser(description=__doc__, epilog="example: python -m benchmarks.streaming").parse_args()
    folder = Path(tempfile.mkdtemp(prefix="streaming-"))
    try:
        opened = build(folder)
        ways = readers(folder, opened)
        rng = np.random.default_rng(1)
        first = np.arange(BATCH)
        truth = np.concatenate(ways["memory map"](first)[:2], 1)
        assert np.array_equal(truth, np.concatenate(ways["ours"](first)[:2], 1))
        assert np.array_equal(truth, ways["xarray + dask"](first)[0])
        cpu: dict[str, list[float]] = {name: [] for name in ways}
        for _ in range(ROUNDS):
            for name, read in ways.items():
                batches = BATCHES if name != "xarray + dask" else 2
                read(first)
                started = time.process_time()
                for _ in range(batches):
                    read(rng.integers(0, HOURS - LEAD, BATCH))
                cpu[name].append(1e3 * (time.process_time() - started) / batches / BATCH)
        for name, milliseconds in cpu.items():
            print(f"{name:14s} {statistics.median(milliseconds):8.3f} ms of processor a sample")
        dask, mapped = ([a / b for a, b in zip(cpu[n], cpu["ours"], strict=True)] for n in ("xarray + dask", "memory map"))
        print(f"ours is {statistics.median(dask):.0f} x as quick as xarray + dask (limit 100)")
        print(f"ours reaches {statistics.median(mapped):.2f} of the memory map (limit 0.3)")
        print(f"a loop of {1e3 * STEP_S:.0f} ms a batch of {BATCH} waits {100 * waiting_share(opened):.2f} % (limit 2)")
    finally:
        shutil.rmtree(folder)


if __name__ == "__main__":
    main()
