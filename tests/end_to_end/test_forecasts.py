"""Forecasts of many analyses: CF zarr, shared by processes, restartable, and beyond the end of the data."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
import xarray as xr

from data import DataError
from data.store.layout import Store
from data.wind_scan.cache import ScanCache
from tests.launching import as_rank, module, tiny_config, train
from trainer.forecaster import Forecaster, forecast, load_forecaster
from trainer.scores import series

DAYS = ("2015-01-12", "2015-01-13")


@pytest.fixture(scope="module")
def trained(tiny_path: Path, tiny_scan: ScanCache, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("forecasts")
    done = train(tiny_config(folder, tiny_path), "steps=2", "checkpoint.every=2", "model.predict=change", ranks=1)
    assert done.returncode == 0, done.stderr
    return folder / "run"


@pytest.fixture(scope="module")
def forecaster(trained: Path) -> Forecaster:
    return load_forecaster(trained)


def test_a_series_holds_the_forecasts_of_every_start(trained: Path, forecaster: Forecaster, tmp_path: Path) -> None:
    out = tmp_path / "f.zarr"
    done = module("trainer", "forecast", str(trained), "--from", DAYS[0], "--to", DAYS[1], "--every", "6", "--out", str(out))
    assert done.returncode == 0, done.stderr
    assert "from 8 analyses" in done.stdout
    with xr.open_zarr(out, consolidated=False) as file:
        assert file["pm25"].dims == ("time", "prediction_timedelta", "lat", "lon")
        assert file["time"].values[1] == np.datetime64("2015-01-12T06")
        assert file["prediction_timedelta"].values.astype("timedelta64[h]").astype(int).tolist() == [6, 12]
        assert file["pm25"].attrs["units"] == "ug m-3"
        assert file.attrs["weather"] == "of the analysis"
        hour = int((np.datetime64("2015-01-13T12") - forecaster.dataset.store.times[0]).astype(int))
        _, expected = forecast(forecaster, hour, [6, 12])
        for channel, name in enumerate(forecaster.dataset.normalizer.targets):
            np.testing.assert_allclose(file[name].sel(time="2015-01-13T12"), expected[:, channel], rtol=1e-4, atol=1e-3)


def test_processes_share_the_starts_and_what_is_there_is_kept(
    forecaster: Forecaster, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    starts = series.starts_of(forecaster, *DAYS, 6)
    made: list[int] = []
    own = series.forecast

    def counted(forecaster: Forecaster, hour: int, leads: list[int]) -> object:
        made.append(hour)
        if len(made) == 3:
            raise KeyboardInterrupt
        return own(forecaster, hour, leads)

    monkeypatch.setattr(series, "forecast", counted)
    out = tmp_path / "f.zarr"
    with pytest.raises(KeyboardInterrupt):
        list(series.write_series(forecaster, starts, out))
    places = []
    for rank in (1, 0):
        as_rank(monkeypatch, rank, 2)
        places.append(list(series.write_series(forecaster, starts, out)))
    assert places == [[1, 3, 5, 7], [0, 2, 4, 6]]
    first = int((starts[0] - forecaster.dataset.store.times[0]).astype(int))
    assert sorted(made) == sorted([*range(first, first + 48, 6), first + 12])  # the interrupted one twice
    with xr.open_zarr(out, consolidated=False) as file:
        assert np.isfinite(file["o3"]).all()


def test_the_last_analysis_gives_a_forecast_and_future_weather_must_be_there(tiny: Store, forecaster: Forecaster) -> None:
    last = len(tiny.times) - 1
    batch, fields = forecast(forecaster, last, [6, 12])
    assert torch.isfinite(fields).all()
    assert not torch.isfinite(batch.target).any()
    with pytest.raises(DataError, match=r"weather at 2015-01-17T00 must lie inside"):
        forecast(forecaster, last + 1, [6, 12])


def test_other_forecasts_are_not_mixed_in(forecaster: Forecaster, tmp_path: Path) -> None:
    out = tmp_path / "f.zarr"
    list(series.write_series(forecaster, series.starts_of(forecaster, DAYS[0], DAYS[0], 12), out))
    with pytest.raises(DataError, match="holds forecasts of other time: choose another --out"):
        list(series.write_series(forecaster, series.starts_of(forecaster, *DAYS, 12), out))
    with pytest.raises(DataError, match="no forecast can start from 2019-01-01"):
        series.starts_of(forecaster, "2019-01-01", "2019-01-02", 12)


def test_a_run_that_has_moved_keeps_what_it_measures_with_itself(trained: Path, tmp_path: Path) -> None:
    """The configuration remembers the place where it was trained; nothing is looked for, or written, there."""
    moved = Path(shutil.copytree(trained, tmp_path / "moved"))
    (moved / "climatology.npz").unlink()
    before = (trained / "climatology.npz").stat()
    first, again = load_forecaster(trained), load_forecaster(moved)
    assert (moved / "climatology.npz").exists()
    assert (trained / "climatology.npz").stat() == before
    hour = 12 * 24
    assert torch.equal(forecast(first, hour, [6, 12])[1], forecast(again, hour, [6, 12])[1])


def test_one_analysis_or_many(trained: Path) -> None:
    done = module("trainer", "forecast", str(trained), "--from", DAYS[0], "--out", "x.zarr")
    assert done.returncode == 2
    assert "give --time for one analysis, or --from and --to for many" in done.stderr
