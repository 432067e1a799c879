"""Score a checkpoint on held-out days, in physical units: by pollutant, lead time and region, as hours and as local days,
beside persistence, climatology and their best mix. Shared by all processes of a launcher; an interrupted one goes on."""

from __future__ import annotations

import argparse
import json
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

from data import DataError
from trainer.commands import add_trained_run

if TYPE_CHECKING:
    from rich.console import Console

EXAMPLES = """  python -m trainer evaluate runs/demo --split test
  python -m trainer evaluate runs/demo --samples 200
  python -m trainer evaluate runs/china --stations cnemc/2018 --station-list stations.csv
  python -m trainer evaluate runs/china --against cams.nc --regions provinces.geojson
  torchrun --nproc_per_node 8 -m trainer evaluate runs/china --regions provinces.geojson
  deepspeed --num_gpus 8 --no_local_rank --module trainer evaluate runs/china"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_trained_run(parser)
    add = parser.add_argument
    add("--split", default="test")
    add("--samples", type=int, help="spread evenly over the split (default: all, which daily values need)")
    add("--regions", type=Path, metavar="FILE", help="GeoJSON of polygons with a 'name' (default: plains, slopes and plateau)")
    add("--against", type=Path, metavar="FORECASTS", help="forecasts of another system, CF zarr or NetCDF, to score beside it")
    about = "observations: CNEMC, OpenAQ or a long table; folders"
    add("--stations", type=Path, nargs="+", default=[], metavar="CSV", help=about)
    add("--station-list", type=Path, metavar="CSV", help="codes, latitudes and longitudes of the stations")
    add("--future-from", type=Path, metavar="STORE", help="forecast weather, where the run is given that of the valid time")
    add("--out", type=Path, metavar="DIR", help="where to write (default: the run directory)")
    add("--utc-offset", type=int, default=8, metavar="HOURS", help="of local days and hours (default 8, as in China)")


def run(options: argparse.Namespace) -> None:
    import numpy as np

    from trainer.forecaster import load_forecaster
    from trainer.verification.evaluation import Options, evaluate
    from trainer.verification.pieces import discard

    out = options.out or options.run_dir
    if options.out is not None:
        out.mkdir(parents=True, exist_ok=True)
    if not os.access(out, os.W_OK):
        raise DataError(f"{out} cannot be written: name a directory that can, with --out.")
    forecaster = load_forecaster(options.run_dir, options.checkpoint, options.overrides, options.raw)
    observed = (tuple(options.stations), options.station_list)
    given = (options.regions, options.against, *observed, options.future_from)
    chosen = Options(options.split, options.samples, options.utc_offset, *given, out)
    done = evaluate(forecaster, chosen)
    if done is None:
        return
    path = out / f"evaluation-{options.split}.json"
    np.savez_compressed(path.with_suffix(".npz"), allow_pickle=False, **done.maps)
    path.write_text(json.dumps(done.scores, indent=1))
    discard(done.parts)
    show(done.scores)
    print(f"wrote {path}")


def show(result: dict[str, Any]) -> None:
    """Print one row for every pollutant and lead time, and what is said of days."""
    from rich.table import Column, Table

    from data.command_line import console

    which = f"step {result['step']}, weights {result['weights']}"
    what = f"{result['split']} split, {result['samples']} samples, {which}"
    title = f"{what}; ug m-3; weather {result['weather']}"
    columns = ("pollutant", "lead", "RMSE", "bias", "NMB %", "R")
    compared = ["persistence", "skill", "95 %", "climatology", "skill", "95 %", "mix", "skill"]
    compared += ["against", "skill", "95 %"] if "against" in result else []
    table = Table(*(Column(name, no_wrap=True) for name in (*columns, *compared)), title=title)
    for name, leads in result["scores"].items():
        for lead, s in leads.items():
            numbers = [s[kind] for kind in ("rmse", "bias")]
            numbers += [None if s["nmb"] is None else 100.0 * s["nmb"], s["r"]]
            values = ["-" if x is None else f"{x:.2f}" for x in numbers]
            skills = [*against(s, "persistence"), *against(s, "climatology"), *against(s, "mix")[:2]]
            skills += against(s, "against") if "against" in result else []
            table.add_row(name, lead, *values, *skills)
        table.add_section()
    screen = console(190 if "against" in result else 160)
    screen.print(table)
    screen.print(
        "persistence, climatology, mix: their RMSE. skill = 1 - MSE / MSE of that: 1 is perfect, 0 is as good as assuming that "
        "nothing changes, that it is as usual at that hour, or the best mix of both; coloured where its interval, of local "
        "days drawn with replacement, excludes 0"
    )
    if "against" in result:
        screen.print(f"against: {result['against']}")
    if "stations" in result:
        show_stations(result["stations"], screen)
    daily = result["daily"]
    if not daily["days"]:
        screen.print("daily values: none, they need every hour of a day: evaluate without --samples")
        return
    for index in daily["indices"]:
        said = [
            f"{lead} {100 * s['forecast']['class_right']:.0f} % (persistence {100 * s['persistence']['class_right']:.0f} %)"
            for lead, s in index["regions"]["domain"].items()
            if s["forecast"]["class_right"] is not None and s["persistence"]["class_right"] is not None
        ]
        screen.print(f"air-quality class of {index['standard']} right, of {daily['days']} local days: {', '.join(said)}")


def show_stations(result: dict[str, Any], screen: Console) -> None:
    """Print scores against observations, beside those of the reanalysis itself."""
    from rich.table import Table

    columns = ("pollutant", "lead", "RMSE", "bias", "R", "reanalysis", "persistence", "skill", "95 %")
    table = Table(*columns, title=f"at {result['counted']['stations']} stations; ug m-3")
    for name, leads in result["scores"].items():
        for lead, s in leads.items():
            values = ["-" if s[k] is None else f"{s[k]:.2f}" for k in ("rmse", "bias", "r", "reanalysis_rmse")]
            table.add_row(name, lead, *values, *against(s, "persistence"))
        table.add_section()
    screen.print(table)
    screen.print("observations: " + ", ".join(f"{count} {what}" for what, count in result["counted"].items()))


def against(scores: dict[str, Any], baseline: str) -> list[str]:
    """RMSE of a baseline, the skill against it, coloured where its interval excludes 0, and the interval."""
    kind = "skill" if baseline == "persistence" else f"{baseline}_skill"
    rmse, skill, low, high = (scores[key] for key in (f"{baseline}_rmse", kind, f"{kind}_low", f"{kind}_high"))
    if skill is None:
        return ["-", "-", "-"]
    if low is None or high is None:
        return [f"{rmse:.2f}", f"{skill:+.3f}", "-"]
    style = "green" if low > 0 else "red" if high < 0 else "default"
    return [f"{rmse:.2f}", f"[{style}]{skill:+.3f}[/]", f"{low:+.2f} .. {high:+.2f}"]
