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
STEPS = 6
SLOW = pytest.mark.slow
KINDS = [("1", "bf16"), *(pytest.param(kind, marks=SLOW) for kind in (("0", "fp32"), ("2", "fp32"), ("3", "bf16")))]


@pytest.fixture(scope="module", params=KINDS, ids="-".join)
def runs(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory, tiny_path: Path, tiny_scan: ScanCache
) -> Path:
    """At a stage and precision: six steps at once, validated often; and three and three, never validated between."""
    zero, precision = request.param
    folder = tmp_path_factory.mktemp("ema")
    config = tiny_config(folder, tiny_path, checkpoint={"every": 1, "keep_last": 9})
    own = [f"ema={DECAY}", f"precision={precision}"]
    jobs: list[dict[str, Any]] = [
        {"zero": zero, "overrides": [*own, f"run_dir={folder}/whole", f"steps={STEPS}", "validation.every=2"]}
    ]
    for steps in (3, STEPS):
        jobs.append({"zero": zero, "overrides": [*own, f"run_dir={folder}/parts", f"steps={steps}", "validation.every=100"]})
    done = train_several(config, jobs)
    assert done.returncode == 0, done.stderr[-3000:]
    return folder


def kept(run: Path, step: int) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """Weights, and their running mean."""
    folder = run / f"checkpoints/step-{step:08d}"
    state = load_file(folder / "optimizer.safetensors")
    means = {name.removesuffix(".ema"): tensor for name, tensor in state.items() if name.endswith(".ema")}
    return load_file(folder / "weights.safetensors"), means


def test_it_follows_the_fp32_weights_step_by_step(runs: Path) -> None:
    run = runs / "whole"
    _, before = kept(run, 1)
    for step in range(2, STEPS + 1):
        weights, mean = kept(run, step)
        assert len(mean) == len([name for name in weights if not name.endswith("H_scale")])
        for name, value in mean.items():
            expected = DECAY * before[name].double() + (1 - DECAY) * weights[name].double()
            torch.testing.assert_close(value.double(), expected, rtol=1e-6, atol=1e-8, msg=name)
        before = mean


def test_resumed_and_validated_or_not_it_is_the_same_to_the_bit(runs: Path) -> None:
    """Scoring puts the mean into the forward pass and the weights back."""
    whole, parts = runs / "whole", runs / "parts"
    assert losses(whole) == losses(parts)
    for ours, theirs in zip(kept(whole, STEPS), kept(parts, STEPS), strict=True):
        assert ours.keys() == theirs.keys()
        assert all(torch.equal(ours[name], theirs[name]) for name in ours)


def test_what_is_scored_is_the_mean_and_raw_the_weights(runs: Path) -> None:
    run = runs / "whole"
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    logged = [row["loss"] for row in rows if row["kind"] == "validation"][-1]
    mean, raw = load_forecaster(run), load_forecaster(run, raw=True)
    tolerance = 1e-5 if mean.run.precision == "fp32" else 2e-3  # a run in bf16 is scored in bf16
    assert validation_loss(mean.model, mean.dataset) == pytest.approx(logged, rel=tolerance)
    assert validation_loss(raw.model, raw.dataset) != pytest.approx(logged, rel=tolerance)


def test_an_export_holds_the_mean(runs: Path, tmp_path: Path) -> None:
    run = runs / "whole"
    done = module("trainer", "checkpoint", "export", str(run / "checkpoints/latest"), "--to", str(tmp_path / "m.safetensors"))
    assert done.returncode == 0, done.stderr
    exported, (_, mean) = load_file(tmp_path / "m.safetensors"), kept(run, STEPS)
    assert all(torch.equal(exported[name], value.reshape(exported[name].shape)) for name, value in mean.items())


def test_a_run_without_a_mean_has_none_to_score(runs: Path, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"\.ema' is not what was saved"):
        load_forecaster(runs / "whole", overrides=None, checkpoint=stripped(runs / "whole", tmp_path))


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
