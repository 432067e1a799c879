"""Joining the ranks of a job: device, process group, collectives that are tried, and a run directory of its own."""

from __future__ import annotations

import datetime
import logging
import os
import resource
import socket
import time
import uuid
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from data.process import locks
from data.process.ranks import LaunchError, World, world
from trainer.checkpoint.consistency import on_main

log = logging.getLogger("trainer")
SEEN_WITHIN_S = 20.0  # a file just written by rank 0, on every host


@dataclass(frozen=True)
class Joined(World):
    """The ranks of a job that have met, and the device of this one."""

    device: torch.device


def join(timeout_minutes: float) -> Joined:
    """Find the ranks, choose the device and create the process group.

    Raises:
        LaunchError: as `find_ranks`, or the master's address is unknown.
    """
    mine = world()
    numbers = {"RANK": mine.rank, "LOCAL_RANK": mine.local_rank, "WORLD_SIZE": mine.size}
    os.environ.update({name: str(number) for name, number in numbers.items()})
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))  # shards and a socket a peer are more than the usual 1024
    _find_master(mine.launcher)
    _require_master()
    device = device_of(mine)
    if device.type == "cuda":
        torch.cuda.set_device(device)
    else:
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
        if "OMP_NUM_THREADS" not in os.environ:
            sharing = int(os.environ.get("LOCAL_WORLD_SIZE", mine.size))
            torch.set_num_threads(max(1, len(os.sched_getaffinity(0)) // sharing))
    import deepspeed
    from deepspeed.utils import logger as deepspeed_logger

    deepspeed_logger.setLevel(logging.WARNING if mine.is_main else logging.ERROR)
    leave_muon_uncompiled()
    if device.type == "cpu":
        skip_inference_operator()
    timeout = datetime.timedelta(minutes=timeout_minutes)
    # ZeRO's sub-groups ignore the timeout given to init_distributed.
    dist.distributed_c10d.default_pg_timeout = dist.distributed_c10d.default_pg_nccl_timeout = timeout
    backend = "nccl" if device.type == "cuda" else "gloo"
    deepspeed.init_distributed(dist_backend=backend, auto_mpi_discovery=False, timeout=timeout, verbose=False)
    return Joined(mine.rank, mine.local_rank, mine.size, mine.launcher, device)


def device_of(mine: World) -> torch.device:
    """The GPU of a rank, or the CPU where torch sees no GPU.

    Raises:
        LaunchError: a host has more ranks than visible GPUs.
    """
    if not torch.cuda.is_available():
        return torch.device("cpu")
    return torch.device("cuda", mine.gpu(torch.cuda.device_count()))


def skip_inference_operator() -> None:
    """On CPUs: DeepSpeed would build an operator that training does not use, for minutes, and leave a lock when killed."""
    from deepspeed.ops import __compatible_ops__

    __compatible_ops__["deepspeed_shm_comm"] = False


def leave_muon_uncompiled() -> None:
    """DeepSpeed 0.19.8 asks of every optimizer whether it is Muon, and compiles Muon's kernels for the answer: that imports
    all of torch's compiler, over a second of processor and a thousand files on every rank, for nothing."""
    from deepspeed.runtime import compiler

    compiler.compile = lambda: compiler.dummy_decorator


def try_collectives(world: Joined, megabytes: int = 16) -> None:
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
        stages = {
            f"the ranks of {hosts[world.rank]}": members[hosts[world.rank]],
            "two hosts": [*groups[0], *groups[1]],
            **stages,
        }
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
            raise LaunchError(
                f"an all-reduce over {stage} summed the ranks to {total:g}, not {sum(ranks)}: the network or its "
                "plugin corrupts data."
            )
        rate = 2 * (len(ranks) - 1) / len(ranks) * values.nbytes / seconds / 1e9
        if group is not dist.group.WORLD:
            dist.destroy_process_group(group)
        log.info("all-reduce over %s: %d ranks, %d MB in %.3f s, %.2f GB/s", stage, len(ranks), megabytes, seconds, rate)


def leave() -> None:
    if dist.is_initialized():
        dist.destroy_process_group()


def require_alike(settings: dict[str, Any], world: Joined) -> None:
    """Every rank must have the same settings, or ranks would wait for different things; collective.

    Raises:
        LaunchError: on every rank, naming the first setting that differs and where.
    """
    everyone: list[Any] = [settings]
    dist.broadcast_object_list(everyone, src=0)
    first = everyone[0]
    keys = sorted(settings.keys() | first.keys())
    differing = [key for key in keys if settings.get(key) != first.get(key)]
    mine = [f"{key}: {settings.get(key)}, not {first.get(key)}" for key in differing[:1]]
    everyone = [[] for _ in range(world.size)]
    dist.all_gather_object(everyone, mine)
    odd = {rank: told[0] for rank, told in enumerate(everyone) if told}
    if odd:
        raise LaunchError(
            f"rank(s) {list(odd)} have another {next(iter(odd.values()))[:400]}: every host must "
            "have the same configuration, DeepSpeed settings, packages and kind of GPU."
        )


def require_shared(run_dir: Path, world: Joined) -> None:
    """Every rank must see what rank 0 has written, or its shard of a checkpoint would lie where nobody finds it; collective.

    Raises:
        LaunchError: on every rank, naming the hosts that do not see it.
    """
    token = uuid.uuid4().hex
    probe = run_dir / f".seen-{on_main(lambda: _write_probe(run_dir, token))}"
    deadline, seen = time.monotonic() + SEEN_WITHIN_S, probe.exists()
    while not seen and time.monotonic() < deadline:
        time.sleep(0.2)
        seen = probe.exists()
    everyone: list[tuple[str, bool]] = [("", True)] * world.size
    dist.all_gather_object(everyone, (socket.gethostname(), seen))
    if world.is_main:
        probe.unlink(missing_ok=True)
    blind = [rank for rank, (_, sees) in enumerate(everyone) if not sees]
    if blind:
        hosts = ", ".join(sorted({everyone[rank][0] for rank in blind}))
        raise LaunchError(
            f"rank(s) {blind} on {hosts} do not see what rank 0 on {everyone[0][0]} has written to {run_dir}: "
            "it is a disk of each host. Choose a run_dir on a file system that all hosts share."
        )


def _write_probe(run_dir: Path, token: str) -> str:
    run_dir.mkdir(parents=True, exist_ok=True)
    (run_dir / f".seen-{token}").touch()
    return token


def claim(run_dir: Path, world: Joined) -> locks.Held | None:
    """Hold the run directory for this job, so that orphans of a killed launcher and their successor never both write.

    Returns:
        The lock, on rank 0, which holds it for all.

    Raises:
        LaunchError: on every rank, if another job trains there.
    """
    held: list[locks.Held] = []

    def take() -> None:
        run_dir.mkdir(parents=True, exist_ok=True)
        try:
            held.append(locks.hold(run_dir / "lock"))
        except locks.Busy as busy:
            raise LaunchError(f"{run_dir} is being trained by {busy}: end that first, or choose another run_dir.") from busy

    on_main(take)
    return held[0] if held else None


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


def _require_master() -> None:
    """Refuse a name that nobody can look up: the rendezvous would ask for it ten minutes long."""
    address, port = os.environ["MASTER_ADDR"], os.environ["MASTER_PORT"]
    try:
        socket.getaddrinfo(address, int(port))
    except (OSError, ValueError, OverflowError) as error:
        raise LaunchError(
            f"MASTER_ADDR={address}, MASTER_PORT={port} is no address on {socket.gethostname()} "
            f"({error}): export the name of rank 0's host as the others know it, and a free port."
        ) from error


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("", 0))
        return int(probe.getsockname()[1])
