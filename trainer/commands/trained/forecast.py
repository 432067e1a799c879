"""Write the forecast from one analysis as CF NetCDF, or those from many as CF zarr."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from data import DataError
from trainer.commands import add_trained_run

if TYPE_CHECKING:
    from trainer.forecaster import Forecaster

EXAMPLES = """  python -m trainer forecast runs/demo --time 2015-08-25T06 --out forecast.nc
  python -m trainer forecast runs/china --from 2018-01-01 --to 2018-12-31 --every 12 --out forecasts.zarr
  torchrun --nproc_per_node 8 -m trainer forecast runs/china --from 2018-01-01 --to 2018-12-31 --out forecasts.zarr

Forecasts of many analyses are shared by all processes of a launcher, and what is there already is kept."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_trained_run(parser)
    add = parser.add_argument
    add("--time", help="hour of the analysis, UTC (default: the middle of the test split)")
    add("--from", dest="first", metavar="DAY", help="first day of many analyses")
    add("--to", dest="last", metavar="DAY", help="last day, inclusive")
    add("--every", type=int, default=12, metavar="HOURS", help="between analyses, from 0 h UTC of the first day (default 12)")
    add("--out", type=Path, required=True, help="NetCDF file to write; of many analyses, a zarr directory")


def run(options: argparse.Namespace) -> None:
    from trainer.forecaster import forecast, hour_of, load_forecaster
    from trainer.scores.netcdf import to_dataset

    if (options.first is None) != (options.last is None) or (options.first and options.time):
        raise DataError("give --time for one analysis, or --from and --to for many.")
    forecaster = load_forecaster(options.run_dir, options.checkpoint, options.overrides, options.raw)
    names = ", ".join(forecaster.dataset.normalizer.targets)
    if options.first is not None:
        count = many(forecaster, options)
        print(f"wrote {options.out}: {names} from {count} analyses")
        return
    hour, leads = hour_of(forecaster, options.time), forecaster.run.data.lead_hours
    _, fields = forecast(forecaster, hour, leads)
    to_dataset(forecaster, hour, leads, fields).to_netcdf(options.out)
    print(f"wrote {options.out}: {names} from {forecaster.dataset.store.times[hour]}")


def many(forecaster: Forecaster, options: argparse.Namespace) -> int:
    """Forecast from many analyses, showing how far it is; how many this process has seen to."""
    from rich.console import Console
    from rich.progress import track

    from data.process.ranks import world
    from trainer.scores.series import starts_of, write_series

    starts = starts_of(forecaster, options.first, options.last, options.every)
    steps = write_series(forecaster, starts, options.out)
    mine = len(range(world().rank, len(starts), world().size))
    shown = track(steps, "forecasting", total=mine, console=Console(stderr=True), disable=not world().is_main)
    return sum(1 for _ in shown)
