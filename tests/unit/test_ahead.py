"""Headers of many files: read once, by any number of parts, and again where a file was replaced."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import xarray as xr

from data.prepare.catalogue import ahead, headers
from data.prepare.catalogue.search import make_catalogue
from data.prepare.sources.source import Source
from data.prepare.sources.spellings import Named

FIELD = {"pm25": Named(("pm25",), "ug m-3")}


def write(path: Path, hour: int, shift: float = 0.0) -> Path:
    axes = {
        "time": ("time", [hour], {"units": "hours since 2015-03-01"}),
        "lat": ("lat", np.arange(30.0, 33.0) + shift, {"units": "degrees_north"}),
        "lon": ("lon", np.arange(110.0, 114.0), {"units": "degrees_east"}),
    }
    xr.Dataset({"pm25": (("time", "lat", "lon"), np.ones((1, 3, 4), "f4"))}, axes).to_netcdf(path)
    return path


@pytest.fixture
def files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    monkeypatch.setattr(ahead, "MANY", 2)
    monkeypatch.setattr(ahead, "PIECE", 2)
    return [write(tmp_path / f"{hour:02d}.nc", hour) for hour in range(7)]


def counted(monkeypatch: pytest.MonkeyPatch, fails_at: str = "") -> list[str]:
    """Names of the files whose headers are read from now on."""
    read: list[str] = []

    def reading(path: Path) -> headers.Header | None:
        if path.name == fails_at:
            raise KeyboardInterrupt
        read.append(path.name)
        return headers.read_header(path)

    monkeypatch.setattr(ahead, "read_header", reading)
    return read


def test_parts_share_the_files_and_the_catalogue_is_the_same(
    files: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "s.zarr"
    read = counted(monkeypatch)
    for part in (1, 0):
        ahead.look_ahead(path, files, workers=1, part=part, parts=2)
    assert sorted(read) == [file.name for file in files]
    found = make_catalogue((Source("generic", FIELD, files),), headers=ahead.headers_of(path, files))
    assert len(read) == len(files)
    assert found.equals(make_catalogue((Source("generic", FIELD, files),)))
    ahead.forget(path)
    assert not list(tmp_path.glob("*.headers"))


def test_an_interruption_costs_one_piece(files: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "s.zarr"
    with monkeypatch.context() as patched:
        counted(patched, fails_at="05.nc")
        with pytest.raises(KeyboardInterrupt):
            ahead.look_ahead(path, files, workers=1)
    read = counted(monkeypatch)
    ahead.look_ahead(path, files, workers=1)
    assert read == ["04.nc", "05.nc", "06.nc"]


def test_a_file_that_was_replaced_is_looked_into_again(
    files: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "s.zarr"
    ahead.look_ahead(path, files, workers=1)
    files[2].unlink()
    write(files[2], hour=20, shift=0.5)
    read = counted(monkeypatch)
    ahead.look_ahead(path, files, workers=1)
    assert read == ["02.nc", "03.nc"]
    signatures = [header.signature for header in ahead.headers_of(path, files) if header is not None]
    assert len(set(signatures)) == 2
