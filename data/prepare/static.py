"""The static fields of a prepared store: terrain, people, land and domain on the target grid."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

import numpy as np
import shapely
import xarray as xr

from data import DataError
from data.prepare.grids import grid, regrid
from data.prepare.grids.grid import Grid
from data.prepare.inputs.opening import opened
from data.prepare.plan import Plan
from data.prepare.sources.coordinates import coordinates
from data.prepare.stored import Stored, decoded
from data.store import layout

PEOPLE_A_CELL = re.compile(r"(number of )?(persons?|people|inhabitants|counts?)( ?(per|/) ?(grid[ -]?)?(cell|pixel))?")


def static_fields(plan: Plan, covered: np.ndarray) -> dict[str, np.ndarray]:
    """The six static fields on the target grid, (H, W) float32.

    Elevation and population that nobody named are those among the fields of a source's first file, where one has them; where
    they have values is then the land, and the domain.
    """
    target = plan.target
    elevation, population = (_named(plan, name) for name in ("elevation", "population"))
    inside = elevation if plan.elevation is None or elevation == _held(plan, "elevation") else None
    if plan.land_mask is None and inside is None:
        raise DataError("--land-mask FILE[:VARIABLE] is needed: the share of land of every cell, 0 to 1.")
    known = None if inside is None else _regridded_static(inside, target, np.isfinite)
    domain = covered & _domain(plan.domain, target)
    if known is not None and plan.domain is None:
        domain &= known >= regrid.NEEDED
    fields = {
        "lat2d": np.repeat(target.lat[:, None], len(target.lon), 1),
        "lon2d": np.repeat(target.lon[None], len(target.lat), 0),
        # The sea floor is not terrain, and nobody lives where a census has no value.
        "elevation": _regridded_static(elevation, target, lambda x: np.maximum(np.nan_to_num(x, nan=0.0), 0.0)),
        "population": _regridded_static(population, target, lambda x: np.nan_to_num(x, nan=0.0), people=True),
        "land_fraction": known if plan.land_mask is None else _regridded_static(plan.land_mask, target, lambda x: x),
        "domain_mask": domain,
    }
    own = {"elevation": plan.elevation is None, "population": plan.population is None, "land_fraction": plan.land_mask is None}
    for name, is_own in own.items():
        gaps = ~np.isfinite(fields[name])
        if is_own:  # beyond the source there is no value, and nothing is forecast
            fields[name] = np.where(gaps, 0.0, fields[name])
            fields["domain_mask"] = fields["domain_mask"] & ~gaps
        elif gaps.any():
            option = {"land_fraction": "land-mask"}.get(name, name)
            raise DataError(
                f"--{option}: its file has no value for {gaps.sum()} of {gaps.size} cells of the target. Take one that covers "
                "--lat and --lon, or a smaller target."
            )
    return {name: np.asarray(values, "f4") for name, values in fields.items()}


def _named(plan: Plan, name: str) -> str:
    """FILE:VARIABLE of a static field."""
    where: str | None = getattr(plan, name)
    if where is not None:
        return where
    held = _held(plan, name)
    if held is None:
        firsts = " and ".join(str(source.files[0]) for source in plan.sources)
        raise DataError(f"--{name} FILE[:VARIABLE] is needed: {firsts} holds no '{name}' of its own.")
    return held


def _held(plan: Plan, name: str) -> str | None:
    """FILE:VARIABLE among the files that are prepared."""
    for source in plan.sources:
        with opened(source.files[0]) as dataset:
            if name in dataset.data_vars:
                return f"{source.files[0]}:{name}"
    return None


def _regridded_static(where: str, target: Grid, clean: Callable[[np.ndarray], np.ndarray], people: bool = False) -> np.ndarray:
    """A field of FILE, FILE:VARIABLE or FILE:VARIABLE[raster=4]; conservative means where the file is finer."""
    path, wanted, selected = _parsed(where)
    with opened(path) as dataset:
        dataset = _select(dataset, selected, path)
        names = [str(name) for name, field in dataset.data_vars.items() if field.squeeze().ndim >= 2]
        if wanted not in names and (wanted or len(names) != 1):
            raise DataError(f"{path} holds {', '.join(names) or 'no field'}: say which as FILE:VARIABLE.")
        field = dataset[wanted or names[0]].squeeze()
        more = [str(dim) for dim in field.dims[:-2] if field.sizes[dim] > 1]
        if more:
            several = f"{field.sizes[more[0]]} fields along '{more[0]}'"
            raise DataError(f"{path}: '{field.name}' is {several}: say which as FILE:VARIABLE[{more[0]}=0], counting from 0.")
        source, values = _near(dataset, str(field.name), path, target)
        if people:
            values = _per_km2(values, source, str(field.attrs.get("units", "")), path)
    (fine_lat, fine_lon), (lat, lon) = grid.spacing(source), grid.spacing(target)
    method = "conservative" if fine_lat * fine_lon < lat * lon else "bilinear"
    return regrid.build(source, target, method)(clean(values).astype("f4")[None])[0]


def _near(dataset: xr.Dataset, name: str, path: Path, around: Grid) -> tuple[Grid, np.ndarray]:
    """A field without time and its grid; of a regular one only what lies within a cell or two of `around`."""
    place = coordinates(dataset, name, path)
    array, source = dataset[name].squeeze().transpose(place.y, place.x), place.grid
    if source.lat.ndim == 1:
        middle, margin = float(around.lon.mean()), 2.0
        lon = middle + grid.wrapped(source.lon - middle)
        rows = np.flatnonzero((source.lat >= around.lat.min() - margin) & (source.lat <= around.lat.max() + margin))
        columns = np.flatnonzero((lon >= around.lon.min() - margin) & (lon <= around.lon.max() + margin))
        array = array[rows[0] : rows[-1] + 1] if rows.size else array[:0]
        array, source = array[:, columns], Grid(source.lat[rows], source.lon[columns])
        if not array.size:
            raise DataError(f"{path} does not cover the target.")
    return source, decoded(Stored(name, array.to_numpy()[None], dataset[name].attrs))[0]


def _per_km2(values: np.ndarray, source: Grid, units: str, path: Path) -> np.ndarray:
    """People a cell as people a km2, where the unit says that they are counted by cell; anything else as it is."""
    if not PEOPLE_A_CELL.fullmatch(units.strip().lower()):
        return values
    if source.lat.ndim == 2:
        raise DataError(
            f"{path} counts people a cell ('{units}') on a curvilinear grid: divide them by the cells' area in km2."
        )
    return values / grid.areas(source.lat, source.lon)


def _parsed(where: str) -> tuple[Path, str, dict[str, int]]:
    """File, variable and places along further dimensions; colons may stand in the names of both."""
    selection = re.search(r"\[(\w+)=(\d+)\]$", where)
    selected = {selection[1]: int(selection[2])} if selection else {}
    where = where[: selection.start()] if selection else where
    parts = where.split(":")
    for count in range(len(parts), 0, -1):
        path = Path(":".join(parts[:count]))
        if path.exists():
            return path, ":".join(parts[count:]), selected
    return Path(parts[0]), ":".join(parts[1:]), selected


def _select(dataset: xr.Dataset, selected: dict[str, int], path: Path) -> xr.Dataset:
    for dim, place in selected.items():
        if dim not in dataset.dims or place >= dataset.sizes[dim]:
            there = ", ".join(f"{name} (0 to {size - 1})" for name, size in dataset.sizes.items())
            raise DataError(f"{path} has no [{dim}={place}]; its dimensions are {there}.")
    return dataset.isel(selected)


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
