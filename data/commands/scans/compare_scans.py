"""Count the orders and tokens in which two wind caches differ, sector by sector."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from data.wind_scan.legacy import OrderTables

EXAMPLES = "  python -m data wind-scan compare old.pkl datasets/china.wind_scan"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("a", type=Path, metavar="A", help="one of our caches, or a pickle of the old code")
    parser.add_argument("b", type=Path, metavar="B")


def run(options: argparse.Namespace) -> None:
    from data.wind_scan.legacy import read_tables

    show_differences(read_tables(options.a), read_tables(options.b))


def show_differences(a: OrderTables, b: OrderTables) -> None:
    from rich.table import Table

    from data.command_line import console

    differences = a.differences(b)
    sectors, tokens = a.global_orders.shape
    table = Table("sector", "degrees", f"global, of {tokens} tokens", "regional tokens", title=f"{a.source} against {b.source}")
    for sector, (globally, regional) in enumerate(differences):
        table.add_row(str(sector), f"{360 * sector / sectors:g}", str(globally), str(regional))
    console().print(table)
    in_global, in_regional = (sum(d[i] > 0 for d in differences) for i in (0, 1))
    if in_global or in_regional:
        print(f"orders differ in {in_global} (global) and {in_regional} (regional) of {sectors} sectors")
    else:
        print("orders are equal")
