"""Which rank is this, of how many? THE answer for every command and every launcher; without torch.

`deepspeed` and `torchrun` say it in the environment, `srun` in SLURM's variables, `mpirun` through mpi4py; without any of
them a process is alone.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache

from data import Refusal

LAUNCHED_BY_MPI = ("PMI_RANK", "PMIX_RANK", "OMPI_COMM_WORLD_RANK", "MPI_LOCALRANKID")


class LaunchError(Refusal):
    """The launcher's variables are incomplete or contradict one another, or the run directory is not this job's."""


@dataclass(frozen=True)
class World:
    """This process among those that were started together."""

    rank: int
    local_rank: int
    size: int
    launcher: str

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    def gpu(self, visible: int) -> int:
        """Index of this rank's GPU among the visible ones; 0 where each task is shown its own alone.

        Raises:
            LaunchError: a host has more ranks than visible GPUs, so that two would share one.
        """
        if visible == 1 and self.launcher in ("srun", "mpirun"):
            return 0
        if self.local_rank >= visible:
            raise LaunchError(
                f"local rank {self.local_rank} finds {visible} GPU(s) (CUDA_VISIBLE_DEVICES="
                f"{os.environ.get('CUDA_VISIBLE_DEVICES', 'unset')}): start one rank a GPU."
            )
        return self.local_rank


def world() -> World:
    """What the environment of this process says.

    Raises:
        LaunchError: as `find_ranks`.
    """
    return find_ranks(os.environ)


def find_ranks(environ: Mapping[str, str]) -> World:
    """What an environment says of the process that has it.

    Raises:
        LaunchError: variables are incomplete or contradict one another.
    """
    stated = {name: environ[name] for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE") if name in environ}
    counted = ("SLURM_STEP_NUM_TASKS", "SLURM_PROCID", "SLURM_LOCALID")
    numbers = stated | {name: environ[name] for name in counted if name in environ}
    for name, text in numbers.items():
        if not text.isdecimal():
            raise LaunchError(f"{name}='{text}' is not a number of ranks: unset it or use a launcher.")
    # The step's own number: SLURM_NTASKS is the job's, and stands in the batch shell, too, which is one process.
    slurm_tasks = int(environ.get("SLURM_STEP_NUM_TASKS", "1")) if "SLURM_PROCID" in environ else 1
    if stated:
        absent = {"RANK", "LOCAL_RANK", "WORLD_SIZE"} - set(stated)
        if absent:
            raise LaunchError(f"the environment sets {sorted(stated)} but not {sorted(absent)}: unset them or use a launcher.")
        rank, local, size = (int(stated[name]) for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE"))
        if not 0 <= rank < size:
            raise LaunchError(f"RANK={rank} is not inside WORLD_SIZE={size}.")
        if size == 1 and slurm_tasks > 1:
            raise LaunchError(
                f"WORLD_SIZE=1 inside a SLURM step of {slurm_tasks} tasks: they would be {slurm_tasks} separate "
                'trainings. With the deepspeed launcher add --launcher_args "--mpi=pmi2".'
            )
        elastic = "TORCHELASTIC_RUN_ID" in environ
        return World(rank, local, size, "torchrun" if elastic else "deepspeed")
    if slurm_tasks > 1:
        if "SLURM_LOCALID" not in environ:
            raise LaunchError(
                "SLURM gives SLURM_PROCID but not SLURM_LOCALID, so a rank cannot know its GPU: start it with srun."
            )
        rank, local = int(environ["SLURM_PROCID"]), int(environ["SLURM_LOCALID"])
        return World(rank, local, slurm_tasks, "srun")
    return _of_mpi() if by_mpi(environ) else World(0, 0, 1, "single process")


def by_mpi(environ: Mapping[str, str]) -> bool:
    """Whether a process belongs to an MPI job, which importing mpi4py joins; no other may do that."""
    sizes = [environ[name] for name in ("PMI_SIZE", "OMPI_COMM_WORLD_SIZE") if name in environ]
    if "SLURM_PROCID" in environ and set(sizes) <= {"1"} and environ.get("SLURM_STEP_NUM_TASKS", "1") == "1":
        return False  # one task of srun, which some sites start with MPI's variables
    return any(name in environ for name in LAUNCHED_BY_MPI)


@cache
def _of_mpi() -> World:
    """Asked once: splitting is a collective."""
    from mpi4py import MPI

    everyone = MPI.COMM_WORLD
    local = everyone.Split_type(MPI.COMM_TYPE_SHARED).Get_rank()
    return World(everyone.Get_rank(), local, everyone.Get_size(), "mpirun")


def require_size(size: int, asked: int | None) -> None:
    """
    Raises:
        LaunchError: not as many ranks as were asked for; often each of them would be a training of its own.
    """
    if asked is not None and size != asked:
        raise LaunchError(
            f"{asked} ranks were asked for and this is one of {size}. With the deepspeed launcher under SLURM add "
            '--launcher_args "--mpi=pmi2"; else compare the launch script with --world-size.'
        )
