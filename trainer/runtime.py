"""The world a process finds itself in: ranks, process group, device, and the wish to stop.

One function resolves rank and world size for every launcher: `deepspeed` and `torchrun` (environment), `srun`
(SLURM's variables), `mpirun` (mpi4py), or none (a single process).
"""

from __future__ import annotations

import datetime
import fcntl
import logging
import os
import resource
import signal
import socket
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import IO

import torch
import torch.distributed as dist

log = logging.getLogger("trainer")
TIME_LIMIT = "the time limit"


class LaunchError(Exception):
    """The launcher's variables are incomplete or contradict one another."""


@dataclass(frozen=True)
class World:
    rank: int
    local_rank: int
    size: int
    launcher: str
    device: torch.device

    @property
    def is_main(self) -> bool:
        return self.rank == 0


def find_ranks(environ: Mapping[str, str]) -> tuple[int, int, int, str]:
    """(rank, local rank, world size, launcher) from the environment.

    Raises:
        LaunchError: variables are incomplete or contradict one another.
    """
    stated = {name: environ[name] for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE") if name in environ}
    slurm_tasks = int(environ.get("SLURM_NTASKS", "1")) if "SLURM_PROCID" in environ else 1
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


def join(timeout_minutes: float) -> World:
    """Find the ranks, choose the device and create the process group.

    Raises:
        LaunchError: as `find_ranks`, or the master's address is unknown.
    """
    rank, local_rank, size, launcher = find_ranks(os.environ)
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(local_rank), WORLD_SIZE=str(size))
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))  # shards and a socket a peer are more than the usual 1024
    _find_master(launcher)
    if torch.cuda.is_available():
        device = torch.device("cuda", local_rank % torch.cuda.device_count())
        torch.cuda.set_device(device)
    else:
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
        device = torch.device("cpu")
        if "OMP_NUM_THREADS" not in os.environ:
            torch.set_num_threads(max(1, len(os.sched_getaffinity(0)) // int(os.environ.get("LOCAL_WORLD_SIZE", size))))
    import deepspeed
    from deepspeed.utils import logger as deepspeed_logger

    deepspeed_logger.setLevel(logging.WARNING if rank == 0 else logging.ERROR)
    if device.type == "cpu":
        skip_inference_operator()
    timeout = datetime.timedelta(minutes=timeout_minutes)
    # ZeRO's sub-groups ignore the timeout given to init_distributed.
    dist.distributed_c10d.default_pg_timeout = dist.distributed_c10d.default_pg_nccl_timeout = timeout
    backend = "nccl" if device.type == "cuda" else "gloo"
    deepspeed.init_distributed(dist_backend=backend, auto_mpi_discovery=False, timeout=timeout, verbose=False)
    return World(rank, local_rank, size, launcher, device)


def skip_inference_operator() -> None:
    """On CPUs: DeepSpeed would build an operator that training does not use, for minutes, and leave a lock when killed."""
    from deepspeed.ops import __compatible_ops__

    __compatible_ops__["deepspeed_shm_comm"] = False


def try_collectives(world: World, megabytes: int = 16) -> None:
    """All-reduce within every host, between two hosts, and over all ranks: where the network is broken, here is where.

    Raises:
        LaunchError: on every rank that got a wrong sum.
    """
    hosts: list[str] = [""] * world.size
    dist.all_gather_object(hosts, socket.gethostname())
    members = {host: [rank for rank, other in enumerate(hosts) if other == host] for host in dict.fromkeys(hosts)}
    stages = {"all ranks": list(range(world.size))}
    if len(members) > 1:
        groups = list(members.values())
        stages = {f"the ranks of {hosts[world.rank]}": members[hosts[world.rank]],
                  "two hosts": [*groups[0], *groups[1]], **stages}  # fmt: skip
        within, _ = dist.new_subgroups_by_enumeration(groups)
        handles = [within, dist.new_group([*groups[0], *groups[1]]), dist.group.WORLD]
    else:
        handles = [dist.group.WORLD]
    values = torch.empty(megabytes * 250_000, device=world.device)
    for (stage, ranks), group in zip(stages.items(), handles, strict=True):
        if world.rank not in ranks:
            continue
        for _ in range(2):  # the first one connects
            values.fill_(float(world.rank))
            started = time.perf_counter()
            dist.all_reduce(values, group=group)
            total = float(values[-1])
            seconds = time.perf_counter() - started
        if total != sum(ranks) or float(values[0]) != total:
            raise LaunchError(f"an all-reduce over {stage} summed the ranks to {total:g}, not {sum(ranks)}: the network or its "
                              "plugin corrupts data.")  # fmt: skip
        rate = 2 * (len(ranks) - 1) / len(ranks) * values.nbytes / seconds / 1e9
        if group is not dist.group.WORLD:
            dist.destroy_process_group(group)
        log.info("all-reduce over %s: %d ranks, %d MB in %.3f s, %.2f GB/s", stage, len(ranks), megabytes, seconds, rate)


def keep_errors(run_dir: Path, rank: int) -> None:
    """From now on this rank's errors, and what ends it unexpectedly, are also in RUN_DIR/errors/rank-R.log."""
    (run_dir / "errors").mkdir(parents=True, exist_ok=True)
    kept = logging.FileHandler(run_dir / "errors" / f"rank-{rank}.log", delay=True)
    kept.setLevel(logging.ERROR)
    kept.setFormatter(logging.Formatter("%(asctime)s %(message)s"))
    logging.getLogger().addHandler(kept)
    sys.excepthook = lambda kind, error, trace: log.critical("%s: %s", kind.__name__, error, exc_info=(kind, error, trace))


def leave() -> None:
    if dist.is_initialized():
        dist.destroy_process_group()


def _lock(file: IO[str], patience_s: float = 2.0) -> bool:
    """Lock `file` for this process alone; whoever only looks whether it is locked lets go within `patience_s`."""
    deadline = time.monotonic() + patience_s
    while True:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            if time.monotonic() > deadline:
                return False
            time.sleep(0.05)
        else:
            return True


def claim(run_dir: Path, world: World) -> IO[str]:
    """Hold the run directory for this job, so that orphans of a killed launcher and their successor never both write.

    Raises:
        LaunchError: on every rank, if another process trains there.
    """
    run_dir.mkdir(parents=True, exist_ok=True)
    held = (run_dir / "lock").open("a+")
    refusal: list[str | None] = [None]
    if world.is_main:
        if not _lock(held):
            held.seek(0)
            refusal = [f"{run_dir} is being trained by {held.read().strip()}: end that first, or choose another run_dir."]
        else:
            held.truncate(0)
            held.write(f"process {os.getpid()} on {socket.gethostname()}\n")
            held.flush()
    dist.broadcast_object_list(refusal, src=0)
    if refusal[0] is not None:
        raise LaunchError(refusal[0])
    return held


class StopVote:
    """Signals, the file STOP in the run directory and a time limit, agreed on by all ranks at a step boundary.

    Votes travel beside the step: `cast` before it, `agreed` after it; so a stop takes effect at most one step later.
    """

    def __init__(self, run_dir: Path, end_time: float | None) -> None:
        self.run_dir, self.end_time = run_dir, end_time
        self.reason = ""
        self._vote = torch.zeros(2)
        self._work: dist.Work | None = None
        self._group = dist.new_group(backend="gloo")
        for number in (signal.SIGTERM, signal.SIGUSR1):
            signal.signal(number, self._on_signal)

    def cast(self, busy: bool) -> None:
        """Send this rank's vote; `busy` says that it is still writing a checkpoint."""
        if not self.reason and dist.get_rank() == 0 and (self.run_dir / "STOP").exists():
            self.reason = f"file {self.run_dir / 'STOP'}"
            (self.run_dir / "STOP").unlink()  # or the next start would stop as well
        if not self.reason and self.end_time is not None and time.time() > self.end_time:
            self.reason = TIME_LIMIT
        self._vote.copy_(torch.tensor([bool(self.reason), busy]))
        self._work = dist.all_reduce(self._vote, op=dist.ReduceOp.MAX, group=self._group, async_op=True)

    @property
    def wants_to_continue(self) -> bool:
        """Whether the reason was one that a scheduler's next start follows, not a person or its cancelling."""
        return self.reason in ("", TIME_LIMIT, signal.SIGUSR1.name)

    def agreed(self) -> tuple[bool, bool]:
        """(stop, busy): whether any rank wants to stop, and whether any was still writing."""
        assert self._work is not None
        self._work.wait()
        stop, busy = self._vote.tolist()
        return bool(stop), bool(busy)

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        self.reason = signal.Signals(number).name


def end_time(limit_minutes: float | None, environ: Mapping[str, str], reserve_s: float = 120.0) -> float | None:
    """When to stop, in seconds since the epoch: the limit given, or the scheduler's end less time to save."""
    ends = [] if limit_minutes is None else [time.time() + 60.0 * limit_minutes]
    if "SLURM_JOB_END_TIME" in environ:
        ends.append(float(environ["SLURM_JOB_END_TIME"]) - reserve_s)
    return min(ends, default=None)


def _find_master(launcher: str) -> None:
    if "MASTER_ADDR" in os.environ and "MASTER_PORT" in os.environ:
        return
    if launcher == "mpirun":
        from mpi4py import MPI

        found = (socket.gethostname(), _free_port()) if MPI.COMM_WORLD.Get_rank() == 0 else None
        address, port = MPI.COMM_WORLD.bcast(found)
    elif launcher == "single process":
        address, port = "127.0.0.1", _free_port()
    else:
        raise LaunchError(f"{launcher} gave ranks but not MASTER_ADDR and MASTER_PORT: export the first host and a free port.")
    os.environ.update(MASTER_ADDR=address, MASTER_PORT=str(port))


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("", 0))
        return int(probe.getsockname()[1])


def quieten(rank: int) -> None:
    """Only rank 0 talks; the others keep their errors, tagged with their rank."""
    logging.basicConfig(
        level=logging.INFO if rank == 0 else logging.ERROR, stream=sys.stderr,
        format="%(message)s" if rank == 0 else f"[rank {rank}] %(message)s",
    )  # fmt: skip
