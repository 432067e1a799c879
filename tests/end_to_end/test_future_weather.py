"""Runs that are given the weather of the valid time, evaluated with forecast weather of another store."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from data import DataError
from data.store.layout import Store
from data.store.opening import open_store
from data.store.reader import ShardReader
from data.synthetic.recipe import Recipe
from data.synthetic.synthesize import synthesize
from data.wind_scan.cache import ScanCache
from tests.conftest import TINY
from tests.launching import module, tiny_config, train
from trainer.forecaster import load_forecaster
from trainer.verification.evaluation import Options, evaluate
from trainer.verification.weather import has_weather

OTHER = Recipe(days=12, rows=16, cols=32, seed=8, missing=0.0, shard_hours=24, train=0.6, validation=0.2, start="2015-01-04")


@pytest.fixture(scope="module")
def trained(tiny_path: Path, tiny_scan: ScanCache, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("future")
    done = train(tiny_config(folder, tiny_path), "steps=20", "checkpoint.every=20", "data.future=[rh, u]", ranks=1)
    assert done.returncode == 0, done.stderr
    return folder / "run"


@pytest.fixture(scope="module")
def weather(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of other weather, from three days later on, to a day before the end."""
    path = tmp_path_factory.mktemp("weather") / "forecast.zarr"
    synthesize(path, OTHER)
    return path


def test_the_same_weather_gives_the_same_scores(trained: Path, tiny_path: Path) -> None:
    perfect = evaluate(load_forecaster(trained), Options())
    given = evaluate(load_forecaster(trained), Options(future_from=tiny_path))
    assert perfect is not None
    assert given is not None
    assert perfect.scores["scores"] == given.scores["scores"]
    assert perfect.scores["weather"].startswith("perfect (analysed)")
    assert given.scores["weather"].startswith("forecast, of tiny.zarr (")


def test_each_sample_is_given_the_hour_that_it_is_valid_at(trained: Path, weather: Path) -> None:
    forecaster = load_forecaster(trained)
    done = evaluate(forecaster, Options(future_from=weather))
    assert done is not None
    dataset, later = forecaster.dataset, open_store(weather)
    index = dataset.index("test")
    valid = dataset.store.times[index.t + index.lead]
    assert done.scores["samples"] == int((valid <= later.times[-1]).sum()) < len(index)
    number = int(np.flatnonzero(index.lead == 12)[0])
    batch = next(dataset.stream(index).listed(np.array([number]), 1))
    at = int((valid[number] - later.times[0]).astype(int))
    expected = ShardReader(later, "weather").read(np.array([at]))
    assert torch.equal(batch.fields["weather@+lead"], torch.from_numpy(expected))
    own = ShardReader(dataset.store, "weather").read(index.t[[number]])
    assert torch.equal(batch.fields["weather"].nan_to_num(-9.0), torch.from_numpy(own).nan_to_num(-9.0))


def test_an_hour_that_lacks_one_variable_is_left_out(trained: Path, weather: Path) -> None:
    """Or the training mean would be scored as forecast weather."""
    dataset, later = load_forecaster(trained).dataset, open_store(weather)
    valid = np.array([later_hour(dataset.store, later, 30), later_hour(dataset.store, later, 31)])
    assert has_weather(dataset, later, valid).all()
    missing = {group: table.copy() for group, table in later.missing.items()}
    missing["weather"][30, later.contents.channel("rh")] = 1.0
    assert has_weather(dataset, replace(later, missing=missing), valid).tolist() == [False, True]


def later_hour(store: Store, later: Store, hour: int) -> int:
    """Time index in the run's store of an hour of the other one."""
    return int((later.times[hour] - store.times[0]).astype(int))


def test_the_command_says_whose_weather_it_was(trained: Path, weather: Path) -> None:
    done = module("trainer", "evaluate", str(trained), "--future-from", str(weather))
    assert done.returncode == 0, done.stderr
    assert "weather forecast, of forecast.zarr" in " ".join(done.stdout.split())
    assert json.loads((trained / "evaluation-test.json").read_text())["weather"].endswith(": rh, u")


def test_weather_that_cannot_act_or_does_not_fit_is_refused(
    trained: Path, weather: Path, tiny_path: Path, tmp_path: Path
) -> None:
    early = tmp_path / "early.zarr"
    synthesize(early, Recipe(**{**OTHER.__dict__, "start": "2012-01-01"}))
    with pytest.raises(DataError, match="no valid time of the evaluation is among them"):
        evaluate(load_forecaster(trained), Options(future_from=early))
    coarse = tmp_path / "coarse.zarr"
    synthesize(coarse, Recipe(**{**TINY.__dict__, "rows": 8, "cols": 16}))
    with pytest.raises(DataError, match="another grid"):
        evaluate(load_forecaster(trained), Options(future_from=coarse))
    done = train(tiny_config(tmp_path, tiny_path), "steps=1", "checkpoint.every=1", ranks=1)
    assert done.returncode == 0, done.stderr
    with pytest.raises(DataError, match="is given no weather of the valid time"):
        evaluate(load_forecaster(tmp_path / "run"), Options(future_from=weather))
