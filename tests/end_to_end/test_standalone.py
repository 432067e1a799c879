"""Forecasts of a dataset in memory equal those from the store, which is then not needed, nor is DeepSpeed."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
import xarray as xr
from safetensors.torch import load_file

from data import DataError
from data.store.layout import Store
from data.store.reader import ShardReader
from data.wind_scan.cache import ScanCache
from tests.launching import ROOT, module, run, tiny_config, train
from trainer import load_forecaster
from trainer.checkpoint.record import read_header, write_tensors
from trainer.forecaster import forecast
from trainer.forecaster import load_forecaster as load_with_store
from trainer.standalone import StandaloneForecaster

FIRST, COUNT = 250, 14
EVERYTHING = ["model.predict=change", "data.history=[1]", "data.future=[u, rh]", "data.derived=[sun, day]", "ema=0.9"]
EVERYTHING += ["data.transform={pm25: log1p}"]


def trained(folder: Path, store: Path, *overrides: str) -> Path:
    done = train(tiny_config(folder, store), "steps=2", "checkpoint.every=2", *overrides, ranks=1)
    assert done.returncode == 0, done.stderr
    return folder / "run"


@pytest.fixture(scope="module")
def everything(tiny_path: Path, tiny_scan: ScanCache, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return trained(tmp_path_factory.mktemp("standalone"), tiny_path, *EVERYTHING)


@pytest.fixture(scope="module")
def analyses(tiny: Store) -> xr.Dataset:
    """Hours of the store in the units that people have, north at the end."""
    hours = np.arange(FIRST, FIRST + COUNT)
    coordinates = {"time": tiny.times[hours].astype("datetime64[ns]"), "latitude": tiny.lat, "longitude": tiny.lon}
    variables = {}
    for group in ("weather", "chemistry"):
        fields = ShardReader(tiny, group).read(hours)
        for channel, variable in enumerate(tiny.contents.groups[group]):
            own, units = fields[:, channel].astype("f8"), variable.units
            if variable.name == "psfc":
                own, units = own / 100.0, "hPa"
            elif variable.name == "temp":
                own, units = own - 273.15, "degC"
            elif variable.name == "co":
                own, units = own / 1000.0, "mg m-3"
            variables[variable.name] = (tuple(coordinates), own, {"units": units})
    return xr.Dataset(variables, coordinates).isel(latitude=slice(None, None, -1))


def require_equal(ours: xr.Dataset, run_dir: Path) -> None:
    """To what the run forecasts from its store, from every hour that has its history and its future."""
    by_store = load_with_store(run_dir)
    for start in ours["time"].values:
        hour = int((start.astype("datetime64[h]") - by_store.dataset.store.times[0]).astype(int))
        _, expected = forecast(by_store, hour, [6, 12])
        for channel, name in enumerate(by_store.dataset.normalizer.targets):
            own = ours[name].sel(time=start).values
            np.testing.assert_allclose(own, expected[:, channel].cpu(), rtol=2e-4, atol=1e-3, err_msg=name)


def test_a_dataset_in_other_units_gives_the_forecasts_of_the_store(everything: Path, analyses: xr.Dataset, tiny: Store) -> None:
    ours = load_forecaster(everything).predict(analyses)
    assert ours.sizes == {"time": 1, "prediction_timedelta": 2, "lat": 16, "lon": 32}  # an hour before, 12 h after
    assert ours["time"].values[0] == tiny.times[FIRST + 1].astype("datetime64[ns]")
    assert ours["co"].attrs["units"] == "ug m-3"
    require_equal(ours, everything)


@pytest.mark.parametrize("mode", ["global", "none"])
def test_a_network_of_the_state_needs_one_hour(
    mode: str, tiny_path: Path, tiny_scan: ScanCache, analyses: xr.Dataset, tmp_path: Path
) -> None:
    scan = ["wind_scan={mode: none}"] if mode == "none" else ["wind_scan.mode=global"]
    run_dir = trained(tmp_path, tiny_path, *scan)
    ours = load_forecaster(run_dir).predict(analyses.isel(time=[3, 7]))
    assert ours.sizes["time"] == 2
    require_equal(ours, run_dir)


def test_an_export_needs_neither_run_nor_store_nor_deepspeed(everything: Path, analyses: xr.Dataset, tmp_path: Path) -> None:
    out = tmp_path / "exported/model.safetensors"
    out.parent.mkdir()
    done = module("trainer", "checkpoint", "export", str(everything / "checkpoints/latest"), "--to", str(out))
    assert done.returncode == 0, done.stderr
    record = read_header(out)
    assert record is not None
    record.config["data"]["store"] = "/gone/store.zarr"
    write_tensors(out, load_file(out), record)
    analyses.to_netcdf(tmp_path / "analyses.nc")
    code = f"""
import sys
import xarray as xr
from trainer import load_forecaster
from trainer.checkpoint.record import read_header, write_tensors
with xr.open_dataset({str(tmp_path / "analyses.nc")!r}) as analyses:
    load_forecaster({str(out)!r}).predict(analyses).to_netcdf({str(tmp_path / "forecasts.nc")!r})
assert "deepspeed" not in sys.modules and "zarr" not in sys.modules
"""
    done = run([sys.executable, "-c", code])
    assert done.returncode == 0, done.stderr
    with xr.open_dataset(tmp_path / "forecasts.nc") as ours:
        require_equal(ours, everything)


def test_what_is_wrong_with_the_analyses_is_said(everything: Path, analyses: xr.Dataset) -> None:
    forecaster = load_forecaster(everything)
    assert isinstance(forecaster, StandaloneForecaster)
    without_units = analyses.copy()
    without_units["rh"] = without_units["rh"].drop_attrs()
    wrong_units = analyses.copy()
    wrong_units["co"] = wrong_units["co"].assign_attrs(units="kg m-3")
    no_unit = analyses.assign(so2=analyses["so2"].assign_attrs(units="m s-1"))
    calm = analyses.where(analyses["longitude"] > 200)
    for given, said in (
        (analyses.drop_vars("no2"), "have no 'no2', which the run is given"),
        (without_units, r"'rh' has no units: set dataset\['rh'\].attrs\['units'\]"),
        (wrong_units, "Are its units really 'kg m-3'"),
        (no_unit, "'so2' is in 'm s-1', which cannot be turned into ug m-3"),
        (analyses.isel(longitude=slice(0, 20)), "Interpolate the analyses first"),
        (analyses.isel(time=slice(0, 5)), "no forecast is possible"),
        (analyses.assign_coords(time=analyses["time"] + np.timedelta64(30, "m")), "must be whole hours"),
        (analyses.drop_vars("time"), "no coordinate time"),
        (calm, "is missing in a whole region"),
    ):
        with pytest.raises(DataError, match=said):
            forecaster.predict(given)
    with pytest.raises(DataError, match="was trained for"):
        forecaster.predict(analyses, [24])


def test_what_is_kept_beside_it_is_checked(everything: Path, analyses: xr.Dataset, tmp_path: Path) -> None:
    moved = Path(shutil.copytree(everything, tmp_path / "moved"))
    kept = moved / "surroundings.npz"
    content = bytearray(kept.read_bytes())
    content[len(content) // 2] ^= 4
    kept.write_bytes(content)
    with pytest.raises(DataError, match=r"surroundings.npz is (damaged|not what was written)"):
        load_forecaster(moved).predict(analyses)
    kept.unlink()
    with pytest.raises(DataError, match="`python -m trainer forecast` writes it"):
        load_forecaster(moved).predict(analyses)
    done = module("trainer", "forecast", str(moved), "--time", "2015-01-12T06", "--out", str(tmp_path / "f.nc"))
    assert done.returncode == 0, done.stderr
    require_equal(load_forecaster(moved).predict(analyses), everything)


@pytest.mark.slow
def test_the_notebook_runs(everything: Path, tiny_path: Path, tmp_path: Path) -> None:
    run_dir = trained(tmp_path, tiny_path, "model.predict=change")
    notebook = json.loads((ROOT / "docs/forecasting.ipynb").read_text())
    cells = ["".join(cell["source"]) for cell in notebook["cells"] if cell["cell_type"] == "code"]
    assert cells[0].startswith("RUN, STORE = ")
    cells[0] = f"RUN, STORE = {str(run_dir)!r}, {str(tiny_path)!r}"
    script = tmp_path / "notebook.py"
    script.write_text(
        "import matplotlib\nmatplotlib.use('Agg')\n" + "\n".join(cells) + "\nassert forecasts.sizes['time'] == 2\n"
    )
    done = run([sys.executable, str(script)])
    assert done.returncode == 0, done.stderr[-2000:]
