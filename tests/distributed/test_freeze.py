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
SLOW = pytest.mark.slow
KINDS = [("3", "fp32"), *(pytest.param(kind, marks=SLOW) for kind in (("0", "fp32"), ("1", "bf16"), ("2", "fp32")))]


def is_frozen(name: str) -> bool:
    return name.startswith("blocks.0.") or name == "pos_embed"


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory, tiny_path: Path, tiny_scan: ScanCache) -> Path:
    return tiny_config(tmp_path_factory.mktemp("freeze"), tiny_path, checkpoint={"every": 2})


@pytest.fixture(scope="module", params=KINDS, ids="-".join)
def runs(request: pytest.FixtureRequest, config: Path) -> tuple[Path, str]:
    """At a stage and precision: four steps at once, and two and two."""
    zero, precision = request.param
    folder = config.parent / f"{zero}-{precision}"
    jobs: list[dict[str, Any]] = []
    for name, ends in (("whole", [4]), ("parts", [2, 4])):
        own = [f"freeze={PATTERNS}", f"precision={precision}", f"run_dir={folder}/{name}"]
        jobs += [{"zero": zero, "overrides": [*own, f"steps={end}"]} for end in ends]
    done = train_several(config, jobs)
    assert done.returncode == 0, done.stderr[-3000:]
    return folder, precision


def test_what_is_frozen_stays_and_everything_else_learns(config: Path, runs: tuple[Path, str]) -> None:
    (folder, precision), run = runs, load(config)
    torch.manual_seed(run.seed)
    first = TopoFlow(run.architecture()).state_dict()
    last = load_file(folder / "whole/checkpoints/step-00000004/weights.safetensors")
    for name, value in last.items():
        start = first[name].to(torch.bfloat16).float() if precision == "bf16" and is_frozen(name) else first[name]
        if is_frozen(name) or name.endswith("H_scale"):
            assert torch.equal(value, start.reshape(value.shape)), name
        elif name != "var_query":
            assert not torch.equal(value, start.reshape(value.shape)), name
    state = load_file(folder / "whole/checkpoints/step-00000004/optimizer.safetensors")
    assert not [name for name in state if is_frozen(name)]
    assert manifest(folder / "whole/checkpoints/latest")["parameters"]["pos_embed"]["group"] == "frozen"


def test_it_resumes_to_the_bit(runs: tuple[Path, str]) -> None:
    folder, _ = runs
    assert losses(folder / "whole") == losses(folder / "parts")
    ours, theirs = (load_file(folder / f"{name}/checkpoints/step-00000004/weights.safetensors") for name in ("whole", "parts"))
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)


@pytest.mark.parametrize(
    ("patterns", "told"),
    [("[blocks.7.*]", "'blocks.7.*' fits no parameter; they are called"), ('[".*"]', "nothing is left to train")],
)
def test_a_pattern_that_fits_nothing_or_everything_is_refused(config: Path, patterns: str, told: str) -> None:
    done = train(config, f"freeze={patterns}", f"run_dir={config.parent}/refused", "steps=1", ranks=1)
    assert done.returncode == 2
    assert told in done.stderr
