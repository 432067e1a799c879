"""Beginning a store: the catalogue of the files, weights and static fields; or finding it as it was left."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import scipy.sparse

from data import DataError
from data.prepare.catalogue.catalogue import Catalogue
from data.prepare.catalogue.search import forget, make_catalogue, require_all
from data.prepare.grids import grid, regrid
from data.prepare.inputs import identity
from data.prepare.plan import PLAN, Plan
from data.prepare.preparation import Preparation, build_scan, console
from data.prepare.sources.source import winds_of
from data.prepare.static import static_fields
from data.process.written import write_text
from data.store import layout, opening, writing
from data.wind_scan import orders


def begin(path: Path, plan: Plan, workers: int = 1) -> Preparation | None:
    """Create the unfinished store, or find it as it was left.

    Returns:
        None where the store is finished already and was made by this plan.

    Raises:
        DataError: a store of another plan stands there, or an input is wrong.
    """
    parts = layout.parts_path(path)
    if path.exists():
        _require_made_by(path, plan)
        shutil.rmtree(parts, ignore_errors=True)
        return None
    if (parts / PLAN).exists():
        begun = Preparation(path)
        _require_begun_by(begun, plan)
        begun.require_same_hours()
        return begun
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
    times = np.arange(catalogue.span[0], catalogue.span[1] + 1)
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
    for number, regridder in enumerate(regridders):
        scipy.sparse.save_npz(parts / f"weights-{number}.npz", regridder.weights)
    return begun_with(path, plan, catalogue)


def begun_with(path: Path, plan: Plan, catalogue: Catalogue) -> Preparation:
    """Write down what a store is made by, the plan last: where it stands, everything does."""
    parts = layout.parts_path(path)
    catalogue.save(parts / "catalogue.npz")
    write_text(parts / PLAN, json.dumps(plan.tree()))
    forget(path)
    return Preparation(path)


def warn_of_lacking(catalogue: Catalogue, winds: str, with_air: np.ndarray) -> None:
    """Say which fields will be missing at which hours for want of what they are converted with."""
    for name, hours in catalogue.incomplete(winds, with_air).items():
        needed = " and ".join(catalogue.converted_with(name, winds))
        console.print(
            f"WARNING: '{name}' will be missing at {len(hours)} hours, first {hours[0]}: no file has the {needed} that it is "
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
        "plan_sha256": plan.sha256,
    }


def _require_made_by(path: Path, plan: Plan) -> None:
    """A finished store must be what this plan and its files would give again."""
    if opening.open_store(path).provenance.get("plan_sha256") != plan.sha256:
        raise DataError(f"{path} already exists and is from another plan. Remove it first, or write to another path.")
    identity.require_unchanged(path, plan.files)
    if plan.scan and not (plan.scan.out / "manifest.json").exists():  # killed between its last two steps
        build_scan(path, plan, None)


def _require_begun_by(begun: Preparation, plan: Plan) -> None:
    before = begun.plan.tree()
    differing = [key for key, value in plan.tree().items() if before[key] != value]
    if differing:
        raise DataError(
            f"{layout.partial_path(begun.path)} was begun with other {', '.join(differing)}. Bring them back, or remove it and "
            f"{begun.parts} to start again."
        )


def _require_axes(catalogue: Catalogue, plan: Plan) -> None:
    """Winds along a grid's axes can be turned."""
    grid_of, along = catalogue.about.grid_of, winds_of(plan.sources)
    if along == "grid" and (catalogue.grids[grid_of["u"]].lat.ndim == 1 or grid_of["u"] != grid_of["v"]):
        raise DataError("--winds grid is for u and v on one curvilinear grid; along latitudes and longitudes they are `earth`.")


def _regridder(number: int, catalogue: Catalogue, plan: Plan) -> tuple[regrid.Regridder, str]:
    """Weights from a grid of the files to the target, and their method."""
    source, asked = catalogue.grids[number], plan.sources[catalogue.about.source_of[number]].method
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
