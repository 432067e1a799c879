"""The running mean of the weights: followed step by step at every ZeRO stage, kept, resumed, and what is scored."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from data.wind_scan.cache import ScanCache
from tests.launching import losses, module, tiny_config, train_several
from trainer.checkpoint.manifest import CheckpointError
from trainer.forecaster import load_forecaster
from trainer.scores.scoring import validation_loss

DECAY = 0.8
KINDS = [("0", "fp32"), ("1", "bf16"), ("2", "fp32"), ("3", "bf16")]
STEPS = 6


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory, tiny_path: Path, tiny_scan: ScanCache) -> Path:
    """For every stage and precision: six steps at once, validated often; and three and three, never validated between."""
    folder = tmp_path_factory.mktemp("ema")
    config = tiny_config(folder, tiny_path, checkpoint={"every": 1, "keep_last": 9})
    jobs: list[dict[str, Any]] = []
    for zero, precision in KINDS:
        own = [f"ema={DECAY}", f"precision={precision}"]
        whole = [f"run_dir={folder}/whole-{zero}-{precision}", f"steps={STEPS}", "validation.every=2"]
        jobs.append({"zero": zero, "overrides": [*own, *whole]})
        for steps in (3, STEPS):
            parts = [f"run_dir={folder}/parts-{zero}-{precision}", f"steps={steps}", "validation.every=100"]
            jobs.append({"zero": zero, "overrides": [*own, *parts]})
    done = train_several(config, jobs)
    assert done.returncode == 0, done.stderr[-3000:]
    return folder


def kept(run: Path, step: int) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """Weights, and their running mean."""
    folder = run / f"checkpoints/step-{step:08d}"
    state = load_file(folder / "optimizer.safetensors")
    means = {name.removesuffix(".ema"): tensor for name, tensor in state.items() if name.endswith(".ema")}
    return load_file(folder / "weights.safetensors"), means


@pytest.mark.parametrize(("zero", "precision"), KINDS)
def test_it_follows_the_fp32_weights_step_by_step(runs: Path, zero: str, precision: str) -> None:
    run = runs / f"whole-{zero}-{precision}"
    _, before = kept(run, 1)
    for step in range(2, STEPS + 1):
        weights, mean = kept(run, step)
        assert len(mean) == len([name for name in weights if not name.endswith("H_scale")])
        for name, value in mean.items():
            expected = DECAY * before[name].double() + (1 - DECAY) * weights[name].double()
            torch.testing.assert_close(value.double(), expected, rtol=1e-6, atol=1e-8, msg=name)
        before = mean


@pytest.mark.parametrize(("zero", "precision"), KINDS)
def test_resumed_and_validated_or_not_it_is_the_same_to_the_bit(runs: Path, zero: str, precision: str) -> None:
    """Scoring puts the mean into the forward pass and the weights back."""
    whole, parts = (runs / f"{name}-{zero}-{precision}" for name in ("whole", "parts"))
    assert losses(whole) == losses(parts)
    for ours, theirs in zip(kept(whole, STEPS), kept(parts, STEPS), strict=True):
        assert ours.keys() == theirs.keys()
        assert all(torch.equal(ours[name], theirs[name]) for name in ours)


@pytest.mark.parametrize("zero", ["0", "2"])
def test_what_is_scored_is_the_mean_and_raw_the_weights(runs: Path, zero: str) -> None:
    run = runs / f"whole-{zero}-fp32"
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    logged = [row["loss"] for row in rows if row["kind"] == "validation"][-1]
    mean, raw = load_forecaster(run), load_forecaster(run, raw=True)
    assert validation_loss(mean.model, mean.dataset) == pytest.approx(logged, rel=1e-5)
    assert validation_loss(raw.model, raw.dataset) != pytest.approx(logged, rel=1e-4)


def test_an_export_holds_the_mean(runs: Path, tmp_path: Path) -> None:
    run = runs / "whole-2-fp32"
    done = module("trainer", "checkpoint", "export", str(run / "checkpoints/latest"), "--to", str(tmp_path / "m.safetensors"))
    assert done.returncode == 0, done.stderr
    exported, (_, mean) = load_file(tmp_path / "m.safetensors"), kept(run, STEPS)
    assert all(torch.equal(exported[name], value.reshape(exported[name].shape)) for name, value in mean.items())


def test_a_run_without_a_mean_has_none_to_score(runs: Path, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="holds no running mean"):
        load_forecaster(runs / "whole-2-fp32", overrides=None, checkpoint=stripped(runs / "whole-2-fp32", tmp_path))


def stripped(run: Path, folder: Path) -> Path:
    """The last checkpoint without the file that the means lie in, as of a run that kept none."""
    target = folder / f"step-{STEPS:08d}"
    target.mkdir()
    for file in (run / f"checkpoints/step-{STEPS:08d}").iterdir():
        if file.name != "manifest.json":
            (target / file.name).write_bytes(file.read_bytes())
    manifest = json.loads((run / f"checkpoints/step-{STEPS:08d}/manifest.json").read_text())
    manifest["files"].pop("optimizer.safetensors")
    (target / "manifest.json").write_text(json.dumps(manifest))
    return target
