"""Frozen parameters: untouched to the bit, without gradient or optimizer state, at every stage; and resumed as ever."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from data.wind_scan.cache import ScanCache
from tests.launching import losses, manifest, tiny_config, train, train_several
from trainer.config_file import load
from trainer.model.topoflow import TopoFlow

PATTERNS = "[blocks.0.*, pos_embed]"
KINDS = [("0", "fp32"), ("1", "bf16"), ("2", "fp32"), ("3", "fp32")]


def is_frozen(name: str) -> bool:
    return name.startswith("blocks.0.") or name == "pos_embed"


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory, tiny_path: Path, tiny_scan: ScanCache) -> Path:
    return tiny_config(tmp_path_factory.mktemp("freeze"), tiny_path, checkpoint={"every": 2})


@pytest.fixture(scope="module")
def runs(config: Path) -> Path:
    jobs: list[dict[str, Any]] = []
    for zero, precision in KINDS:
        for name, ends in (("whole", [4]), ("parts", [2, 4])):
            own = [f"freeze={PATTERNS}", f"precision={precision}", f"run_dir={config.parent}/{name}-{zero}"]
            jobs += [{"zero": zero, "overrides": [*own, f"steps={end}"]} for end in ends]
    done = train_several(config, jobs)
    assert done.returncode == 0, done.stderr[-3000:]
    return config.parent


@pytest.mark.parametrize(("zero", "precision"), KINDS)
def test_what_is_frozen_stays_and_everything_else_learns(config: Path, runs: Path, zero: str, precision: str) -> None:
    run = load(config)
    torch.manual_seed(run.seed)
    first = TopoFlow(run.architecture()).state_dict()
    last = load_file(runs / f"whole-{zero}/checkpoints/step-00000004/weights.safetensors")
    for name, value in last.items():
        start = first[name].to(torch.bfloat16).float() if precision == "bf16" and is_frozen(name) else first[name]
        if is_frozen(name) or name.endswith("H_scale"):
            assert torch.equal(value, start.reshape(value.shape)), name
        elif name != "var_query":
            assert not torch.equal(value, start.reshape(value.shape)), name
    state = load_file(runs / f"whole-{zero}/checkpoints/step-00000004/optimizer.safetensors")
    assert not [name for name in state if is_frozen(name)]
    assert manifest(runs / f"whole-{zero}/checkpoints/latest")["parameters"]["pos_embed"]["group"] == "frozen"


@pytest.mark.parametrize(("zero", "precision"), KINDS)
def test_it_resumes_to_the_bit(runs: Path, zero: str, precision: str) -> None:
    assert losses(runs / f"whole-{zero}") == losses(runs / f"parts-{zero}")
    files = [runs / f"{name}-{zero}/checkpoints/step-00000004/weights.safetensors" for name in ("whole", "parts")]
    ours, theirs = (load_file(file) for file in files)
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)


@pytest.mark.parametrize(
    ("patterns", "told"),
    [("[blocks.7.*]", "'blocks.7.*' fits no parameter; they are called"), ('[".*"]', "nothing is left to train")],
)
def test_a_pattern_that_fits_nothing_or_everything_is_refused(config: Path, patterns: str, told: str) -> None:
    done = train(config, f"freeze={patterns}", f"run_dir={config.parent}/refused", "steps=1", ranks=1)
    assert done.returncode == 2
    assert told in done.stderr
