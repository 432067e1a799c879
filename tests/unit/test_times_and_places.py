"""One opinion about time and place: what files say in odd ways is read as it is meant, or refused with what to do."""

from __future__ import annotations

import ast
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import xarray as xr
import zarr

from data import DataError
from data.prepare.grids.grid import Grid
from data.prepare.grids.regrid import build
from data.prepare.inputs.opening import opened
from data.prepare.sources.coordinates import coordinates, layout
from data.prepare.sources.source import Clock
from data.prepare.sources.times import stamp_of, valid_hours
from tests.launching import ROOT

DAY = {"units": "hours since 2015-03-01"}
UTC, HOURLY = Clock(name_zone=0.0), {"units": "hours"}
START = {"standard_name": "forecast_reference_time"}
LAT, LON = np.arange(30.0, 33.0), np.arange(110.0, 114.0)
PLACE = {"lat": ("lat", LAT, {"units": "degrees_north"}), "lon": ("lon", LON, {"units": "degrees_east"})}


def field(dims: tuple[str, ...], sizes: dict[str, int], coords: dict[str, Any]) -> xr.Dataset:
    shape = tuple(sizes[dim] for dim in dims)
    return xr.Dataset({"pm25": ((*dims, "lat", "lon"), np.zeros((*shape, 3, 4), "f4"))}, PLACE | coords)


def hours(dataset: xr.Dataset, clock: Clock = UTC) -> list[int]:
    """Hours since 2015-03-01 at which it is valid."""
    found = valid_hours(dataset, "pm25", Path("f.nc"), clock)
    return (found.valid - np.datetime64("2015-03-01", "h")).astype(int).tolist()


def test_nothing_else_looks_at_what_says_time_and_place() -> None:
    """Five places had an opinion on the time of a field."""
    allowed = {"data/prepare/sources/times.py", "data/prepare/sources/coordinates.py"}
    asked = {"forecast_reference_time", "forecast_period", "degrees_north", "bounds", "valid_time"}
    for path in (ROOT / "data").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            looks = isinstance(node, ast.Compare) and {x.value for x in ast.walk(node) if isinstance(x, ast.Constant)} & asked
            assert not looks or str(path.relative_to(ROOT)) in allowed, (path, node.lineno)


@pytest.mark.parametrize(
    ("dims", "coords", "expected"),
    [
        (("time",), {"time": ("time", [0, 12], DAY), "step": ((), 6, HOURLY)}, [6, 18]),
        (("time",), {"time": ("time", [0, 12], DAY | {"standard_name": "time"}), "step": ((), 6, HOURLY)}, [0, 12]),
        (("time",), {"time": ("time", [0, 12], DAY), "valid_time": ("time", [3, 15], DAY)}, [3, 15]),
        (("time",), {"time": ("time", [0, 12], DAY), "reftime": ("time", [-6, 6], DAY)}, [0, 12]),
        (("time",), {"time": ("time", [0, 12], DAY | START), "lead_time": ("time", [3, 6], {"units": "h"})}, [3, 18]),
        (("lead",), {"time": ((), 24, DAY), "lead": ("lead", [1, 2], {"units": "days"})}, [48, 72]),
        (("init_time", "lead"), {"init_time": ("init_time", [0, 12], DAY), "lead": ("lead", [3, 6], HOURLY)}, [3, 6, 15, 18]),
        (("lead", "time"), {"time": ("time", [0, 12], DAY), "lead": ("lead", [3, 6], HOURLY)}, [3, 15, 6, 18]),
        (("time",), {"time": ("time", [0.5, 1.5], DAY | {"bounds": "b"}), "b": (("time", "nv"), [[0, 1], [1, 2]])}, [1, 2]),
        (("time",), {"time": ("time", [0, 3], DAY | {"bounds": "b"}), "b": (("time", "nv"), [[0, 3], [3, 6]])}, [3, 6]),
        ((), {"time": ((), 20150301.25, {"units": "day as %Y%m%d.%f"})}, [6]),
        (("time",), {"time": ("time", [0, 12], DAY), "created": ((), 999, DAY)}, [0, 12]),
        (
            ("time",),
            {"time": ("time", [0, 12], DAY | START), "step": ((), 6, HOURLY), "created": ((), 999, DAY)},
            [6, 18],
        ),
    ],
)
def test_a_field_is_valid_when_its_file_says(dims: tuple[str, ...], coords: dict[str, Any], expected: list[int]) -> None:
    assert hours(field(dims, dict.fromkeys(dims, 2), coords)) == expected


@pytest.mark.parametrize(
    ("dims", "coords", "said"),
    [
        (("time",), {"time": ("time", [0, 12], DAY | START)}, "no forecast period"),
        (("time",), {"time": ("time", [0, 12], DAY), "step": ("time", [3, 6], HOURLY)}, "begin or are valid then"),
        (
            ("time", "step"),
            {"time": ("time", [0, 12], DAY | {"standard_name": "time"}), "step": ("step", [3, 6], HOURLY)},
            "begin or are valid then",
        ),
        (("step",), {"time": ((), 0, DAY), "step": ("step", [3, 6], {"units": "fortnights"})}, "are in 'fortnights'"),
        (("time",), {}, "2 of 'time': nobody can know"),
        ((), {"step": ((), 6, HOURLY)}, "no time from which they count"),
        (("time",), {"time": ("time", [0, 12], DAY | START), "created": ((), 999, DAY)}, "no forecast period"),
        ((), {}, "no hour in its name"),
        (("time",), {"time": ("time", [0.25, 1.25], DAY)}, "2015-03-01T00:15:00 is not on a whole hour"),
    ],
)
def test_what_nobody_can_know_is_refused(dims: tuple[str, ...], coords: dict[str, Any], said: str) -> None:
    with pytest.raises(DataError, match=said):
        hours(field(dims, dict.fromkeys(dims, 2), coords))


@pytest.mark.parametrize(
    ("name", "hour"),
    [
        ("CN-Reanalysis2015030105.nc", "2015-03-01T05"),
        ("a_20150301_05.nc", "2015-03-01T05"),
        ("a.2015-03-01T05.nc", "2015-03-01T05"),
        ("a.2015-03-01T05:00:00Z.nc", "2015-03-01T05"),
        ("a_20150301T0500.nc", "2015-03-01T05"),
        ("a2015030124.nc", "2015-03-02T00"),
        ("a2015133105.nc", None),
        ("a20150301.nc", None),
        ("run123456789.nc", None),
    ],
)
def test_hours_in_names(name: str, hour: str | None) -> None:
    assert stamp_of(Path(name)) == (None if hour is None else np.datetime64(hour, "h"))


def test_a_lead_is_chosen_in_whatever_way_it_is_stated() -> None:
    leads = {"time": ("time", [0, 12], DAY), "step": ("step", [3, 6], HOURLY)}
    dataset = field(("time", "step"), {"time": 2, "step": 2}, leads)
    assert hours(dataset, Clock(lead_hours=(6.0,))) == [6, 18]
    beside = dataset.assign(valid_time=(("time", "step"), [[3, 6], [15, 18]], DAY))
    assert hours(beside, Clock(lead_hours=(3.0,))) == [3, 15]
    assert hours(beside.isel(step=1), Clock(lead_hours=(6.0,))) == [6, 18]
    with pytest.raises(DataError, match="--lead asks for 9 h, its lead times are 3, 6 h"):
        hours(dataset, Clock(lead_hours=(9.0,)))


def on_levels(values: list[float] | None, size: int = 3) -> xr.Dataset:
    dataset = field(("level",), {"level": size}, {"time": ((), 0, DAY)})
    return dataset if values is None else dataset.assign_coords(level=("level", values))


def place_of(dataset: xr.Dataset, level: float | None) -> int:
    place = coordinates(dataset, "pm25", Path("f.nc"))
    found = valid_hours(dataset, "pm25", Path("f.nc"), Clock())
    ((_, where),) = layout(dataset, "pm25", place, found, level, Path("f.nc"), "pm25").at
    return where


def test_a_level_is_its_value() -> None:
    """In a second file with another order, another height was stored."""
    assert place_of(on_levels([1000.0, 925.0, 850.0]), 850) == 2
    assert place_of(on_levels([850.0, 925.0, 1000.0]), 850) == 0
    assert place_of(on_levels(None), -1) == 2
    assert place_of(on_levels([925.0], size=1), None) == 0
    for dataset, level, said in (
        (on_levels([1000.0, 925.0, 850.0]), 0, "has the levels 1000, 925, 850"),
        (on_levels([925.0], size=1), 850, "has the levels 925"),
        (on_levels([1000.0, 925.0, 850.0]), None, r"more than one of level \(1000, 925, 850\)"),
        (on_levels(None), 3, "not a level 3"),
    ):
        with pytest.raises(DataError, match=said):
            place_of(dataset, level)


def test_coordinates_are_those_that_say_so() -> None:
    lat2, lon2 = np.meshgrid(LAT, LON, indexing="ij")
    curved = xr.Dataset(
        {"pm25": (("y", "x"), np.zeros((3, 4)))},
        {"y": ("y", LAT + 1), "x": ("x", LON + 1), "lat": (("y", "x"), lat2), "lon": (("y", "x"), lon2)},
    )
    assert coordinates(curved, "pm25", Path("f")).grid.lat.shape == (3, 4)
    rotated = curved.drop_vars(["y", "x"]).assign_coords(
        rlat=("y", [0.0, 1.0, 2.0], {"standard_name": "grid_latitude", "units": "degrees"}),
        rlon=("x", np.arange(4.0), {"standard_name": "grid_longitude", "units": "degrees"}),
    )
    assert coordinates(rotated, "pm25", Path("f")).grid.lat.shape == (3, 4)
    cells = curved.drop_vars(["lat", "lon"]).assign_coords(y=("y", np.arange(3.0)), x=("x", np.arange(4.0)))
    with pytest.raises(DataError, match="no coordinate of 'pm25' is its latitude"):
        coordinates(cells, "pm25", Path("f"))
    in_km = curved.drop_vars(["lat", "lon"]).assign_coords(y=("y", LAT, {"units": "km"}), x=("x", LON, {"units": "km"}))
    with pytest.raises(DataError, match="no coordinate of 'pm25' is its latitude"):
        coordinates(in_km, "pm25", Path("f"))
    points = xr.Dataset({"pm25": (("values",), np.zeros(4))}, {"latitude": ("values", LON - 80), "longitude": ("values", LON)})
    with pytest.raises(DataError, match="4 points without rows and columns"):
        coordinates(points, "pm25", Path("f"))
    two = curved.assign_coords(latitude=(("y", "x"), lat2 + 1))
    with pytest.raises(DataError, match="are each the latitude of 'pm25', and differ"):
        coordinates(two, "pm25", Path("f"))
    in_radians = xr.Dataset(
        {"pm25": (("a", "b"), np.zeros((3, 4)))},
        {
            "a": ("a", np.deg2rad(LAT), {"units": "radian", "standard_name": "latitude"}),
            "b": ("b", np.deg2rad(LON), {"units": "radian", "standard_name": "longitude"}),
        },
    )
    np.testing.assert_allclose(coordinates(in_radians, "pm25", Path("f")).grid.lat, LAT)


@pytest.mark.parametrize("method", ["bilinear", "conservative"])
@pytest.mark.parametrize("repeated", [0, 2])
def test_a_curvilinear_grid_closes_around_the_globe(method: str, repeated: int) -> None:
    """Weights through the seam: wrong by up to 40 %, sums of 2."""
    lat, lon = np.meshgrid(np.arange(-88.0, 89.0, 4.0), np.arange(73.5, 433.5 + 5.0 * repeated, 5.0), indexing="ij")
    source = Grid(lat.copy(), (lon + 180.0) % 360.0 - 180.0)
    source.lat[:2, :3], source.lon[:2, :3] = np.nan, np.nan
    for target in (Grid(np.arange(60.0, -61.0, -7.5), np.arange(-175.0, 180.0, 10.0)), Grid(LAT[::2] * 2, LON * 10 - 1000)):
        regridder = build(source, target, method)
        np.testing.assert_allclose(regridder.weights.sum(1), 1.0, atol=0.01)
        values = regridder((10 + source.lat + 20 * np.cos(np.deg2rad(source.lon)))[None].astype("f4"))[0]
        expected = 10 + target.lat[:, None] + 20 * np.cos(np.deg2rad(target.lon))[None]
        np.testing.assert_allclose(values, expected, atol=0.6)


def test_a_store_that_has_grown_since_it_was_consolidated_is_read_whole(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for version in (2, 3):
        path = tmp_path / f"{version}.zarr"
        field(("time",), {"time": 2}, {"time": ("time", [0, 1], DAY)}).to_zarr(path, zarr_format=version, consolidated=True)
        grown = zarr.open_group(path, mode="r+", use_consolidated=False)
        for name, shape in (("time", (4,)), ("pm25", (4, 3, 4))):
            array = grown[name]
            assert isinstance(array, zarr.Array)
            array.resize(shape)
        grown["time"][2:] = np.array([2, 3])
        with opened(path) as dataset:
            assert hours(dataset) == [0, 1, 2, 3]
        assert "when its metadata were consolidated" in " ".join(capsys.readouterr().err.split())
