"""Files -> store: begin once, write shards anywhere, finish once; on this machine, or on all ranks of `mpirun`."""

from __future__ import annotations

import os
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import Any

from data import DataError
from data.command_line import EXIT_INTERRUPTED
from data.prepare.beginning import begin
from data.prepare.catalogue.search import look_ahead
from data.prepare.plan import PLAN, Plan
from data.prepare.preparation import Preparation, console
from data.process.ranks import by_mpi, world
from data.store import layout


def prepare(path: Path, plan: Plan, workers: int) -> None:
    """Do everything on this machine, or on all ranks of `mpirun`; run it again after an interruption.

    Raises:
        DataError: a file, a unit or a grid is wrong, the target is full, or a worker died.
    """
    everyone = _mpi_world()
    if everyone is not None:
        _prepare_with_mpi(path, plan, everyone)
        return
    begun = begin(path, plan, workers)
    if begun:
        begun.load(begun.remaining(), workers)
        begun.finish()


def stage(path: Path, plan: Plan, name: str, part: int, parts: int, workers: int) -> None:
    """Do one stage: `begin`, `load` a part of the shards, or `finish`, by what `begin` wrote down.

    Raises:
        DataError: nothing was begun here, or with other arguments, or MPI ranks would all do the same stage.
    """
    if _mpi_world() is not None:
        raise DataError("--stage is for array tasks; under mpirun leave it out, the ranks share the work.")
    if name != "begin" and not path.exists():
        Preparation(path)
    begun = begin(path, plan, workers)
    if begun and name == "load":
        begun.load(begun.remaining(part, parts), workers)
    elif begun and name == "finish":
        begun.finish()


def _mpi_world() -> Any:
    """mpi4py's world of the ranks that share the work; None where this process is alone.

    Raises:
        DataError: processes were started together that do not know of one another.
    """
    everyone = world()
    if everyone.size == 1:
        return None
    if by_mpi(os.environ):
        from mpi4py import MPI

        if MPI.COMM_WORLD.size == everyone.size:
            return MPI.COMM_WORLD
    raise DataError(
        f"{everyone.launcher} started {everyone.size} processes without MPI, and each would do all "
        "the work: use mpirun, `srun --mpi=pmi2`, or one array task a --part."
    )


def _prepare_with_mpi(path: Path, plan: Plan, everyone: Any) -> None:
    console.quiet = everyone.rank != 0
    _abort_all_on_error(everyone)
    try:
        if everyone.bcast(everyone.rank == 0 and not path.exists() and not (layout.parts_path(path) / PLAN).exists()):
            _together(everyone, lambda: look_ahead(path, plan.sources, plan.defined, 1, everyone.rank, everyone.size))
        begun = _together(everyone, lambda: begin(path, plan) is not None if everyone.rank == 0 else None)
        if everyone.bcast(begun):
            mine = _together(everyone, lambda: Preparation(path))
            _together(everyone, lambda: mine.load(mine.remaining(everyone.rank, everyone.size), 1))
            _together(everyone, lambda: mine.finish() if everyone.rank == 0 else None)
    except KeyboardInterrupt:
        everyone.Abort(EXIT_INTERRUPTED)


def _abort_all_on_error(everyone: Any) -> None:
    """Let an error that nobody expected end every rank; the others would wait for this one for ever."""

    def abort(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
        traceback.print_exception(kind, error, trace)
        everyone.Abort(1)

    sys.excepthook = abort


def _together(everyone: Any, step: Callable[[], Any]) -> Any:
    """Run a step on every rank, and fail on all of them where it fails on one."""
    result, problem = None, None
    try:
        result = step()
    except (DataError, OSError) as error:
        problem = str(error)
    problems = [p for p in everyone.allgather(problem) if p]
    if problems:
        raise DataError(problems[0])
    return result
