"""Wind-scan order tables and sector codes, in a versioned cache that a run opens and never builds.

A sector s of S stands for the direction 2*pi*s/S, counter-clockwise from eastward, that the air moves *to*.
Patches are ordered along it, upwind first: `order[k]` is the k-th patch downwind, `rank` its inverse.
Tables are pure geometry (grid, spacing on the ground, sectors, regions); their identity is a hash of the orders.
Beside them stands, for one dataset, the sector of the whole grid and of every region at every hour.

CACHE/manifest.json   versions, geometry, hashes, fingerprint of the dataset
CACHE/orders.npz      global_orders (S, N) int32, regional_orders (S, P) int32 (inside one region of P patches)
CACHE/sectors.npy     (T, 1 + regions) uint8: global sector, then the regions in raster order; 255 = no valid wind
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import zipfile
import zlib
from dataclasses import asdict, dataclass, fields
from functools import cached_property
from pathlib import Path
from typing import IO, Any

import numpy as np

from data import DataError
from data.store.layout import DAMAGE, Store
from data.store.reader import ShardReader
from data.wind_scan.orders import NO_WIND, Geometry, beyond_the_domain, geometry_of, invert, order_along_wind, sector_codes

FORMAT = 1
ALGORITHM = 1


@dataclass(frozen=True)
class ScanCache:
    """An opened cache: `ranks(mode, hours)` gives every patch's place downwind.

    Sectors are read hour by hour, so that what a rank opens does not grow with the length of the data; one process reads
    all of them once, checks them, and tells the others which hours are usable.
    """

    path: Path
    geometry: Geometry
    global_orders: np.ndarray
    regional_orders: np.ndarray
    known: dict[str, np.ndarray]  # "global", "regional" -> (T,) bool: the hours whose sectors are all known
    orders_hash: str

    @cached_property
    def _global_ranks(self) -> np.ndarray:
        return invert(self.global_orders)

    @cached_property
    def _regional_ranks(self) -> np.ndarray:
        return invert(self.regional_orders)

    @property
    def hours(self) -> int:
        return len(self.known["global"])

    @cached_property
    def _file(self) -> IO[bytes]:
        return (self.path / "sectors.npy").open("rb", buffering=0)

    def __getstate__(self) -> dict[str, Any]:
        """Without the open file, which another process opens for itself."""
        return {f.name: getattr(self, f.name) for f in fields(self)}

    def sectors(self, hours: np.ndarray) -> np.ndarray:
        """(B, 1 + regions) uint8 at time indices `hours` (B,): sector of the whole grid, then of every region.

        Raises:
            DataError: the file is shorter than when it was checked.
        """
        width = 1 + self.geometry.regions[0] * self.geometry.regions[1]
        codes = np.empty((len(hours), width), "u1")
        size = os.fstat(self._file.fileno()).st_size
        for row, hour in zip(codes, hours.tolist(), strict=True):
            if os.preadv(self._file.fileno(), [row.data], size - (self.hours - hour) * width) != width:
                raise DataError(f"{self.path}/sectors.npy is truncated. Build the cache again.")
        return codes

    def usable(self, mode: str) -> np.ndarray:
        """(T,) bool: hours whose sectors are all known in this mode."""
        return np.ones(self.hours, bool) if mode == "none" else self.known[mode]

    def ranks(self, mode: str, hours: np.ndarray) -> np.ndarray:
        """(B, N) int64: the place along the wind of each raster patch, for time indices `hours` (B,).

        Raises:
            DataError: an hour has no valid wind.
        """
        gh, gw = self.geometry.patches
        if mode == "none":
            return np.broadcast_to(np.arange(gh * gw), (len(hours), gh * gw))
        sectors = self.sectors(np.asarray(hours))
        unknown = without_wind(mode, sectors)
        if unknown.any():
            raise DataError(f"{self.path}: no valid wind at time indices {hours[unknown].tolist()}.")
        return self.ranks_along(mode, sectors)

    def ranks_along(self, mode: str, sectors: np.ndarray) -> np.ndarray:
        """(B, N) int64: the place of each raster patch along winds whose sectors (B, 1 + regions) are all known."""
        gh, gw = self.geometry.patches
        if mode == "global":
            return self._global_ranks[sectors[:, 0]]
        rh, rw = self.geometry.region_patches
        rows, cols = self.geometry.regions
        local = self._regional_ranks[sectors[:, 1:]]  # (B, R, P)
        scanned = local + np.arange(rows * cols)[:, None] * (rh * rw)
        blocks = scanned.reshape(len(sectors), rows, cols, rh, rw).transpose(0, 1, 3, 2, 4)
        return blocks.reshape(len(sectors), gh * gw)


def without_wind(mode: str, sectors: np.ndarray) -> np.ndarray:
    """(B,) bool: where a sector (B, 1 + regions) that this mode needs is not known."""
    return np.asarray(((sectors[:, :1] if mode == "global" else sectors[:, 1:]) == NO_WIND).any(1))


def build(
    store: Store,
    path: Path,
    *,
    patch: int,
    regions: tuple[int, int],
    sectors: int,
    orders: dict[str, np.ndarray] | None = None,
    codes: np.ndarray | None = None,
) -> ScanCache:
    """Compute orders and the sectors of every hour of `store`, and write the cache at `path`, replacing an older one.

    Args:
        orders: imported tables to use instead: "global_orders" (S, N) and "regional_orders" (S, P).
        codes: (T, 1 + regions) sectors of every hour, where whoever wrote the store has computed them already.
    """
    geometry = geometry_of(store, patch, regions, sectors)
    if path.exists() and not (path / "manifest.json").exists():
        raise DataError(f"{path} exists and is not a wind-scan cache: it is not replaced. Choose another --out.")
    if orders is None:
        orders = {
            "global_orders": order_along_wind(*geometry.patches, geometry),
            "regional_orders": order_along_wind(*geometry.region_patches, geometry),
        }
    if codes is None:
        codes = _sectors_of(store, regions, sectors, _known_codes(path, store, geometry))
    codes = beyond_the_domain(codes, store.static["domain_mask"], regions)
    partial = path.with_name(path.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    np.savez(partial / "orders.npz", **orders)  # type: ignore[arg-type]
    np.save(partial / "sectors.npy", codes)
    manifest = {
        "format": FORMAT,
        "algorithm": ALGORITHM,
        "geometry": asdict(geometry),
        "orders_sha256": hash_orders(**orders),
        "sectors_sha256": hashlib.sha256(codes.tobytes()).hexdigest(),
        "store_fingerprint": store.fingerprint,
    }
    (partial / "manifest.json").write_text(json.dumps(manifest, indent=1))
    shutil.rmtree(path, ignore_errors=True)
    partial.rename(path)
    return open_cache(path, store, patch=patch)


def open_cache(path: str | Path, store: Store, *, patch: int) -> ScanCache:
    """Open the cache for `store` and check versions, geometry, hashes and the dataset it was made for.

    Raises:
        DataError: absent, of another version, grid or dataset, or its content differs from its hashes.
    """
    path = Path(path)
    remedy = f"Build it with\n  python -m data wind-scan {store.path} --out {path}"
    geometry, global_orders, regional_orders = read_orders(path, remedy)
    manifest = _read_manifest(path, remedy)
    expected = geometry_of(store, patch, geometry.regions, geometry.sectors)
    for name, value in asdict(expected).items():
        if getattr(geometry, name) != value:
            raise DataError(f"{path} was built for {name} {getattr(geometry, name)}, the run has {value}. {remedy}")
    if manifest["store_fingerprint"] != store.fingerprint:
        raise DataError(
            f"{path} is stale: it was built for dataset {manifest['store_fingerprint'][:12]}, "
            f"{store.path} is {store.fingerprint[:12]}. {remedy}"
        )
    try:
        codes = np.load(path / "sectors.npy", allow_pickle=False)
    except DAMAGE as error:
        raise DataError(f"{path}/sectors.npy cannot be read ({error}). {remedy}") from error
    shape = (len(store.times), 1 + geometry.regions[0] * geometry.regions[1])
    if codes.shape != shape or hashlib.sha256(codes.tobytes()).hexdigest() != manifest["sectors_sha256"]:
        raise DataError(f"{path}/sectors.npy does not match its recorded hash. {remedy}")
    known = {"global": codes[:, 0] != NO_WIND, "regional": (codes[:, 1:] != NO_WIND).all(1)}
    return ScanCache(path, geometry, global_orders, regional_orders, known, manifest["orders_sha256"])


def store_of(path: Path) -> str:
    """Fingerprint of the store that a cache was built for; empty where there is no cache."""
    return str(_read_manifest(path, "Build it again.")["store_fingerprint"]) if path.exists() else ""


def read_orders(path: Path, remedy: str = "Build it again.") -> tuple[Geometry, np.ndarray, np.ndarray]:
    """Geometry, global (S, N) and regional (S, P) orders of a cache, whatever dataset it is for.

    Raises:
        DataError: no cache, of another version, or an order was altered.
    """
    if not (path / "manifest.json").exists():
        raise DataError(f"no wind-scan cache at {path}. {remedy}")
    manifest = _read_manifest(path, remedy)
    stated = manifest["geometry"]
    try:
        geometry = Geometry(**{**stated, "grid": tuple(stated["grid"]), "regions": tuple(stated["regions"])})
        with np.load(path / "orders.npz", allow_pickle=False) as file:
            orders = {name: file[name] for name in ("global_orders", "regional_orders")}
    except (*DAMAGE, zipfile.BadZipFile, zlib.error) as error:
        raise DataError(f"{path} is damaged ({type(error).__name__}: {error}). {remedy}") from error
    numbers = (*geometry.grid, geometry.patch, *geometry.regions, geometry.sectors)
    if not all(type(number) is int and number > 0 for number in numbers) or not isinstance(geometry.aspect, float):
        raise DataError(f"{path}/manifest.json is damaged: its geometry is {stated}. {remedy}")
    if hash_orders(**orders) != manifest["orders_sha256"]:
        raise DataError(f"{path}/orders.npz does not match its recorded hash: an order was altered. {remedy}")
    return geometry, orders["global_orders"], orders["regional_orders"]


def _read_manifest(path: Path, remedy: str) -> dict[str, Any]:
    try:
        manifest = json.loads((path / "manifest.json").read_text(encoding="utf-8"))
        kinds = {"geometry": dict, "orders_sha256": str, "sectors_sha256": str, "store_fingerprint": str}
        if (manifest["format"], manifest["algorithm"]) != (FORMAT, ALGORITHM):
            raise DataError(
                f"{path} has format {manifest['format']}, algorithm {manifest['algorithm']}; "
                f"this code reads {FORMAT}, {ALGORITHM}. {remedy}"
            )
        wrong = [name for name, kind in kinds.items() if not isinstance(manifest[name], kind)]
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise DataError(f"{path}/manifest.json is damaged ({type(error).__name__}: {error}). {remedy}") from error
    if wrong:
        raise DataError(f"{path}/manifest.json is damaged: {', '.join(wrong)}. {remedy}")
    read: dict[str, Any] = manifest
    return read


def hash_orders(global_orders: np.ndarray, regional_orders: np.ndarray) -> str:
    """Identity of the tables: sha256 over shapes and little-endian int32 values, whatever file they came from."""
    digest = hashlib.sha256()
    for table in (global_orders, regional_orders):
        digest.update(json.dumps(table.shape).encode() + np.ascontiguousarray(table, "<i4").tobytes())
    return digest.hexdigest()


def _known_codes(path: Path, store: Store, geometry: Geometry) -> np.ndarray:
    """(T', 1 + regions) sectors of the first hours: of a cache of this store before hours were appended to it, or none.

    Without the last ones that had no wind, which may have come since.
    """
    nothing = np.empty((0, 1 + geometry.regions[0] * geometry.regions[1]), "u1")
    if not store.earlier or not path.exists():
        return nothing
    manifest, before = _read_manifest(path, "Build it again."), read_orders(path)[0]
    if not store.continues(manifest["store_fingerprint"]) or before != geometry:
        return nothing
    codes = np.load(path / "sectors.npy", allow_pickle=False)
    if hashlib.sha256(codes.tobytes()).hexdigest() != manifest["sectors_sha256"]:
        return nothing
    return np.asarray(codes[: 1 + np.flatnonzero(codes[:, 0] != NO_WIND).max(initial=-1)])


def _sectors_of(store: Store, regions: tuple[int, int], sectors: int, known: np.ndarray) -> np.ndarray:
    from rich.console import Console
    from rich.progress import track

    reader, step = ShardReader(store, "weather"), store.shard_hours
    u, v = store.contents.channel("u"), store.contents.channel("v")
    codes = np.empty((len(store.times), 1 + regions[0] * regions[1]), "u1")
    codes[: len(known)] = known
    for start in track(range(len(known) - len(known) % step, len(codes), step), "wind sectors", console=Console(stderr=True)):
        block = reader.read(np.arange(start, min(start + step, len(codes))))
        codes[start : start + step] = sector_codes(block[:, u], block[:, v], regions, sectors)
    return codes
