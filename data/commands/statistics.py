"""Measure a store over a training split that a run chooses itself (`data.splits`), and keep what was found beside it."""

from __future__ import annotations

import argparse
from pathlib import Path

EXAMPLES = """  python -m data statistics datasets/china.zarr --split 2013-01-01 2016-12-31 --workers 8
  python -m data statistics datasets/china.zarr --split 2013-01-01 2014-12-31 --split 2016-01-01 2016-12-31"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("store", type=Path)
    days = "days of the training split, inclusive; repeat it for several ranges"
    parser.add_argument("--split", nargs=2, action="append", required=True, metavar=("FIRST", "LAST"), help=days)
    parser.add_argument("--workers", type=int, default=1, help="processes on this machine")


def run(options: argparse.Namespace) -> None:
    from rich.console import Console
    from rich.progress import track

    from data import splits
    from data.command_line import console
    from data.commands.inspect import show_statistics
    from data.store.opening import open_store

    store = open_store(options.store)
    train = splits.hours_of(store, "train", options.split)
    steps = splits.measure(store, train, options.workers)
    for _ in track(steps, "measuring", total=splits.shards_of(store, train), console=Console(stderr=True)):
        pass
    chosen = splits.split_as(store, {"train": options.split})
    show_statistics(chosen, console())
    print(f"wrote {splits.kept_at(store, train)}")
