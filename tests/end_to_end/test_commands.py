"""What a user does, from nothing to maps, by the commands of the README; numbers checked against plain numpy."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import xarray as xr
import zarr
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from data import __main__ as data_commands
from data.store.opening import open_store
from data.variables import PUBLISHED
from tests.launching import losses, module, run, tiny_config, train
from trainer import __main__ as trainer_commands
from trainer.config_file import load
from trainer.preflight.plan import checkpoint_bytes, parameters_of


def succeed(*arguments: str) -> str:
    """Not forked: what a command has forgotten to import is missing."""
    done = run([sys.executable, "-m", *arguments])
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Synthesize, wind-scan, train two ranks, evaluate, plot; the run directory."""
    folder = tmp_path_factory.mktemp("user")
    store = folder / "small.zarr"
    succeed("data", "synthesize", str(store), "--days", "16", "--grid", "16", "32", "--shard-hours", "48", "--seed", "2")
    assert "0 without wind" in succeed("data", "wind-scan", str(store), "--regions", "4", "4")
    config = tiny_config(
        folder,
        store,
        steps=40,
        validation={"every": 20, "samples": 8},
        optimizer={"lr": 4e-3},
        schedule={"warmup_steps": 5, "decay_steps": 40},
        model={"grid": [16, 32], "width": 32, "depth": 2, "heads": 4, "dropout": 0.0, "init_std": 0.1},
    )
    done = train(config, launcher="deepspeed")
    assert done.returncode == 0, done.stderr[-3000:]
    assert "step 40/40  loss" in done.stderr
    assert "ETA" in done.stderr
    return folder / "run"


def test_inspect_describes_the_store(trained: Path) -> None:
    text = succeed("data", "inspect", str(trained.parent / "small.zarr"))
    for expected in ("16 x 32", "split train", "fingerprint", "pm25", "ug m-3", "GeoNames", "summary of years", "384"):
        assert expected in text


def test_run_directory_holds_everything(trained: Path) -> None:
    assert (trained / "config.yaml").is_file()
    assert (trained / "checkpoints/step-00000040/manifest.json").is_file()
    rows = [json.loads(line) for line in (trained / "metrics.jsonl").read_text().splitlines()]
    assert [r["step"] for r in rows if r["kind"] == "train"] == list(range(1, 41))
    assert [r["step"] for r in rows if r["kind"] == "validation"] == [0, 20, 40]
    last = [r for r in rows if r["kind"] == "train"][-1]
    assert {"loss", "loss_pm25", "lr", "grad_norm", "samples_per_s", "data_wait_share", "elevation_alpha"} <= last.keys()
    assert last["elevation_alpha"] != 0.01
    events = EventAccumulator(str(trained / "tensorboard"))
    events.Reload()
    assert [e.step for e in events.Scalars("train/loss")] == list(range(1, 41))
    curve = losses(trained)
    assert np.mean(curve[-5:]) < 0.8 * np.mean(curve[:5])


def test_evaluation_agrees_with_numpy_on_persistence(trained: Path) -> None:
    text = succeed("trainer", "evaluate", str(trained))
    assert "skill = 1 - MSE / MSE of that" in text
    result = json.loads((trained / "evaluation-test.json").read_text())
    store = open_store(trained.parent / "small.zarr")
    assert result["fingerprints"]["data"] == store.fingerprint
    chemistry = np.asarray(zarr.open_group(store.path, mode="r")["chemistry"], "f8")
    ((first, last),) = store.splits["test"]
    area = np.cos(np.deg2rad(store.lat))[:, None] * store.static["domain_mask"]
    for name in ("pm25", "o3"):
        for lead in (6, 12):
            t = np.arange(first, last - lead)
            field = chemistry[:, PUBLISHED.channel(name)]
            error = field[t] - field[t + lead]
            weight = np.where(np.isfinite(error), area, 0.0)
            rmse = np.sqrt((weight * np.nan_to_num(error) ** 2).sum() / weight.sum())
            assert result["scores"][name][f"{lead}h"]["persistence_rmse"] == pytest.approx(rmse, rel=1e-6)
            assert result["scores"][name][f"{lead}h"]["units"] == "ug m-3"


def test_forecast_is_a_cf_file_on_the_grid_of_the_store(trained: Path, tmp_path: Path) -> None:
    out = tmp_path / "forecast.nc"
    succeed("trainer", "forecast", str(trained), "--time", "2015-01-15T06", "--out", str(out))
    with xr.open_dataset(out, decode_timedelta=False) as file:
        assert file["pm25"].dims == ("lead_time", "lat", "lon")
        assert file["lead_time"].values.tolist() == [6, 12]
        assert file["time"].values == np.datetime64("2015-01-15T06")
        assert float(abs(file["pm25"].mean() - 50.0)) < 50.0
    done = module("trainer", "forecast", str(trained), "--time", "2019-01-15T06", "--out", str(out))
    assert done.returncode == 2
    assert "must lie inside" in done.stderr


@pytest.mark.slow
def test_plots_are_drawn(trained: Path) -> None:
    text = succeed("trainer", "plot", str(trained), "--lead", "12")
    for name in ("curves.png", "case-12h.png"):
        assert name in text
        assert (trained / "plots" / name).stat().st_size > 20_000


def test_twice_as_many_steps_continue_the_run(trained: Path) -> None:
    done = train(trained.parent / "config.yaml", "steps=44")
    assert done.returncode == 0, done.stderr[-3000:]
    assert "resumed from" in done.stderr
    assert "step 0:" not in done.stderr
    assert len(losses(trained)) == 44


@pytest.mark.parametrize("package", [data_commands, trainer_commands])
def test_help_lists_every_command_and_each_has_an_example(package: ModuleType, capsys: pytest.CaptureFixture[str]) -> None:
    def asked_for_help(*arguments: str) -> str:
        with pytest.raises(SystemExit, match="0"):
            package.main([*arguments])
        return capsys.readouterr().out

    listing = asked_for_help("--help")
    assert "example" in listing
    for command in package.COMMANDS:
        assert f"\n  {command}" in listing
        assert "example" in asked_for_help(command, "--help"), command


def test_status_reads_a_run_from_its_files_alone(trained: Path) -> None:
    said = succeed("trainer", "status", str(trained))
    assert re.search(r"(\d+) of \1, ", said)
    for expected in ("finished", "samples/s", "waiting for data", "slowest rank", "elevation_alpha", "last checkpoint"):
        assert expected in said, expected
    (trained / "errors").mkdir(exist_ok=True)
    (trained / "errors/rank-17.log").write_text("2026-01-01 00:00:00,000 error: no space left\nTraceback\n")
    assert "last error of rank-17" in succeed("trainer", "status", str(trained))


def test_plan_estimates_the_bytes_of_a_checkpoint(trained: Path) -> None:
    run = load(trained / "config.yaml")
    written = sum(f.stat().st_size for f in (trained / "checkpoints/step-00000040").rglob("*") if f.is_file())
    assert checkpoint_bytes(parameters_of(run)) == pytest.approx(written, rel=0.25)  # a tiny network's headers
