"""A file has its own name only once it is whole; directories change places."""

from __future__ import annotations

import ctypes
import errno
import os
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

AT_FDCWD, RENAME_EXCHANGE = -100, 2  # of renameat2(2)


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


def exchange(one: Path, other: Path) -> None:
    """Let two directories take each other's place: in one instant, where the file system can do that.

    Where it cannot, `one` is called NAME.replaced meanwhile.
    """
    libc = ctypes.CDLL(None, use_errno=True)
    if hasattr(libc, "renameat2"):
        if libc.renameat2(AT_FDCWD, os.fsencode(one), AT_FDCWD, os.fsencode(other), RENAME_EXCHANGE) == 0:
            return
        code = ctypes.get_errno()
        if code not in (errno.ENOSYS, errno.EINVAL, errno.ENOTSUP):
            raise OSError(code, os.strerror(code), str(one))
    aside = one.with_name(f"{one.name}.replaced")
    one.rename(aside)
    other.rename(one)
    aside.rename(other)
