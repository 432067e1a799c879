"""Files -> store, in parallel and restartable: begin once, write shards anywhere, finish once.

A shard is the unit of work: one process reads its hours, regrids, writes and marks it done, and nobody else touches it.
So no process waits for another, any number of processes and any interruption give the same bytes, and what is done is
verified by its hash and not redone. The plan, the catalogue of the files and the weights stand in `STORE.parts` for all of
them.
"""

from __future__ import annotations

import multiprocessing
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from data import DataError
from data.command_line import EXIT_INTERRUPTED
from data.prepare.beginning import begin, build_scan, console, require_same_hours
from data.prepare.catalogue.search import look_ahead
from data.prepare.mpi import abort_all_on_error, mpi_world, together
from data.prepare.plan import PLAN, Plan
from data.prepare.shards import attachments_of, is_done, job_of, sectors_of, write_shard
from data.store import finishing, layout


def prepare(path: Path, plan: Plan, workers: int) -> None:
    """Everything on this machine, or on all ranks of `mpirun`; run it again after an interruption.

    Raises:
        DataError: a file, a unit or a grid is wrong, the target is full, or a worker died.
    """
    world = mpi_world()
    if world is not None:
        return _prepare_with_mpi(path, plan, world)
    if begin(path, plan, workers):
        load(path, remaining(path), workers)
        finish(path)


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
    return [shard for shard in mine if shard >= job_of(path).kept_shards and not is_done(path, shard)]


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
    require_same_hours(path, job_of(path).catalogue)
    if scan:
        codes = np.concatenate([sectors_of(path, i) for i in range(shards)])
    fingerprint = finishing.finalise(path, attachments_of(path))
    if scan:
        build_scan(path, scan, codes)
    return fingerprint


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
    try:
        if world.bcast(world.rank == 0 and not path.exists() and not (layout.parts_path(path) / PLAN).exists()):
            together(world, lambda: look_ahead(path, plan.sources, plan.defined, 1, world.rank, world.size))
        unfinished = world.bcast(together(world, lambda: begin(path, plan) if world.rank == 0 else None))
        if unfinished:
            together(world, lambda: load(path, remaining(path, world.rank, world.size), 1))
            together(world, lambda: finish(path) if world.rank == 0 else None)
    except KeyboardInterrupt:
        world.Abort(EXIT_INTERRUPTED)


def _require_begun(path: Path) -> None:
    if not (layout.parts_path(path) / PLAN).exists():
        raise DataError(f"nothing was begun for {path}: run `python -m data prepare ... --stage begin` first, once.")


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
