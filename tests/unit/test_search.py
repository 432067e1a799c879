"""Many files are looked into once, by any number of parts, and again where one was replaced."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import xarray as xr

from data import DataError
from data.prepare.catalogue import search
from data.prepare.catalogue.search import look_ahead, make_catalogue
from data.prepare.sources.source import Named, Source

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
def sources(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[Source, ...]:
    monkeypatch.setattr(search, "PIECE", 2)
    return (Source("generic", FIELD, [write(tmp_path / f"{hour:02d}.nc", hour) for hour in range(7)]),)


def counted(monkeypatch: pytest.MonkeyPatch, fails_at: str = "") -> list[str]:
    """Names of the files that are looked into from now on."""
    read: list[str] = []
    look = search._fields_of

    def looking(path: Path, *more: Any) -> list[dict[str, Any]]:
        if path.name == fails_at:
            raise KeyboardInterrupt
        read.append(path.name)
        return look(path, *more)

    monkeypatch.setattr(search, "_fields_of", looking)
    return read


def test_parts_share_the_files_and_the_catalogue_is_the_same(
    sources: tuple[Source, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "s.zarr"
    read = counted(monkeypatch)
    for part in (1, 0):
        look_ahead(path, sources, (), workers=1, part=part, parts=2)
    assert sorted(read) == [file.name for file in sources[0].files]
    found = make_catalogue(path, sources, ())
    assert len(read) == len(sources[0].files)
    search.forget(path)
    assert found.equals(make_catalogue(path, sources, (), workers=2))
    search.forget(path)
    assert not list(tmp_path.glob("*.looked"))


def test_an_interruption_costs_one_piece(sources: tuple[Source, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "s.zarr"
    with monkeypatch.context() as patched:
        counted(patched, fails_at="05.nc")
        with pytest.raises(KeyboardInterrupt):
            make_catalogue(path, sources, ())
    read = counted(monkeypatch)
    make_catalogue(path, sources, ())
    assert read == ["04.nc", "05.nc", "06.nc"]


def test_a_file_that_was_replaced_is_looked_into_again(
    sources: tuple[Source, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "s.zarr"
    make_catalogue(path, sources, ())
    replaced = sources[0].files[2]
    replaced.unlink()
    write(replaced, hour=20, shift=0.5)
    read = counted(monkeypatch)
    with pytest.raises(DataError, match="02.nc has 'pm25' on another grid"):
        make_catalogue(path, sources, ())
    assert read == ["02.nc", "03.nc"]
