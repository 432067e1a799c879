"""A warm parent, started once a session: it has imported what ranks need, and forks each job's ranks from itself.

So a test's ranks are real processes with a process group of their own, and start in a tenth of a second instead of three.
A job is a line on standard input, as JSON: "argv" as of python itself (a script, or "-m" and a module), "ranks" (0 for a
process without a launcher), "env", and the files "out" and "err". The answer is a line with the exit codes. As launchers
do, it ends the other ranks when one has failed.
"""

from __future__ import annotations

import json
import os
import runpy
import signal
import socket
import sys
import time
from typing import Any

import deepspeed.utils  # noqa: F401
import torch._dynamo
import torch.utils.tensorboard  # noqa: F401
import xarray  # noqa: F401

import trainer.forecaster
import trainer.preflight.examine
import trainer.train  # noqa: F401

GRACE_S = 20.0  # between the wish that ranks end and their end


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def become(job: dict[str, Any], rank: int, port: int) -> None:
    """Turn this forked process into what a launcher would have started."""
    os.environ.clear()
    os.environ.update(job["env"])
    if job["ranks"]:
        size = str(job["ranks"])
        os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=size, LOCAL_WORLD_SIZE=size)
        os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    for file, descriptor in (("out", 1), ("err", 2)):
        opened = os.open(job[file], os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(opened, descriptor)
        os.close(opened)
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)


def ended(pids: list[int]) -> list[int]:
    """Exit codes of the ranks, once all have ended."""
    codes: dict[int, int] = {}
    deadline = float("inf")
    while len(codes) < len(pids):
        pid, status = os.waitpid(-1, os.WNOHANG)
        if pid in pids:
            codes[pid] = os.waitstatus_to_exitcode(status)
            if codes[pid] != 0 and deadline == float("inf"):
                deadline = time.monotonic() + GRACE_S
                for other in set(pids) - set(codes):
                    os.kill(other, signal.SIGTERM)
        elif time.monotonic() > deadline:
            for other in set(pids) - set(codes):
                os.kill(other, signal.SIGKILL)
        else:
            time.sleep(0.01)
    return [codes[pid] for pid in pids]


def serve() -> list[str]:
    """Fork jobs until standard input ends; in a forked rank, what it has to run."""
    for line in sys.stdin:
        job = json.loads(line)
        port, pids = free_port(), []
        for rank in range(max(1, job["ranks"])):
            pid = os.fork()
            if pid == 0:
                become(job, rank, port)
                argv: list[str] = job["argv"]
                return argv
            pids.append(pid)
        print(json.dumps(ended(pids)), flush=True)
    return []


if __name__ == "__main__":
    told = serve()
    # At the top of the process, so that exit codes, hooks and threads are those of a python that was started so.
    if told and told[0] == "-m":
        sys.argv = told[1:]
        runpy.run_module(told[1], run_name="__main__", alter_sys=True)
    elif told:
        sys.argv = told
        runpy.run_path(told[0], run_name="__main__")
