"""Score a checkpoint on held-out days: errors and skill for every pollutant and lead time, in physical units."""

from __future__ import annotations

import argparse
import json
from typing import Any

from trainer.commands import add_trained_run

EXAMPLES = "  python -m trainer evaluate runs/demo --split test --samples 200"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_trained_run(parser)
    parser.add_argument("--split", default="test")
    parser.add_argument("--samples", type=int, help="spread evenly over the split (default: all)")


def run(options: argparse.Namespace) -> None:
    from trainer.forecaster import load_forecaster
    from trainer.scores.evaluation import evaluate

    forecaster = load_forecaster(options.run_dir, options.checkpoint, options.overrides, options.raw)
    result = evaluate(forecaster, options.split, options.samples)
    path = options.run_dir / f"evaluation-{options.split}.json"
    path.write_text(json.dumps(result, indent=1))
    show(result)
    print(f"wrote {path}")


def show(result: dict[str, Any]) -> None:
    """Print one row for every pollutant and lead time."""
    from rich.table import Table

    from data.command_line import console

    title = f"{result['split']} split, {result['samples']} samples, step {result['step']}; weather {result['weather']}"
    table = Table(
        "pollutant", "units", "lead", "RMSE", "MAE", "bias", "NMB %", "R", "persistence RMSE", "skill", "95 %", title=title
    )
    for name, leads in result["scores"].items():
        for lead, s in leads.items():
            shown = {"nmb": 100.0}  # per cent
            kinds = ("rmse", "mae", "bias", "nmb", "r", "persistence_rmse")
            values = ["-" if s[k] is None else f"{shown.get(k, 1.0) * s[k]:.2f}" for k in kinds]
            skill = "-" if s["skill"] is None else f"{s['skill']:+.3f}"
            known = s["skill_low"] is not None
            style = "green" if known and s["skill_low"] > 0 else "red" if known and s["skill_high"] < 0 else "default"
            ends = f"{s['skill_low']:+.3f} .. {s['skill_high']:+.3f}" if known else "-"
            table.add_row(name, s["units"], lead, *values, f"[{style}]{skill}[/]", ends)
        table.add_section()
    screen = console()
    screen.print(table)
    screen.print(
        "skill = 1 - MSE / MSE of persistence: 1 is perfect, 0 is as good as assuming nothing changes; coloured where its "
        "interval, of days drawn with replacement, excludes 0"
    )
