"""An evaluation in pieces: ranks share them, each is kept as soon as it is summed, and all are added in their order.

So the result is the same to the bit on any number of ranks and after any interruption, and nothing is exchanged but files.
"""

from __future__ import annotations

import hashlib
import json
import shutil
import time
import zipfile
import zlib
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np

from data import DataError
from data.process.ranks import world
from data.process.written import being_written

SMALLEST, MOST = 128, 64  # samples of a piece, pieces
WAIT_S = 1800.0  # without a new piece of another rank
Sums = dict[str, np.ndarray]


def cut(days: np.ndarray) -> list[slice]:
    """Samples in the order of their local days, cut between days.

    Args:
        days: (n,) ascending.
    """
    size = max(SMALLEST, -(-len(days) // MOST))
    starts = np.concatenate([[0], np.flatnonzero(np.diff(days)) + 1])
    bounds = [0]
    for start in starts[1:]:
        if start - bounds[-1] >= size:
            bounds.append(int(start))
    return [slice(a, b) for a, b in zip(bounds, [*bounds[1:], len(days)], strict=True)]


def share(folder: Path, count: int, work: Callable[[int], Sums]) -> Iterator[int]:
    """Sum and keep this rank's pieces, those that are not there yet; the number of each as it is done."""
    folder.mkdir(parents=True, exist_ok=True)
    rank, size = world().rank, world().size
    for number in range(rank, count, size):
        path = _place(folder, number)
        if not path.exists():
            with being_written(path) as partial, partial.open("wb") as file:
                np.savez_compressed(file, allow_pickle=False, **work(number))
        yield number


def merged(folder: Path, count: int) -> Sums:
    """The sums of all pieces, once the last is there.

    Raises:
        DataError: a piece does not come, or is damaged.
    """
    total: Sums = {}
    for number in range(count):
        path = _place(folder, number)
        deadline = time.monotonic() + WAIT_S
        while not path.exists():
            if time.monotonic() > deadline:
                raise DataError(
                    f"{path} did not come within {WAIT_S:.0f} s; rank {number % world().size} has to write it: look at its "
                    "messages. What is done is kept: the same command goes on."
                )
            time.sleep(0.05)
        try:
            with np.load(path, allow_pickle=False) as file:
                part = {name: file[name] for name in file.files}
        except (zipfile.BadZipFile, zlib.error, ValueError, OSError) as error:
            raise DataError(f"{path} is damaged ({error}). Remove it: it is made again.") from error
        total = {name: values + total[name] if total else values for name, values in part.items()}
    return total


def discard(folder: Path) -> None:
    """Remove the pieces, once what they make has been written."""
    shutil.rmtree(folder, ignore_errors=True)
    with suppress(OSError):  # others, of evaluations that go on or were never finished, stay
        folder.parent.rmdir()


def identity(described: dict[str, Any]) -> str:
    """What an evaluation is of: pieces of another one are never mixed in."""
    return hashlib.sha256(json.dumps(described, sort_keys=True, default=str).encode()).hexdigest()[:16]


def _place(folder: Path, number: int) -> Path:
    return folder / f"{number:04d}.npz"
