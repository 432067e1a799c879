"""Paths of the air against motions whose paths are known, and their cache."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from data import DataError
from data.process import locks
from data.store.layout import Store
from data.store.reader import ShardReader
from data.wind_paths import cache
from data.wind_paths.trajectories import EARTH_RADIUS_KM, PathGrid, backward

HOURS, EVERY = 24, 3


def grid(rows: int = 40, cols: int = 80, north_first: bool = True) -> PathGrid:
    lat = np.linspace(50.0, 20.0, rows)
    return PathGrid(lat if north_first else lat[::-1].copy(), np.linspace(80.0, 140.0, cols))


def degrees(points: torch.Tensor, on: PathGrid) -> tuple[np.ndarray, np.ndarray]:
    """Latitude and longitude of (..., 2, P) rows and columns."""
    row, col = points.double().numpy().swapaxes(0, -2)
    return on.lat[0] + row * (on.lat[1] - on.lat[0]), on.lon[0] + col * (on.lon[1] - on.lon[0])


def rotation(on: PathGrid, axis: np.ndarray, speed: float) -> np.ndarray:
    """(2, H, W) m s-1 of a solid body that turns about an axis (3,) with `speed` rad s-1."""
    lat, lon = np.meshgrid(np.deg2rad(on.lat), np.deg2rad(on.lon), indexing="ij")
    at = np.stack([np.cos(lat) * np.cos(lon), np.cos(lat) * np.sin(lon), np.sin(lat)], -1)
    velocity = np.cross(speed * axis, at) * EARTH_RADIUS_KM * 1000
    east = np.stack([-np.sin(lon), np.cos(lon), 0 * lon], -1)
    north = np.stack([-np.sin(lat) * np.cos(lon), -np.sin(lat) * np.sin(lon), np.cos(lat)], -1)
    return np.stack([(velocity * east).sum(-1), (velocity * north).sum(-1)])


def turned_back(lat: np.ndarray, lon: np.ndarray, axis: np.ndarray, angle: float) -> tuple[np.ndarray, np.ndarray]:
    """Where points were before a rotation by `angle` about `axis` (Rodrigues)."""
    lat, lon = np.deg2rad(lat), np.deg2rad(lon)
    at = np.stack([np.cos(lat) * np.cos(lon), np.cos(lat) * np.sin(lon), np.sin(lat)], -1)
    back = at * np.cos(-angle) + np.cross(axis, at) * np.sin(-angle) + axis * (at @ axis)[..., None] * (1 - np.cos(angle))
    return np.rad2deg(np.arcsin(back[..., 2])), np.rad2deg(np.arctan2(back[..., 1], back[..., 0]))


@pytest.mark.parametrize("north_first", [True, False])
@pytest.mark.parametrize("axis", [(0.0, 0.0, 1.0), (0.3, 0.4, 0.866)])
def test_solid_rotation_of_the_sphere_is_followed_back(axis: tuple[float, float, float], north_first: bool) -> None:
    on, about = grid(north_first=north_first), np.array(axis) / np.linalg.norm(axis)
    speed = 10.0 / (EARTH_RADIUS_KM * 1000)  # 10 m s-1
    winds = torch.from_numpy(np.repeat(rotation(on, about, speed)[None], HOURS + 2, 0).astype("f4"))
    points = backward(winds, 2, HOURS, EVERY, on, 2)
    lat0, lon0 = degrees(on.centres(2).T[None], on)
    for number in range(HOURS // EVERY):
        lat, lon = turned_back(lat0[0], lon0[0], about, speed * 3600 * EVERY * (number + 1))
        inside = (lat > 20.5) & (lat < 49.5) & (lon > 81.0) & (lon < 139.0)
        found_lat, found_lon = degrees(points[1, number], on)
        known = inside & np.isfinite(found_lat)
        assert known.sum() > 0.5 * known.size
        # 860 km in a day; a cell is 85 km
        assert abs(found_lat - lat)[known].max() * 111 < 2.0
        assert (abs(found_lon - lon)[known] * np.cos(np.deg2rad(lat[known]))).max() * 111 < 2.0


def test_the_error_in_time_is_of_second_order() -> None:
    """A wind that grows from nothing as a sine, alike everywhere near the equator: its integral is known."""
    on = PathGrid(np.linspace(3.0, -3.0, 60), np.linspace(0.0, 6.0, 60))
    east = 15 * 30 + 25  # a patch in the middle row, with room to the west

    def error(hours: int) -> float:
        winds = np.zeros((hours + 1, 2, *on.shape), "f4")
        winds[:, 0] = 5.0 * np.sin(np.pi / 2 * np.arange(hours + 1) / hours)[:, None, None]
        point = float(backward(torch.from_numpy(winds), 1, hours, hours, on, 2)[0, 0, 1, east])
        way = 5.0 * 3.6 * hours * 2 / np.pi / on.col_km  # columns
        return abs(float(on.centres(2)[east, 1]) - point - way) / way

    assert error(6) / error(12) == pytest.approx(4.0, rel=0.15)


def test_columns_go_around_the_globe() -> None:
    on = PathGrid(np.linspace(60.0, -60.0, 24), np.arange(0.0, 360.0, 7.5))
    winds = torch.zeros(HOURS + 1, 2, *on.shape)
    winds[:, 0] = 30.0
    points = backward(winds, 1, HOURS, EVERY, on, 2)
    assert torch.isfinite(points).all()
    assert float(points[0, -1, 1].min()) < 0.0
    lat = np.deg2rad(on.lat[0] + on.centres(2)[:, 0].numpy() * (on.lat[1] - on.lat[0]))
    way = 30.0 * 3.6 * HOURS / (on.col_km * np.cos(lat))
    np.testing.assert_allclose(on.centres(2)[:, 1].numpy() - points[0, -1, 1].numpy(), way, rtol=1e-4)


def test_what_nobody_knows_is_marked(tiny: Store) -> None:
    on = grid()
    winds = torch.full((HOURS + 1, 2, *on.shape), 10.0)
    winds[HOURS - 12] = torch.nan
    points = backward(winds, 1, HOURS, EVERY, on, 2)
    west = on.centres(2)[:, 1] < 2
    assert not torch.isfinite(points[0, -1]).any()  # behind the hour without wind
    assert not torch.isfinite(points[0, 3][:, west]).any()  # from outside the grid
    assert torch.isfinite(points[0, 0][:, ~west]).any()


def test_rounding_does_not_add_up_and_a_record_is_read_back(tiny: Store) -> None:
    geometry = cache.geometry_of(tiny, 2, 48)
    rng = np.random.default_rng(0)
    centres = PathGrid.of(tiny).centres(2).numpy()
    moves = rng.uniform(-40, 40, (3, 16, 2, len(centres))) * np.array([geometry.row_step, geometry.col_step])[:, None]
    points = (centres.T + moves.cumsum(1)).astype("f4")
    points[1, 9:, :, 5] = np.nan
    steps = cache.quantised(points, centres, geometry)
    unit = np.array([geometry.row_step, geometry.col_step])[:, None]
    back = centres.T + (np.where(steps == cache.GONE, 0, steps) * unit).cumsum(1)
    known = np.isfinite(points)
    assert (abs(back - points) / unit)[known].max() <= 0.501
    assert ((steps == cache.GONE).any(2) == ~known.all(2)).all()


def direct(store: Store, geometry: cache.PathGeometry, hour: int) -> np.ndarray:
    """One record from all winds before it, read at once."""
    channels = [store.contents.channel(name) for name in ("u", "v")]
    winds = ShardReader(store, "weather").read(np.arange(hour - geometry.hours, hour + 1))[:, channels]
    on = PathGrid.of(store)
    points = backward(torch.from_numpy(winds), 1, geometry.hours, 3, on, geometry.patch)
    return cache.quantised(points.numpy(), on.centres(geometry.patch).numpy(), geometry)[0]


def test_the_cache_is_the_same_for_any_number_of_workers_and_after_an_interruption(
    tiny: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    built = cache.build(tiny, tmp_path / "one", patch=2, hours=12)
    hour = len(tiny.times) - 5
    np.testing.assert_array_equal(built.read(np.array([hour]), np.array([4]))[0], direct(tiny, built.geometry, hour))
    two = built.read(np.array([hour, hour]), np.array([2, 4]))
    np.testing.assert_array_equal(two[0, :2], two[1, :2])
    assert (two[0, 2:] == cache.GONE).all()
    assert (built.read(np.array([2]), np.array([4]))[0, 1:] == cache.GONE).all()  # before the first hour of the store
    write, calls = cache._write_piece, []

    def killed(*given: object) -> None:
        calls.append(1)
        if len(calls) == 2:
            raise KeyboardInterrupt
        write(*given)  # type: ignore[arg-type]

    with monkeypatch.context() as patched:
        patched.setattr(cache, "_write_piece", killed)
        with pytest.raises(KeyboardInterrupt):
            cache.build(tiny, tmp_path / "two", patch=2, hours=12)
    rename = cache.write_text

    def killed_at_the_end(file: Path, text: str) -> None:
        if file.name == "manifest.json":
            raise KeyboardInterrupt
        rename(file, text)

    with monkeypatch.context() as patched:
        patched.setattr(cache, "write_text", killed_at_the_end)
        with pytest.raises(KeyboardInterrupt):
            cache.build(tiny, tmp_path / "two", patch=2, hours=12, workers=1)
    (tmp_path / "two.partial" / "1.bin").write_bytes(b"of a node that died")
    with pytest.raises(DataError, match="is not what was written: run the same command again"):
        cache.build(tiny, tmp_path / "two", patch=2, hours=12)
    with (
        locks.hold(tmp_path / "two.lock"),
        pytest.raises(DataError, match="is being built by process"),
    ):
        cache.build(tiny, tmp_path / "two", patch=2, hours=12)
    cache.build(tiny, tmp_path / "two", patch=2, hours=12, workers=2)
    for name in ("paths.bin", "manifest.json"):
        assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "two" / name).read_bytes()
    assert not list(tmp_path.glob("*.partial"))


def test_a_wrong_cache_is_refused_by_name(tiny: Store, tmp_path: Path) -> None:
    path = tmp_path / "paths"
    with pytest.raises(DataError, match="no cache of wind paths at"):
        cache.open_cache(path, tiny, patch=2, hours=12)
    cache.build(tiny, path, patch=2, hours=12)
    with pytest.raises(DataError, match="the longest lead time is 24 h"):
        cache.open_cache(path, tiny, patch=2, hours=24)
    with pytest.raises(DataError, match="was built for"):
        cache.open_cache(path, tiny, patch=4, hours=12)
    with pytest.raises(DataError, match="is stale"):
        cache.open_cache(path, replace(tiny, fingerprint="0" * 64), patch=2, hours=12)
    assert cache.damaged(path) == []
    content = bytearray((path / "paths.bin").read_bytes())
    content[-1] ^= 1
    (path / "paths.bin").write_bytes(content)
    assert len(cache.damaged(path)) == 1
    (path / "paths.bin").write_bytes(content[:-1])
    with pytest.raises(DataError, match="is not what was written"):
        cache.open_cache(path, tiny, patch=2, hours=12)
    manifest = json.loads((path / "manifest.json").read_text())
    for wrong in ({"format": 9}, {"geometry": 3}, {"geometry": {}}, {"pieces": "x"}):
        (path / "manifest.json").write_text(json.dumps(manifest | wrong))
        with pytest.raises(DataError):
            cache.open_cache(path, tiny, patch=2, hours=12)
    other = tmp_path / "mine"
    other.mkdir()
    with pytest.raises(DataError, match="is no cache of paths"):
        cache.build(tiny, other, patch=2, hours=12)
