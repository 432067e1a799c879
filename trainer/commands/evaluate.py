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
    columns = ("pollutant", "units", "lead", "RMSE", "MAE", "bias", "NMB %", "R")
    table = Table(*columns, "persistence", "skill", "95 %", "climatology", "skill", "95 %", title=title)
    for name, leads in result["scores"].items():
        for lead, s in leads.items():
            numbers = [s[kind] for kind in ("rmse", "mae", "bias")]
            numbers += [None if s["nmb"] is None else 100.0 * s["nmb"], s["r"]]
            values = ["-" if x is None else f"{x:.2f}" for x in numbers]
            table.add_row(name, s["units"], lead, *values, *against(s, "persistence"), *against(s, "climatology"))
        table.add_section()
    screen = console(140)
    screen.print(table)
    screen.print(
        "persistence, climatology: their RMSE. skill = 1 - MSE / MSE of that: 1 is perfect, 0 is as good as assuming that "
        "nothing changes, or that it is as usual at that hour; coloured where its interval, of days drawn with replacement, "
        "excludes 0"
    )


def against(scores: dict[str, Any], baseline: str) -> list[str]:
    """RMSE of a baseline, the skill against it, coloured where its interval excludes 0, and the interval."""
    kind = "skill" if baseline == "persistence" else f"{baseline}_skill"
    rmse, skill, low, high = (scores[key] for key in (f"{baseline}_rmse", kind, f"{kind}_low", f"{kind}_high"))
    if skill is None:
        return ["-", "-", "-"]
    style = "green" if low > 0 else "red" if high < 0 else "default"
    return [f"{rmse:.2f}", f"[{style}]{skill:+.3f}[/]", f"{low:+.3f} .. {high:+.3f}"]
