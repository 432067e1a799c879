"""The simulated atmosphere behaves as its description says."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import zarr

from data import DataError
from data.store.layout import Store
from data.synthetic.atmosphere import BACKGROUND, SPECIES, Atmosphere
from data.synthetic.recipe import Recipe
from data.synthetic.synthesize import load_static, synthesize
from data.variables import PUBLISHED

RECIPE = Recipe(rows=32, cols=64, seed=1)


def atmosphere(**changes: float) -> Atmosphere:
    recipe = replace(RECIPE, **changes)
    lat, lon, static = load_static(recipe.rows, recipe.cols)
    return Atmosphere(lat, lon, static, recipe)


def test_a_puff_moves_downwind_at_the_speed_of_the_wind() -> None:
    air = atmosphere(blocking=0.0)
    air.concentration = np.zeros((6, 32, 64))
    air.background = np.zeros((6, 1, 1))
    air.concentration[0, 16, 20] = 100.0
    u, v = np.full((32, 64), 10.0), np.full((32, 64), 4.0)
    hours = 12
    for _ in range(hours * 6):
        air._transport(u, v, 600.0)
    field = air.concentration[0]
    rows, cols = np.indices(field.shape)
    east = (cols * field).sum() / field.sum() - 20
    north = -((rows * field).sum() / field.sum() - 16)
    assert east == pytest.approx(10.0 * 3600 * hours / air.dx[16 - round(north), 0], rel=0.05)
    assert north == pytest.approx(4.0 * 3600 * hours / air.dy, rel=0.05)


def test_uniform_background_air_stays_uniform_without_sources() -> None:
    air = atmosphere(blocking=0.0)
    air.concentration = np.broadcast_to(air.background, (6, 32, 64)).copy()
    u = np.random.default_rng(0).normal(0, 5, (2, 32, 64))
    air._transport(u[0], u[1], 300.0)
    np.testing.assert_allclose(air.concentration, np.broadcast_to(air.background, (6, 32, 64)), rtol=1e-12)


def test_climbs_hold_air_back_with_the_strength_asked_for() -> None:
    behind = []
    for blocking in (0.0, 1.0, 4.0):
        air = atmosphere(blocking=blocking)
        air.background = np.zeros((6, 1, 1))
        wall = np.zeros((32, 64))
        wall[:, 32:] = 1000.0
        air.elevation = wall
        air._prepare_terrain()
        air.concentration = np.zeros((6, 32, 64))
        for _ in range(60):
            air.concentration[0, :, 28:30] = 100.0
            air._transport(np.full((32, 64), 8.0), np.zeros((32, 64)), 600.0)
        behind.append(air.concentration[0, 4:-4, 33:40].mean())
    assert behind[0] > 1.4 * behind[1] > 1.4 * 1.4 * behind[2] > 0.0


def test_wind_is_turned_away_from_climbs() -> None:
    air = atmosphere()
    weather, _ = air._weather(np.datetime64("2015-01-10", "h"))
    east, north = air.uphill
    steep = air.deflection > 0.3
    air.deflection = np.zeros_like(air.deflection)
    free, _ = air._weather(np.datetime64("2015-01-10", "h"))
    climb = np.maximum(weather[0] * east + weather[1] * north, 0)[steep]
    free_climb = np.maximum(free[0] * east + free[1] * north, 0)[steep]
    assert climb.sum() < 0.7 * free_climb.sum()


def test_fields_have_the_units_and_cycles_of_the_real_ones(tiny: Store) -> None:
    fields = np.asarray(zarr.open_group(tiny.path, mode="r")["chemistry"], "f8")
    weather = np.asarray(zarr.open_group(tiny.path, mode="r")["weather"], "f8")
    assert not np.isnan(weather).any()
    assert 0.002 < np.isnan(fields).mean() < 0.03
    assert np.nanmin(fields) >= 0.0
    cities = tiny.static["population"] > np.quantile(tiny.static["population"], 0.95)
    ocean = tiny.static["land_fraction"] < 0.01
    for name in ("pm25", "no2", "so2", "co"):
        channel = PUBLISHED.channel(name)
        assert np.nanmean(fields[:, channel][:, cities]) > 2 * np.nanmean(fields[:, channel][:, ocean])
    hour = (np.arange(len(fields)) + 8) % 24  # local solar time near 120 E
    o3 = fields[:, PUBLISHED.channel("o3")][:, cities]
    assert np.nanmean(o3[(hour >= 13) & (hour <= 16)]) > np.nanmean(o3[(hour >= 3) & (hour <= 6)])
    assert np.corrcoef(weather[:, 4].mean(0).ravel(), tiny.static["elevation"].ravel())[0, 1] < -0.95
    assert list(BACKGROUND) == SPECIES


def test_a_grid_that_does_not_divide_is_refused(tmp_path) -> None:
    with pytest.raises(DataError, match="does not divide 128 x 256"):
        synthesize(tmp_path / "s.zarr", replace(RECIPE, rows=48))
