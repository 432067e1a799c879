"""Draw loss curves, skill, maps of a case, and the sources that were learned, which are written as NetCDF, too."""

from __future__ import annotations

import argparse
import json

from data import DataError
from trainer.commands import add_trained_run

EXAMPLES = "  python -m trainer plot runs/demo --time 2015-08-25T06 --lead 24"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_trained_run(parser)
    parser.add_argument("--time", help="hour of the analysis, UTC (default: the middle of the test split)")
    parser.add_argument("--lead", type=int, help="lead time of the maps in hours (default 24, or the run's first)")


def run(options: argparse.Namespace) -> None:
    from trainer.forecaster import hour_of, load_forecaster
    from trainer.report import runs, scores

    forecaster = load_forecaster(options.run_dir, options.checkpoint, options.overrides, options.raw)
    folder = options.run_dir / "plots"
    folder.mkdir(exist_ok=True)
    leads = forecaster.run.data.lead_hours
    lead = options.lead or (24 if 24 in leads else leads[0])
    if lead not in leads:
        raise DataError(f"--lead {lead}: the run was trained for {leads} h.")
    written = [folder / "curves.png", folder / f"case-{lead}h.png"]
    runs.plot_curves(options.run_dir, written[0])
    runs.plot_case(forecaster, hour_of(forecaster, options.time), lead, written[1])
    for evaluation in sorted(options.run_dir.glob("evaluation-*.json")):
        written.append(folder / f"skill-{evaluation.stem.removeprefix('evaluation-')}.png")
        scores.plot_skill(json.loads(evaluation.read_text()), written[-1])
    if forecaster.model.sources is not None:
        from trainer.report import sources

        written += [folder / "sources.png", folder / "sources.nc"]
        sources.plot_sources(forecaster, written[-2])
        sources.learned(forecaster).to_netcdf(written[-1])
    print("\n".join(f"wrote {path}" for path in written))
