"""Preparation on all ranks of `mpirun`."""

from __future__ import annotations

import os
import sys
import traceback
from collections.abc import Callable
from types import TracebackType
from typing import Any

from data import DataError
from data.process.ranks import by_mpi, world


def mpi_world() -> Any:
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


def abort_all_on_error(world: Any) -> None:
    """Let an error that nobody expected end every rank; the others would wait for this one for ever."""

    def abort(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
        traceback.print_exception(kind, error, trace)
        world.Abort(1)

    sys.excepthook = abort


def together(world: Any, step: Callable[[], Any]) -> Any:
    """Run a step on every rank, and fail on all of them where it fails on one."""
    result, problem = None, None
    try:
        result = step()
    except (DataError, OSError) as error:
        problem = str(error)
    problems = [p for p in world.allgather(problem) if p]
    if problems:
        raise DataError(problems[0])
    return result
