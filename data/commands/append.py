"""Add the later hours of new files to a store, read as those were that it was prepared from."""

from __future__ import annotations

import argparse
from pathlib import Path

EXAMPLES = """  python -m data append datasets/china.zarr raw/CN-Reanalysis20190101.tar.gz
  python -m data append datasets/china.zarr 'raw/*.tar.gz'      files that it was made of are left out"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("store", type=Path)
    add("files", nargs="*", metavar="FILE", help="as for `prepare`")
    add("--files-from", type=Path, metavar="LIST", help="a text file with one more FILE a line")
    add("--workers", type=int, default=1, help="processes on this machine")


def run(options: argparse.Namespace) -> None:
    from data.prepare.appending import append
    from data.prepare.inputs.given import expand

    store = append(options.store, expand(options.files, options.files_from), options.workers)
    if store is None:
        print(f"{options.store} was made of all these files already")
        return
    print(
        f"{options.store} reaches to {store.times[-1]}, fingerprint {store.fingerprint[:12]} after {store.earlier[-1][:12]}; "
        "splits and statistics are as before"
    )
