"""Real two-process runs under the deepspeed launcher: every ZeRO stage is the same training, and resume is exact."""

from __future__ import annotations

import json
import subprocess
import time
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from data.store.opening import open_store
from data.wind_scan.cache import ScanCache
from tests.launching import ROOT, arguments, environment, free_port, losses, manifest, tiny_config, train, train_several


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory, tiny_path: Path, tiny_scan: ScanCache) -> Path:
    return tiny_config(tmp_path_factory.mktemp("zero"), tiny_path)


LENGTH = ("steps=26", "schedule.decay_steps=26")
SLOW = [pytest.param(zero, marks=pytest.mark.slow) for zero in ("0", "2", "3", "3_offload")]
STAGES = ["1", *SLOW]


def job(config: Path, zero: str, name: str, *overrides: str) -> dict[str, Any]:
    return {"zero": zero, "overrides": [f"run_dir={config.parent / name}", *LENGTH, *overrides]}


@pytest.fixture(scope="module")
def single(config: Path) -> Path:
    """26 steps by one process without ZeRO; dropout on, accumulation 2."""
    train_several(config, [job(config, "0", "single")], ranks=1)
    return config.parent / "single"


@pytest.fixture(scope="module")
def staged(config: Path) -> Callable[[str], Path]:
    """Directory of the same steps by two ranks at a ZeRO stage, and again stopped at 1, 7 and 23."""

    @cache
    def train_at(zero: str) -> Path:
        parts = [job(config, zero, f"resumed{zero}", f"steps={steps}") for steps in (1, 7, 23, 26)]
        train_several(config, [job(config, zero, f"zero{zero}"), *parts])
        return config.parent

    return train_at


@pytest.mark.parametrize("zero", STAGES)
def test_every_stage_agrees_with_a_single_process(single: Path, staged: Callable[[str], Path], zero: str) -> None:
    runs = staged(zero)
    truth, ours = losses(single), losses(runs / f"zero{zero}")
    assert len(truth) == 26
    np.testing.assert_allclose(ours, truth, rtol=1e-5)
    # Compared from the start, a wrong update shows as a difference of moved distances, not of weights near 0.02.
    first, second = (final_weights(run) for run in (single, runs / f"zero{zero}"))
    assert first.keys() == second.keys()
    for name in first:
        torch.testing.assert_close(second[name], first[name], rtol=1e-3, atol=2e-5, msg=name)


@pytest.mark.parametrize("zero", STAGES)
def test_stopped_at_1_7_and_23_the_curve_is_the_uninterrupted_one_to_the_bit(staged: Callable[[str], Path], zero: str) -> None:
    runs = staged(zero)
    assert losses(runs / f"resumed{zero}") == losses(runs / f"zero{zero}")
    ours, truth = (final_weights(runs / name) for name in (f"resumed{zero}", f"zero{zero}"))
    assert all(torch.equal(ours[name], truth[name]) for name in truth)


def test_a_run_on_the_node_s_copy_of_the_store_is_the_same_run(
    config: Path, staged: Callable[[str], Path], tiny_path: Path
) -> None:
    runs = staged("1")
    train_several(config, [job(config, "1", "copied", f"data.cache_dir={config.parent}/node")])
    assert losses(runs / "copied") == losses(runs / "zero1")
    (copy,) = (runs / "node").iterdir()
    assert open_store(copy).fingerprint == open_store(tiny_path).fingerprint


def final_weights(run: Path) -> dict[str, torch.Tensor]:
    return load_file(run / "checkpoints/step-00000026/weights.safetensors")


@pytest.mark.slow
@pytest.mark.parametrize("zero", ["1", "3"])
def test_spikes_are_rolled_back_as_if_their_samples_had_never_been(config: Path, zero: str) -> None:
    """Two spoilt steps between the same two checkpoints; the truth is a run whose stream never held their samples."""
    still = [*LENGTH, "model.dropout=0.0", "model.drop_path=0.0", "checkpoint.every=5", "steps=20", "schedule.warmup_steps=0"]
    policy, skip = (f"spikes={{policy: {kind}, factor: 4.0}}" for kind in ("roll_back", "skip"))
    bad = [[88, 96], [104, 112]]
    clean, rolled, skipped = (config.parent / f"{name}{zero}" for name in ("clean", "rolled", "skipped"))
    jobs: list[dict[str, Any]] = [
        {"overrides": [f"run_dir={clean}", *still], "leave_out": bad},
        {"overrides": [f"run_dir={rolled}", *still, policy], "spike_at": bad},
        {"overrides": [f"run_dir={skipped}", *still, skip], "spike_at": bad},
    ]
    said = train_several(config, [job | {"zero": zero} for job in jobs]).stderr
    assert losses(rolled) == losses(clean)
    for first, last in bad:
        assert said.count(f"stepping over samples {first} to {last}") == 1
    rows = [json.loads(line) for line in (skipped / "bad_samples.jsonl").read_text().splitlines()]
    assert {row["step"] for row in rows} == {12, 14}
    assert len(rows) == 16
    assert rows[0]["reason"].startswith("loss ")
    assert len(losses(skipped)) == 18
    remembered = manifest(rolled / "checkpoints/latest")["progress"]
    assert remembered["roll_backs"] == 2
    assert remembered["stepped_over"] == bad
    assert remembered["samples_seen"] == 22 * 8


@pytest.mark.parametrize(
    ("launcher", "wish"),
    [
        ("torchrun", "USR1"),
        pytest.param("torchrun", "STOP", marks=pytest.mark.slow),
        pytest.param("deepspeed", "TERM", marks=pytest.mark.slow),
    ],
)
def test_told_to_stop_it_saves_and_a_second_start_finishes_the_same_run(
    config: Path, staged: Callable[[str], Path], launcher: str, wish: str
) -> None:
    """SIGUSR1 to one rank; a file STOP; SIGTERM to deepspeed's launcher of a host, which kills the ranks 30 s later."""
    run = config.parent / f"stopped-{wish}"
    start = {
        "torchrun": ["torchrun", "--standalone", "--nproc_per_node", "2"],
        "deepspeed": ["deepspeed", "--num_gpus", "2", "--master_port", str(free_port())],
    }
    command = [
        *start[launcher],
        "trainer/train.py",
        *arguments(config, f"run_dir={run}", *LENGTH, "steps=3000", zero="1"),
        "--stopped-file",
        str(config.parent / f"requeue-{wish}"),
    ]
    process = subprocess.Popen(command, cwd=ROOT, env=environment(), stderr=subprocess.PIPE, text=True)
    metrics = run / "metrics.jsonl"
    deadline = time.monotonic() + 120
    while not (metrics.exists() and metrics.read_text().count('"train"') >= 3):
        assert time.monotonic() < deadline
        assert process.poll() is None, process.stderr.read() if process.stderr else ""
        time.sleep(0.05)
    if wish == "STOP":
        (run / "STOP").touch()
    else:  # a rank of torchrun's; of `deepspeed`, the one child that starts the ranks
        children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
        subprocess.run(["kill", f"-{wish}", children[-1]], check=True)
    _, errors = process.communicate(timeout=120)
    assert "stopped at step" in errors, errors[-3000:]
    # A scheduler starts again what its own signal stopped, not what a person or a cancelled job has ended.
    assert (config.parent / f"requeue-{wish}").exists() == (wish == "USR1")
    stopped_at = manifest(sorted((run / "checkpoints").glob("step-*"))[-1])["progress"]["step"]
    assert 3 <= stopped_at < 3000
    done = train(config, f"run_dir={run}", *LENGTH, f"steps={max(26, stopped_at + 5)}")
    assert done.returncode == 0, done.stderr[-3000:]
    assert f"resumed from {run}/checkpoints/step-{stopped_at:08d}" in done.stderr
    assert losses(run)[:26] == losses(staged("1") / "zero1")


@pytest.mark.slow
def test_bf16_trains(config: Path, single: Path) -> None:
    run = config.parent / "bf16"
    done = train(config, f"run_dir={run}", *LENGTH, "precision=bf16", zero="2")
    assert done.returncode == 0, done.stderr[-3000:]
    np.testing.assert_allclose(losses(run), losses(single), rtol=0.05)
