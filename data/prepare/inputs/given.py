"""What was given on the command line -> files: directories are searched, archives looked into, patterns expanded.

A file in an archive is called as if the archive were a directory: CN-Reanalysis20150301.tar.gz/CN-Reanalysis2015030100.nc.
It is read from there, and never unpacked to a disk.
"""

from __future__ import annotations

import glob
import gzip
import lzma
import tarfile
import zipfile
import zlib
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

from data import DataError

ENDINGS = (".nc", ".nc3", ".nc4", ".cdf", ".grd", ".netcdf")  # searched for in directories and archives
GRIB_ENDINGS = (".grib", ".grb", ".grib1", ".grb1", ".grib2", ".grb2")  # in directories only: its library wants files
ARCHIVES = (".tar", ".tar.gz", ".tgz", ".tar.bz2", ".tar.xz", ".zip")
DAMAGED = (zipfile.BadZipFile, tarfile.TarError, gzip.BadGzipFile, zlib.error, lzma.LZMAError, EOFError)
# (what a file begins with, what it is and what to do with it)
KINDS: tuple[tuple[bytes, str], ...] = (
    (b"\x0e\x03\x13\x01", "HDF4: turn it into NetCDF first, as with `h4tonccf_nc4` or `ncl_convert2nc`"),
    (b"<", "a web page or XML, often an error page of a download: look at it, and fetch the file again"),
    (b"{", "JSON, often an error message of a download: look at it, and fetch the file again"),
    (b"version https://git-lfs", "a git-LFS pointer: fetch the file itself with `git lfs pull`"),
    (b"\x1f\x8b", "compressed by gzip: unpack it first with `gunzip`"),
    (b"BZh", "compressed by bzip2: unpack it first with `bunzip2`"),
    (b"\xfd7zXZ", "compressed by xz: unpack it first with `unxz`"),
)


def expand(given: list[str], listed: Path | None = None) -> list[Path]:
    """Every file that arguments name, sorted: files, directories, archives, patterns in quotes.

    Args:
        listed: a text file with one more argument a line.

    Raises:
        DataError: an argument names nothing, or an archive is damaged.
    """
    lines = [] if listed is None else [line.strip() for line in listed.read_text(encoding="utf-8").splitlines()]
    found: set[Path] = set()
    for argument in [*given, *filter(None, lines)]:
        here = list(_files_of(argument))
        if not here:
            nothing = "there is no NetCDF file or zarr store in it (GRIB in an archive has to be unpacked first)"
            why = nothing if Path(argument).exists() else "there is no such file"
            raise DataError(f"{argument} cannot be read: {why}.")
        found |= set(here)
    if not found:
        raise DataError("no files were given: name them, or a list of them with --files-from.")
    return sorted(found)


def archive_of(path: Path) -> Path | None:
    """The archive that a file lies in; None for a file of its own."""
    if path.exists():
        return None
    return next((parent for parent in path.parents if parent.is_file()), None)


def on_disk(path: Path) -> Path:
    """What has to be looked at to know whether a file has changed."""
    return archive_of(path) or path


def read_member(path: Path, archive: Path) -> bytes:
    """The content of a file in an archive.

    Raises:
        DataError: the archive is damaged, or has no such file any more.
    """
    name = str(path.relative_to(archive))
    try:
        if zipfile.is_zipfile(archive):
            with zipfile.ZipFile(archive) as opened:
                return opened.read(name)
        return _tar(archive).read(name)
    except KeyError as error:
        raise DataError(f"{archive} holds no {name}.") from error
    except DAMAGED as error:
        raise DataError(f"{archive} is damaged or cut off ({error}): fetch it again.") from error


def is_zarr(path: Path) -> bool:
    return any((path / name).is_file() for name in (".zgroup", ".zmetadata", "zarr.json"))


def is_grib(path: Path) -> bool:
    return _begins(path, b"GRIB")


def is_tiff(path: Path) -> bool:
    return _begins(path, b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")


def described(path: Path) -> str:
    """What a file that is no NetCDF is, and what to do; empty where that is not known."""
    with path.open("rb") as file:
        first = file.read(64)
    if not first:
        return "empty: the copy or download failed"
    return next((what for beginning, what in KINDS if first.lstrip().startswith(beginning)), "")


def _begins(path: Path, *firsts: bytes) -> bool:
    with path.open("rb") as file:
        return file.read(4) in firsts


def _files_of(argument: str) -> Iterator[Path]:
    path = Path(argument)
    if not path.exists() and glob.has_magic(argument):
        for name in sorted(glob.glob(argument, recursive=True)):
            yield from _files_of(name)
    elif path.is_dir() and not is_zarr(path):
        yield from _searched(path)
    elif path.is_file() and (zipfile.is_zipfile(path) or path.name.endswith(ARCHIVES)):
        yield from _members(path)
    elif path.exists() or archive_of(path) is not None:
        yield path


def _searched(folder: Path) -> Iterator[Path]:
    for path in sorted(folder.iterdir()):
        if path.is_dir() or path.name.endswith((*ENDINGS, *GRIB_ENDINGS, *ARCHIVES)):
            yield from _files_of(str(path))


def _members(archive: Path) -> Iterator[Path]:
    try:
        if zipfile.is_zipfile(archive):
            with zipfile.ZipFile(archive) as opened:
                names = opened.namelist()
        else:
            with tarfile.open(archive) as tar:
                names = [member.name for member in tar if member.isfile()]
    except DAMAGED as error:
        raise DataError(f"{archive} is damaged or cut off ({error}): fetch it again.") from error
    yield from (archive / name for name in names if name.endswith(ENDINGS))


class _Tar:
    """An archive that can only be read from its beginning.

    Files are mostly asked for as they lie in it, and one at a time is in memory; once one is asked for that has passed, all
    are kept there.
    """

    def __init__(self, archive: Path) -> None:
        self._archive, self._open = archive, ExitStack()
        self._coming = _contents(self._open.enter_context(tarfile.open(archive)))  # noqa: SIM115 - until `close`
        self._kept: dict[str, bytes] | None = None

    def read(self, name: str) -> bytes:
        """
        Raises:
            KeyError: there is no such file.
        """
        if self._kept is None:
            for other, content in self._coming:
                if other == name:
                    return content
            with tarfile.open(self._archive) as tar:
                self._kept = dict(_contents(tar))
        return self._kept[name]

    def close(self) -> None:
        self._open.close()


_latest: dict[tuple[Path, int], _Tar] = {}  # one at most, by path and time of modification


def _tar(archive: Path) -> _Tar:
    key = archive, archive.stat().st_mtime_ns
    if key not in _latest:
        for before in _latest.values():
            before.close()
        _latest.clear()
        _latest[key] = _Tar(archive)
    return _latest[key]


def _contents(tar: tarfile.TarFile) -> Iterator[tuple[str, bytes]]:
    """Name and content of every file that may be data, as they lie in it."""
    for member in tar:
        file = tar.extractfile(member) if member.isfile() and member.name.endswith(ENDINGS) else None
        if file is not None:
            yield str(Path(member.name)), file.read()
