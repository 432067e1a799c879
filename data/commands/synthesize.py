"""Write a small physical reanalysis over real East Asian terrain."""

from __future__ import annotations

import argparse
from pathlib import Path

from data.synthetic.recipe import Recipe

EXAMPLES = "  python -m data synthesize datasets/demo.zarr --days 90 --grid 64 128"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("store", type=Path, help="directory of the new store")
    parser.add_argument("--days", type=int, default=Recipe.days)
    grid = [Recipe.rows, Recipe.cols]
    parser.add_argument(
        "--grid", type=int, nargs=2, default=grid, metavar=("ROWS", "COLS"), help="any that divides 128 x 256 (default 64 128)"
    )
    parser.add_argument("--start", default=Recipe.start, help="first day, YYYY-MM-DD")
    parser.add_argument("--seed", type=int, default=Recipe.seed)
    parser.add_argument("--blocking", type=float, default=Recipe.blocking, help="how strongly climbs hold air back, per km")
    parser.add_argument("--missing", type=float, default=Recipe.missing, help="share of pollutant cells to hide")
    parser.add_argument("--train", type=float, default=Recipe.train, help="share of the hours in the training split")
    parser.add_argument("--validation", type=float, default=Recipe.validation, help="share in the validation split")
    parser.add_argument("--shard-hours", type=int, default=Recipe.shard_hours)


def run(options: argparse.Namespace) -> None:
    from data.synthetic.synthesize import synthesize

    given = dict(vars(options))
    rows, cols = given.pop("grid")
    fields = {name: value for name, value in given.items() if name in Recipe.__dataclass_fields__}
    fingerprint = synthesize(options.store, Recipe(rows=rows, cols=cols, **fields))
    print(f"wrote {options.store}: {options.days} days on {rows} x {cols} cells, fingerprint {fingerprint[:12]}")
