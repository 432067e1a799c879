"""Preparation on all ranks of `mpirun`."""

from __future__ import annotations

import os
import sys
import traceback
from collections.abc import Callable
from types import TracebackType
from typing import Any

from data import DataError

LAUNCHED_BY_MPI = ("PMI_RANK", "PMIX_RANK", "OMPI_COMM_WORLD_RANK", "MPI_LOCALRANKID")


def is_first_rank() -> bool:
    """Whether this process speaks for all: the only one, or rank 0 of `mpirun`."""
    world = mpi_world()
    return world is None or world.rank == 0


def mpi_world() -> Any:
    """mpi4py's world where `mpirun` started more than one rank, else None.

    Raises:
        DataError: SLURM started several tasks that do not know of one another.
    """
    if not any(name in os.environ for name in LAUNCHED_BY_MPI):
        if int(os.environ.get("SLURM_STEP_NUM_TASKS", "1")) > 1:
            raise DataError(
                "srun started several tasks without MPI, and each would do all the work: use `srun --mpi=pmi2`, "
                "mpirun, or one array task a --part."
            )
        return None
    from mpi4py import MPI  # importing it joins the MPI job, which only a process started by mpirun may do

    return MPI.COMM_WORLD if MPI.COMM_WORLD.size > 1 else None


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
