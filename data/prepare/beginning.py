"""Beginning a store: the catalogue of the files, weights and static fields; or finding it as it was left."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import scipy.sparse
from rich.console import Console

from data import DataError
from data.prepare.catalogue.catalogue import Catalogue, load_catalogue
from data.prepare.catalogue.search import forget, make_catalogue, require_all
from data.prepare.grids import grid, regrid
from data.prepare.inputs import identity
from data.prepare.plan import PLAN, Plan, Scan, defined_in, sha256_of
from data.prepare.shards import job_of
from data.prepare.sources.source import sources_in, winds_of
from data.prepare.static import static_fields
from data.process.written import write_text
from data.store import layout, opening, writing
from data.wind_scan import cache, orders

console = Console(stderr=True)


def begin(path: Path, plan: Plan, workers: int = 1) -> bool:
    """Create the unfinished store, or find it as it was left.

    Returns:
        False where the store is finished already and was made by this plan.

    Raises:
        DataError: a store of another plan stands there, or an input is wrong.
    """
    parts = layout.parts_path(path)
    job_of.cache_clear()  # this process may have prepared another store here
    if path.exists():
        _require_made_by(path, plan)
        shutil.rmtree(parts, ignore_errors=True)
        return False
    if (parts / PLAN).exists():
        _require_begun_by(path, plan)
        require_same_hours(path, load_catalogue(parts / "catalogue.npz"))
        return True
    seen = identity.glance(plan.files)
    catalogue = make_catalogue(path, plan.sources, plan.defined, workers)
    require_all(catalogue, plan.sources)
    _require_axes(catalogue, plan)
    console.print(f"{len(plan.files)} files, {' .. '.join(map(str, catalogue.span))}")
    warn_of_lacking(catalogue, winds_of(plan.sources), np.array([], "datetime64[h]"))
    regridders, methods = zip(*(_regridder(number, catalogue, plan) for number in range(len(catalogue.grids))), strict=True)
    static = static_fields(plan, np.logical_and.reduce([regridder.covered for regridder in regridders]))
    if plan.scan:
        orders.geometry(plan.target.lat, plan.target.lon, plan.scan.patch, plan.scan.regions, plan.scan.sectors)
    _require_space(path, len(np.unique(np.concatenate(list(catalogue.hours.values())))), plan)
    path.parent.mkdir(parents=True, exist_ok=True)
    first, last = catalogue.span
    times = np.arange(first, last + 1)
    writing.create(
        path,
        times=times,
        lat=plan.target.lat,
        lon=plan.target.lon,
        static=static,
        splits=_split_hours(plan, times),
        shard_hours=plan.shard_hours,
        provenance=_provenance(plan, catalogue, methods),
        contents=plan.contents,
    )
    catalogue.save(parts / "catalogue.npz")
    identity.begin(parts, seen)
    for number, regridder in enumerate(regridders):
        scipy.sparse.save_npz(parts / f"weights-{number}.npz", regridder.weights)
    write_text(parts / PLAN, json.dumps(plan.identity()))
    forget(path)
    return True


def warn_of_lacking(catalogue: Catalogue, winds: str, with_air: np.ndarray) -> None:
    """Say which fields will be missing at which hours for want of what they are converted with."""
    for name, hours in catalogue.incomplete(winds, with_air).items():
        needed = " and ".join(catalogue.converted_with(name, winds))
        console.print(
            f"WARNING: '{name}' will be missing at {len(hours)} hours, first {hours[0]}: no file "
            f"has the {needed} that it is "
            "converted with"
        )


def _provenance(plan: Plan, catalogue: Catalogue, methods: tuple[str, ...]) -> dict[str, Any]:
    """How the store was made, for those who look at it."""
    return {
        "generator": "python -m data prepare",
        "source": " + ".join(source.kind for source in plan.sources),
        "files": len(plan.files),
        "methods": list(methods),
        "hours": "; ".join(dict.fromkeys(source.clock.described() for source in plan.sources)),
        "winds": f"relative to the {winds_of(plan.sources)}",
        "clipped": list(plan.clip),
        "masked_beyond": list(plan.mask_beyond),
        "source_grids": [list(source.shape) for source in catalogue.grids],
        "plan_sha256": sha256_of(plan.identity()),
    }


def _require_made_by(path: Path, plan: Plan) -> None:
    """A finished store must be what this plan and its files would give again."""
    if opening.open_store(path).provenance.get("plan_sha256") != sha256_of(plan.identity()):
        raise DataError(f"{path} already exists and is from another plan. Remove it first, or write to another path.")
    identity.require_unchanged(path, plan.files)
    if plan.scan and not (plan.scan.out / "manifest.json").exists():  # killed between its last two steps
        build_scan(path, plan.scan, None)


def _require_begun_by(path: Path, plan: Plan) -> None:
    parts = layout.parts_path(path)
    begun = json.loads((parts / PLAN).read_text())
    differing = [key for key, value in plan.identity().items() if begun.get(key) != value]
    if differing:
        raise DataError(
            f"{layout.partial_path(path)} was begun with other {', '.join(differing)}. Bring them back, or remove it and "
            f"{parts} to start again."
        )


def _require_axes(catalogue: Catalogue, plan: Plan) -> None:
    """Winds along a grid's axes can be turned."""
    number, along = catalogue.grid_of["u"], winds_of(plan.sources)
    if along == "grid" and (catalogue.grids[number].lat.ndim == 1 or number != catalogue.grid_of["v"]):
        raise DataError("--winds grid is for u and v on one curvilinear grid; along latitudes and longitudes they are `earth`.")


def _regridder(number: int, catalogue: Catalogue, plan: Plan) -> tuple[regrid.Regridder, str]:
    """Weights from a grid of the files to the target, and their method."""
    source, asked = catalogue.grids[number], plan.sources[catalogue.source_of[number]].method
    (fine_lat, fine_lon), (lat, lon) = grid.spacing(source), grid.spacing(plan.target)
    method = asked or ("conservative" if lat * lon > fine_lat * fine_lon else "bilinear")
    console.print(f"{fine_lat:.3g} x {fine_lon:.3g} to {lat:.3g} x {lon:.3g} degrees, {method}")
    regridder = regrid.build(source, plan.target, method)
    outside = int((~regridder.covered).sum())
    if outside:
        console.print(
            f"WARNING: {outside} of {regridder.covered.size} cells lie outside the source: missing in every hour, and "
            "outside domain_mask"
        )
    return regridder, method


def require_same_hours(path: Path, before: Catalogue) -> None:
    """Files that were replaced since the catalogue was made must hold the same hours; their shards are written again.

    Raises:
        DataError: they do not.
    """
    parts = layout.parts_path(path)
    replaced = identity.replaced(parts, before.files)
    if not replaced:
        return
    names = ", ".join(map(str, replaced[:4])) + (" and others" if len(replaced) > 4 else "")
    console.print(f"{names} changed since the catalogue was made: comparing")
    plan = json.loads((parts / PLAN).read_text())
    now = make_catalogue(path, sources_in(plan), defined_in(plan))
    forget(path)
    if not before.equals(now.on(before.grids, before.source_of, before.grid_of) if "base" in plan else now):
        raise DataError(
            f"{replaced[0]} holds other hours, or another grid or kind of unit, than when it was catalogued: "
            f"remove {layout.partial_path(path)} and {parts} to start again."
        )


def build_scan(path: Path, scan: Scan, codes: np.ndarray | None) -> None:
    cache.build(opening.open_store(path), scan.out, patch=scan.patch, regions=scan.regions, sectors=scan.sectors, codes=codes)


def _split_hours(plan: Plan, times: np.ndarray) -> dict[str, tuple[int, int]]:
    splits = {}
    for name, days in plan.splits.items():
        try:
            first, last = (np.datetime64(day, "D") for day in days)
        except ValueError as error:
            raise DataError(f"--{name} {' '.join(days)}: write days as 2013-01-01.") from error
        start, stop = np.searchsorted(times, [first.astype(times.dtype), (last + 1).astype(times.dtype)])
        if start == stop:
            raise DataError(f"--{name} {' '.join(days)} holds no hour of the data ({times[0]} .. {times[-1]}).")
        splits[name] = (int(start), int(stop))
    return splits


def _require_space(path: Path, hours: int, plan: Plan) -> None:
    there = next(p for p in [path.parent, *path.parent.parents] if p.exists())
    free = shutil.disk_usage(there).free
    wanted = 4 * hours * len(plan.contents.hourly) * plan.grid[0] * plan.grid[1]
    if wanted > free:
        raise DataError(f"{path} will take up to {wanted / 1e9:.1f} GB, {there} has {free / 1e9:.1f} GB free.")
