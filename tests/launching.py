"""Runs of the product as a user starts them: real processes, the deepspeed launcher, gloo on this machine."""

from __future__ import annotations

import atexit
import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import threading
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import yaml

ROOT = Path(__file__).parents[1]
BIN = Path(sys.executable).parent


def environment() -> dict[str, str]:
    return {**os.environ, "PATH": f"{BIN}:{os.environ['PATH']}", "OMP_NUM_THREADS": "1"}


def tiny_config(folder: Path, store: Path, **changes: Any) -> Path:
    """A run of seconds on the session's tiny store; `changes` replace top-level keys."""
    tree: dict[str, Any] = {
        "run_dir": str(folder / "run"),
        "steps": 20,
        "seed": 5,
        "data": {"store": str(store), "lead_hours": [6, 12], "prefetch": 2},
        "wind_scan": {"mode": "regional", "cache": str(store.with_suffix(".wind_scan"))},
        "model": {"grid": [16, 32], "width": 32, "depth": 2, "heads": 4, "dropout": 0.1, "drop_path": 0.1},
        "optimizer": {"lr": 2e-3, "weight_decay": 0.01},
        "schedule": {"warmup_steps": 3, "decay_steps": 20},
        "batch": {"total": 8, "micro": 2},
        "validation": {"every": 100, "samples": 6},
        "checkpoint": {"every": 100},
        "telemetry": {"every": 1},
    }
    path = folder / "config.yaml"
    path.write_text(yaml.safe_dump(tree | changes))
    return path


def train(
    config: Path, *overrides: str, ranks: int = 2, zero: str = "1", launcher: str = "warm"
) -> subprocess.CompletedProcess[str]:
    """A run. "warm" forks its ranks (tests/warm.py); where the launcher matters, name it: torchrun or deepspeed."""
    own = ["trainer/train.py", *arguments(config, *overrides, zero=zero)]
    if launcher == "warm":
        return ranks_of(own, ranks if ranks > 1 else 0)
    start = {
        "torchrun": ["torchrun", "--standalone", "--nproc_per_node", str(ranks)],
        "deepspeed": ["deepspeed", "--num_gpus", str(ranks), "--master_port", str(free_port())],
    }
    return run([*start[launcher], *own])


def train_several(config: Path, jobs: list[dict[str, Any]], ranks: int = 2) -> subprocess.CompletedProcess[str]:
    """Many runs on the same ranks: each job has "zero", "overrides", settings of "deepspeed" that differ, and what
    tests/distributed/several.py injects."""
    given = []
    for number, job in enumerate(jobs):
        own = arguments(config, *job["overrides"], zero=job.get("zero", "1"))
        if "deepspeed" in job:
            settings = json.loads(Path(own[3]).read_text())
            for key, value in job["deepspeed"].items():
                settings[key] = settings[key] | value if isinstance(value, dict) else value
            own[3] = str(config.with_name(f"deepspeed-{number}.json"))
            Path(own[3]).write_text(json.dumps(settings))
        given.append(job | {"arguments": own})
    done = ranks_of(["tests/distributed/several.py", json.dumps(given)], ranks)
    assert done.returncode == 0, done.stderr[-3000:]
    return done


@dataclass
class Started:
    """Ranks that run: their process numbers, and the files that they write to."""

    argv: list[str]
    pids: list[int]
    out: Path
    err: Path

    def alive(self, rank: int = 0) -> bool:
        """Whether a rank has neither ended nor died."""
        return Path(f"/proc/{self.pids[rank]}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"

    def signal(self, number: int, rank: int = 0) -> None:
        os.kill(self.pids[rank], number)

    def wait(self, timeout: float = 120) -> subprocess.CompletedProcess[str]:
        return warm().wait(self, timeout)


class Warm:
    """The warm parent of this session, and one job after the other."""

    def __init__(self) -> None:
        command = [sys.executable, "-m", "tests.warm"]
        own = environment() | {"DS_ACCELERATOR": "cpu"}
        self._parent = subprocess.Popen(
            command, cwd=ROOT, env=own, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, start_new_session=True
        )
        self._folder = tempfile.TemporaryDirectory()
        self._count = 0
        atexit.register(self.close)

    def start(self, argv: list[str], ranks: int) -> Started:
        """Fork the ranks of a job."""
        self._count += 1
        files = {name: Path(self._folder.name, f"{self._count}.{name}") for name in ("out", "err")}
        for file in files.values():
            file.touch()
        job = {"argv": argv, "ranks": ranks, "env": environment(), **{name: str(file) for name, file in files.items()}}
        return Started(argv, self._ask(job, 30), files["out"], files["err"])

    def wait(self, started: Started, timeout: float) -> subprocess.CompletedProcess[str]:
        """Exit code 0, or that of the first rank that failed."""
        (code,) = self._ask({"wait": started.pids}, timeout)
        said = [file.read_text(errors="replace") for file in (started.out, started.err)]
        return subprocess.CompletedProcess(started.argv, code, *said)

    def _ask(self, question: dict[str, Any], timeout: float) -> list[int]:
        assert self._parent.stdin
        assert self._parent.stdout
        late = threading.Timer(timeout, self.close)
        late.start()
        try:
            self._parent.stdin.write(json.dumps(question) + "\n")
            self._parent.stdin.flush()
            answer = self._parent.stdout.readline()
        finally:
            late.cancel()
        if not answer:
            raise subprocess.TimeoutExpired(str(question)[:500], timeout)
        numbers: list[int] = json.loads(answer)
        return numbers

    def close(self) -> None:
        """End the parent and whatever it has started."""
        with suppress(ProcessLookupError):
            os.killpg(self._parent.pid, signal.SIGKILL)
        self._parent.wait()
        WARM.clear()


WARM: list[Warm] = []


def warm() -> Warm:
    if not WARM:
        WARM.append(Warm())
    return WARM[0]


def start_ranks(argv: list[str], ranks: int) -> Started:
    """Python with `argv` on so many forked ranks; 0 for a process that no launcher started."""
    return warm().start(argv, ranks)


def ranks_of(argv: list[str], ranks: int, timeout: float = 300) -> subprocess.CompletedProcess[str]:
    """`start_ranks`, and wait for their end."""
    return start_ranks(argv, ranks).wait(timeout)


def arguments(config: Path, *overrides: str, zero: str) -> list[str]:
    """Arguments of trainer/train.py."""
    deepspeed = ROOT / f"ds_configs/zero{zero}.json"
    if zero.startswith("3"):  # the tiny network's tensors would all be too small to be partitioned
        settings = json.loads(deepspeed.read_text())
        settings["zero_optimization"]["stage3_param_persistence_threshold"] = 0
        deepspeed = config.with_name(f"zero{zero}.json")
        deepspeed.write_text(json.dumps(settings))
    # A key given twice is refused; here a later one replaces what a list in common has.
    last = {text.partition("=")[0]: text for text in overrides if "=" in text}
    kept = [text for text in overrides if "=" not in text or last[text.partition("=")[0]] is text]
    return ["--config", str(config), "--deepspeed_config", str(deepspeed), *kept]


def run(command: list[str], timeout: float = 300) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command, cwd=ROOT, env=environment(), capture_output=True, text=True, timeout=timeout, check=False)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def as_rank(monkeypatch: pytest.MonkeyPatch, rank: int, size: int) -> None:
    """Be one of several processes of a launcher."""
    for name, number in (("RANK", rank), ("LOCAL_RANK", rank), ("WORLD_SIZE", size)):
        monkeypatch.setenv(name, str(number))


def manifest(checkpoint: Path) -> dict[str, Any]:
    """A checkpoint's manifest as JSON."""
    content: dict[str, Any] = json.loads((checkpoint / "manifest.json").read_text())
    return content


def module(*arguments: str) -> subprocess.CompletedProcess[str]:
    """`python -m ARGUMENTS`, forked from the warm parent."""
    return ranks_of(["-m", *arguments], 0)


def losses(run_dir: Path) -> list[float]:
    """Training loss of every step."""
    rows = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    return [row["loss"] for row in rows if row["kind"] == "train"]
