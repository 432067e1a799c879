"""How much could knowing the barriers help at all? The simulator's own forecast without them, from the same analyses."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import numpy as np
import shapely

from benchmarks.physics_study.design import LEADS
from data.synthetic.atmosphere import Atmosphere
from data.synthetic.recipe import Recipe
from data.synthetic.synthesize import load_static

RECIPE = {"start": "2015-04-01", "days": 180, "rows": 32, "cols": 64}  # as the stores of the study
TEST_FROM, EVERY = 126 * 24, 11  # hours; every hour of the day comes about as often


def ceiling(blocking: int, regions: Path) -> dict[str, Any]:
    """RMSE against the simulation with barriers, of the same simulation without any from the analysis on.

    Weather, emissions and chemistry are known exactly: what is left is what a forecast loses by not knowing barriers.

    Returns:
        region -> lead time -> a number for each pollutant, ug m-3.
    """
    lat, lon, static = load_static(RECIPE["rows"], RECIPE["cols"])
    atmosphere = Atmosphere(lat, lon, static, Recipe(**RECIPE, blocking=blocking))
    hours, begin = RECIPE["days"] * 24, np.datetime64(RECIPE["start"], "h")
    truth, forecasts = {}, {}
    for hour in range(hours):
        if hour >= TEST_FROM:
            truth[hour] = atmosphere.concentration.copy()
            if hour % EVERY == 0 and hour + max(LEADS) < hours:
                forecasts[hour] = _without_barriers(atmosphere, begin + hour)
        atmosphere.advance_one_hour(begin + hour)
    weight = np.cos(np.deg2rad(lat))[:, None] * static["domain_mask"]
    squared = {
        lead: np.mean([(fields[lead] - truth[hour + lead]) ** 2 for hour, fields in forecasts.items()], axis=0)
        for lead in LEADS
    }
    places = {"domain": np.ones(weight.shape, bool)} | _inside(regions, lat, lon)
    return {
        name: {
            str(lead): [float(f"{np.sqrt(np.average(field, weights=weight * inside)):.6g}") for field in squared[lead]]
            for lead in LEADS
        }
        for name, inside in places.items()
    }


def _without_barriers(atmosphere: Atmosphere, start: np.datetime64) -> dict[int, np.ndarray]:
    """Lead time -> (6, H, W)."""
    free = copy.deepcopy(atmosphere)
    for face in ("pass_east", "pass_west", "pass_south", "pass_north"):
        setattr(free, face, np.ones_like(getattr(free, face)))
    fields = {}
    for hour in range(max(LEADS)):
        free.advance_one_hour(start + hour)
        if hour + 1 in LEADS:
            fields[hour + 1] = free.concentration.copy()
    return fields


def _inside(regions: Path, lat: np.ndarray, lon: np.ndarray) -> dict[str, np.ndarray]:
    east, north = np.meshgrid(lon, lat)
    features = json.loads(regions.read_text())["features"]
    return {
        f["properties"]["name"]: np.asarray(shapely.contains_xy(shapely.from_geojson(json.dumps(f["geometry"])), east, north))
        for f in features
    }
