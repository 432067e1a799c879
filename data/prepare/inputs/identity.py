"""Is a file what it was: a glance (size, times of modification and change, inode), and the hash of its content.

A damaged download that is replaced by a good one has often the same size, in classic NetCDF always,
and a copied modification time: a glance says that something happened, the content what.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

from data import DataError
from data.prepare.inputs.given import on_disk

RECORD = "sources.json"  # in a finished store: what the files that it was made of were


class Content(NamedTuple):
    """What a file, or an archive, looked like and held."""

    glance: list[int]
    sha256: str
    rest: bool = False  # it has later hours, for the next time


def glance(file: Path) -> list[int]:
    """Size, modification time, change time and inode; of a zarr store the sum and the latest of its files.

    Raises:
        DataError: it cannot be read.
    """
    try:
        members = [member.stat() for member in file.rglob("*") if member.is_file()] if file.is_dir() else [file.stat()]
    except OSError as error:
        raise DataError(f"{file} cannot be read ({error.strerror}).") from error
    latest = [max(getattr(found, name) for found in members) for name in ("st_mtime_ns", "st_ctime_ns", "st_ino")]
    return [sum(found.st_size for found in members), *latest]


def content_of(file: Path) -> Content:
    """Glance and hash of one state of a file; of a zarr store, of the names and contents of its files."""
    while True:
        before = glance(file)
        sha256 = _sha256(file)
        if glance(file) == before:
            return Content(before, sha256)


def recorded(store: Path) -> dict[str, Content]:
    """What a finished store remembers of its files; those of the first versions remembered nothing.

    Raises:
        DataError: the record is damaged.
    """
    try:
        found = json.loads((store / RECORD).read_text())
    except FileNotFoundError:
        return {}
    except ValueError as error:
        raise DataError(f"{store / RECORD} is damaged ({error}): copy the store again.") from error
    return {name: Content(**about) for name, about in found.items()}


def as_json(known: dict[str, Content]) -> bytes:
    """What `recorded` reads."""
    return json.dumps({name: known[name]._asdict() for name in sorted(known)}, indent=0).encode()


def unknown(files: list[Path], known: dict[str, Content]) -> list[Path]:
    """Files that a store was not made of, by their content, wherever they lie; and those that hold hours for the next time."""
    whole = {about.sha256 for about in known.values() if not about.rest}
    new: dict[Path, bool] = {}
    for file in {on_disk(file) for file in files}:
        about = known.get(str(file))
        new[file] = about.rest if about else content_of(file).sha256 not in whole
    return [file for file in files if new[on_disk(file)]]


def require_unchanged(store: Path, files: Iterable[Path]) -> None:
    """Require that a finished store is what its files would give again.

    Raises:
        DataError: a file now has another content.
    """
    before = recorded(store)
    for file in sorted({on_disk(file) for file in files} & set(map(Path, before))):
        known = before[str(file)]
        if known.glance != glance(file) and known.sha256 != content_of(file).sha256:
            raise DataError(f"{file} has another content than when {store} was made of it. Remove {store} to prepare it again.")


def _sha256(file: Path) -> str:
    if file.is_dir():
        digest = hashlib.sha256()
        for member in sorted(member for member in file.rglob("*") if member.is_file()):
            digest.update(f"{member.relative_to(file)} {_sha256(member)}\n".encode())
        return digest.hexdigest()
    with file.open("rb") as opened:
        return hashlib.file_digest(opened, "sha256").hexdigest()
