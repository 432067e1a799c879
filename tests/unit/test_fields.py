"""What is impossible is judged on the cells of the source, before regridding mixes it into what is possible."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import xarray as xr

from data import DataError
from data.prepare.catalogue.search import make_catalogue
from data.prepare.fields import Reader
from data.prepare.grids import regrid
from data.prepare.grids.grid import Grid
from data.prepare.sources.source import Named, Source, read_as

LAT, LON = np.arange(30.0, 34.0, 0.125), np.arange(110.0, 114.0, 0.125)
TARGET = Grid(np.arange(30.5, 33.1, 0.5), np.arange(110.5, 113.1, 0.5))
START = np.datetime64("2015-03-01T00", "h")


def read(folder: Path, holes: dict[tuple[int, int], float], **judged: tuple[str, ...]) -> np.ndarray:
    """(H, W) of a field of 50 ug m-3 with other values in some cells, coarsened sixteen cells to one."""
    values = np.full((1, len(LAT), len(LON)), 50.0, "f4")
    for (row, column), value in holes.items():
        values[0, row, column] = value
    axes = {
        "time": ("time", [0.0], {"units": "hours since 2015-03-01"}),
        "lat": ("lat", LAT, {"units": "degrees_north"}),
        "lon": ("lon", LON, {"units": "degrees_east"}),
    }
    xr.Dataset({"pm25": (tuple(axes), values, {"units": "ug m-3"})}, axes).to_netcdf(folder / "f.nc")
    source = Source("generic", {"pm25": Named(("pm25",), "ug m-3")}, [folder / "f.nc"])
    found = make_catalogue(folder / "s.zarr", (source,), ())
    into = {"pm25": np.full((1, *TARGET.shape), np.nan, "f4")}
    regridder = regrid.build(found.grids[0], TARGET, "conservative")
    Reader(found, [regridder], read_as(()), into, START, **judged).read()
    return into["pm25"][0]


@pytest.mark.parametrize(("value", "said"), [(-999.0, "is -999"), (np.inf, "is infinite"), (1e5, "is 100000")])
def test_one_impossible_cell_of_sixteen_is_refused_or_left_out(value: float, said: str, tmp_path: Path) -> None:
    """A mean with -999 in it can be possible: it stayed, exit 0, and cells around it were wrong by up to 98 %."""
    holes = {(8, 9): value, (17, 20): value}
    with pytest.raises(DataError, match=said):
        read(tmp_path, holes)
    np.testing.assert_allclose(read(tmp_path, holes, mask_beyond=("pm25",)), 50.0, rtol=1e-6)
    if np.isinf(value):
        with pytest.raises(DataError, match=said):
            read(tmp_path, holes, clip=("pm25",))


def test_what_reaches_no_cell_of_the_target_is_not_judged(tmp_path: Path) -> None:
    np.testing.assert_allclose(read(tmp_path, {(0, 0): -999.0}), 50.0, rtol=1e-6)


def test_a_clipped_value_is_the_nearest_possible_one(tmp_path: Path) -> None:
    clipped = read(tmp_path, {(8, 9): -999.0}, clip=("pm25",))
    assert np.nanmin(clipped) == pytest.approx(50.0 * 15 / 16, rel=1e-3)
