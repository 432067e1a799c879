"""Which rank is this, of how many? One answer for every launcher; without torch.

`deepspeed` and `torchrun` say it in the environment, `srun` in SLURM's variables, `mpirun` through mpi4py; without any of
them a process is alone.
"""

from __future__ import annotations

from collections.abc import Mapping

from data import Refusal


class LaunchError(Refusal):
    """The launcher's variables are incomplete or contradict one another, or the run directory is not this job's."""


def find_ranks(environ: Mapping[str, str]) -> tuple[int, int, int, str]:
    """(rank, local rank, world size, launcher) from the environment.

    Raises:
        LaunchError: variables are incomplete or contradict one another.
    """
    stated = {name: environ[name] for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE") if name in environ}
    numbers = {**stated, **{name: environ[name] for name in ("SLURM_STEP_NUM_TASKS", "SLURM_PROCID") if name in environ}}
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
        return rank, local, size, "torchrun" if "TORCHELASTIC_RUN_ID" in environ else "deepspeed"
    if slurm_tasks > 1:
        return int(environ["SLURM_PROCID"]), int(environ["SLURM_LOCALID"]), slurm_tasks, "srun"
    if "PMI_SIZE" in environ or "OMPI_COMM_WORLD_SIZE" in environ:
        from mpi4py import MPI

        world = MPI.COMM_WORLD
        local = world.Split_type(MPI.COMM_TYPE_SHARED).Get_rank()
        return world.Get_rank(), local, world.Get_size(), "mpirun"
    return 0, 0, 1, "single process"


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
