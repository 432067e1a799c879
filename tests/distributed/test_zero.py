"""Real two-process runs under the deepspeed launcher: every ZeRO stage is the same training, and resume is exact."""

from __future__ import annotations

import json
import signal
import subprocess
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from data.wind_scan import ScanCache
from tests.launching import ROOT, environment, losses, tiny_config, train


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory, tiny_path: Path, tiny_scan: ScanCache) -> Path:
    return tiny_config(tmp_path_factory.mktemp("zero"), tiny_path)


@pytest.fixture(scope="module")
def uninterrupted(config: Path) -> dict[str, Path]:
    """20 steps by a single process without ZeRO, and by two processes at every stage; dropout on, accumulation 2."""
    runs = {}
    for zero, ranks in (("0", 1), ("0", 2), ("1", 2), ("2", 2), ("3", 2), ("3_offload", 2)):
        run = config.parent / f"zero{zero}-{ranks}"
        done = train(config, f"run_dir={run}", ranks=ranks, zero=zero)
        assert done.returncode == 0, done.stderr[-3000:]
        runs[f"{zero}-{ranks}"] = run
    return runs


@pytest.mark.parametrize("which", ["0-2", "1-2", "2-2", "3-2", "3_offload-2"])
def test_every_stage_agrees_with_a_single_process(uninterrupted: dict[str, Path], which: str) -> None:
    single, ours = losses(uninterrupted["0-1"]), losses(uninterrupted[which])
    assert len(single) == 20
    np.testing.assert_allclose(ours, single, rtol=1e-5)
    # Compared from the start, a wrong update shows as a difference of moved distances, not of weights near 0.02.
    first, second = (load_file(uninterrupted[w] / "checkpoints/step-00000020/weights.safetensors") for w in ("0-1", which))
    assert first.keys() == second.keys()
    for name in first:
        torch.testing.assert_close(second[name], first[name], rtol=1e-3, atol=2e-5, msg=name)


@pytest.mark.parametrize("zero", ["1", "3"])
def test_resumed_curve_equals_the_uninterrupted_one_to_the_bit(config: Path, uninterrupted: dict[str, Path], zero: str) -> None:
    run = config.parent / f"resumed{zero}"
    for steps in (7, 20):
        done = train(config, f"run_dir={run}", f"steps={steps}", zero=zero)
        assert done.returncode == 0, done.stderr[-3000:]
    assert "resumed from" in done.stderr
    assert losses(run) == losses(uninterrupted[f"{zero}-2"])
    ours, truth = (load_file(r / "checkpoints/step-00000020/weights.safetensors") for r in (run, uninterrupted[f"{zero}-2"]))
    assert all(torch.equal(ours[name], truth[name]) for name in truth)


def test_f27_resume_with_another_batch_or_rate_is_refused(config: Path, uninterrupted: dict[str, Path]) -> None:
    """Batch, accumulation and rates differed silently from the run being resumed."""
    done = train(config, f"run_dir={uninterrupted['1-2']}", "optimizer.lr=1e-3", "batch.micro=4", "steps=30")
    assert done.returncode != 0
    assert "optimizer.lr: 0.002 then, 0.001 now" in done.stderr
    assert "batch.micro: 2 then, 4 now" in done.stderr
    assert "Traceback" not in done.stderr


def test_sigterm_to_one_rank_saves_and_a_second_start_finishes_the_same_run(
    config: Path, uninterrupted: dict[str, Path]
) -> None:
    run = config.parent / "stopped"
    command = ["torchrun", "--standalone", "--nproc_per_node", "2", "trainer/train.py", "--config", str(config),
               f"run_dir={run}"]  # fmt: skip
    process = subprocess.Popen(command, cwd=ROOT, env=environment(), stderr=subprocess.PIPE, text=True)
    metrics = run / "metrics.jsonl"
    deadline = time.monotonic() + 120
    while not (metrics.exists() and metrics.read_text().count('"train"') >= 3):
        assert time.monotonic() < deadline
        assert process.poll() is None, process.stderr.read() if process.stderr else ""
        time.sleep(0.05)
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    subprocess.run(["kill", f"-{signal.SIGTERM.value}", children[1]], check=True)
    _, errors = process.communicate(timeout=120)
    assert "stopped at step" in errors, errors[-3000:]
    stopped_at = json.loads(sorted((run / "checkpoints").glob("step-*/manifest.json"))[-1].read_text())["step"]
    assert 3 <= stopped_at < 20
    done = train(config, f"run_dir={run}")
    assert done.returncode == 0, done.stderr[-3000:]
    assert losses(run) == losses(uninterrupted["1-2"])


def test_bf16_trains(config: Path, uninterrupted: dict[str, Path]) -> None:
    run = config.parent / "bf16"
    done = train(config, f"run_dir={run}", "precision=bf16", zero="2")
    assert done.returncode == 0, done.stderr[-3000:]
    np.testing.assert_allclose(losses(run), losses(uninterrupted["2-2"]), rtol=0.05)
