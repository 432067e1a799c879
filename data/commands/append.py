"""Add the later hours of new files to a store, read as those were that it was prepared from."""

from __future__ import annotations

import argparse
from pathlib import Path

from data import DataError

EXAMPLES = """  python -m data append datasets/china.zarr raw/CN-Reanalysis20190101.tar.gz
  python -m data append datasets/china.zarr 'raw/*.tar.gz'      files that it was made of are left out
  python -m data append datasets/asia.zarr --config sources.yaml      a store of several sources"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("store", type=Path)
    add("files", nargs="*", metavar="FILE", help="as for `prepare`")
    add("--files-from", type=Path, metavar="LIST", help="a text file with one more FILE a line")
    add("--config", type=Path, metavar="SOURCES", help="YAML: all sources of a store that was made of several")
    add("--workers", type=int, default=1, help="processes on this machine")


def run(options: argparse.Namespace) -> None:
    from data.prepare.appending import append
    from data.prepare.inputs.given import expand

    if options.config and (options.files or options.files_from):
        raise DataError("--config lists the files of every source: give no others.")
    files = [] if options.config else expand(options.files, options.files_from)
    store = append(options.store, files, options.workers, options.config)
    if store is None:
        print(f"{options.store} stays as it is: it was made of all these files already, or a source has no later hours")
        return
    print(
        f"{options.store} reaches to {store.times[-1]}, fingerprint {store.fingerprint[:12]} after {store.earlier[-1][:12]}; "
        "splits and statistics are as before"
    )
