"""Runs of the product as a user starts them: real processes, the deepspeed launcher, gloo on this machine."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import yaml

ROOT = Path(__file__).parents[1]
BIN = Path(sys.executable).parent


def environment() -> dict[str, str]:
    return {**os.environ, "PATH": f"{BIN}:{os.environ['PATH']}", "OMP_NUM_THREADS": "1"}


def tiny_config(folder: Path, store: Path, **changes: Any) -> Path:
    """A run of seconds on the session's tiny store; `changes` replace top-level keys."""
    tree: dict[str, Any] = {
        "run_dir": str(folder / "run"), "steps": 20, "seed": 5,
        "data": {"store": str(store), "lead_hours": [6, 12], "prefetch": 2},
        "wind_scan": {"mode": "regional", "cache": str(store.with_suffix(".wind_scan"))},
        "model": {"grid": [16, 32], "width": 32, "depth": 2, "heads": 4, "dropout": 0.1, "drop_path": 0.1},
        "optimizer": {"lr": 2e-3, "weight_decay": 0.01},
        "schedule": {"warmup_steps": 3, "decay_steps": 20},
        "batch": {"total": 8, "micro": 2},
        "validation": {"every": 100, "samples": 6}, "checkpoint": {"every": 100}, "telemetry": {"every": 1},
    }  # fmt: skip
    path = folder / "config.yaml"
    path.write_text(yaml.safe_dump(tree | changes))
    return path


def train(
    config: Path, *overrides: str, ranks: int = 2, zero: str = "1", launcher: str = "torchrun"
) -> subprocess.CompletedProcess[str]:
    """A run as a user starts it. torchrun is seconds quicker than `deepspeed --num_gpus RANKS`, but prints a traceback of
    its own when a rank fails; one rank needs no launcher."""
    start = {"torchrun": ["torchrun", "--standalone", "--nproc_per_node", str(ranks)],
             "deepspeed": ["deepspeed", "--num_gpus", str(ranks), "--master_port", str(free_port())]}[launcher]  # fmt: skip
    if ranks == 1 and launcher == "torchrun":
        start = [sys.executable]
    return run([*start, "trainer/train.py", *arguments(config, *overrides, zero=zero)])


def train_several(config: Path, jobs: list[dict[str, Any]], ranks: int = 2) -> subprocess.CompletedProcess[str]:
    """Many runs for one start-up: each job has "zero", "overrides", settings of "deepspeed" that differ, and what
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
    command = ["torchrun", "--standalone", "--nproc_per_node", str(ranks), "tests/distributed/several.py", json.dumps(given)]
    done = run(command)
    assert done.returncode == 0, done.stderr[-3000:]
    return done


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


def manifest(checkpoint: Path) -> dict[str, Any]:
    """A checkpoint's manifest as JSON."""
    content: dict[str, Any] = json.loads((checkpoint / "manifest.json").read_text())
    return content


def module(*arguments: str) -> subprocess.CompletedProcess[str]:
    """`python -m ARGUMENTS`."""
    return run([sys.executable, "-m", *arguments])


def losses(run_dir: Path) -> list[float]:
    """Training loss of every step."""
    rows = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    return [row["loss"] for row in rows if row["kind"] == "train"]
