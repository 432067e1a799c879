"""The same run on another number of ranks, without a command by hand; damaged checkpoints are stepped over."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from data.wind_scan import ScanCache
from tests.launching import losses, module, tiny_config, train


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory, tiny_path: Path, tiny_scan: ScanCache) -> Path:
    """A global batch of 12 in micro-batches of 1, dropout on."""
    return tiny_config(tmp_path_factory.mktemp("elastic"), tiny_path, batch={"total": 12, "micro": 1},
                       checkpoint={"every": 4, "keep_last": 9})  # fmt: skip


def finish(done) -> str:
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stderr


@pytest.mark.slow
@pytest.mark.parametrize("zero", ["0", "1", "2", "3"])
def test_two_then_four_then_one_then_three_ranks_are_one_run(config: Path, zero: str) -> None:
    truth, run = config.parent / f"truth{zero}", config.parent / f"elastic{zero}"
    finish(train(config, f"run_dir={truth}", "steps=16", zero=zero))
    for ranks, steps in ((2, 4), (4, 8), (1, 12), (3, 16)):
        said = finish(train(config, f"run_dir={run}", f"steps={steps}", ranks=ranks, zero=zero))
        assert ("converted" in said) == (steps > 4 and zero != "0")
    ours = losses(run)
    assert len(ours) == 16
    np.testing.assert_allclose(ours, losses(truth), rtol=1e-5)
    assert not list((run / "checkpoints").glob("*.partial"))


@pytest.mark.slow
def test_stage_3_and_1_do_not_interchange_and_say_so(config: Path) -> None:
    run = config.parent / "stages"
    finish(train(config, f"run_dir={run}", "steps=4", zero="1"))
    done = train(config, f"run_dir={run}", "steps=8", zero="3", launcher="deepspeed")
    assert done.returncode != 0
    assert "only 1 and 2 interchange" in done.stderr
    assert "Traceback" not in done.stderr
    finish(train(config, f"run_dir={run}", "steps=8", zero="2"))


def test_a_checkpoint_converted_beforehand_is_used_as_it_is(config: Path) -> None:
    folder = config.parent / "beforehand"
    finish(train(config, f"run_dir={folder}", "steps=4", zero="3"))
    done = module("trainer", "checkpoint", "convert", str(folder / "checkpoints/latest"))
    assert done.returncode == 0, done.stderr
    said = finish(train(config, f"run_dir={folder}", "steps=6", ranks=1, zero="3"))
    assert "converted" not in said
    assert len(losses(folder)) == 6


@pytest.mark.parametrize("damage", ["truncate", "flip", "remove"])
def test_damaged_checkpoint_is_named_and_the_one_before_is_used(config: Path, damage: str, tmp_path: Path) -> None:
    run = config.parent / "damaged"
    if not run.exists():
        finish(train(config, f"run_dir={run}", "steps=12", ranks=1, zero="0"))
    checkpoints = sorted((run / "checkpoints").glob("step-*"))
    newest = checkpoints[-1]
    victim = max(newest.rglob("*.pt"), key=lambda f: f.stat().st_size)
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
    assert len(losses(run)) == 12


def test_all_damaged_is_refused_rather_than_started_anew(config: Path) -> None:
    run = config.parent / "ruined"
    finish(train(config, f"run_dir={run}", "steps=2", ranks=1, zero="0"))
    (run / "checkpoints/step-00000002/weights.safetensors").write_bytes(b"")
    done = train(config, f"run_dir={run}", "steps=4", ranks=1, zero="0")
    assert done.returncode != 0
    assert "every checkpoint" in done.stderr
