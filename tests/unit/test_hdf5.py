"""What is read of NetCDF-4 files without their library is what the library reads, whatever the storage."""

from __future__ import annotations

import io
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import netCDF4
import numpy as np
import pytest

from data import DataError
from data.prepare.inputs.hdf5 import Fields
from data.prepare.inputs.opening import opened_plainly

SIZES = {"time": 9, "level": 2, "south": 20, "west": 31}
STORED: dict[str, dict[str, Any]] = {
    "shuffled": {"zlib": True, "chunksizes": (1, 1, 20, 31)},
    "not shuffled": {"zlib": True, "shuffle": False, "chunksizes": (3, 2, 20, 31)},
    "chunks that do not divide": {"zlib": True, "complevel": 9, "chunksizes": (4, 2, 7, 8)},
    "checksums": {"zlib": True, "fletcher32": True},
    "chunks as they are": {"chunksizes": (1, 1, 20, 31)},
    "contiguous": {"contiguous": True},
}
WANTED = ([(0, 9), (0, 2), (0, 20), (0, 31)], [(2, 7), (1, 2), (0, 20), (0, 31)], [(8, 9), (0, 1), (3, 17), (30, 31)])


def values(dtype: str) -> np.ndarray:
    rng = np.random.default_rng(0)
    return (1000 * rng.standard_normal(tuple(SIZES.values()))).astype(dtype)


def write(path: Path, dtype: str = "f4", *, sizes: dict[str, int] = SIZES, written: int = 9, **stored: Any) -> Path:
    with netCDF4.Dataset(path, "w") as file:
        for dim, size in sizes.items():
            file.createDimension(dim, None if dim == "time" and not stored.get("contiguous") else size)
        endian = "big" if dtype.startswith(">") else "native"
        field = file.createVariable("pm25", dtype, tuple(sizes), endian=endian, **stored)
        field.set_auto_maskandscale(False)
        field.units, field.scale_factor, field.missing_value = "ug m-3", 0.5, np.array(7, dtype)
        field[:written] = np.resize(values(dtype), tuple(sizes.values()))[:written]
    return path


def by_library(path: Path, wanted: list[tuple[int, int]]) -> np.ndarray:
    with netCDF4.Dataset(path) as file:
        file.set_auto_maskandscale(False)
        return np.asarray(file["pm25"][tuple(slice(*places) for places in wanted)])


@pytest.mark.parametrize("dtype", ["f4", "f8", "i2", "u1", "i8", ">f4", ">i2"])
@pytest.mark.parametrize("stored", STORED)
def test_all_storage_gives_what_the_library_gives(tmp_path: Path, stored: str, dtype: str) -> None:
    path = write(tmp_path / "a.nc", dtype, **STORED[stored])
    with tarfile.open(tmp_path / "a.tar", "w") as tar:
        tar.add(path, "a.nc")
    for place in (path, tmp_path / "a.tar" / "a.nc"):
        with opened_plainly(place) as file:
            assert (file.dimensions["pm25"], file.shape("pm25")) == (tuple(SIZES), tuple(SIZES.values()))
            assert {key: file.attributes("pm25")[key] for key in ("units", "scale_factor", "missing_value")} == {
                "units": "ug m-3",
                "scale_factor": 0.5,
                "missing_value": np.array(7, dtype),
            }
            for wanted in WANTED:
                expected, found = by_library(path, wanted), file.read("pm25", wanted)
                assert found.dtype.newbyteorder("=") == expected.dtype.newbyteorder("=")
                np.testing.assert_array_equal(found, expected)


@pytest.mark.parametrize("stored", STORED)
def test_the_library_is_left_out_where_it_is_slow(tmp_path: Path, stored: str) -> None:
    fields = Fields(write(tmp_path / "a.nc", **STORED[stored]), None)
    ours = stored in ("shuffled", "not shuffled", "chunks that do not divide")
    assert (fields.read("pm25", WANTED[1]) is not None) == ours
    fields.close()


def test_what_was_never_written_is_what_the_library_fills_in(tmp_path: Path) -> None:
    path = write(tmp_path / "a.nc", written=4, zlib=True, chunksizes=(1, 1, 20, 31))
    with netCDF4.Dataset(path, "a") as file:
        file.createVariable("o3", "f4", ("time", "south"))[8] = 1.0  # time is longer than the field of pm25 now
    with opened_plainly(path) as file:
        assert file.shape("pm25") == tuple(SIZES.values())
        np.testing.assert_array_equal(file.read("pm25", WANTED[0]), by_library(path, WANTED[0]))


def test_dimensions_of_one_length_are_told_apart(tmp_path: Path) -> None:
    sizes = {"time": 9, "level": 1, "south": 9, "west": 31}
    path = write(tmp_path / "a.nc", sizes=sizes, zlib=True)
    with opened_plainly(path) as file:
        assert file.dimensions["pm25"] == tuple(sizes)
        everything = [(0, size) for size in sizes.values()]
        np.testing.assert_array_equal(file.read("pm25", everything), by_library(path, everything))


def flip(content: bytearray) -> None:
    content[len(content) // 2] ^= 0xFF


@pytest.mark.parametrize("damage", [flip, lambda content: content.__delitem__(slice(len(content) // 2, None))])
@pytest.mark.parametrize("archived", [False, True])
def test_damage_inside_a_chunk_is_refused_by_name(tmp_path: Path, damage: Callable[[bytearray], None], archived: bool) -> None:
    path = write(tmp_path / "a.nc", zlib=True, chunksizes=(9, 2, 20, 31))
    content = bytearray(path.read_bytes())
    damage(content)
    path.write_bytes(content)
    if archived:
        with tarfile.open(tmp_path / "a.tar", "w") as tar:
            about = tarfile.TarInfo("b.nc")
            about.size = len(content)
            tar.addfile(about, io.BytesIO(content))
        path = tmp_path / "a.tar" / "b.nc"
    with pytest.raises(DataError, match=r"b?a?\.nc cannot be read .*damaged or cut off"), opened_plainly(path) as file:
        file.read("pm25", WANTED[0])
