"""Failures of scripts, logs, repositories and comparisons: F14, F16, F22, F23, F25, F36, F39."""

from __future__ import annotations

import ast
import json
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
import torch

from data.samples import SampleIndex
from data.store.layout import Store
from data.stream import Stream
from tests.launching import ROOT, module, run, tiny_config, train
from trainer.__main__ import main
from trainer.config_file import load
from trainer.model.topoflow import TopoFlow


@pytest.fixture
def config(tiny_path: Path, tiny_scan: object, tmp_path: Path) -> Path:
    return tiny_config(tmp_path, tiny_path)


def test_f14_every_read_ahead_depth_works_none_included(tiny: Store) -> None:
    """`prefetch_factor` was passed without workers: ValueError on the cluster."""
    index = SampleIndex(np.arange(100), np.full(100, 6), 0)
    read = []
    for depth in (0, 1, 7):
        stream = Stream(tiny, index, None, "none", depth, 128, False).training(0, 3, 1, 1, 0)
        read.append([batch.target.nan_to_num(-1.0) for batch in islice(stream, 5)])
    for other in read[1:]:
        assert all(torch.equal(a, b) for a, b in zip(read[0], other, strict=True))


def test_f16_a_value_of_the_wrong_type_is_refused_on_the_login_node(config: Path) -> None:
    """An int where a timedelta was needed was found on 256 GPUs: the configuration was first parsed there."""
    refused = module("trainer", "plan", "--config", str(config), "--gpus", "2", "--gpu", "h200", "watch.step=ten")
    assert refused.returncode == 2
    assert "watch.step: Input should be a valid number" in refused.stderr
    assert "Traceback" not in refused.stderr
    started = train(config, "watch.step=30", "steps=4", "schedule.decay_steps=4", ranks=1)
    assert started.returncode == 0, started.stderr[-2000:]


def test_f22_rank_0_talks_and_others_only_about_their_errors(config: Path, tmp_path: Path) -> None:
    """Noise lines times 128 hid the errors."""
    done = train(config, "steps=4", "schedule.decay_steps=4")
    assert done.returncode == 0
    for said in ("2 rank(s) by deepspeed", "step 0: validation loss", "step 4/4  loss", "all-reduce over all ranks"):
        assert done.stderr.count(said) == 1, said
    failed = train(config, "data.store=/nowhere.zarr", f"run_dir={tmp_path}/failed")
    own = [line for line in failed.stderr.splitlines() if line.startswith(("error:", "[rank"))]
    assert own == ["error: no store at /nowhere.zarr. Build one with"]
    assert "no store at" in (tmp_path / "failed/errors/rank-1.log").read_text()


def plain_tensors(model: torch.nn.Module) -> list[str]:
    return [
        f"{name}.{key}"
        for name, part in model.named_modules()
        for key, value in vars(part).items()
        if isinstance(value, torch.Tensor)
    ]


def test_f23_no_constant_of_the_network_is_a_plain_tensor_that_stays_on_its_device(config: Path) -> None:
    """Constants were plain tensors: device mismatch."""
    model = TopoFlow(load(config).architecture())
    assert plain_tensors(model) == []
    model.blocks[0].scale = torch.ones(3)
    assert plain_tensors(model) == ["blocks.0.scale"]


def test_f25_dumps_environments_runs_and_data_are_ignored_and_nothing_large_is_tracked() -> None:
    """A core dump of 1.1 GB and a virtual environment were committed."""
    for name in ("core.4711", ".venv/bin/python", "runs/x/metrics.jsonl", "datasets/a.zarr/zarr.json", "x.pyc"):
        assert run(["git", "check-ignore", "--quiet", "--no-index", name]).returncode == 0, name
    tracked = run(["git", "ls-files", "-z"]).stdout.split("\0")
    large = [name for name in tracked if name and (ROOT / name).exists() and (ROOT / name).stat().st_size > 3_000_000]
    assert large == []


def test_f36_results_on_other_data_scans_or_samples_are_not_compared(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Baselines were compared across scans, normalisations and samples."""
    one = {
        "checkpoint": "a",
        "step": 1,
        "split": "test",
        "samples": 8,
        "fingerprints": {"data": "d1", "wind_scan_orders": "w1"},
        "period": ["2015", "2016"],
        "loss": 0.5,
        "baseline": "persistence",
        "weather": "of the analysis",
        "scores": {"pm25": {"24h": {"units": "ug m-3", "rmse": 3.0, "skill": 0.2}}},
    }
    (tmp_path / "one.json").write_text(json.dumps(one))
    (tmp_path / "same.json").write_text(json.dumps(one | {"checkpoint": "b"}))
    assert main(["compare", str(tmp_path / "one.json"), str(tmp_path / "same.json")]) == 0
    assert "pm25" in capsys.readouterr().out
    for key, value in (
        ("samples", 9),
        ("split", "validation"),
        ("fingerprints", {"data": "d2", "wind_scan_orders": "w1"}),
        ("fingerprints", {"data": "d1", "wind_scan_orders": "w2"}),
    ):
        (tmp_path / "other.json").write_text(json.dumps(one | {key: value}))
        assert main(["compare", str(tmp_path / "one.json"), str(tmp_path / "other.json")]) == 2
        assert "cannot be compared" in capsys.readouterr().err


def absolute_paths(source: str) -> list[str]:
    fixed = ("/proc", "/tmp", "/dev/shm", "/var/tmp")
    tree = ast.parse(source)
    pieces = {id(part) for node in ast.walk(tree) if isinstance(node, ast.JoinedStr) for part in node.values[1:]}
    strings = [n.value for n in ast.walk(tree) if isinstance(n, ast.Constant) and id(n) not in pieces]
    return [s for s in strings if isinstance(s, str) and s.startswith("/") and len(s) > 2 and not s.startswith(fixed)]


def test_f39_no_absolute_path_stands_in_the_code() -> None:
    """Absolute paths in code; a cache loader that checked three fields (its content hash: test_wind_scan.py)."""
    assert absolute_paths('open("/scratch/project/china.zarr")') == ["/scratch/project/china.zarr"]
    files = [path for part in ("trainer", "data") for path in (ROOT / part).rglob("*.py")]
    assert len(files) > 100
    for path in files:
        assert absolute_paths(path.read_text()) == [], path
    for path in (ROOT / "launch").rglob("*.yaml"):
        assert ": /" not in path.read_text(), path
