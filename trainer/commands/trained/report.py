"""One page of a run that a person can mail: scores with intervals, pictures, cases, configuration and fingerprints."""

from __future__ import annotations

import argparse

from trainer.commands import add_trained_run

EXAMPLES = """  python -m trainer evaluate runs/demo && python -m trainer report runs/demo"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_trained_run(parser)
    parser.add_argument("--split", default="test", help="which evaluation (default: test)")


def run(options: argparse.Namespace) -> None:
    from trainer.forecaster import load_forecaster
    from trainer.report.report import write_report

    forecaster = load_forecaster(options.run_dir, options.checkpoint, options.overrides, options.raw)
    out = write_report(forecaster, options.split)
    print(f"wrote {out} ({out.stat().st_size / 1e6:.1f} MB), and its pictures in {options.run_dir / 'plots'}")
