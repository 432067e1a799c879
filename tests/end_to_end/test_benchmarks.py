"""What cannot be measured here must at least run: the benchmark that waits for a GPU; and the study that takes hours."""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks.gpu_step import FlexAttention
from benchmarks.physics_study import __main__ as study
from tests.launching import run
from trainer.model.architecture import Architecture
from trainer.model.attention import Attention


@pytest.mark.slow
def test_the_gpu_benchmark_runs_on_a_small_network() -> None:
    done = run([sys.executable, "-m", "benchmarks.gpu_step", "--tiny", "--micro", "1", "2"])
    assert done.returncode == 0, done.stderr
    for line in ("Obvious", "elevation bias by", "host waits inside forward and backward"):
        assert line in done.stdout


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
def test_the_rival_attention_computes_the_same() -> None:
    torch.manual_seed(0)
    arch = Architecture((20, 8), 1, (0,), width=32, heads=2, alpha_init=2.0)
    ours, rival = (kind(arch, first=True).double() for kind in (Attention, FlexAttention))
    rival.load_state_dict(ours.state_dict())
    x, z = torch.randn(2, 40, 32, dtype=torch.float64), torch.rand(2, 40, dtype=torch.float64).mul(4000)
    with torch.no_grad():
        torch.testing.assert_close(rival(x, z), ours(x, z), rtol=1e-6, atol=1e-7)  # its slope is fp32


def test_a_failed_training_ends_the_study_and_loses_no_other(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What was trained before is kept, what has not begun does not begin, and the next start trains the rest."""
    begun: list[str] = []
    fails = True

    def train(_: Path, job: Any) -> dict[str, Any]:
        begun.append(job.name)
        time.sleep(0.1)
        if fails and job.name == "k2-none-1":
            raise SystemExit("it ended with code 1")
        return {"blocking": job.blocking, "variant": job.variant, "seed": job.seed, "loss": 0.1}

    monkeypatch.setattr(study, "RESULTS", tmp_path / "results.json")
    monkeypatch.setattr(study.runs, "make_store", lambda *_: None)
    monkeypatch.setattr(study.oracle, "ceiling", lambda *_: {})
    monkeypatch.setattr(study.runs, "train_and_score", train)
    with pytest.raises(SystemExit, match="code 1"):
        study.study(tmp_path / "work", 1, ["none"])
    kept = json.loads((tmp_path / "results.json").read_text())["runs"]
    assert [(row["blocking"], row["seed"]) for row in kept] == [(0, 1)]
    assert len(begun) < 5
    fails = False
    before = len(begun)
    study.study(tmp_path / "work", 1, ["none"])
    assert "k0-none-1" not in begun[before:]
    assert len(json.loads((tmp_path / "results.json").read_text())["runs"]) == 15
