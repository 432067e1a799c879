"""The zarr v3 store: its layout, what is known of an opened one, and its identity.

Layout of STORE (dimension names and CF attributes make `xarray.open_zarr` show it as one dataset):
  weather   (time, weather_variable, lat, lon)    float32, NaN where missing
  chemistry (time, chemistry_variable, lat, lon)  float32, NaN where missing
  static    (static_variable, lat, lon)           float32
  weather_missing, chemistry_missing (time, *_variable)  share of missing cells
  time, lat, lon, *_variable, *_units             coordinates
Inner chunks hold one time step, shards `shard_hours` of them, so six years are a few hundred files.
Root attributes: format, splits, statistics (training split only), provenance, content hash, fingerprint.
docs/data.md is the specification.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from data import DataError
from data.variables import BY_NAME, PUBLISHED, Contents, contents, restored

if TYPE_CHECKING:
    import zarr

FORMAT = 1
# What zarr and numpy raise on metadata or chunks that are not what was written.
DAMAGE = (OSError, ValueError, KeyError, TypeError, IndexError, AttributeError, AssertionError, RuntimeError, MemoryError,
          OverflowError, ZeroDivisionError, NotImplementedError, EOFError)  # fmt: skip
EMPTY = hashlib.sha256().hexdigest()
EPOCH = np.datetime64("1970-01-01T00", "h")


@dataclass(frozen=True)
class Store:
    """An opened store: metadata, coordinates and static fields; dynamic fields are read by reader.py."""

    path: Path
    contents: Contents  # which variables it holds
    times: np.ndarray  # (T,) datetime64[h]
    lat: np.ndarray  # (H,) degrees north
    lon: np.ndarray  # (W,) degrees east
    static: dict[str, np.ndarray]  # name -> (H, W) float32, units of `contents`
    missing: dict[str, np.ndarray]  # group -> (T, V) share of missing cells
    statistics: dict[str, dict[str, float]]  # name -> mean, std, min, max, count, ... (statistics.py)
    years: dict[str, Any]  # year -> hours, gaps, missing shares and ranges
    splits: dict[str, tuple[tuple[int, int], ...]]  # name -> [first, last) time index of its ranges; a run may choose its own
    shard_hours: int
    provenance: dict[str, Any]
    content: str  # hash of the hashes of all shards
    fingerprint: str
    earlier: tuple[str, ...] = ()  # fingerprints of what it was before hours were appended
    chosen: str = ""  # hash of splits and statistics that are not the store's own

    @property
    def grid(self) -> tuple[int, int]:
        return len(self.lat), len(self.lon)

    @property
    def origin(self) -> str:
        """Fingerprint of before anything was appended: one name for the same data at any length."""
        return (*self.earlier, self.fingerprint)[0]

    def continues(self, fingerprint: str) -> bool:
        """Whether this is the data of a fingerprint, or the same with later hours appended."""
        return fingerprint in (*self.earlier, self.fingerprint)

    def shard_hashes(self) -> dict[str, str]:
        """GROUP/NUMBER of every shard -> sha256 of its file when it was written.

        Raises:
            DataError: the list is damaged; it is part of the fingerprint.
        """
        path = self.path / "shards.json"
        try:
            hashes = json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError, RecursionError) as error:
            raise DataError(f"{path} cannot be read ({error}). Copy the store again.") from error
        if content_of(hashes) != self.content:
            raise DataError(f"{path} is not what was written with the store. Copy the store again.")
        listed: dict[str, str] = hashes
        return listed

    def inside(self, split: str) -> np.ndarray:
        """(T,) bool: which hours lie in a split.

        Raises:
            DataError: there is no such split.
        """
        if split not in self.splits:
            raise DataError(f"{self.path}: no split '{split}'; there is {', '.join(self.splits)}.")
        hours = np.zeros(len(self.times), bool)
        for first, last in self.splits[split]:
            hours[first:last] = True
        return hours


def partial_path(path: Path) -> Path:
    return path.with_name(path.name + ".partial")


def parts_path(path: Path) -> Path:
    """The directory beside an unfinished store that holds the done-marks of its shards."""
    return path.with_name(path.name + ".parts")


def hash_of(file: Path) -> str:
    """sha256 of a shard; one whose hours are all missing is no file."""
    if not file.exists():
        return EMPTY
    with file.open("rb") as content:
        return hashlib.file_digest(content, "sha256").hexdigest()


def shard_file(name: str) -> Path:
    """The file, inside the store, of a shard as shards.json names it: GROUP/NUMBER."""
    group, shard = name.split("/")
    return Path(group, "c", shard, "0", "0", "0")


def split_indices(root: zarr.Group) -> dict[str, tuple[int, int]]:
    first = EPOCH + np.asarray(root["time"])[0]
    hour = np.timedelta64(1, "h")
    bounds = {
        name: [int((np.datetime64(t, "h") - first) // hour) for t in ends]
        for name, ends in attributes_of(root)["splits"].items()
    }
    return {name: (a, b + 1) for name, (a, b) in bounds.items()}


def contents_of(root: zarr.Group) -> Contents:
    """The variables of a store; those of the first versions held the published ones and did not say so."""
    attrs = attributes_of(root)
    if "variables" not in attrs:
        return PUBLISHED
    own = {name: restored(about) for name, about in attrs["definitions"].items()}
    return contents((own | BY_NAME)[name] for group in attrs["variables"].values() for name in group)


def attributes_of(root: zarr.Group) -> dict[str, Any]:
    return dict(root.attrs)


def fingerprint_of(root: zarr.Group) -> str:
    """Identity of content and metadata: any change of values, coordinates, statistics or splits changes it."""
    described = {k: root.attrs[k] for k in ("store_format", "splits", "statistics", "content")}
    described |= {k: np.asarray(root[k]).tolist() for k in ("lat", "lon")}
    described["static"] = hashlib.sha256(np.ascontiguousarray(np.asarray(root["static"])).tobytes()).hexdigest()
    described["time"] = [int(np.asarray(root["time"])[i]) for i in (0, -1)]
    held = contents_of(root)
    described["variables"] = {g: [[v.name, v.units] for v in members] for g, members in held.groups.items()}
    if root.attrs.get("definitions"):
        described["definitions"] = root.attrs["definitions"]
    return hashlib.sha256(json.dumps(described, sort_keys=True).encode()).hexdigest()


def content_of(hashes: Any) -> str:
    return hashlib.sha256(json.dumps(hashes).encode()).hexdigest()


def tables_of(root: zarr.Group) -> str:
    """Hash of what grows with the length of the data and is no shard: the times, and which cells are missing."""
    digest = hashlib.sha256()
    for name in ("time", *(f"{group}_missing" for group in contents_of(root).dynamic)):
        digest.update(np.ascontiguousarray(np.asarray(root[name])).tobytes())
    return digest.hexdigest()
