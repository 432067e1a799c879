"""Thirty kills at random instants, a third of them inside a save, roll-backs and retention among them: every start resumes,
the end is bit-equal."""

from __future__ import annotations

import random
import signal
import subprocess
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from data.wind_scan.cache import ScanCache
from tests.launching import ROOT, environment, manifest, tiny_config, train

KILLS = 30
STEPS = 600


def descendants(pid: int) -> list[int]:
    children = [int(c) for f in Path(f"/proc/{pid}/task").glob("*/children") for c in f.read_text().split()]
    return children + [d for child in children for d in descendants(child)]


def kill(pids: list[int]) -> None:
    subprocess.run(["kill", f"-{signal.SIGKILL.value}", *map(str, pids)], check=False, stderr=subprocess.DEVNULL)


@pytest.mark.slow
@pytest.mark.timeout(2400)
def test_thirty_kills_change_nothing(tmp_path: Path, tiny_path: Path, tiny_scan: ScanCache) -> None:
    rng = random.Random(0)
    schedule = {"warmup_steps": 3, "decay_steps": STEPS}
    config = tiny_config(
        tmp_path,
        tiny_path,
        steps=STEPS,
        checkpoint={"every": 5, "keep_last": 2},
        schedule=schedule,
        telemetry={"every": 10},
        validation={"every": 1000, "samples": 4},
        max_bad_steps=1000,
        spikes={"policy": "roll_back", "factor": 1.12, "most_roll_backs": 1000},
    )
    truth, run = tmp_path / "truth", tmp_path / "killed"
    done = train(config, f"run_dir={truth}")
    assert done.returncode == 0, done.stderr[-3000:]
    outcomes = {"one rank": 0, "all ranks": 0, "launcher": 0, "inside a save": 0}
    command = [
        "torchrun",
        "--standalone",
        "--nproc_per_node",
        "2",
        "trainer/train.py",
        "--config",
        str(config),
        f"run_dir={run}",
    ]
    for number in range(KILLS):
        before = {p.name for p in (run / "checkpoints").glob("step-*")}
        log = (tmp_path / f"life{number}.log").open("w")
        process = subprocess.Popen(command, cwd=ROOT, env=environment(), stderr=log, stdout=log)
        deadline = time.monotonic() + 120
        while {p.name for p in (run / "checkpoints").glob("step-*[0-9]")} <= before:  # it lives, and has saved
            assert process.poll() is None, (tmp_path / f"life{number}.log").read_text()[-3000:]
            assert time.monotonic() < deadline
            time.sleep(0.002)
        ranks = descendants(process.pid)
        if number % 3 == 0:
            while not list((run / "checkpoints").glob("step-*.partial")) and process.poll() is None:
                pass
            time.sleep(rng.uniform(0.0, 0.01))
        else:
            time.sleep(rng.uniform(0.0, 0.5))
        assert process.poll() is None, "the run ended before it was killed: raise STEPS"
        victim = ("one rank", "all ranks", "launcher")[number // 3 % 3]
        kill({"one rank": [rng.choice(ranks)], "all ranks": ranks, "launcher": [process.pid]}[victim])
        outcomes[victim] += 1
        if victim == "launcher":
            kill(ranks)  # its orphans would train on
        process.wait(timeout=90)
        kill(ranks)
        outcomes["inside a save"] += bool(list((run / "checkpoints").glob("step-*.partial")))  # it left one behind
    done = train(config, f"run_dir={run}")
    assert done.returncode == 0, done.stderr[-3000:]
    lives = "".join((tmp_path / f"life{n}.log").read_text() for n in range(KILLS))
    assert lives.count("resumed from") >= KILLS - 1
    assert "is damaged" not in lives
    for file in ("weights.safetensors", "optimizer.safetensors"):
        ours, expected = (load_file(r / f"checkpoints/step-{STEPS:08d}" / file) for r in (run, truth))
        assert all(torch.equal(ours[name], expected[name]) for name in expected)
    ends = [manifest(r / f"checkpoints/step-{STEPS:08d}")["progress"] for r in (run, truth)]
    assert ends[0]["stepped_over"] == ends[1]["stepped_over"]
    outcomes["roll-backs"] = ends[0]["roll_backs"]
    assert ends[0]["roll_backs"] == ends[1]["roll_backs"] >= 1
    print(outcomes)
    assert outcomes["inside a save"] >= KILLS // 6
