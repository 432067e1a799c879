"""Write the forecast from one analysis as CF NetCDF."""

from __future__ import annotations

import argparse
from pathlib import Path

from trainer.commands import add_trained_run

EXAMPLES = "  python -m trainer forecast runs/demo --time 2015-03-25T06 --out forecast.nc"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_trained_run(parser)
    parser.add_argument("--time", help="hour of the analysis, UTC (default: the middle of the test split)")
    parser.add_argument("--out", type=Path, required=True, help="NetCDF file to write")


def run(options: argparse.Namespace) -> None:
    from trainer.forecaster import forecast, hour_of, load_forecaster
    from trainer.scores.netcdf import to_dataset

    forecaster = load_forecaster(options.run_dir, options.checkpoint, options.overrides, options.raw)
    hour, leads = hour_of(forecaster, options.time), forecaster.run.data.lead_hours
    _, fields = forecast(forecaster, hour, leads)
    to_dataset(forecaster, hour, leads, fields).to_netcdf(options.out)
    names = ", ".join(forecaster.dataset.normalizer.targets)
    print(f"wrote {options.out}: {names} from {forecaster.dataset.store.times[hour]}")
