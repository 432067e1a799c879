"""Thirty kills at random instants, a third of them inside a save, with roll-backs, retention, appends to the store and renames
of the run directory among them: every start resumes, and the end is bit-equal."""

from __future__ import annotations

import random
import signal
import subprocess
import time
from contextlib import suppress
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from data.prepare.appending import append
from data.store.opening import open_store
from tests.end_to_end.test_append import prepared
from tests.launching import ROOT, environment, manifest, tiny_config, train
from tests.reanalysis import write_caqra, write_static
from trainer.checkpoint import store

KILLS = 30
APPENDS = {9: "2015-01-03", 19: "2015-01-05"}  # life in which the store gets later hours -> the first day of them
RENAMED_WHILE_IT_RUNS = (4, 14, 24)  # which ends it
RENAMED_BETWEEN = (7, 17, 27)  # it goes on under another name
STEPS = 600


def descendants(pid: int) -> list[int]:
    children: list[int] = []
    for file in Path(f"/proc/{pid}/task").glob("*/children"):
        with suppress(OSError):  # a thread that has ended meanwhile
            children += map(int, file.read_text().split())
    return children + [d for child in children for d in descendants(child)]


def kill(pids: list[int]) -> None:
    subprocess.run(["kill", f"-{signal.SIGKILL.value}", *map(str, pids)], check=False, stderr=subprocess.DEVNULL)


@pytest.mark.slow
@pytest.mark.timeout(2400)
def test_thirty_kills_change_nothing(tmp_path: Path) -> None:
    rng = random.Random(0)
    write_static(tmp_path / "static.nc")
    write_caqra(tmp_path / "jan.nc", start="2014-12-31", hours=72)
    for start in APPENDS.values():
        write_caqra(tmp_path / f"{start}.nc", start=start, hours=48)
    common = {
        "steps": STEPS,
        "checkpoint": {"every": 5, "keep_last": 2},
        "schedule": {"warmup_steps": 3, "decay_steps": STEPS},
        "telemetry": {"every": 10},
        "validation": {"every": 1000, "samples": 4},
        "max_bad_steps": 1000,
        "spikes": {"policy": "roll_back", "factor": 1.03, "most_roll_backs": 1000},
    }
    data, configs = [], []
    for name in ("truth", "killed"):
        (tmp_path / name).mkdir()
        data.append(prepared(tmp_path, tmp_path / name / "s.zarr", "jan.nc"))
        configs.append(tiny_config(tmp_path / name, data[-1], **common))
    truth, run = tmp_path / "truth/run", tmp_path / "killed/run"
    done = train(configs[0], f"run_dir={truth}")
    assert done.returncode == 0, done.stderr[-3000:]
    outcomes = {"one rank": 0, "all ranks": 0, "launcher": 0, "inside a save": 0, "renamed": 0, "appended": 0}
    start = ["torchrun", "--standalone", "--nproc_per_node", "2", "trainer/train.py", "--config", str(configs[1])]
    for number in range(KILLS):
        if number in RENAMED_BETWEEN:
            run = run.rename(run.with_name(f"run{number}"))
        before = {path.name for path in (run / "checkpoints").glob("step-*")}
        log = (tmp_path / f"life{number}.log").open("w")
        process = subprocess.Popen([*start, f"run_dir={run}"], cwd=ROOT, env=environment(), stderr=log, stdout=log)
        deadline = time.monotonic() + 120
        while {path.name for path in (run / "checkpoints").glob("step-*[0-9]")} <= before:  # it lives, and has saved
            assert process.poll() is None, (tmp_path / f"life{number}.log").read_text()[-3000:]
            assert time.monotonic() < deadline
            time.sleep(0.002)
        ranks = descendants(process.pid)
        if number in APPENDS:  # under a run that reads the store
            append(data[1], [tmp_path / f"{APPENDS[number]}.nc"], workers=1)
            outcomes["appended"] += 1
        if number in RENAMED_WHILE_IT_RUNS:
            moved = run.rename(run.with_name("moved"))
            assert process.wait(timeout=90) not in (0, 75)
            assert not run.exists()
            moved.rename(run)
            outcomes["renamed"] += 1
            continue
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
    done = train(configs[1], f"run_dir={run}")
    assert done.returncode == 0, done.stderr[-3000:]
    lives = "".join((tmp_path / f"life{n}.log").read_text() for n in range(KILLS))
    assert lives.count("resumed from") >= KILLS - 1
    assert "is damaged" not in lives
    assert "is not continued" not in lives
    for file in ("weights.safetensors", "optimizer.safetensors"):
        ours, expected = (load_file(r / f"checkpoints/step-{STEPS:08d}" / file) for r in (run, truth))
        assert all(torch.equal(ours[name], expected[name]) for name in expected)
    ends = [manifest(r / f"checkpoints/step-{STEPS:08d}") for r in (run, truth)]
    progress = [end["progress"] for end in ends]
    assert progress[0]["stepped_over"] == progress[1]["stepped_over"]
    assert progress[0]["roll_backs"] == progress[1]["roll_backs"] >= 1
    assert progress[0]["validated_on"] == progress[1]["validated_on"]
    outcomes["roll-backs"] = progress[0]["roll_backs"]
    assert ends[0]["fingerprints"]["data"] == open_store(data[1]).fingerprint != ends[1]["fingerprints"]["data"]
    assert len(ends[0]["starts"]) == KILLS + 1
    assert len(store.look(run)) <= 3
    print(outcomes)
    assert outcomes["inside a save"] >= KILLS // 6
