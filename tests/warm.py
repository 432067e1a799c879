"""A warm parent, started once a session: it has imported what ranks need, and forks each job's ranks from itself.

So a test's ranks are real processes with a process group of their own, and start in a tenth of a second instead of three.
A job is a line on standard input, as JSON: "argv" as of python itself (a script, "-m" and a module, or "-c" and code),
"ranks" (0 for a process without a launcher), "env", and the files "out" and "err". The answers are two lines: the process
numbers, and, after {"wait": numbers}, the exit code of the rank that failed first, or 0. As launchers do, it ends the other
ranks when one has failed.
"""

from __future__ import annotations

import json
import logging
import os
import runpy
import signal
import sys
import time
from pathlib import Path
from typing import Any

import deepspeed.utils  # noqa: F401
import torch._dynamo
import torch.utils.tensorboard  # noqa: F401
import xarray  # noqa: F401
import zarr  # noqa: F401
from deepspeed.ops import __compatible_ops__  # noqa: F401 - probing compiles a program

import data.prepare.stages
import data.store.opening  # noqa: F401
import trainer.forecaster
import trainer.preflight.examine
import trainer.train  # noqa: F401
from tests.launching import free_port

GRACE_S = 20.0  # between the wish that ranks end and their end


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


def ended(pids: list[int]) -> int:
    """Exit code of the rank that failed first, or 0, once all have ended; one of its own before one of a signal.

    A process that leaves by `_exit` beside other threads can be gone to look at, and not yet to wait for.
    """
    first = 0
    codes: dict[int, int] = {}
    deadline = float("inf")
    while len(codes) < len(pids):
        for pid in [pid for pid in pids if pid not in codes]:
            found, status = os.waitpid(pid, os.WNOHANG)
            if found:
                codes[pid] = os.waitstatus_to_exitcode(status)
                first = codes[pid] if first == 0 or first < 0 < codes[pid] else first
        if any(codes.values()) and deadline == float("inf"):
            deadline = time.monotonic() + GRACE_S
            for other in set(pids) - set(codes):
                os.kill(other, signal.SIGTERM)
        elif time.monotonic() > deadline:
            for other in set(pids) - set(codes):
                os.kill(other, signal.SIGKILL)
        else:
            time.sleep(0.01)
    return first


def serve() -> list[str]:
    """Fork jobs until standard input ends; in a forked rank, what it has to run."""
    for line in sys.stdin:
        job = json.loads(line)
        if "wait" in job:
            print(json.dumps([ended(job["wait"])]), flush=True)
            continue
        port, pids = free_port(), []
        for rank in range(max(1, job["ranks"])):
            pid = os.fork()
            if pid == 0:
                become(job, rank, port)
                argv: list[str] = job["argv"]
                return argv
            pids.append(pid)
        print(json.dumps(pids), flush=True)
    return []


def run(argv: list[str]) -> None:
    """As python would; but a rank that has ended is gone at once, without tidying up a thousand modules."""
    try:
        if argv[0] == "-c":
            sys.argv = argv[:1] + argv[2:]
            exec(compile(argv[1], "<string>", "exec"), {"__name__": "__main__"})
        elif argv[0] == "-m":
            sys.argv = argv[1:]
            runpy.run_module(argv[1], run_name="__main__", alter_sys=True)
        else:
            sys.argv = argv
            sys.path[0] = str(Path(argv[0]).absolute().parent)
            runpy.run_path(argv[0], run_name="__main__")
        code: Any = 0
    except SystemExit as ended:
        code = ended.code
    if isinstance(code, str):
        print(code, file=sys.stderr)
    logging.shutdown()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code if isinstance(code, int) else int(code is not None))


if __name__ == "__main__":
    told = serve()
    if told:
        run(told)  # at the top of the process, so that a hook for errors is called as it would be
