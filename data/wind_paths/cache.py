"""Paths of the air, precomputed to a versioned cache that a run opens and never builds.

One record an hour of arrival: where the air of every patch was 3, 6, ... 96 h before, so that a
sample of any lead time reads one range of one record. A point is stored as its way from the point
after it, in whole steps of one byte: with the fastest wind that is stored, 60 m s-1, 127 of them.
What rounding leaves over goes into the next point, so that no error adds up.

CACHE/manifest.json   versions, geometry, fingerprint of the store, sha256 of every piece
CACHE/paths.bin       (T, points, 2, P) int8 steps of rows and columns; -128 where nobody knows
"""

from __future__ import annotations

import hashlib
import json
import multiprocessing
import os
import shutil
from dataclasses import asdict, dataclass, fields
from functools import cached_property
from pathlib import Path
from typing import IO, Any

import numpy as np
import torch

from data import DataError
from data.channels.channels import EVERY_H
from data.process import locks
from data.process.workers import results
from data.process.written import write_text
from data.store.layout import Store
from data.store.reader import ShardReader
from data.wind_paths.trajectories import PathGrid, backward

FORMAT = 1
FASTEST = 60.0  # m s-1, between two points
STEPS = 127
GONE = -128


@dataclass(frozen=True)
class PathGeometry:
    """What determines the meaning of a record."""

    grid: tuple[int, int]
    patch: int
    hours: int  # length of the paths
    row_step: float  # rows
    col_step: float  # columns


@dataclass(frozen=True)
class PathCache:
    """An opened cache: `read(hours, points)`."""

    path: Path
    geometry: PathGeometry
    hours: int  # records
    sha256: str  # of format and geometry; the winds are those of the store

    @property
    def patches(self) -> int:
        rows, cols = self.geometry.grid
        return rows // self.geometry.patch * (cols // self.geometry.patch)

    @cached_property
    def _file(self) -> IO[bytes]:
        return (self.path / "paths.bin").open("rb", buffering=0)

    def __getstate__(self) -> dict[str, Any]:
        """Without the open file, which another process opens for itself."""
        return {f.name: getattr(self, f.name) for f in fields(self)}

    def read(self, hours: np.ndarray, points: np.ndarray) -> np.ndarray:
        """(B, most, 2, P) int8: the first `points` (B,) points of the air that arrives at time indices `hours` (B,).

        What is behind them, and an hour beyond the last one, is unknown.

        Raises:
            DataError: the file is shorter than when it was checked.
        """
        out = np.full((len(hours), int(points.max()), 2, self.patches), GONE, "i1")
        record = self.geometry.hours // EVERY_H * 2 * self.patches
        for row, hour, count in zip(out, hours.tolist(), points.tolist(), strict=True):
            wanted = row[:count]
            if hour < self.hours and os.preadv(self._file.fileno(), [wanted.data.cast("B")], hour * record) != wanted.nbytes:
                raise DataError(f"{self.path}/paths.bin is truncated. Build the cache again.")
        return out


def geometry_of(store: Store, patch: int, hours: int) -> PathGeometry:
    """The geometry of the paths over a store.

    Raises:
        DataError: grid and patch do not divide, or hours are not a whole number of points.
    """
    rows, cols = store.grid
    if rows % patch or cols % patch or hours < EVERY_H or hours % EVERY_H:
        raise DataError(
            f"{rows} x {cols} pixels, patch {patch}, {hours} h: use a patch that divides the grid, and a multiple of "
            f"{EVERY_H} h."
        )
    grid, farthest = PathGrid.of(store), FASTEST * EVERY_H * 3.6
    narrowest = grid.col_km * float(np.cos(np.deg2rad(min(80.0, abs(store.lat).max()))))
    steps = [round(farthest / STEPS / abs(km), 9) for km in (grid.row_km, narrowest)]
    return PathGeometry(store.grid, patch, hours, *steps)


def build(store: Store, path: Path, *, patch: int, hours: int, workers: int = 1) -> PathCache:
    """Compute the paths of the air that arrives at every hour of `store`; run it again after an interruption.

    Hours that an older cache of the same store has are taken from there.

    Raises:
        DataError: something else stands at `path`, the grid is not regular, or another process builds it.
    """
    if path.exists() and not (path / "manifest.json").exists():
        raise DataError(f"{path} exists and is no cache of paths: it is not replaced. Choose another --out.")
    geometry = geometry_of(store, patch, hours)
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        held = locks.hold(path.with_name(path.name + ".lock"))
    except locks.Busy as busy:
        raise DataError(f"{path} is being built by {busy}: wait for it, or end it.") from busy
    with held:
        _build(store, path, geometry, workers)
    return open_cache(path, store, patch=patch, hours=0)


def _build(store: Store, path: Path, geometry: PathGeometry, workers: int) -> None:
    from rich.console import Console
    from rich.progress import track

    partial = path.with_name(path.name + ".partial")
    about = {"format": FORMAT, "geometry": asdict(geometry), "store_fingerprint": store.fingerprint}
    begun, stated = partial / "begun.json", json.dumps(about)
    if not begun.exists() or begun.read_text() != stated:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        write_text(begun, stated)
    known = _known_pieces(path, store, geometry)
    starts = range(0, len(store.times), store.shard_hours)
    tasks = [
        (store, geometry, partial, number, path if number in known else None)
        for number in range(len(starts))
        if not ((partial / f"{number}.done").exists() and (partial / f"{number}.bin").exists())
    ]
    for _ in track(results(_write_piece, tasks, workers), "wind paths", total=len(tasks), console=Console(stderr=True)):
        pass
    hashes = [(partial / f"{number}.done").read_text() for number in range(len(starts))]
    with (partial / "paths.bin").open("wb") as joined:
        for number in range(len(starts)):
            content = (partial / f"{number}.bin").read_bytes()
            if hashlib.sha256(content).hexdigest() != hashes[number]:  # a node died before its page reached the disk
                (partial / f"{number}.bin").unlink()
                raise DataError(f"{partial}/{number}.bin is not what was written: run the same command again.")
            joined.write(content)
            (partial / f"{number}.bin").unlink()
    write_text(partial / "manifest.json", json.dumps(about | {"piece_hours": store.shard_hours, "pieces": hashes}, indent=1))
    for left in (*partial.glob("*.done"), begun):
        left.unlink()
    shutil.rmtree(path, ignore_errors=True)
    partial.rename(path)


def open_cache(path: str | Path, store: Store, *, patch: int, hours: int) -> PathCache:
    """Open the cache for `store` and check version, geometry, size and the store it was made for.

    Args:
        hours: the longest lead time that is needed.

    Raises:
        DataError: absent, of another version, grid or store, damaged, or its paths are too short.
    """
    path = Path(path)
    remedy = f"Build it with\n  python -m data wind-paths {store.path} --out {path}"
    manifest = _read_manifest(path, remedy)
    geometry = PathGeometry(**{**manifest["geometry"], "grid": tuple(manifest["geometry"]["grid"])})
    expected = geometry_of(store, patch, geometry.hours)
    if geometry != expected:
        raise DataError(f"{path} was built for {geometry}, the run has {expected}. {remedy}")
    if geometry.hours < hours:
        raise DataError(f"{path} has paths of {geometry.hours} h, the longest lead time is {hours} h. {remedy} --hours {hours}")
    if manifest["store_fingerprint"] != store.fingerprint:
        raise DataError(
            f"{path} is stale: it was built for dataset {manifest['store_fingerprint'][:12]}, {store.path} is "
            f"{store.fingerprint[:12]}. {remedy}"
        )
    sha256 = hashlib.sha256(json.dumps([FORMAT, asdict(geometry)]).encode()).hexdigest()
    cache = PathCache(path, geometry, len(store.times), sha256)
    size = (path / "paths.bin").stat().st_size if (path / "paths.bin").exists() else 0
    if size != cache.hours * (geometry.hours // EVERY_H) * 2 * cache.patches:
        raise DataError(f"{path}/paths.bin has {size} bytes, which is not what was written. {remedy}")
    return cache


def damaged(path: Path) -> list[str]:
    """Pieces of a cache that are not what was written, by their hours."""
    manifest = _read_manifest(path, "Build it again.")
    geometry, wrong = manifest["geometry"], []
    rows, cols = geometry["grid"]
    patches = rows // geometry["patch"] * (cols // geometry["patch"])
    piece_bytes = manifest["piece_hours"] * geometry["hours"] // EVERY_H * 2 * patches
    with (path / "paths.bin").open("rb") as file:
        for number, sha256 in enumerate(manifest["pieces"]):
            if hashlib.sha256(file.read(piece_bytes)).hexdigest() != sha256:
                first = number * manifest["piece_hours"]
                wrong.append(f"hours {first} .. {first + manifest['piece_hours'] - 1}")
    return wrong


def _write_piece(store: Store, geometry: PathGeometry, folder: Path, number: int, older: Path | None) -> None:
    """Write the records of one shard's hours, or take them from an older cache."""
    if multiprocessing.parent_process() is not None:
        torch.set_num_threads(1)  # there are as many processes as there may be threads
    start = number * store.shard_hours
    stop = min(start + store.shard_hours, len(store.times))
    if older is None:
        content = paths_of(store, geometry, start, stop).tobytes()
    else:
        length = geometry.hours // EVERY_H * 2 * PathCache(older, geometry, 0, "").patches
        with (older / "paths.bin").open("rb") as file:
            file.seek(start * length)
            content = file.read((stop - start) * length)
    with (folder / f"{number}.bin").open("wb") as out:
        out.write(content)
    write_text(folder / f"{number}.done", hashlib.sha256(content).hexdigest())


def paths_of(store: Store, geometry: PathGeometry, start: int, stop: int) -> np.ndarray:
    """(stop - start, points, 2, P) int8 records of the air that arrives at the hours [start, stop) of a store."""
    reader, contents = ShardReader(store, "weather"), store.contents
    channels = [contents.channel(name) for name in ("u", "v")]
    winds = np.full((stop - start + geometry.hours, 2, *store.grid), np.nan, "f4")
    first = max(0, start - geometry.hours)
    winds[first - start + geometry.hours :] = reader.read(np.arange(first, stop))[:, channels]
    points = backward(torch.from_numpy(winds), stop - start, geometry.hours, EVERY_H, PathGrid.of(store), geometry.patch)
    return quantised(points.numpy(), PathGrid.of(store).centres(geometry.patch).numpy(), geometry)


def records_of(winds: np.ndarray, geometry: PathGeometry, grid: PathGrid) -> np.ndarray:
    """(hours / EVERY_H, 2, P) int8 record of the air that arrives at the last of some hours, from the first one on.

    Args:
        winds: (1 + hours, 2, H, W) float32 of consecutive hours, m s-1.
    """
    hours = len(winds) - 1
    points = backward(torch.from_numpy(winds), 1, hours, EVERY_H, grid, geometry.patch)
    return quantised(points.numpy(), grid.centres(geometry.patch).numpy(), geometry)[0]


def quantised(points: np.ndarray, centres: np.ndarray, geometry: PathGeometry) -> np.ndarray:
    """Steps (n, points, 2, P) int8 of paths (n, points, 2, P) that end at `centres` (P, 2)."""
    unit = np.array([geometry.row_step, geometry.col_step], "f4")[:, None]
    steps = np.full(points.shape, GONE, "i1")
    at = np.broadcast_to(centres.T.astype("f4"), points[:, 0].shape).copy()
    known = np.ones((len(points), points.shape[-1]), bool)
    for number in range(points.shape[1]):
        known &= np.isfinite(points[:, number]).all(1)
        whole = np.clip(np.round((np.nan_to_num(points[:, number]) - at) / unit), -STEPS, STEPS)
        at += whole * unit
        steps[:, number] = np.where(known[:, None], whole, GONE)
    return steps


def _known_pieces(path: Path, store: Store, geometry: PathGeometry) -> set[int]:
    """Pieces that an older cache of the same hours has: of this store, or of one that it continues."""
    if not path.exists():
        return set()
    manifest = _read_manifest(path, "Build it again.")
    same = json.loads(json.dumps(asdict(geometry))) == manifest["geometry"] and manifest["piece_hours"] == store.shard_hours
    if not same or not store.continues(manifest["store_fingerprint"]):
        return set()
    wrong = damaged(path)
    # The last one may have been short; hours without wind may have got one since.
    return set() if wrong else set(range(len(manifest["pieces"]) - 1 - geometry.hours // store.shard_hours))


def _read_manifest(path: Path, remedy: str) -> dict[str, Any]:
    try:
        manifest: dict[str, Any] = json.loads((path / "manifest.json").read_text(encoding="utf-8"))
        if manifest["format"] != FORMAT:
            raise DataError(f"{path} has format {manifest['format']}; this code reads {FORMAT}. {remedy}")
        kinds = {"geometry": dict, "pieces": list, "store_fingerprint": str, "piece_hours": int}
        wrong = [name for name, kind in kinds.items() if not isinstance(manifest[name], kind)]
        wrong += [f.name for f in fields(PathGeometry) if f.name not in manifest["geometry"]]
    except FileNotFoundError as error:
        raise DataError(f"no cache of wind paths at {path}. {remedy}") from error
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise DataError(f"{path}/manifest.json is damaged ({type(error).__name__}: {error}). {remedy}") from error
    if wrong:
        raise DataError(f"{path}/manifest.json is damaged: {', '.join(wrong)}. {remedy}")
    return manifest
