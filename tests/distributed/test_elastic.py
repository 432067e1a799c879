"""The same run on another number of ranks, without a command by hand; damaged checkpoints are stepped over."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from data.wind_scan.cache import ScanCache
from tests.launching import losses, tiny_config, train, train_several
from trainer.checkpoint import store


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory, tiny_path: Path, tiny_scan: ScanCache) -> Path:
    """A global batch of 12 in micro-batches of 1, dropout on."""
    return tiny_config(
        tmp_path_factory.mktemp("elastic"), tiny_path, batch={"total": 12, "micro": 1}, checkpoint={"every": 4, "keep_last": 9}
    )


def finish(done) -> str:
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stderr


@pytest.mark.slow
@pytest.mark.parametrize("zero", ["0", "1", "2", "3"])
def test_two_then_four_then_one_then_three_ranks_are_one_run(config: Path, zero: str) -> None:
    truth, run = config.parent / f"truth{zero}", config.parent / f"elastic{zero}"
    finish(train(config, f"run_dir={truth}", "steps=16", zero=zero))
    for ranks, steps in ((2, 4), (4, 8), (1, 12), (3, 16)):
        finish(train(config, f"run_dir={run}", f"steps={steps}", ranks=ranks, zero=zero))
    ours = losses(run)
    assert len(ours) == 16
    np.testing.assert_allclose(ours, losses(truth), rtol=1e-5)
    require_equal_state(run, truth, 16, exact=False)
    assert not list((run / "checkpoints").glob("*.partial"))


def require_equal_state(ours: Path, truth: Path, step: int, exact: bool) -> None:
    """Weights and both moments, by name: equal to the bit, or to 1e-5 of each tensor's norm."""
    for file in ("weights.safetensors", "optimizer.safetensors"):
        a, b = (load_file(run / f"checkpoints/step-{step:08d}" / file) for run in (ours, truth))
        assert a.keys() == b.keys()
        for name, value in b.items():
            if exact:
                assert torch.equal(a[name], value), name
            else:
                assert float((a[name] - value).norm()) <= 1e-5 * float(value.norm()) + 1e-9, name


@pytest.mark.slow
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_run_goes_on_at_any_stage_and_number_of_ranks_with_both_moments(config: Path, precision: str) -> None:
    """From one checkpoint of two ranks under ZeRO 1: at every stage, by two ranks and by one.

    In bf16 the order of a sum shows in the third digit of a gradient: only the same stage and ranks give the same moments.
    """
    folder = config.parent / precision
    common = [f"precision={precision}", "checkpoint.every=2", "batch.total=4"]

    def job(zero: str, name: str, steps: int) -> dict[str, Any]:
        return {"zero": zero, "overrides": [f"run_dir={folder}/{name}", *common, f"steps={steps}"]}

    stages = ("0", "1", "2", "3", "3_offload")
    # In this order, since ZeRO 3 replaces torch's linear layer in its process for good, by one that rounds otherwise.
    train_several(config, [job(z, f"{name}{z}", steps) for z in stages for name, steps in (("whole", 4), ("start", 2))])
    moved = stages if precision == "fp32" else ("3",)
    for zero in stages:
        shutil.copytree(folder / f"start{zero}", folder / f"same{zero}")
    for zero in moved:
        shutil.copytree(folder / f"start{zero}", folder / f"one{zero}")
        shutil.copytree(folder / "start1", folder / f"from1to{zero}")
    goes_on = [job(z, f"{name}{z}", 4) for z in stages for name in ("same", "from1to") if name == "same" or z in moved]
    train_several(config, goes_on)
    train_several(config, [job(z, f"one{z}", 4) for z in moved], ranks=1)
    for zero in stages:
        require_equal_state(folder / f"same{zero}", folder / f"whole{zero}", 4, exact=True)
        if precision == "fp32":
            require_equal_state(folder / f"one{zero}", folder / f"whole{zero}", 4, exact=False)
            require_equal_state(folder / f"from1to{zero}", folder / "whole1", 4, exact=False)


@pytest.mark.parametrize("damage", ["truncate", "flip", "remove"])
def test_damaged_checkpoint_is_named_and_the_one_before_is_used(config: Path, damage: str, tmp_path: Path) -> None:
    run = config.parent / "damaged"
    if not run.exists():
        finish(train(config, f"run_dir={run}", "steps=12", ranks=1, zero="0"))
    checkpoints = [found.path for found in store.look(run)]
    newest = checkpoints[-1]
    victim = max(newest.rglob("*.safetensors"), key=lambda f: f.stat().st_size)
    content = bytearray(victim.read_bytes())
    if damage == "truncate":
        victim.write_bytes(content[: len(content) // 2])
    elif damage == "flip":
        content[len(content) // 3] ^= 4
        victim.write_bytes(content)
    else:
        victim.unlink()
    said = finish(train(config, f"run_dir={run}", "steps=12", ranks=1, zero="0"))
    assert f"{newest} is damaged and skipped" in said
    assert f"resumed from {checkpoints[-2]}" in said
    assert f"{newest} is not continued, and is called {newest.name}.aside-" in said
    assert len(losses(run)) == 12


def test_all_damaged_is_refused_rather_than_started_anew(config: Path) -> None:
    run = config.parent / "ruined"
    finish(train(config, f"run_dir={run}", "steps=2", ranks=1, zero="0"))
    (run / "checkpoints/step-00000002/weights.safetensors").write_bytes(b"")
    done = train(config, f"run_dir={run}", "steps=4", ranks=1, zero="0")
    assert done.returncode != 0
    assert "every checkpoint" in done.stderr
