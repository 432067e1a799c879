"""`python -m trainer forecast RUN_DIR --time T --out FILE`: the forecast from one analysis, as CF NetCDF."""

from __future__ import annotations

import argparse
from pathlib import Path

import xarray as xr
from torch import Tensor

from data.variables import BY_NAME
from trainer.command import run_command, run_parser
from trainer.trained import Trained, forecast, hour_of, load_trained


def to_dataset(trained: Trained, hour: int, lead_hours: list[int], fields: Tensor) -> xr.Dataset:
    """(L, T, H, W) ug m-3 -> CF dataset with lead time, latitude and longitude."""
    store = trained.inputs.store
    targets = trained.inputs.normalizer.targets
    leads = xr.Variable("lead_time", lead_hours, {"standard_name": "forecast_period", "units": "hours"})
    coordinates = {
        "lead_time": leads, "time": store.times[hour].astype("datetime64[ns]"),
        "lat": ("lat", store.lat, {"standard_name": "latitude", "units": "degrees_north"}),
        "lon": ("lon", store.lon, {"standard_name": "longitude", "units": "degrees_east"}),
    }  # fmt: skip
    variables = {
        name: (("lead_time", "lat", "lon"), fields[:, i].cpu().numpy(),
               {"units": BY_NAME[name].units, "standard_name": BY_NAME[name].standard_name})
        for i, name in enumerate(targets)
    }  # fmt: skip
    attributes = {"Conventions": "CF-1.11", "source": f"{trained.checkpoint}, step {trained.manifest.step}",
                  **{f"{k}_fingerprint": v for k, v in trained.inputs.fingerprints().items()}}  # fmt: skip
    return xr.Dataset(variables, coordinates, attributes)


def main(argv: list[str]) -> int:
    parser = run_parser("forecast", __doc__, "runs/demo --time 2015-03-25T06 --out forecast.nc")
    parser.add_argument("--time", help="hour of the analysis, UTC (default: the middle of the test split)")
    parser.add_argument("--out", type=Path, required=True, help="NetCDF file to write")

    def command(options: argparse.Namespace) -> None:
        trained = load_trained(options.run_dir, options.checkpoint, options.overrides)
        hour, leads = hour_of(trained, options.time), trained.run.data.lead_hours
        _, fields = forecast(trained, hour, leads)
        to_dataset(trained, hour, leads, fields).to_netcdf(options.out)
        print(f"wrote {options.out}: {', '.join(trained.inputs.normalizer.targets)} from {trained.inputs.store.times[hour]}")

    return run_command(argv, parser, command)
