"""Compute the wind-scan cache of a store: order tables and the sector of every region and hour."""

from __future__ import annotations

import argparse
from pathlib import Path

EXAMPLES = """  python -m data wind-scan datasets/demo.zarr --regions 8 16
  python -m data wind-scan import-pickle old.pkl --store datasets/china.zarr --out old.wind_scan
  python -m data wind-scan compare old.pkl datasets/china.wind_scan"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("store", type=Path)
    parser.add_argument("--out", type=Path, help="cache directory (default: STORE with the ending .wind_scan)")
    parser.add_argument("--patch", type=int, default=2, help="pixels a side of a patch (default 2)")
    parser.add_argument("--regions", type=int, nargs=2, default=[32, 32], metavar=("ROWS", "COLS"))
    parser.add_argument("--sectors", type=int, default=16)


def run(options: argparse.Namespace) -> None:
    from data.store.opening import open_store
    from data.wind_scan.cache import build

    out = options.out or options.store.with_suffix(".wind_scan")
    store, regions = open_store(options.store), tuple(options.regions)
    cache = build(store, out, patch=options.patch, regions=regions, sectors=options.sectors)
    unknown = int((~(cache.usable("global") & cache.usable("regional"))).sum())
    print(f"wrote {out}: orders {cache.orders_hash[:12]}, {cache.hours} hours, {unknown} without wind")
