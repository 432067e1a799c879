"""Set evaluations beside each other; refuses to mix data, scans or samples."""

from __future__ import annotations

import argparse
from pathlib import Path

from data.command_line import console
from trainer.scores.comparison import read_comparable

EXAMPLES = "  python -m trainer compare runs/a/evaluation-test.json runs/b/evaluation-test.json"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("evaluations", type=Path, nargs="+", metavar="evaluation.json")


def run(options: argparse.Namespace) -> None:
    from rich.table import Table

    results = read_comparable(options.evaluations)
    columns = [f"{path.parent.name} {what}" for path in options.evaluations for what in ("RMSE", "skill")]
    table = Table("pollutant", "lead", *columns)
    for name, leads in results[0]["scores"].items():
        for lead in leads:
            scores = [result["scores"][name][lead] for result in results]
            table.add_row(name, lead, *("-" if s[k] is None else f"{s[k]:.3f}" for s in scores for k in ("rmse", "skill")))
    console().print(table)
