"""The static fields of a prepared store: terrain, people, land and domain on the target grid."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import shapely

from data import DataError
from data.prepare import grid, regrid
from data.prepare.grid import Grid
from data.prepare.plan import Plan
from data.prepare.sources import files
from data.store import layout


def static_fields(plan: Plan, covered: np.ndarray) -> dict[str, np.ndarray]:
    """The six static fields on the target grid, (H, W) float32."""
    target = plan.target
    fields = {
        "lat2d": np.repeat(target.lat[:, None], len(target.lon), 1),
        "lon2d": np.repeat(target.lon[None], len(target.lat), 0),
        # The sea floor is not terrain, and nobody lives where a census has no value.
        "elevation": _regridded_static(plan.elevation, target, lambda x: np.maximum(x, 0.0)),
        "population": _regridded_static(plan.population, target, lambda x: np.where(np.isnan(x), 0.0, x)),
        "land_fraction": _regridded_static(plan.land_mask, target, lambda x: x),
        "domain_mask": covered & _domain(plan.domain, target),
    }
    return {name: values.astype("f4") for name, values in fields.items()}


def _regridded_static(where: str, target: Grid, clean: Callable[[np.ndarray], np.ndarray]) -> np.ndarray:
    """A field of FILE or FILE:VARIABLE, conservative means where the file is finer."""
    name, _, wanted = where.partition(":")
    with files.opened(Path(name)) as dataset:
        flat = [str(v) for v in dataset.data_vars if dataset[v].squeeze().ndim == 2]
        if wanted not in flat and (wanted or len(flat) != 1):
            raise DataError(f"{name} holds {', '.join(flat) or 'no field'}: say which as FILE:VARIABLE.")
        source, values = files.read_static(dataset, wanted or flat[0], Path(name), target)
    (fine_lat, fine_lon), (lat, lon) = grid.spacing(source), grid.spacing(target)
    method = "conservative" if fine_lat * fine_lon < lat * lon else "bilinear"
    return regrid.build(source, target, method)(clean(values).astype("f4")[None])[0]


def _domain(where: str | None, target: Grid) -> np.ndarray:
    """(H, W) bool from an .npy array, a NetCDF field or a GeoJSON polygon; everywhere where none is given."""
    shape = target.shape
    if where is None:
        return np.ones(shape, bool)
    if where.endswith(".npy"):
        try:
            mask = np.load(where, allow_pickle=False)
        except layout.DAMAGE as error:
            raise DataError(f"--domain {where} cannot be read: {error}.") from error
        if mask.shape != shape or mask.dtype.kind not in "biuf":
            raise DataError(f"{where} is {mask.shape} of {mask.dtype}, the target grid is {shape}.")
        return np.asarray(mask > 0)
    if where.endswith((".json", ".geojson")):
        try:
            polygons = shapely.unary_union(shapely.get_parts(shapely.from_geojson(Path(where).read_text(encoding="utf-8"))))
        except (shapely.errors.ShapelyError, ValueError, TypeError) as error:
            raise DataError(f"--domain {where} is not GeoJSON with polygons: {str(error)[:200]}.") from error
        lon, lat = np.meshgrid(target.lon, target.lat)
        return np.asarray(shapely.contains_xy(polygons, lon, lat))
    return _regridded_static(where, target, lambda x: x) >= regrid.NEEDED
