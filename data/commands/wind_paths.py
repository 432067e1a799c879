"""Compute where the air of every patch comes from, at every hour of a store: a cache that a run opens."""

from __future__ import annotations

import argparse
from pathlib import Path

EXAMPLES = """  python -m data wind-paths datasets/china.zarr --out datasets/china.wind_paths --workers 8
  python -m data wind-paths datasets/china.zarr --out datasets/china.wind_paths --verify      every byte against its hash

Interrupt it anywhere and run it again; after an append, only what is new is computed."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("store", type=Path)
    add("--out", type=Path, required=True, help="directory of the cache")
    add("--hours", type=int, default=96, help="length of the paths: the longest lead time (default: 96)")
    add("--patch", type=int, default=2, help="pixels a side, as model.patch (default: 2)")
    add("--workers", type=int, default=1, help="processes on this machine")
    add("--verify", action="store_true", help="only check the cache that is there")


def run(options: argparse.Namespace) -> None:
    from data import DataError
    from data.store.opening import open_store
    from data.wind_paths import cache

    if options.verify:
        wrong = cache.damaged(options.out)
        if wrong:
            raise DataError(f"{options.out} is damaged: {', '.join(wrong[:8])}. Remove it, and build it again.")
        print(f"{options.out} is what was written")
        return
    store = open_store(options.store)
    built = cache.build(store, options.out, patch=options.patch, hours=options.hours, workers=options.workers)
    size = (options.out / "paths.bin").stat().st_size
    print(f"wrote {options.out}: {built.hours} hours, {size / 1e6:.1f} MB, paths {built.sha256[:12]}")
