"""Regridding against an independent library, a clipping of polygons by hand, and what must be conserved."""

from __future__ import annotations

import numpy as np
import pytest
import xarray as xr
import xarray_regrid  # noqa: F401 - gives data arrays their .regrid

from data import DataError
from data.prepare.grids import grid as grids
from data.prepare.grids.grid import Grid
from data.prepare.grids.regrid import build
from tests.reanalysis import lambert

TARGET = Grid(np.linspace(48, 22, 14), np.linspace(90, 120, 17))


def regular(rows: int, cols: int) -> Grid:
    return Grid(np.linspace(10, 60, rows), np.linspace(80, 135, cols))


def two_dimensional(grid: Grid) -> Grid:
    lat, lon = np.meshgrid(grid.lat, grid.lon, indexing="ij")
    return Grid(lat, lon)


def random_fields(grid: Grid, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).uniform(1, 9, (3, *grid.shape)).astype("f4")


@pytest.mark.parametrize(
    ("method", "theirs", "rtol"),
    [("bilinear", "linear", 2e-5), ("conservative", "conservative", 1e-3)],  # theirs weights by the cosine of centres
)
def test_a_regular_grid_is_regridded_as_an_independent_library_does(method: str, theirs: str, rtol: float) -> None:
    grid = regular(67, 91)
    fields = random_fields(grid)
    source = xr.DataArray(fields, dims=("time", "lat", "lon"), coords={"lat": grid.lat, "lon": grid.lon})
    target = xr.Dataset(coords={"lat": TARGET.lat[::-1], "lon": TARGET.lon})
    truth = getattr(source.regrid, theirs)(target).transpose("time", "lat", "lon").to_numpy()[:, ::-1]
    np.testing.assert_allclose(build(grid, TARGET, method)(fields), truth, rtol=rtol)


@pytest.mark.parametrize("method", ["bilinear", "conservative"])
@pytest.mark.parametrize(("lat_step", "lon_shift"), [(-1, 0.0), (1, 360.0), (-1, -360.0)])
def test_latitudes_down_and_other_longitudes_change_nothing(method: str, lat_step: int, lon_shift: float) -> None:
    grid = regular(40, 50)
    fields = random_fields(grid)
    turned = Grid(grid.lat[::lat_step], grid.lon + lon_shift)
    truth = build(grid, TARGET, method)(fields)
    np.testing.assert_allclose(build(turned, TARGET, method)(fields[:, ::lat_step]), truth, rtol=1e-6)


@pytest.mark.parametrize("method", ["bilinear", "conservative"])
def test_a_target_across_the_seam_of_a_global_grid_is_whole(method: str) -> None:
    lat = np.linspace(-80, 80, 81)
    globe, shifted = Grid(lat, np.arange(0.0, 360.0, 2.0)), Grid(lat, np.arange(-180.0, 180.0, 2.0))
    fields = random_fields(globe)
    target = Grid(np.linspace(20, 40, 5), np.linspace(-7, 9, 6))
    ours = build(globe, target, method)(fields)
    assert np.isfinite(ours).all()
    np.testing.assert_allclose(ours, build(shifted, target, method)(np.roll(fields, 90, axis=2)), rtol=1e-6)


@pytest.mark.parametrize("method", ["bilinear", "conservative"])
def test_a_regular_grid_given_as_curvilinear_gives_the_same(method: str) -> None:
    grid = regular(45, 52)
    fields = random_fields(grid)
    truth = build(grid, TARGET, method)(fields)
    np.testing.assert_allclose(build(two_dimensional(grid), TARGET, method)(fields), truth, rtol=2e-4)


def clipped_area(polygon: np.ndarray, west: float, south: float, east: float, north: float) -> float:
    """Area of a polygon inside a box, by Sutherland and Hodgman's clipping and the shoelace formula, float64."""
    for axis, limit, sign in ((0, west, 1), (0, east, -1), (1, south, 1), (1, north, -1)):
        kept: list[np.ndarray] = []
        for a, b in zip(polygon, np.roll(polygon, -1, axis=0), strict=True):
            inside_a, inside_b = sign * (a[axis] - limit) >= 0, sign * (b[axis] - limit) >= 0
            if inside_a:
                kept.append(a)
            if inside_a != inside_b:
                kept.append(a + (b - a) * (limit - a[axis]) / (b[axis] - a[axis]))
        if not kept:
            return 0.0
        polygon = np.array(kept)
    x, y = polygon.T
    return float(abs(x @ np.roll(y, -1) - y @ np.roll(x, -1)) / 2)


@pytest.mark.parametrize("curvilinear", [False, True])
def test_cells_are_weighted_by_areas_of_overlap(curvilinear: bool) -> None:
    grid = Grid(*lambert(40, 52, 100.0)) if curvilinear else regular(45, 52)
    lat, lon = (grid.lat, grid.lon) if curvilinear else np.meshgrid(grid.lat, grid.lon, indexing="ij")
    fields = random_fields(grid)
    ours = build(grid, TARGET, "conservative")(fields)

    def corners(c: np.ndarray) -> np.ndarray:
        wide = np.pad(c, 1, mode="reflect", reflect_type="odd")
        return (wide[:-1, :-1] + wide[1:, :-1] + wide[:-1, 1:] + wide[1:, 1:]) / 4

    x, y = corners(np.asarray(lon)), np.sin(np.deg2rad(corners(np.asarray(lat))))
    south_north, west_east = np.sin(np.deg2rad(grids.edges(TARGET.lat))), grids.edges(TARGET.lon)
    for row, col in ((2, 3), (7, 9), (11, 14)):
        box = (west_east[col], min(south_north[row : row + 2]), west_east[col + 1], max(south_north[row : row + 2]))
        weights = np.zeros(lat.shape)
        for i, j in np.ndindex(lat.shape):
            quad = np.array([(x[a, b], y[a, b]) for a, b in ((i, j), (i, j + 1), (i + 1, j + 1), (i + 1, j))])
            weights[i, j] = clipped_area(quad, *box)
        truth = (weights * fields).sum((1, 2)) / weights.sum()
        np.testing.assert_allclose(ours[:, row, col], truth, rtol=1e-5)


def test_bilinear_on_a_curvilinear_grid_is_exact_for_planes() -> None:
    lat, lon = lambert(40, 52, 100.0)
    plane = (3.0 + 0.2 * lon - 0.7 * lat).astype("f4")[None]
    truth = 3.0 + 0.2 * TARGET.lon[None] - 0.7 * TARGET.lat[:, None]
    np.testing.assert_allclose(build(Grid(lat, lon), TARGET, "bilinear")(plane)[0], truth, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("curvilinear", [False, True])
def test_area_means_are_conserved(curvilinear: bool) -> None:
    """Source cells inside the target hand on exactly their area."""
    grid = two_dimensional(regular(67, 91)) if curvilinear else regular(67, 91)
    weights = build(grid, TARGET, "conservative").weights.toarray()
    area = np.diff(np.sin(np.deg2rad(grids.edges(TARGET.lat)))) * -np.diff(grids.edges(TARGET.lon))[0]
    given = (weights * np.repeat(area, len(TARGET.lon))[:, None]).sum(0).reshape(grid.shape)
    lat, lon = regular(67, 91).lat, regular(67, 91).lon
    own = np.diff(np.sin(np.deg2rad(grids.edges(lat))))[:, None] * np.diff(grids.edges(lon))
    inside = np.outer((lat > 24) & (lat < 46), (lon > 92) & (lon < 118))
    np.testing.assert_allclose(given[inside], own[inside], rtol=2e-5 if not curvilinear else 1e-3)


def test_under_half_valid_is_missing_and_the_rest_is_the_mean_of_what_is_there() -> None:
    source = Grid(np.array([10.0, 20.0]), np.array([10.0, 20.0]))
    target = Grid(np.array([15.0, 35.0]), np.array([15.0, 35.0]))
    fields = np.array([[[1, 2], [3, 4]], [[1, np.nan], [3, 4]], [[np.nan, np.nan], [np.nan, 4]]], "f4")
    cell = build(source, target, "conservative")(fields)[:, 0, 0]
    north, south = (abs(np.sin(np.deg2rad(15)) - np.sin(np.deg2rad(edge))) for edge in (25, 5))
    means = [(south * 1.5 + north * 3.5) / (south + north), (south * 0.5 * 1 + north * 3.5) / (south * 0.5 + north)]
    np.testing.assert_allclose(cell[:2], means, rtol=1e-6)
    assert np.isnan(cell[2])


def test_a_source_elsewhere_is_refused() -> None:
    with pytest.raises(DataError, match="no cell of the target"):
        build(Grid(np.linspace(-40, -20, 5), np.linspace(0, 30, 5)), TARGET, "bilinear")
