"""Files in archives, in whatever order they are asked for, and what is remembered of files."""

from __future__ import annotations

import hashlib
import io
import tarfile
from collections.abc import Callable
from pathlib import Path

import pytest

from data import DataError
from data.prepare.inputs import given, identity

NAMES = [f"{number}.nc" for number in range(6)]


def write(archive: Path, change: str = "") -> Path:
    with tarfile.open(archive, "w:gz") as tar:
        for name in NAMES:
            content = f"content of {name}{change}".encode()
            about = tarfile.TarInfo(f"./{name}")
            about.size = len(content)
            tar.addfile(about, io.BytesIO(content))
    return archive


ORDERS: dict[str, Callable[[list[str]], list[str]]] = {
    "as they lie": list,
    "some": lambda names: names[1::2],
    "backwards": lambda names: names[::-1],
    "twice": lambda names: [*names, *names],
    "one again": lambda names: [names[2], names[2], names[1], names[4]],
}


@pytest.mark.parametrize("order", ORDERS)
def test_files_of_a_tar_are_read_in_any_order(tmp_path: Path, order: str) -> None:
    archive, other = write(tmp_path / "a.tar.gz"), write(tmp_path / "b.tar.gz", " of b")
    for name in ORDERS[order](NAMES):
        assert given.read_member(archive / name, archive) == f"content of {name}".encode()
    assert given.read_member(other / NAMES[3], other) == b"content of 3.nc of b"
    assert given.read_member(archive / NAMES[0], archive) == b"content of 0.nc"


def test_an_archive_that_was_replaced_is_read_anew(tmp_path: Path) -> None:
    archive = write(tmp_path / "a.tar.gz")
    given.read_member(archive / NAMES[2], archive)
    write(tmp_path / "new.tar.gz", " anew").replace(archive)
    assert given.read_member(archive / NAMES[3], archive) == b"content of 3.nc anew"


def test_a_file_that_is_not_there_is_named_and_the_others_are_read_on(tmp_path: Path) -> None:
    archive = write(tmp_path / "a.tar.gz")
    with pytest.raises(DataError, match=r"a\.tar\.gz holds no 7\.nc"):
        given.read_member(archive / "7.nc", archive)
    assert given.read_member(archive / NAMES[5], archive) == b"content of 5.nc"


def test_a_file_that_changes_while_it_is_hashed_is_hashed_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file, hashes = tmp_path / "a.nc", []
    file.write_bytes(b"half")

    def copied_meanwhile(path: Path) -> str:
        hashes.append(hashlib.sha256(path.read_bytes()).hexdigest())
        file.write_bytes(b"half and half")
        return hashes[-1]

    monkeypatch.setattr(identity, "_sha256", copied_meanwhile)
    monkeypatch.setattr(identity, "glance", lambda path: [path.stat().st_size])
    assert identity.content_of(file).sha256 == hashlib.sha256(b"half and half").hexdigest()
    assert len(hashes) == 2
