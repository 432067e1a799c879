"""NetCDF -> store, in parallel and restartable: begin once, write shards anywhere, finish once.

A shard is the unit of work: one process reads its hours, regrids, writes and marks it done, and nobody else touches it.
So no process waits for another, any number of processes and any interruption give the same bytes, and what is done is
verified by its hash and not redone. The plan, the catalogue of the files and the weights stand in `STORE.parts` for all of
them.
"""

from __future__ import annotations

import hashlib
import json
import multiprocessing
import os
import shutil
import sys
import traceback
import zipfile
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from functools import lru_cache
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
import scipy.sparse
import shapely
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from data import DataError, locks, origin, regrid, sources, store, variables, wind_scan
from data.regrid import Grid, Regridder

console = Console(stderr=True)
LAUNCHED_BY_MPI = ("PMI_RANK", "PMIX_RANK", "OMPI_COMM_WORLD_RANK", "MPI_LOCALRANKID")


@dataclass(frozen=True)
class Scan:
    """The wind scan whose sectors are computed in the same pass."""

    out: Path
    patch: int = 2
    regions: tuple[int, int] = (32, 32)
    sectors: int = 16


@dataclass(frozen=True)
class Plan:
    """Everything that determines a prepared store; a restart must bring the same one."""

    source: str
    fields: dict[str, sources.Named]
    files: list[Path]
    lat: tuple[float, float]  # southern and northern border of the target, degrees
    lon: tuple[float, float]  # western and eastern border
    grid: tuple[int, int]
    splits: dict[str, tuple[str, str]]  # name -> first and last day, YYYY-MM-DD, both inside
    elevation: str  # FILE or FILE:VARIABLE
    population: str
    land_mask: str
    domain: str | None = None
    method: str | None = None  # None: conservative where the target is coarser
    shard_hours: int = 120
    scan: Scan | None = field(default=None)
    lead_hours: tuple[float, ...] | None = None  # of forecasts; None: all, each hour once

    @property
    def target(self) -> Grid:
        """Cell centres, northern row first."""
        (south, north), (west, east), (rows, cols) = self.lat, self.lon, self.grid
        down, right = (np.arange(rows) + 0.5) / rows, (np.arange(cols) + 0.5) / cols
        return Grid(north - down * (north - south), west + right * (east - west))

    def identity(self) -> dict[str, Any]:
        """What a restart is compared with; what the files hold is compared by their content (origin.py)."""
        described: dict[str, Any] = json.loads(json.dumps(asdict(self), default=str))
        return described


def prepare(path: Path, plan: Plan, workers: int) -> None:
    """Everything on this machine, or on all ranks of `mpirun`; run it again after an interruption.

    Raises:
        DataError: a file, a unit or a grid is wrong, the target is full, or a worker died.
    """
    world = _mpi_world()
    if world is not None:
        return _prepare_with_mpi(path, plan, world)
    if begin(path, plan):
        load(path, remaining(path), workers)
        finish(path)


def begin(path: Path, plan: Plan) -> bool:
    """Create the unfinished store, or find it as it was left.

    Returns:
        False where the store is finished already and was made by this plan.

    Raises:
        DataError: a store of another plan stands there, or an input is wrong.
    """
    parts = store.parts_path(path)
    _job.cache_clear()  # this process may have prepared another store here
    if path.exists():
        made_by = store.open_store(path).provenance.get("plan_sha256")
        if made_by != _sha256_of(plan.identity()):
            raise DataError(f"{path} already exists and is from another plan. Remove it first, or write to another path.")
        origin.require_unchanged(path, plan.files)
        if plan.scan and not (plan.scan.out / "manifest.json").exists():  # killed between its last two steps
            _build_scan(path, plan.scan, None)
        shutil.rmtree(parts, ignore_errors=True)
        return False
    if (parts / "plan.json").exists():
        begun = json.loads((parts / "plan.json").read_text())
        differing = [key for key, value in plan.identity().items() if begun.get(key) != value]
        if differing:
            raise DataError(f"{store.partial_path(path)} was begun with other {', '.join(differing)}. Bring them back, or "
                            f"remove it and {parts} to start again.")  # fmt: skip
        _require_same_hours(path, sources.load(parts / "catalogue.npz"))
        return True
    seen = origin.glance(plan.files)
    catalogue = sources.catalogue(plan.fields, plan.files, plan.lead_hours)
    first, last = catalogue.span
    times = np.arange(first, last + 1)
    (fine_lat, fine_lon), (lat, lon) = regrid.spacing(catalogue.grid), regrid.spacing(plan.target)
    method = plan.method or ("conservative" if lat * lon > fine_lat * fine_lon else "bilinear")
    console.print(f"{len(plan.files)} files, {first} .. {last}; {fine_lat:.3g} x {fine_lon:.3g} to {lat:.3g} x {lon:.3g} "
                  f"degrees, {method}")  # fmt: skip
    regridder = regrid.build(catalogue.grid, plan.target, method)
    outside = int((~regridder.covered).sum())
    if outside:
        console.print(f"WARNING: {outside} of {regridder.covered.size} cells lie outside the source: missing in every hour, "
                      "and outside domain_mask")  # fmt: skip
    static = static_fields(plan, regridder.covered)
    if plan.scan:
        wind_scan.geometry(plan.target.lat, plan.target.lon, plan.scan.patch, plan.scan.regions, plan.scan.sectors)
    _require_space(path, len(np.unique(np.concatenate(list(catalogue.hours.values())))), plan)
    path.parent.mkdir(parents=True, exist_ok=True)
    store.create(
        path, times=times, lat=plan.target.lat, lon=plan.target.lon, static=static, splits=_split_hours(plan, times),
        shard_hours=plan.shard_hours,
        provenance={"generator": "python -m data prepare", "source": plan.source, "files": len(plan.files), "method": method,
                    "source_grid": list(catalogue.grid.shape), "plan_sha256": _sha256_of(plan.identity())},
    )  # fmt: skip
    catalogue.save(parts / "catalogue.npz")
    origin.begin(parts, seen)
    scipy.sparse.save_npz(parts / "weights.npz", regridder.weights)
    _write_last(parts / "plan.json", json.dumps(plan.identity()))
    return True


def _require_same_hours(path: Path, before: sources.Catalogue) -> None:
    """Files that were replaced since the catalogue was made must hold the same hours; their shards are written again.

    Raises:
        DataError: they do not.
    """
    parts = store.parts_path(path)
    replaced = origin.replaced(parts, before.files)
    if not replaced:
        return
    names = ", ".join(map(str, replaced[:4])) + (" and others" if len(replaced) > 4 else "")
    console.print(f"{names} changed since the catalogue was made: comparing")
    if not before.equals(sources.catalogue(before.fields, before.files, before.lead_hours)):
        raise DataError(f"{replaced[0]} holds other hours or another grid than when {store.partial_path(path)} was begun: "
                        f"remove it and {parts} to start again.")  # fmt: skip


def require_same_plan(path: Path, plan: Plan) -> bool:
    """For the stages after `begin`, which work by what it wrote down; False where the store is finished already.

    Raises:
        DataError: nothing was begun here, or with other arguments, or MPI ranks would all do the same stage.
    """
    if not path.exists():
        _require_begun(path)
    if _mpi_world() is not None:
        raise DataError("--stage is for array tasks; under mpirun leave it out, the ranks share the work.")
    return begin(path, plan)


def remaining(path: Path, part: int = 0, parts: int = 1) -> list[int]:
    """Shards part, part + parts, ... that are not done, or no longer what was written.

    Raises:
        DataError: nothing was begun here.
    """
    _require_begun(path)
    hours, length = _job(path).hours, _job(path).shard_hours
    mine = range(part, -(-hours // length), parts)
    return [shard for shard in mine if not _is_done(path, shard)]


def load(path: Path, shards: list[int], workers: int) -> None:
    """Read, regrid and write the given shards with `workers` processes, showing progress."""
    with _full_disk_named(path), _progress() as progress:
        task = progress.add_task(path.name, total=len(shards), rate="")
        read = 0
        for bytes_read in _written(path, shards, workers):
            read += bytes_read
            elapsed = progress.tasks[task].elapsed or 1e-9
            progress.update(task, advance=1, rate=f"{read / elapsed / 1e6:.0f} MB/s of source")


def finish(path: Path) -> str:
    """Merge statistics, close the store, and write the wind-scan cache where one was asked for.

    Returns:
        The fingerprint.

    Raises:
        DataError: shards are missing.
    """
    _require_begun(path)
    scan = _job(path).scan
    shards = -(-_job(path).hours // _job(path).shard_hours)
    left = remaining(path)
    if left:
        raise DataError(f"{path}: {len(left)} of {shards} shards are not written: {left[:8]}. Run the same command again.")
    _require_same_hours(path, _job(path).catalogue)
    if scan:
        codes = np.concatenate([_sectors(path, i) for i in range(shards)])
    files = _job(path).catalogue.files
    about = {origin.RECORD: json.dumps(origin.describe(store.parts_path(path), files), indent=0)}
    fingerprint = store.finalise(path, about)
    if scan:
        _build_scan(path, scan, codes)
    return fingerprint


def _build_scan(path: Path, scan: Scan, codes: np.ndarray | None) -> None:
    wind_scan.build(store.open_store(path), scan.out, patch=scan.patch, regions=scan.regions, sectors=scan.sectors, codes=codes)


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


@dataclass(frozen=True)
class _Job:
    """What every process needs to write a shard."""

    catalogue: sources.Catalogue
    regridder: Regridder
    first: np.datetime64
    hours: int
    shard_hours: int
    scan: Scan | None

    def files_of(self, shard: int) -> list[int]:
        """Numbers of the files that a shard's hours are read from."""
        start = self.first + shard * self.shard_hours
        return self.catalogue.files_between(start, start + min(self.shard_hours, self.hours - shard * self.shard_hours))


@lru_cache(maxsize=1)
def _job(path: Path) -> _Job:
    parts = store.parts_path(path)
    plan = json.loads((parts / "plan.json").read_text())
    catalogue = sources.load(parts / "catalogue.npz")
    first, last = catalogue.span
    regridder = Regridder(scipy.sparse.load_npz(parts / "weights.npz"), tuple(plan["grid"]))
    stated = plan["scan"]
    scan = stated and Scan(Path(stated["out"]), stated["patch"], tuple(stated["regions"]), stated["sectors"])
    return _Job(catalogue, regridder, first, int((last - first).astype(int)) + 1, plan["shard_hours"], scan)


def _write_shard(path: Path, shard: int) -> int:
    """Bytes of source read."""
    job = _job(path)
    try:
        held = locks.hold(store.parts_path(path) / f"lock-{shard}")
    except locks.Busy as busy:
        raise DataError(f"shard {shard} of {path} is being written by {busy}: wait for it, or end it.") from busy
    with held:
        return _write_claimed(path, job, shard)


def _write_claimed(path: Path, job: _Job, shard: int) -> int:
    start = shard * job.shard_hours
    count = min(job.shard_hours, job.hours - start)
    parts = store.parts_path(path)
    used = job.files_of(shard)
    content = {number: origin.content_of(parts, job.catalogue.files[number], number) for number in used}
    (parts / f"sources-{shard}.json").unlink(missing_ok=True)
    reader = sources.Reader(job.catalogue, job.first + start, count)
    for group in store.DYNAMIC_GROUPS:
        block = np.full((count, len(variables.GROUPS[group]), *job.regridder.shape), np.nan, "f4")
        for channel, name in enumerate(variables.names(group)):
            values = reader.variable(name)
            if values is not None:
                block[:, channel] = job.regridder(values)
        store.write_block(path, group, start, block)
        if group == "weather" and job.scan:
            u, v = (block[:, variables.CHANNEL_OF[name]] for name in ("u", "v"))
            codes = wind_scan.sector_codes(u, v, job.scan.regions, job.scan.sectors)
            being_written = store.parts_path(path) / f"sectors-{shard}.{os.getpid()}.npz"
            np.savez(being_written, codes=codes)
            being_written.rename(store.parts_path(path) / f"sectors-{shard}.npz")
    for number in used:
        origin.require_still(parts, job.catalogue.files[number], number)
    _write_last(parts / f"sources-{shard}.json", json.dumps(content))
    return reader.bytes_read


def _written(path: Path, shards: list[int], workers: int) -> Iterator[int]:
    """Write shards; bytes read of each, as they are done."""
    if workers == 1:
        yield from (_write_shard(path, shard) for shard in shards)
        return
    # Spawned: libraries that were opened before a fork hang after it.
    with ProcessPoolExecutor(workers, mp_context=multiprocessing.get_context("spawn")) as pool:
        try:
            for done in as_completed([pool.submit(_write_shard, path, shard) for shard in shards]):
                yield done.result()
        except BrokenProcessPool as error:
            raise DataError("a worker process died (often for lack of memory). Run the same command again, with fewer "
                            "--workers; what is done is kept.") from error  # fmt: skip
        finally:
            pool.shutdown(cancel_futures=True)


def is_first_rank() -> bool:
    """Whether this process speaks for all: the only one, or rank 0 of `mpirun`."""
    world = _mpi_world()
    return world is None or world.rank == 0


def _mpi_world() -> Any:
    """mpi4py's world where `mpirun` started more than one rank, else None.

    Raises:
        DataError: SLURM started several tasks that do not know of one another.
    """
    if not any(name in os.environ for name in LAUNCHED_BY_MPI):
        if int(os.environ.get("SLURM_STEP_NUM_TASKS", "1")) > 1:
            raise DataError("srun started several tasks without MPI, and each would do all the work: use `srun --mpi=pmi2`, "
                            "mpirun, or one array task a --part.")  # fmt: skip
        return None
    from mpi4py import MPI  # importing it joins the MPI job, which only a process started by mpirun may do

    return MPI.COMM_WORLD if MPI.COMM_WORLD.size > 1 else None


def _prepare_with_mpi(path: Path, plan: Plan, world: Any) -> None:
    console.quiet = world.rank != 0

    def abort(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
        traceback.print_exception(kind, error, trace)
        world.Abort(1)  # or the other ranks would wait for this one for ever

    sys.excepthook = abort

    def together(step: Callable[[], Any]) -> Any:
        """Run a step on every rank, and fail on all of them where it fails on one."""
        result, problem = None, None
        try:
            result = step()
        except (DataError, OSError) as error:
            problem = str(error)
        problems = [p for p in world.allgather(problem) if p]
        if problems:
            raise DataError(problems[0])
        return result

    unfinished = world.bcast(together(lambda: begin(path, plan) if world.rank == 0 else None))
    if unfinished:
        together(lambda: load(path, remaining(path, world.rank, world.size), 1))
        together(lambda: finish(path) if world.rank == 0 else None)


def _is_done(path: Path, shard: int) -> bool:
    if _job(path).scan:
        try:
            _sectors(path, shard)
        except (FileNotFoundError, EOFError, ValueError, zipfile.BadZipFile):
            return False
    return _is_of_its_sources(path, shard) and all(store.is_written(path, group, shard) for group in store.DYNAMIC_GROUPS)


def _is_of_its_sources(path: Path, shard: int) -> bool:
    """Whether the files that a shard was read from still hold what was read."""
    parts, files = store.parts_path(path), _job(path).catalogue.files
    try:
        recorded: dict[str, str] = json.loads((parts / f"sources-{shard}.json").read_text())
    except (FileNotFoundError, ValueError):  # killed before it was done, or before its page reached the disk
        return False
    return all(origin.content_of(parts, files[int(number)], int(number)) == sha256 for number, sha256 in recorded.items())


def _sectors(path: Path, shard: int) -> np.ndarray:
    """The wind sectors of a shard's hours; the file carries its own checksum."""
    with np.load(store.parts_path(path) / f"sectors-{shard}.npz", allow_pickle=False) as file:
        return np.asarray(file["codes"])


def _require_begun(path: Path) -> None:
    if not (store.parts_path(path) / "plan.json").exists():
        raise DataError(f"nothing was begun for {path}: run `python -m data prepare ... --stage begin` first, once.")


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
    wanted = 4 * hours * len(sources.needed()) * plan.grid[0] * plan.grid[1]
    if wanted > free:
        raise DataError(f"{path} will take up to {wanted / 1e9:.1f} GB, {there} has {free / 1e9:.1f} GB free.")


def _regridded_static(where: str, target: Grid, clean: Callable[[np.ndarray], np.ndarray]) -> np.ndarray:
    """A field of FILE or FILE:VARIABLE, conservative means where the file is finer."""
    name, _, wanted = where.partition(":")
    with sources.opened(Path(name)) as dataset:
        flat = [str(v) for v in dataset.data_vars if dataset[v].squeeze().ndim == 2]
        if wanted not in flat and (wanted or len(flat) != 1):
            raise DataError(f"{name} holds {', '.join(flat) or 'no field'}: say which as FILE:VARIABLE.")
        grid, values = sources.read_static(dataset, wanted or flat[0], Path(name), target)
    (fine_lat, fine_lon), (lat, lon) = regrid.spacing(grid), regrid.spacing(target)
    method = "conservative" if fine_lat * fine_lon < lat * lon else "bilinear"
    return regrid.build(grid, target, method)(clean(values).astype("f4")[None])[0]


def _domain(where: str | None, target: Grid) -> np.ndarray:
    """(H, W) bool from an .npy array, a NetCDF field or a GeoJSON polygon; everywhere where none is given."""
    shape = target.shape
    if where is None:
        return np.ones(shape, bool)
    if where.endswith(".npy"):
        try:
            mask = np.load(where, allow_pickle=False)
        except store.DAMAGE as error:
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


@contextmanager
def _full_disk_named(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise DataError(f"{store.partial_path(path)} cannot be written ({error}). What is done is kept: make room, and run the "
                        "same command again.") from error  # fmt: skip


def _progress() -> Progress:
    return Progress(TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TextColumn("shards"),
                    TextColumn("{task.fields[rate]}"), TimeElapsedColumn(), TextColumn("left"), TimeRemainingColumn(),
                    console=console)  # fmt: skip


def _sha256_of(tree: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(tree, sort_keys=True).encode()).hexdigest()


def _write_last(path: Path, text: str) -> None:
    partial = path.with_name(f"{path.name}.{os.getpid()}.partial")
    partial.write_text(text)
    partial.rename(path)
