"""What is read of NetCDF-4 files without their library is what the library reads, whatever the storage."""

from __future__ import annotations

import io
import tarfile
import zlib
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import h5py
import netCDF4
import numpy as np
import pytest

from data import DataError
from data.prepare.inputs.hdf5 import Fields
from data.prepare.inputs.opening import opened_plainly
from data.prepare.reader import _clear_packing
from data.prepare.sources.hours import Asked, stored_hours
from data.prepare.sources.spellings import Named
from data.prepare.sources.times import Dimensions
from data.variables import BY_NAME

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


def write(
    path: Path, dtype: str = "f4", *, sizes: dict[str, int] = SIZES, written: int = 9, grows: bool = False, **stored: Any
) -> Path:
    with netCDF4.Dataset(path, "w") as file:
        for dim, size in sizes.items():
            file.createDimension(dim, None if dim == "time" and grows else size)
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
    assert fields.dimensions == {"pm25": tuple(SIZES)}
    ours = stored in ("shuffled", "not shuffled", "chunks that do not divide")
    assert (fields.read("pm25", WANTED[1]) is not None) == ours
    fields.close()


def test_what_was_never_written_is_what_the_library_fills_in(tmp_path: Path) -> None:
    path = write(tmp_path / "a.nc", written=4, grows=True, zlib=True, chunksizes=(1, 1, 20, 31))
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


def grown(file: netCDF4.Dataset) -> None:
    """Time has no variable, grows, and is as long as another dimension: its own length is stored as 0."""
    for dim, size in (("Time", None), ("y", 5), ("x", 6), ("soil", 4)):
        file.createDimension(dim, size)
    file.createVariable("U10", "f4", ("Time", "y", "x"), zlib=True)[:4] = np.arange(120).reshape(4, 5, 6)
    file.createVariable("ZS", "f4", ("soil",))[:] = 1.0


def namesakes(file: netCDF4.Dataset) -> None:
    """A variable called like a dimension that it does not count along, and a dimension called like a field."""
    for dim, size in (("z", 3), ("y", 5), ("x", 6), ("u", 7)):
        file.createDimension(dim, size)
    z = file.createVariable("z", "f4", ("y", "x"), zlib=True)
    z.units, z[:] = "m", np.arange(30).reshape(5, 6)
    file.createVariable("u10", "f4", ("y", "x"), zlib=True)[:] = 2.0


def empty_attribute(file: netCDF4.Dataset) -> None:
    file.createDimension("y", 5)
    field = file.createVariable("o3", "f4", ("y",), zlib=True)
    field.units, field.missing_value, field[:] = "", np.array([], "f4"), 3.0


def bare_dimension(file: netCDF4.Dataset) -> None:
    for dim, size in (("y", 5), ("u", 7)):
        file.createDimension(dim, size)
    file.createVariable("u10", "f4", ("y",), zlib=True)[:] = 2.0


def one_dimension_twice(file: netCDF4.Dataset) -> None:
    file.createDimension("y", 5)
    file.createVariable("cov", "f4", ("y", "y"), zlib=True)[:] = np.arange(25).reshape(5, 5)


@pytest.mark.parametrize("build", [grown, namesakes, empty_attribute, bare_dimension, one_dimension_twice])
def test_odd_files_are_described_as_the_library_describes_them(
    tmp_path: Path, build: Callable[[netCDF4.Dataset], None]
) -> None:
    with netCDF4.Dataset(tmp_path / "a.nc", "w") as file:
        build(file)
    with netCDF4.Dataset(tmp_path / "a.nc") as file, opened_plainly(tmp_path / "a.nc") as ours:
        file.set_auto_maskandscale(False)
        assert ours.dimensions.keys() == file.variables.keys()
        for name, variable in file.variables.items():
            assert (ours.dimensions[name], ours.shape(name)) == (variable.dimensions, variable.shape)
            stated = {key: variable.getncattr(key) for key in variable.ncattrs()}
            np.testing.assert_equal(ours.attributes(name), stated)
            assert [type(value) for value in ours.attributes(name).values()] == [
                type(stated[key]) for key in ours.attributes(name)
            ]
            np.testing.assert_array_equal(ours.read(name, [(0, size) for size in variable.shape]), variable[:])


@pytest.mark.parametrize(("level", "found"), [(0, 1.0), (2, 3.0), (-1, 3.0)])
def test_a_level_is_counted_from_either_end(tmp_path: Path, level: int, found: float) -> None:
    path, asked = tmp_path / "a.nc", Asked(Named(("pm25",), "ug m-3", level=level), Dimensions("time", "y", "x"), np.array([0]))
    with netCDF4.Dataset(path, "w") as file:
        for dim, size in (("time", 1), ("lev", 3), ("y", 5), ("x", 6)):
            file.createDimension(dim, size)
        file.createVariable("pm25", "f4", ("time", "lev", "y", "x"), zlib=True)[:] = np.arange(1, 4)[:, None, None]
    assert (dict(stored_hours(path, {"pm25": asked}))["pm25"].values == found).all()
    with pytest.raises(DataError, match="3 of lev, not a level 3"):
        list(stored_hours(path, {"pm25": replace(asked, named=replace(asked.named, level=3))}))


def test_any_damaged_byte_gives_the_same_numbers_or_a_refusal(tmp_path: Path) -> None:
    path = write(tmp_path / "a.nc", sizes={"time": 2, "south": 4, "west": 5}, written=2, zlib=True)
    whole, rng = path.read_bytes(), np.random.default_rng(0)
    for place in rng.choice(len(whole), 150, replace=False):
        content = bytearray(whole)
        content[place] ^= 0xFF
        path.write_bytes(content)
        try:
            with opened_plainly(path) as file:
                found = file.read("pm25", [(0, 2), (0, 4), (0, 5)])
        except (DataError, KeyError):  # by its name, or without the field
            continue
        np.testing.assert_array_equal(found, np.resize(values("f4"), (2, 4, 5)))


def by_h5py(path: Path, attached: bool = True) -> h5py.File:
    file = h5py.File(path, "w")
    for name, size in (("y", 5), ("x", 6)):
        file[name] = np.arange(size, dtype="f4")
        file[name].make_scale(name)
    file.create_dataset("pm25", (5, 6), "f4", chunks=(5, 6), compression="gzip", shuffle=True)
    for axis, name in enumerate(("y", "x") if attached else ()):
        file["pm25"].dims[axis].attach_scale(file[name])
    return file


def test_a_chunk_that_a_filter_was_left_out_for_is_not_unpacked(tmp_path: Path) -> None:
    path = tmp_path / "a.nc"
    with by_h5py(path) as file:
        file["pm25"].id.write_direct_chunk((0, 0), np.arange(30, dtype="f4").tobytes(), filter_mask=3)
    with opened_plainly(path) as ours:
        np.testing.assert_array_equal(ours.read("pm25", [(0, 5), (0, 6)]), np.arange(30).reshape(5, 6))
    shuffled = np.arange(30, dtype="<f4").view("u1").reshape(30, 4).T.tobytes()
    with by_h5py(path) as file:  # deflated but said not to be shuffled: the mask decides
        file["pm25"].id.write_direct_chunk((0, 0), zlib.compress(shuffled), filter_mask=1)
    with opened_plainly(path) as ours:
        np.testing.assert_array_equal(ours.read("pm25", [(0, 5), (0, 6)]), by_library(path, [(0, 5), (0, 6)]))


def test_integers_of_fewer_bits_than_they_take_are_left_to_the_library(tmp_path: Path) -> None:
    path = tmp_path / "a.nc"
    with h5py.File(path, "w") as file:
        kind, how = h5py.h5t.STD_I16LE.copy(), h5py.h5p.create(h5py.h5p.DATASET_CREATE)
        kind.set_precision(10)
        how.set_chunk((5,))
        how.set_deflate(1)
        space = h5py.h5s.create_simple((5,))
        h5py.h5d.create(file.id, b"pm25", kind, space, how).write(space, space, np.arange(-15, -10, dtype="i2"))
    with opened_plainly(path) as ours:
        np.testing.assert_array_equal(ours.read("pm25", [(0, 5)]), np.arange(-15, -10))


def test_dimensions_that_a_field_is_not_attached_to_are_guessed_as_the_library_guesses(tmp_path: Path) -> None:
    by_h5py(tmp_path / "a.nc", attached=False).close()
    with netCDF4.Dataset(tmp_path / "a.nc") as file, opened_plainly(tmp_path / "a.nc") as ours:
        assert ours.dimensions["pm25"] == file["pm25"].dimensions


def test_a_file_is_closed(tmp_path: Path) -> None:
    path = write(tmp_path / "a.nc", zlib=True)
    fields = Fields(path, None)
    fields.close()
    assert path not in [link.resolve() for link in Path("/proc/self/fd").iterdir()]


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


def test_numbers_just_below_zero_come_from_packing_and_are_zero_also_beside_missing_ones() -> None:
    pm25 = BY_NAME["pm25"]
    assert pm25.typical
    little = -0.5e-2 * pm25.typical[0]
    for missing in ([], [np.nan]):
        values = np.array([little, 3.0, 100 * little, *missing], "f4")
        _clear_packing(pm25, values)
        np.testing.assert_array_equal(values, np.array([0.0, 3.0, 100 * little, *missing], "f4"))
