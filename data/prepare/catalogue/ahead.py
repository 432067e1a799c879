"""Headers of many files, read by all workers and ranks before the catalogue is made, and kept: an interruption costs little.

Six years of one file an hour are 52,584 files, and what is in an archive has to be unpacked to be looked into.
"""

from __future__ import annotations

import json
import multiprocessing
import shutil
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.progress import track

from data.prepare.catalogue.headers import Header, read_header
from data.prepare.inputs import identity
from data.process.written import write_text

MANY = 100  # files, from which on it is worth it
PIECE = 48  # files whose headers are kept together: two days of one file an hour


def look_ahead(path: Path, files: list[Path], workers: int, part: int = 0, parts: int = 1) -> None:
    """Read and keep the headers of every `parts`-th piece of the files that a store at `path` is made of."""
    if len(files) < MANY:
        return
    folder = _folder(path)
    folder.mkdir(parents=True, exist_ok=True)
    wanted = [number for number in range(part, _pieces(files), parts) if _kept(folder, files, number) is None]
    tasks = [(folder, number, files[number * PIECE : (number + 1) * PIECE]) for number in wanted]
    steps = _looked(tasks, workers)
    for _ in track(steps, "looking into files", total=len(tasks), console=Console(stderr=True), disable=part > 0):
        pass


def headers_of(path: Path, files: list[Path]) -> Iterator[Header | None]:
    """The header of every file: as it was kept, or read now."""
    if len(files) < MANY:
        yield from map(read_header, files)
        return
    for number in range(_pieces(files)):
        kept = _kept(_folder(path), files, number)
        yield from map(read_header, files[number * PIECE : (number + 1) * PIECE]) if kept is None else kept


def forget(path: Path) -> None:
    """Remove what was kept, once the catalogue is."""
    shutil.rmtree(_folder(path), ignore_errors=True)


def _folder(path: Path) -> Path:
    return path.with_name(path.name + ".headers")


def _pieces(files: list[Path]) -> int:
    return -(-len(files) // PIECE)


def _looked(tasks: list[tuple[Path, int, list[Path]]], workers: int) -> Iterator[None]:
    if workers == 1:
        yield from map(_look, tasks)
        return
    # Spawned: libraries that were opened before a fork hang after it.
    with ProcessPoolExecutor(workers, mp_context=multiprocessing.get_context("spawn")) as pool:
        yield from pool.map(_look, tasks)


def _look(task: tuple[Path, int, list[Path]]) -> None:
    folder, number, files = task
    seen = identity.glance(files)
    found = [_as_json(read_header(file)) for file in files]
    content = {"files": [str(file) for file in files], "seen": seen, "headers": found}
    write_text(folder / f"{number}.json", json.dumps(content))


def _kept(folder: Path, files: list[Path], number: int) -> list[Header | None] | None:
    """The headers of a piece; None where they were not read, or the files look different since."""
    own = files[number * PIECE : (number + 1) * PIECE]
    try:
        kept = json.loads((folder / f"{number}.json").read_text())
    except (FileNotFoundError, ValueError):
        return None
    if kept["files"] != [str(file) for file in own] or kept["seen"] != identity.glance(own):
        return None
    return [_from_json(header) for header in kept["headers"]]


def _as_json(header: Header | None) -> dict[str, Any] | None:
    if header is None:
        return None
    times = {name: [values.tolist(), str(values.dtype), about] for name, (values, about) in header.times.items()}
    return {"signature": header.signature, "times": times}


def _from_json(kept: dict[str, Any] | None) -> Header | None:
    if kept is None:
        return None
    times = {name: (np.array(values, dtype), about) for name, (values, dtype, about) in kept["times"].items()}
    return Header(kept["signature"], times)
