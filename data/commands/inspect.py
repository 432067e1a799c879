"""Print what a store holds: grid, time, splits, statistics, missing shares, provenance, fingerprint."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from data import variables

if TYPE_CHECKING:
    from rich.console import Console

    from data.store.layout import Store

EXAMPLES = "  python -m data inspect datasets/demo.zarr"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("store", type=Path)


def run(options: argparse.Namespace) -> None:
    from data.command_line import console
    from data.store.opening import open_store

    store, screen = open_store(options.store), console()
    show_properties(store, screen)
    show_statistics(store, screen)
    show_years(store, screen)


def show_properties(store: Store, screen: Console) -> None:
    from rich.table import Column, Table

    (rows, cols), lat, lon, times = store.grid, store.lat, store.lon, store.times
    files = [f for f in store.path.rglob("*") if f.is_file()]
    size = sum(f.stat().st_size for f in files)
    table = Table("property", Column("value", overflow="fold"), title=str(store.path))
    latitudes, longitudes = (f"{c[0]:.3f} .. {c[-1]:.3f}" for c in (lat, lon))
    table.add_row("grid", f"{rows} x {cols}, latitude {latitudes}, longitude {longitudes}")
    table.add_row("time", f"{times[0]} .. {times[-1]}, {len(times)} hours")
    for name, (first, last) in store.splits.items():
        table.add_row(f"split {name}", f"{times[first]} .. {times[last - 1]}, {last - first} hours")
    table.add_row("size", f"{size / 1e6:.1f} MB in {len(files)} files, {store.shard_hours} hours a shard")
    for key, value in store.provenance.items():
        table.add_row(key, str(value))
    table.add_row("fingerprint", store.fingerprint)
    screen.print(table)


def show_statistics(store: Store, screen: Console) -> None:
    from rich.table import Table

    missing: dict[str, float] = {}
    for group, shares in store.missing.items():
        missing |= dict(zip(variables.names(group), shares.mean(0).tolist(), strict=True))
    columns = ("mean", "std", "min", "max")
    table = Table("variable", "units", *columns, "missing %", title="statistics of the training split")
    for name, numbers in store.statistics.items():
        values = [f"{numbers[key]:.5g}" for key in columns]
        table.add_row(name, variables.BY_NAME[name].units, *values, f"{100 * missing.get(name, 0.0):.3f}")
    screen.print(table)


def show_years(store: Store, screen: Console) -> None:
    from rich.table import Table

    table = Table("year", "hours", "gaps", "variable", "missing %", "least", "greatest", title="summary of years")
    for year, about in store.years.items():
        for name, entry in about["variables"].items():
            ends = ["-", "-"] if entry["range"] is None else [f"{x:.5g}" for x in entry["range"]]
            gaps = about["gaps"][variables.GROUP_OF[name]]
            table.add_row(year, str(about["hours"]), str(gaps), name, f"{100 * entry['missing']:.3f}", *ends)
    screen.print(table)
