"""Read a wind cache of the old code, say whether its orders equal ours, and turn it into one of ours."""

from __future__ import annotations

import argparse
from pathlib import Path

from data import DataError

EXAMPLES = "  python -m data wind-scan import-pickle old.pkl --store datasets/china.zarr --out old.wind_scan"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("file", type=Path)
    ground = "compare with our orders on this store's ground distances (default: the old code's own units)"
    parser.add_argument("--store", type=Path, help=ground)
    parser.add_argument("--out", type=Path, help="write a cache for --store with the imported orders")


def run(options: argparse.Namespace) -> None:
    from data.commands.scans.compare_scans import show_differences
    from data.store.opening import open_store
    from data.wind_scan import legacy
    from data.wind_scan.cache import build
    from data.wind_scan.orders import geometry_of

    if options.out and not options.store:
        raise DataError("--out needs --store: a cache holds the wind sectors of one dataset.")
    tables = legacy.read_tables(options.file)
    geometry = tables.geometry
    if options.store:
        geometry = geometry_of(open_store(options.store), geometry.patch, geometry.regions, geometry.sectors)
        if geometry.grid != tables.geometry.grid:
            theirs, ours = (f"{rows} x {cols}" for rows, cols in (tables.geometry.grid, geometry.grid))
            raise DataError(f"{options.file} is for {theirs} pixels, {options.store} has {ours}.")
    show_differences(tables, legacy.ours(tables, geometry.aspect))
    if options.out:
        orders = {"global_orders": tables.global_orders, "regional_orders": legacy.one_regional_table(tables)}
        cache = build(
            open_store(options.store),
            options.out,
            patch=geometry.patch,
            regions=geometry.regions,
            sectors=geometry.sectors,
            orders=orders,
        )
        print(f"wrote {options.out}: orders {cache.orders_hash[:12]}")
