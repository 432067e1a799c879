"""Files -> store, in parallel and restartable: begin once, write shards anywhere, finish once.

A shard is the unit of work: one process reads its hours, regrids, writes and marks it done, and nobody else touches it.
So no process waits for another, any number of processes and any interruption give the same bytes, and what is done is
verified by its hash and not redone. The plan, the catalogue of the files and the weights stand in `STORE.parts` for all of
them.
"""

from __future__ import annotations

import json
import multiprocessing
import shutil
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import scipy.sparse
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from data import DataError
from data.prepare import file_identity, grid, regrid
from data.prepare.mpi import abort_all_on_error, mpi_world, together
from data.prepare.plan import Plan, Scan, sha256_of
from data.prepare.shards import is_done, job_of, sectors_of, write_last, write_shard
from data.prepare.sources.catalogue import Catalogue, load_catalogue, make_catalogue
from data.prepare.sources.spellings import needed
from data.prepare.static import static_fields
from data.store import layout, opening, writing
from data.wind_scan import cache, orders

console = Console(stderr=True)


def prepare(path: Path, plan: Plan, workers: int) -> None:
    """Everything on this machine, or on all ranks of `mpirun`; run it again after an interruption.

    Raises:
        DataError: a file, a unit or a grid is wrong, the target is full, or a worker died.
    """
    world = mpi_world()
    if world is not None:
        return _prepare_with_mpi(path, plan, world)
    if begin(path, plan):
        load(path, remaining(path), workers)
        finish(path)


def begin(path: Path, plan: Plan) -> bool:
    """Create the unfinished store, or find it as it was left.

    Returns:
        False where the store is finished already and was made by this plan.

    Raises:
        DataError: a store of another plan stands there, or an input is wrong.
    """
    parts = layout.parts_path(path)
    job_of.cache_clear()  # this process may have prepared another store here
    if path.exists():
        made_by = opening.open_store(path).provenance.get("plan_sha256")
        if made_by != sha256_of(plan.identity()):
            raise DataError(f"{path} already exists and is from another plan. Remove it first, or write to another path.")
        file_identity.require_unchanged(path, plan.files)
        if plan.scan and not (plan.scan.out / "manifest.json").exists():  # killed between its last two steps
            _build_scan(path, plan.scan, None)
        shutil.rmtree(parts, ignore_errors=True)
        return False
    if (parts / "plan.json").exists():
        begun = json.loads((parts / "plan.json").read_text())
        differing = [key for key, value in plan.identity().items() if begun.get(key) != value]
        if differing:
            raise DataError(
                f"{layout.partial_path(path)} was begun with other {', '.join(differing)}. Bring them back, or "
                f"remove it and {parts} to start again."
            )
        _require_same_hours(path, load_catalogue(parts / "catalogue.npz"))
        return True
    seen = file_identity.glance(plan.files)
    catalogue = make_catalogue(plan.fields, plan.files, plan.lead_hours)
    first, last = catalogue.span
    times = np.arange(first, last + 1)
    (fine_lat, fine_lon), (lat, lon) = grid.spacing(catalogue.grid), grid.spacing(plan.target)
    method = plan.method or ("conservative" if lat * lon > fine_lat * fine_lon else "bilinear")
    console.print(
        f"{len(plan.files)} files, {first} .. {last}; {fine_lat:.3g} x {fine_lon:.3g} to {lat:.3g} x {lon:.3g} "
        f"degrees, {method}"
    )
    regridder = regrid.build(catalogue.grid, plan.target, method)
    outside = int((~regridder.covered).sum())
    if outside:
        console.print(
            f"WARNING: {outside} of {regridder.covered.size} cells lie outside the source: missing in every hour, "
            "and outside domain_mask"
        )
    static = static_fields(plan, regridder.covered)
    if plan.scan:
        orders.geometry(plan.target.lat, plan.target.lon, plan.scan.patch, plan.scan.regions, plan.scan.sectors)
    _require_space(path, len(np.unique(np.concatenate(list(catalogue.hours.values())))), plan)
    path.parent.mkdir(parents=True, exist_ok=True)
    writing.create(
        path,
        times=times,
        lat=plan.target.lat,
        lon=plan.target.lon,
        static=static,
        splits=_split_hours(plan, times),
        shard_hours=plan.shard_hours,
        provenance={
            "generator": "python -m data prepare",
            "source": plan.source,
            "files": len(plan.files),
            "method": method,
            "source_grid": list(catalogue.grid.shape),
            "plan_sha256": sha256_of(plan.identity()),
        },
    )
    catalogue.save(parts / "catalogue.npz")
    file_identity.begin(parts, seen)
    scipy.sparse.save_npz(parts / "weights.npz", regridder.weights)
    write_last(parts / "plan.json", json.dumps(plan.identity()))
    return True


def _require_same_hours(path: Path, before: Catalogue) -> None:
    """Files that were replaced since the catalogue was made must hold the same hours; their shards are written again.

    Raises:
        DataError: they do not.
    """
    parts = layout.parts_path(path)
    replaced = file_identity.replaced(parts, before.files)
    if not replaced:
        return
    names = ", ".join(map(str, replaced[:4])) + (" and others" if len(replaced) > 4 else "")
    console.print(f"{names} changed since the catalogue was made: comparing")
    if not before.equals(make_catalogue(before.fields, before.files, before.lead_hours)):
        raise DataError(
            f"{replaced[0]} holds other hours or another grid than when {layout.partial_path(path)} was begun: "
            f"remove it and {parts} to start again."
        )


def require_same_plan(path: Path, plan: Plan) -> bool:
    """For the stages after `begin`, which work by what it wrote down; False where the store is finished already.

    Raises:
        DataError: nothing was begun here, or with other arguments, or MPI ranks would all do the same stage.
    """
    if not path.exists():
        _require_begun(path)
    if mpi_world() is not None:
        raise DataError("--stage is for array tasks; under mpirun leave it out, the ranks share the work.")
    return begin(path, plan)


def remaining(path: Path, part: int = 0, parts: int = 1) -> list[int]:
    """Shards part, part + parts, ... that are not done, or no longer what was written.

    Raises:
        DataError: nothing was begun here.
    """
    _require_begun(path)
    hours, length = job_of(path).hours, job_of(path).shard_hours
    mine = range(part, -(-hours // length), parts)
    return [shard for shard in mine if not is_done(path, shard)]


def load(path: Path, shards: list[int], workers: int) -> None:
    """Read, regrid and write the given shards with `workers` processes, showing progress."""
    with _full_disk_named(path), _progress() as progress:
        task = progress.add_task(path.name, total=len(shards), rate="")
        read = 0
        for bytes_read in _written(path, shards, workers):
            read += bytes_read
            elapsed = progress.tasks[task].elapsed or 1e-9
            progress.update(task, advance=1, rate=f"{read / elapsed / 1e6:.0f} MB/s of source")


def finish(path: Path) -> str:
    """Merge statistics, close the store, and write the wind-scan cache where one was asked for.

    Returns:
        The fingerprint.

    Raises:
        DataError: shards are missing.
    """
    _require_begun(path)
    scan = job_of(path).scan
    shards = -(-job_of(path).hours // job_of(path).shard_hours)
    left = remaining(path)
    if left:
        raise DataError(f"{path}: {len(left)} of {shards} shards are not written: {left[:8]}. Run the same command again.")
    _require_same_hours(path, job_of(path).catalogue)
    if scan:
        codes = np.concatenate([sectors_of(path, i) for i in range(shards)])
    files = job_of(path).catalogue.files
    about = {file_identity.RECORD: json.dumps(file_identity.describe(layout.parts_path(path), files), indent=0)}
    fingerprint = writing.finalise(path, about)
    if scan:
        _build_scan(path, scan, codes)
    return fingerprint


def _build_scan(path: Path, scan: Scan, codes: np.ndarray | None) -> None:
    cache.build(opening.open_store(path), scan.out, patch=scan.patch, regions=scan.regions, sectors=scan.sectors, codes=codes)


def _written(path: Path, shards: list[int], workers: int) -> Iterator[int]:
    """Write shards; bytes read of each, as they are done."""
    if workers == 1:
        yield from (write_shard(path, shard) for shard in shards)
        return
    # Spawned: libraries that were opened before a fork hang after it.
    with ProcessPoolExecutor(workers, mp_context=multiprocessing.get_context("spawn")) as pool:
        try:
            for done in as_completed([pool.submit(write_shard, path, shard) for shard in shards]):
                yield done.result()
        except BrokenProcessPool as error:
            raise DataError(
                "a worker process died (often for lack of memory). Run the same command again, with fewer "
                "--workers; what is done is kept."
            ) from error
        finally:
            pool.shutdown(cancel_futures=True)


def _prepare_with_mpi(path: Path, plan: Plan, world: Any) -> None:
    console.quiet = world.rank != 0

    abort_all_on_error(world)
    unfinished = world.bcast(together(world, lambda: begin(path, plan) if world.rank == 0 else None))
    if unfinished:
        together(world, lambda: load(path, remaining(path, world.rank, world.size), 1))
        together(world, lambda: finish(path) if world.rank == 0 else None)


def _require_begun(path: Path) -> None:
    if not (layout.parts_path(path) / "plan.json").exists():
        raise DataError(f"nothing was begun for {path}: run `python -m data prepare ... --stage begin` first, once.")


def _split_hours(plan: Plan, times: np.ndarray) -> dict[str, tuple[int, int]]:
    splits = {}
    for name, days in plan.splits.items():
        try:
            first, last = (np.datetime64(day, "D") for day in days)
        except ValueError as error:
            raise DataError(f"--{name} {' '.join(days)}: write days as 2013-01-01.") from error
        start, stop = np.searchsorted(times, [first.astype(times.dtype), (last + 1).astype(times.dtype)])
        if start == stop:
            raise DataError(f"--{name} {' '.join(days)} holds no hour of the data ({times[0]} .. {times[-1]}).")
        splits[name] = (int(start), int(stop))
    return splits


def _require_space(path: Path, hours: int, plan: Plan) -> None:
    there = next(p for p in [path.parent, *path.parent.parents] if p.exists())
    free = shutil.disk_usage(there).free
    wanted = 4 * hours * len(needed()) * plan.grid[0] * plan.grid[1]
    if wanted > free:
        raise DataError(f"{path} will take up to {wanted / 1e9:.1f} GB, {there} has {free / 1e9:.1f} GB free.")


@contextmanager
def _full_disk_named(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise DataError(
            f"{layout.partial_path(path)} cannot be written ({error}). What is done is kept: make room, and run the "
            "same command again."
        ) from error


def _progress() -> Progress:
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("shards"),
        TextColumn("{task.fields[rate]}"),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
        console=console,
    )
