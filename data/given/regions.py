"""Parts of the domain that are scored apart: by height, or polygons of a GeoJSON file."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import shapely

from data import DataError
from data.store.layout import Store
from data.strict import parse_json

PLAINS, PLATEAU = 500.0, 2500.0  # m


def regions_of(store: Store, polygons: Path | None) -> dict[str, np.ndarray]:
    """Name -> (H, W) bool, which cells of the domain lie in a region; the domain itself first.

    By default plains below 500 m, slopes, and plateaus above 2,500 m.

    Raises:
        DataError: the file is no GeoJSON of polygons with names, or a region has no cell.
    """
    height, inside = store.static["elevation"], store.static["domain_mask"] > 0
    found = {"domain": inside}
    if polygons is None:
        bands = {"plains": height < PLAINS, "slopes": (height >= PLAINS) & (height <= PLATEAU), "plateau": height > PLATEAU}
        return found | {name: band & inside for name, band in bands.items() if (band & inside).any()}
    lon, lat = np.meshgrid(store.lon, store.lat)
    for name, polygon in _polygons(polygons).items():
        found[name] = np.asarray(shapely.contains_xy(polygon, lon, lat)) & inside
        if not found[name].any():
            raise DataError(f"{polygons}: no cell of the domain has its centre in '{name}'. Correct the polygon, or remove it.")
    return found


def _polygons(path: Path) -> dict[str, shapely.Geometry]:
    tree = parse_json(path.read_text(encoding="utf-8"), str(path))
    try:
        polygons: dict[str, shapely.Geometry] = {}
        for feature in tree["features"]:  # a mainland and its islands may be features of one name
            name, part = str(feature["properties"]["name"]), shapely.from_geojson(json.dumps(feature["geometry"]))
            polygons[name] = shapely.union(polygons[name], part) if name in polygons else part
    except (shapely.errors.ShapelyError, KeyError, TypeError, ValueError) as error:
        raise DataError(
            f"{path} is not a GeoJSON FeatureCollection of polygons, each with a property 'name' ({str(error)[:100]})."
        ) from error
    if not polygons or "domain" in polygons:
        raise DataError(f"{path} must hold at least one polygon, and none of the name 'domain', which is everything.")
    return polygons
