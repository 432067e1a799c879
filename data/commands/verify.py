"""Check every shard of a store against its recorded hash."""

from __future__ import annotations

import argparse
from pathlib import Path

from data import DataError

EXAMPLES = "  python -m data verify datasets/demo.zarr"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("store", type=Path)


def run(options: argparse.Namespace) -> None:
    from data.store.opening import open_store, verify

    store = open_store(options.store)
    wrong = verify(store)
    if wrong:
        raise DataError(f"{store.path} is damaged:\n" + "\n".join(f"  {line}" for line in wrong))
    print(f"{store.path}: every shard is what was written, fingerprint {store.fingerprint[:12]}")
