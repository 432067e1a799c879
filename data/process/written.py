"""A file has its own name only once it is whole."""

from __future__ import annotations

import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def being_written(path: Path) -> Iterator[Path]:
    """Give a file in the making another name beside `path`, which it gets when the block ends.

    The other name ends in `.partial`; what a failure leaves under it is removed.
    """
    partial = path.with_name(f"{path.name}.{uuid.uuid4().hex[:8]}.partial")
    try:
        yield partial
        partial.rename(path)
    finally:
        partial.unlink(missing_ok=True)


def write_text(path: Path, text: str) -> None:
    """Write a text file whole, or not at all."""
    with being_written(path) as partial:
        partial.write_text(text, encoding="utf-8")
