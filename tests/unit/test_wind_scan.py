"""Order tables and sectors against brute force, and a cache that is only read, never trusted."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from data import DataError
from data.store.layout import Store
from data.wind_scan.cache import ScanCache, build, open_cache
from data.wind_scan.orders import NO_WIND, Geometry, geometry_of, order_along_wind, sector_codes

GEOMETRY = Geometry(grid=(16, 32), patch=2, regions=(4, 4), sectors=16, aspect=1.3, north_first=True)


def test_orders_run_downwind() -> None:
    rows, cols = 8, 16
    for sector, order in enumerate(order_along_wind(rows, cols, GEOMETRY)):
        angle = 2 * np.pi * sector / 16
        assert sorted(order) == list(range(rows * cols))
        along = [np.cos(angle) * (k % cols) - np.sin(angle) * (k // cols) * 1.3 for k in order]
        assert (np.diff(along) > -1e-5).all()
        ties = [b > a for a, b, d in zip(order, order[1:], np.diff(along), strict=False) if abs(d) < 1e-7]
        assert all(ties), "patches side by side across the wind keep raster order"


@pytest.mark.parametrize(
    ("sector", "first_row", "first_col"),
    [(0, None, 0), (4, 3, None), (8, None, 3), (12, 0, None)],
    ids=["to the east", "to the north", "to the west", "to the south"],
)
@pytest.mark.parametrize("north_first", [True, False])
def test_cardinal_winds_start_at_the_upwind_edge(sector, first_row, first_col, north_first) -> None:
    geometry = Geometry(GEOMETRY.grid, 2, (4, 4), 16, 1.0, north_first)
    upwind = order_along_wind(4, 4, geometry)[sector][:4]
    if first_col is not None:
        assert set(upwind % 4) == {first_col}
    else:
        assert set(upwind // 4) == {first_row if north_first else 3 - first_row}


def test_sectors_are_the_direction_of_the_speed_weighted_mean() -> None:
    rng = np.random.default_rng(0)
    u, v = rng.normal(0, 5, (2, 3, 8, 16))
    u[0, :1, :4] = np.nan  # part of one region
    u[1, 2:4, 4:8] = np.nan  # all of another
    codes = sector_codes(u, v, (4, 4), 16)
    for t in range(3):
        for region in range(17):
            if region == 0:
                a, b = u[t].ravel(), v[t].ravel()
            else:
                r, c = divmod(region - 1, 4)
                a, b = (f[t, 2 * r : 2 * r + 2, 4 * c : 4 * c + 4].ravel() for f in (u, v))
            valid = np.isfinite(a) & np.isfinite(b)
            if not valid.any():
                assert codes[t, region] == NO_WIND
                continue
            a, b = a[valid], b[valid]
            w = np.sqrt(a * a + b * b)
            angle = np.angle(complex((a * w).sum(), (b * w).sum())) % (2 * np.pi)
            distance = np.abs((codes[t, region] * 2 * np.pi / 16 - angle + np.pi) % (2 * np.pi) - np.pi)
            assert distance <= np.pi / 16 + 1e-9
    assert (codes == NO_WIND).sum() == 1


def test_regional_ranks_are_true_blocks_in_raster_order(tiny: Store, tiny_scan: ScanCache) -> None:
    hours = np.array([0, 100, 200])
    ranks = tiny_scan.ranks("regional", hours)
    gh, gw = tiny_scan.geometry.patches
    rh, rw = tiny_scan.geometry.region_patches
    for b in range(len(hours)):
        expected = np.empty(gh * gw, int)
        for region in range(16):
            r, c = divmod(region, 4)
            local = tiny_scan.regional_orders[tiny_scan.sectors(hours)[b, 1 + region]]
            for k, patch in enumerate(local):
                row, col = r * rh + patch // rw, c * rw + patch % rw
                expected[row * gw + col] = region * rh * rw + k
        np.testing.assert_array_equal(ranks[b], expected)
        assert sorted(ranks[b]) == list(range(gh * gw))


def test_a_region_without_wind_is_ordered_where_nothing_is_forecast_and_nowhere_else(tiny: Store, tmp_path: Path) -> None:
    """A country's border lies inside every target: no hour would have a regional scan."""
    mask = np.ones_like(tiny.static["domain_mask"])
    mask[: mask.shape[0] // 4, -(mask.shape[1] // 4) :] = 0.0  # the fourth region
    store = replace(tiny, static={**tiny.static, "domain_mask": mask})
    codes = np.tile(np.arange(17, dtype="u1") % 16, (len(tiny.times), 1))
    codes[:, 0] = np.arange(len(codes)) % 16
    codes[:, 4], codes[7, 5], codes[9, :] = NO_WIND, NO_WIND, NO_WIND
    cache = build(store, tmp_path / "cache", patch=2, regions=(4, 4), sectors=16, codes=codes)
    assert np.flatnonzero(~cache.usable("regional")).tolist() == [7, 9]
    everything = cache.sectors(np.arange(cache.hours))
    np.testing.assert_array_equal(everything[:, 4], everything[:, 0])
    np.testing.assert_array_equal(np.delete(everything, 4, 1), np.delete(codes, 4, 1))


def test_global_and_raster_ranks(tiny_scan: ScanCache) -> None:
    hours = np.array([7, 50])
    ranks = tiny_scan.ranks("global", hours)
    for b in range(len(hours)):
        order = tiny_scan.global_orders[tiny_scan.sectors(hours)[b, 0]]
        np.testing.assert_array_equal(ranks[b][order], np.arange(len(order)))
    np.testing.assert_array_equal(tiny_scan.ranks("none", hours), np.tile(np.arange(128), (2, 1)))


def test_one_altered_order_is_refused(tiny: Store, tiny_scan: ScanCache, tmp_path: Path) -> None:
    path = tmp_path / "cache"
    shutil.copytree(tiny_scan.path, path)
    orders = tiny_scan.global_orders.copy()
    orders[3, [10, 11]] = orders[3, [11, 10]]
    np.savez(path / "orders.npz", global_orders=orders, regional_orders=tiny_scan.regional_orders)
    with pytest.raises(DataError, match=r"an order was altered(.|\n)*python -m data wind-scan"):
        open_cache(path, tiny, patch=2)


def test_altered_sector_is_refused(tiny: Store, tiny_scan: ScanCache, tmp_path: Path) -> None:
    path = tmp_path / "cache"
    shutil.copytree(tiny_scan.path, path)
    codes = np.load(path / "sectors.npy")
    codes[5, 1] = (codes[5, 1] + 1) % 16
    np.save(path / "sectors.npy", codes)
    with pytest.raises(DataError, match="does not match its recorded hash"):
        open_cache(path, tiny, patch=2)


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [("format", 0, "format 0"), ("algorithm", 9, "algorithm 9"), ("store_fingerprint", "0" * 64, "stale")],
)
def test_stale_cache_is_refused(tiny: Store, tiny_scan: ScanCache, tmp_path: Path, key, value, message) -> None:
    path = tmp_path / "cache"
    shutil.copytree(tiny_scan.path, path)
    manifest = json.loads((path / "manifest.json").read_text())
    (path / "manifest.json").write_text(json.dumps(manifest | {key: value}))
    with pytest.raises(DataError, match=message):
        open_cache(path, tiny, patch=2)


def test_cache_of_another_grid_or_patch_is_refused(tiny: Store, tiny_scan: ScanCache, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="built for patch 2"):
        open_cache(tiny_scan.path, tiny, patch=1)
    path = tmp_path / "cache"
    shutil.copytree(tiny_scan.path, path)
    manifest = json.loads((path / "manifest.json").read_text())
    manifest["geometry"]["grid"] = [32, 64]
    (path / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(DataError, match="built for grid"):
        open_cache(path, tiny, patch=2)


def test_absent_cache_names_the_command(tiny: Store, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"no wind-scan cache(.|\n)*python -m data wind-scan"):
        open_cache(tmp_path / "nowhere", tiny, patch=2)


@pytest.mark.parametrize(("regions", "sectors"), [((4, 4), 255), ((4, 4), 0), ((0, 4), 16)])
def test_impossible_sectors_and_regions_are_refused(tiny: Store, regions: tuple[int, int], sectors: int) -> None:
    with pytest.raises(DataError, match="use 1 to 254 sectors"):
        geometry_of(tiny, 2, regions, sectors)


def test_regions_that_do_not_divide_are_refused(tiny: Store) -> None:
    with pytest.raises(DataError, match="not divisible into 3 x 4 regions"):
        geometry_of(tiny, 2, (3, 4), 16)
