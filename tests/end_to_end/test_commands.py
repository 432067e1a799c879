"""What a user does, from nothing to maps, by the commands of the README; numbers checked against plain numpy."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import xarray as xr
import zarr
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from data.store import open_store
from data.variables import CHANNEL_OF
from tests.launching import losses, module, tiny_config, train


def succeed(*arguments: str) -> str:
    done = module(*arguments)
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
        folder, store, steps=40, validation={"every": 20, "samples": 8}, optimizer={"lr": 4e-3},
        schedule={"warmup_steps": 5, "decay_steps": 40},
        model={"grid": [16, 32], "width": 32, "depth": 2, "heads": 4, "dropout": 0.0, "init_std": 0.1},
    )  # fmt: skip
    done = train(config, launcher="deepspeed")
    assert done.returncode == 0, done.stderr[-3000:]
    assert "step 40/40  loss" in done.stderr
    assert "ETA" in done.stderr
    return folder / "run"


def test_inspect_describes_the_store(trained: Path) -> None:
    text = succeed("data", "inspect", str(trained.parent / "small.zarr"))
    for expected in ("16 x 32", "split train", "fingerprint", "pm25", "ug m-3", "GeoNames", "0 of 384 hours wholly missing"):
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
    assert "skill = 1 - MSE / MSE of persistence" in text
    result = json.loads((trained / "evaluation-test.json").read_text())
    store = open_store(trained.parent / "small.zarr")
    assert result["fingerprints"]["data"] == store.fingerprint
    chemistry = np.asarray(zarr.open_group(store.path, mode="r")["chemistry"], "f8")
    first, last = store.split("test")
    area = np.cos(np.deg2rad(store.lat))[:, None] * store.static["domain_mask"]
    for name in ("pm25", "o3"):
        for lead in (6, 12):
            t = np.arange(first, last - lead)
            field = chemistry[:, CHANNEL_OF[name]]
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


@pytest.mark.parametrize(
    ("package", "commands"),
    [("data", ("synthesize", "wind-scan", "inspect")), ("trainer", ("train", "evaluate", "forecast", "plot"))],
)
def test_help_lists_every_command_and_each_has_an_example(package: str, commands: tuple[str, ...]) -> None:
    text = succeed(package, "--help")
    assert "example" in text
    for command in commands:
        assert f"\n  {command}" in text
        assert "example" in succeed(package, command, "--help")
