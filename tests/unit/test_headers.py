"""Which files are taken for alike: those that differ in times and values of fields only, in either format, also in memory."""

from __future__ import annotations

import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import h5py
import netCDF4
import numpy as np
import pytest

from data import DataError
from data.prepare.catalogue import headers
from data.prepare.catalogue.headers import read_header
from data.prepare.inputs.given import expand


def write(path: Path, change: Callable[[netCDF4.Dataset], Any] = lambda _: None, kind: str = "NETCDF4", cols: int = 7) -> Path:
    with netCDF4.Dataset(path, "w", format=kind) as file:
        for dim, size in (("time", 2), ("south", 5), ("west", cols)):
            file.createDimension(dim, size)
        time = file.createVariable("time", "f8", ("time",))
        time.units, time[:] = "hours since 2015-03-01", [1, 2]
        for name in ("lat2d", "lon2d", "pm25"):
            field = file.createVariable(name, "f4", ("south", "west"), zlib=kind == "NETCDF4")
            field.units, field[:] = "1", np.arange(5 * cols).reshape(5, cols)
        change(file)
    return path


def set_to(name: str, values: Any) -> Callable[[netCDF4.Dataset], Any]:
    return lambda file: file[name].__setitem__(slice(None), values)


ALIKE = {
    "times": set_to("time", [5, 6]),
    "fields": set_to("pm25", 3.0),
    "note": lambda file: file["pm25"].setncattr("note", "x"),
}
OTHERS = {
    "latitudes": set_to("lat2d", 0.0),
    "longitudes": set_to("lon2d", 0.0),
    "units": lambda file: file["pm25"].setncattr("units", "ug m-3"),
    "a variable more": lambda file: file.createVariable("o3", "f4", ("south", "west")),
    "another type": lambda file: file.createVariable("o3", "f8", ("south", "west")),
}


@pytest.mark.parametrize(("kind", "cols"), [("NETCDF4", 7), ("NETCDF4", 5), ("NETCDF4_CLASSIC", 7), ("NETCDF3_CLASSIC", 7)])
def test_files_that_are_made_alike_have_one_signature(tmp_path: Path, kind: str, cols: int) -> None:
    """Five columns are as many as rows: HDF5 alone does not tell cheaply which dimension is which."""
    first = read_header(write(tmp_path / "first.nc", kind=kind, cols=cols))
    assert first
    values, about = first.times["time"]
    assert (values.tolist(), about) == ([1.0, 2.0], {"units": "hours since 2015-03-01"})
    for name, change in ALIKE.items():
        other = read_header(write(tmp_path / "other.nc", change, kind, cols))
        assert other, name
        assert other.signature == first.signature, name
    seen = {first.signature}
    for change in OTHERS.values():
        other = read_header(write(tmp_path / "other.nc", change, kind, cols))
        assert other
        seen.add(other.signature)
    assert len(seen) == 1 + len(OTHERS)


def test_longitudes_that_are_called_like_a_dimension_count(tmp_path: Path) -> None:
    """NetCDF-4 stores lon(lat, lon) under another name, since it does not count along lon."""

    def curvilinear(start: float) -> Callable[[netCDF4.Dataset], Any]:
        def change(file: netCDF4.Dataset) -> None:
            file.createDimension("lat", 4)
            file.createDimension("lon", 3)
            file.createVariable("lon", "f8", ("lat", "lon"))[:] = start + np.arange(12.0).reshape(4, 3)

        return change

    found = [read_header(write(tmp_path / f"{start}.nc", curvilinear(start))) for start in (70.0, 100.0)]
    assert len({header.signature for header in found if header}) == 2


def test_text_of_any_kind_is_read_as_the_library_reads_it(tmp_path: Path) -> None:
    """Attributes of the type string, and letters that are not UTF-8."""

    def stated(file: netCDF4.Dataset) -> None:
        file["time"].delncattr("units")
        file["time"].setncattr_string("units", "hours since 2015-03-01")

    header = read_header(write(tmp_path / "string.nc", stated))
    assert header
    assert header.times["time"][1] == {"units": "hours since 2015-03-01"}
    path = write(tmp_path / "latin.nc")
    with h5py.File(path, "a") as file:
        file["pm25"].attrs["units"] = np.bytes_(b"\xb5g m-3")
    assert read_header(path)


def test_whatever_is_damaged_is_left_to_be_named_later(tmp_path: Path) -> None:
    whole, rng = write(tmp_path / "whole.nc").read_bytes(), np.random.default_rng(0)
    for _ in range(200):
        damaged = bytearray(whole)
        for place in rng.integers(8, len(whole), 8):
            damaged[place] = rng.integers(256)
        (tmp_path / "damaged.nc").write_bytes(bytes(damaged))
        read_header(tmp_path / "damaged.nc")


def test_dimensions_of_one_length_are_told_apart(tmp_path: Path) -> None:
    def turned(file: netCDF4.Dataset) -> None:
        file.renameDimension("south", "other")
        file.renameDimension("west", "south")
        file.renameDimension("other", "west")

    found = [read_header(write(tmp_path / f"{n}.nc", change, cols=5)) for n, change in enumerate((lambda _: None, turned))]
    assert all(found)
    assert len({header.signature for header in found if header}) == 2


def test_a_member_of_an_archive_is_read_from_memory_alike(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write(tmp_path / "a.nc")
    with tarfile.open(tmp_path / "day.tar.gz", "w:gz") as tar:
        tar.add(path, "a.nc")
    on_disk, in_archive = read_header(path), read_header(tmp_path / "day.tar.gz" / "a.nc")
    assert on_disk
    assert in_archive
    assert in_archive.signature == on_disk.signature
    monkeypatch.setattr(headers.hdf5, "is_hdf5", lambda *_: False)
    slow = read_header(path)
    assert slow
    assert slow.times["time"][1] == on_disk.times["time"][1]


@pytest.mark.parametrize("damage", ["cut", "bits", "checksum"])
def test_a_damaged_archive_is_named(tmp_path: Path, damage: str) -> None:
    rng = np.random.default_rng(0)
    path = write(tmp_path / "a.nc", lambda file: file.createVariable("o3", "f4", ("south", "west")))
    (tmp_path / "noise.bin").write_bytes(rng.bytes(200_000))
    archive = tmp_path / "day.tar.gz"
    with tarfile.open(archive, "w:gz") as tar:
        tar.add(path, "a.nc")
        tar.add(tmp_path / "noise.bin", "noise.bin")
        tar.add(path, "b.nc")
    whole = bytearray(archive.read_bytes())
    if damage == "cut":
        whole = whole[: len(whole) // 2]
    elif damage == "bits":
        whole[len(whole) // 2 : len(whole) // 2 + 3000] = bytes([0xFF] * 3000)
    else:
        whole[-6] ^= 0xFF
    archive.write_bytes(bytes(whole))
    with pytest.raises(DataError, match="is damaged or cut off"):
        expand([str(archive)])
