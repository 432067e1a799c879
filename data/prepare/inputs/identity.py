"""What the files that a store is made of held: size, times and a hash of the content of each.

A file is hashed once, by whoever reads it first; a glance (size, modification and change time, inode) tells whether that
still holds. A damaged download that is replaced by a good one has often the same size, in classic NetCDF always, and a
copied modification time: its content tells.
"""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Collection
from pathlib import Path
from typing import Any

from data import DataError
from data.prepare.inputs.given import on_disk
from data.process import locks
from data.process.written import write_text

RECORD = "sources.json"  # in a finished store
SMALL = 16 << 20  # bytes; sooner hashed twice than locked
REST = "rest.json"  # in the parts of an appended one: files with hours for the next time
SEEN = "seen.json"  # in the parts of an unfinished one: the glance when the catalogue was made


def glance(files: list[Path]) -> dict[str, list[int]]:
    """Size, modification time, change time and inode of every file."""
    return {str(file): _glance(file) for file in {on_disk(file) for file in files}}


def begin(parts: Path, seen: dict[str, list[int]], rest: Collection[str] = ()) -> None:
    """Remember what the files looked like before they were catalogued, and which hold hours for the next time."""
    (parts / SEEN).write_text(json.dumps(seen))
    (parts / REST).write_text(json.dumps(sorted(rest)))


def unknown(files: list[Path], known: dict[str, dict[str, Any]]) -> list[Path]:
    """Files that a store was not made of, by their content, wherever they lie; and those that hold hours for the next time."""
    whole = {about["sha256"] for about in known.values() if not about.get("rest")}
    found = []
    for file in files:
        about = known.get(str(on_disk(file)))
        if about is not None and not about.get("rest"):
            continue
        if about is not None or _sha256(on_disk(file)) not in whole:
            found.append(file)
    return found


def replaced(parts: Path, files: list[Path]) -> list[Path]:
    """Files that do not look as they did when they were catalogued."""
    try:
        seen = json.loads((parts / SEEN).read_text())
    except (FileNotFoundError, ValueError):
        return files
    return [file for file in sorted({on_disk(file) for file in files}) if seen.get(str(file)) != _glance(file)]


def content_of(parts: Path, file: Path) -> str:
    """sha256 of a file, or of the archive it lies in, computed once for all processes, if it is large.

    Raises:
        OSError: it cannot be read.
    """
    file, record = on_disk(file), _record(parts, file)
    while True:
        known = _known(record)
        if known is not None and known["glance"] == _glance(file):
            return str(known["sha256"])
        if file.is_file() and file.stat().st_size < SMALL:
            return _hashed(file, record)
        try:
            with locks.hold(record.with_suffix(".lock")):
                if (known := _known(record)) is not None and known["glance"] == _glance(file):
                    continue  # another process has just done it
                return _hashed(file, record)
        except locks.Busy:  # another process is reading it just now
            time.sleep(0.2)


def _hashed(file: Path, record: Path) -> str:
    """Hash a file, again if it changed meanwhile, and keep the hash."""
    while True:
        before = _glance(file)
        sha256 = _sha256(file)
        if _glance(file) == before:
            break
    write_text(record, json.dumps({"glance": before, "sha256": sha256}))
    return sha256


def require_still(parts: Path, file: Path) -> None:
    """
    Raises:
        DataError: the file changed while it was read.
    """
    known = _known(_record(parts, file))
    if known is None or known["glance"] != _glance(file):
        raise DataError(f"{file} changed while it was read. Wait until it is complete, and run the same command again.")


def describe(parts: Path, files: list[Path]) -> dict[str, dict[str, Any]]:
    """What a finished store remembers of its files, also of those that gave no hour."""
    found, rest = {}, set(json.loads((parts / REST).read_text()))
    for file in sorted({on_disk(file) for file in files}):
        content_of(parts, file)
        known = _known(_record(parts, file))
        assert known is not None
        found[str(file)] = known | ({"rest": True} if str(file) in rest else {})
    return found


def recorded(store: Path) -> dict[str, dict[str, Any]]:
    """What a finished store remembers of its files; those of the first versions remembered nothing.

    Raises:
        DataError: the record is damaged.
    """
    try:
        found: dict[str, dict[str, Any]] = json.loads((store / RECORD).read_text())
    except FileNotFoundError:
        return {}
    except ValueError as error:
        raise DataError(f"{store / RECORD} is damaged ({error}): copy the store again.") from error
    return found


def require_unchanged(store: Path, files: list[Path]) -> None:
    """A finished store is what its files would give again.

    Raises:
        DataError: a file now has another content.
    """
    before = recorded(store)
    for file in sorted({on_disk(file) for file in files}):
        known = before.get(str(file))
        if known is None or known["glance"] == _glance(file):
            continue
        if _sha256(file) != known["sha256"]:
            raise DataError(f"{file} has another content than when {store} was made of it. Remove {store} to prepare it again.")


def _record(parts: Path, file: Path) -> Path:
    return parts / f"content-{hashlib.sha256(str(on_disk(file)).encode()).hexdigest()[:24]}.json"


def _known(record: Path) -> dict[str, Any] | None:
    try:
        known: dict[str, Any] = json.loads(record.read_text())
    except (FileNotFoundError, ValueError):
        return None
    return known


def _glance(file: Path) -> list[int]:
    """Size, modification time, change time and inode; of a zarr store the sum and the latest of its files."""
    place = on_disk(file)
    try:
        members = [member.stat() for member in place.rglob("*") if member.is_file()] if place.is_dir() else [place.stat()]
    except OSError as error:
        raise DataError(f"{file} cannot be read ({error.strerror}).") from error
    latest = [max(getattr(found, name) for found in members) for name in ("st_mtime_ns", "st_ctime_ns", "st_ino")]
    return [sum(found.st_size for found in members), *latest]


def _sha256(file: Path) -> str:
    """Of a file, or of the names and contents of all files of a zarr store."""
    if file.is_dir():
        digest = hashlib.sha256()
        for member in sorted(member for member in file.rglob("*") if member.is_file()):
            digest.update(f"{member.relative_to(file)} {_sha256(member)}\n".encode())
        return digest.hexdigest()
    with file.open("rb") as opened:
        return hashlib.file_digest(opened, "sha256").hexdigest()
