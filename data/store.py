"""The zarr v3 store: layout, creation (init -> write blocks -> finalise), opening, fingerprint.

Layout of STORE (dimension names and CF attributes make `xarray.open_zarr` show it as one dataset):
  weather   (time, weather_variable, lat, lon)    float32, NaN where missing
  chemistry (time, chemistry_variable, lat, lon)  float32, NaN where missing
  static    (static_variable, lat, lon)           float32
  weather_missing, chemistry_missing (time, *_variable)  share of missing cells
  time, lat, lon, *_variable, *_units             coordinates
Inner chunks hold one time step, shards `shard_hours` of them, so six years are a few hundred files.
Root attributes: format, splits, statistics (training split only), provenance, content hash, fingerprint.
A store is written under `STORE.partial`, with what is known of its shards under `STORE.parts`, and renamed by `finalise`:
what opens is whole. docs/data.md is the specification.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import zarr

from data import DataError, statistics, variables

FORMAT = 1
DYNAMIC_GROUPS = ("weather", "chemistry")
# What zarr and numpy raise on metadata or chunks that are not what was written.
DAMAGE = (OSError, ValueError, KeyError, TypeError, IndexError, AttributeError, AssertionError, RuntimeError, MemoryError,
          OverflowError, ZeroDivisionError, NotImplementedError, EOFError)  # fmt: skip
EMPTY = hashlib.sha256().hexdigest()
EPOCH = np.datetime64("1970-01-01T00", "h")


@dataclass(frozen=True)
class Store:
    """An opened store: metadata, coordinates and static fields; dynamic fields are read by reader.py."""

    path: Path
    times: np.ndarray  # (T,) datetime64[h]
    lat: np.ndarray  # (H,) degrees north
    lon: np.ndarray  # (W,) degrees east
    static: dict[str, np.ndarray]  # name -> (H, W) float32, units of variables.py
    missing: dict[str, np.ndarray]  # group -> (T, V) share of missing cells
    statistics: dict[str, dict[str, float]]  # name -> mean, std, min, max, count, ... (statistics.py)
    years: dict[str, Any]  # year -> hours, gaps, missing shares and ranges
    splits: dict[str, tuple[int, int]]  # name -> [first, last) time index
    shard_hours: int
    provenance: dict[str, Any]
    content: str  # hash of the hashes of all shards
    fingerprint: str

    @property
    def grid(self) -> tuple[int, int]:
        return len(self.lat), len(self.lon)

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
        if _content_of(hashes) != self.content:
            raise DataError(f"{path} is not what was written with the store. Copy the store again.")
        listed: dict[str, str] = hashes
        return listed

    def split(self, name: str) -> tuple[int, int]:
        if name not in self.splits:
            raise DataError(f"{self.path}: no split '{name}'; the store has {', '.join(self.splits)}.")
        return self.splits[name]


def partial_path(path: Path) -> Path:
    return path.with_name(path.name + ".partial")


def parts_path(path: Path) -> Path:
    """The directory beside an unfinished store that holds the done-marks of its shards."""
    return path.with_name(path.name + ".parts")


def create(
    path: Path,
    *,
    times: np.ndarray,
    lat: np.ndarray,
    lon: np.ndarray,
    static: dict[str, np.ndarray],
    splits: dict[str, tuple[int, int]],
    shard_hours: int,
    provenance: dict[str, Any],
) -> None:
    """Write metadata, coordinates and static fields of a new store; dynamic blocks follow by `write_block`.

    Args:
        times: (T,) hourly datetime64, without gaps (a missing hour is a step of NaN).
        splits: name -> [first, last) time index; statistics are fitted on the one called "train".

    Raises:
        DataError: the store exists, times are not hourly, splits overlap, or a static field is missing or impossible.
    """
    if path.exists():
        raise DataError(f"{path} already exists. Remove it first, or write to another path.")
    if not (np.diff(times.astype("datetime64[h]")).astype(int) == 1).all():
        raise DataError(f"{path}: times must be hourly and without gaps (write a missing hour as NaN).")
    bounds = sorted(splits.values())
    overlap = any(a[1] > b[0] for a, b in zip(bounds, bounds[1:], strict=False))
    if "train" not in splits or overlap or bounds[0][0] < 0 or bounds[-1][1] > len(times):
        raise DataError(f"{path}: splits must include 'train', lie inside the data and not overlap: {splits}")
    expected = variables.names("static")
    if sorted(static) != sorted(expected):
        raise DataError(f"{path}: static fields must be {expected}, got {sorted(static)}.")
    shape = (len(lat), len(lon))
    for name, field in static.items():
        _check_range(name, float(np.nanmin(field)), float(np.nanmax(field)), where=str(path))
        if field.shape != shape or not np.isfinite(field).all():
            raise DataError(f"{path}: static field '{name}' must be finite with shape {shape}, got {field.shape}.")

    shutil.rmtree(parts_path(path), ignore_errors=True)
    root = zarr.open_group(partial_path(path), mode="w", zarr_format=3)
    _coordinate(
        root,
        "time",
        (times.astype("datetime64[h]") - EPOCH).astype("int32"),
        ("time",),
        standard_name="time",
        units="hours since 1970-01-01 00:00:00",
        calendar="proleptic_gregorian",
    )
    _coordinate(root, "lat", np.asarray(lat, "f8"), ("lat",), standard_name="latitude", units="degrees_north", axis="Y")
    _coordinate(root, "lon", np.asarray(lon, "f8"), ("lon",), standard_name="longitude", units="degrees_east", axis="X")
    for group, members in variables.GROUPS.items():
        dim = f"{group}_variable"
        _coordinate(root, dim, np.array([v.name for v in members], object), (dim,), long_name=f"{group} variable")
        _coordinate(
            root,
            f"{group}_units",
            np.array([v.units for v in members], object),
            (dim,),
            long_name=f"units of the {group} variables",
        )
        for kind in ("standard_name", "long_name"):
            _coordinate(root, f"{group}_{kind}", np.array([getattr(v, kind) for v in members], object), (dim,),
                        long_name=f"{kind} of the {group} variables")  # fmt: skip
        if group == "static":
            _coordinate(
                root,
                "static",
                np.stack([static[v.name] for v in members]).astype("f4"),
                (dim, "lat", "lon"),
                coordinates="static_units",
            )
            continue
        array = root.create_array(
            group, shape=(len(times), len(members), *shape), dtype="float32", fill_value=float("nan"),
            chunks=(1, len(members), *shape), shards=(shard_hours, len(members), *shape),
            compressors=None, dimension_names=("time", dim, "lat", "lon"),
        )  # fmt: skip
        array.attrs["coordinates"] = f"{group}_units {group}_standard_name {group}_long_name"
    root.attrs.update({
        "Conventions": "CF-1.11", "store_format": FORMAT, "shard_hours": shard_hours, "provenance": provenance,
        "splits": {name: [str(times[a]), str(times[b - 1])] for name, (a, b) in splits.items()},
        "missing_values": "NaN; inputs are filled with the training mean, targets get zero weight",
    })  # fmt: skip
    parts_path(path).mkdir()


def write_block(path: Path, group: str, start: int, block: np.ndarray) -> None:
    """Write one whole shard of `group` and, last, its done-mark with moments, missing shares and hash.

    Args:
        start: first time index, a multiple of the shard length.
        block: (hours, V, H, W) float32; `hours` is the shard length, or what is left of the series.

    Raises:
        DataError: the block is not exactly one shard, or holds values outside a variable's possible range.
    """
    root = zarr.open_group(partial_path(path), mode="r+")
    array, shard_hours = root[group], int(_attributes(root)["shard_hours"])
    assert isinstance(array, zarr.Array)
    expected = min(shard_hours, array.shape[0] - start)
    if start % shard_hours or len(block) != expected:
        raise DataError(f"{path}/{group}: a block must be one whole shard ({expected} hours at {start}).")
    members = variables.GROUPS[group]
    low, high = _extremes(block)
    for channel, variable in enumerate(members):
        where = f"{path} hours {start}..{start + len(block) - 1}"
        if not np.isnan(low[:, channel]).all():
            _check_range(variable.name, float(np.nanmin(low[:, channel])), float(np.nanmax(high[:, channel])), where)
    shard = start // shard_hours
    _shard_file(path, group, shard).unlink(missing_ok=True)  # or zarr would read it first, even where it is damaged
    array[start : start + len(block)] = block

    train = _split_indices(root)["train"]
    inside = block[max(0, train[0] - start) : max(0, train[1] - start)]
    mark = {
        "sha256": hash_of(_shard_file(path, group, shard)),
        "statistics": [statistics.measure(inside[:, channel], variable) for channel, variable in enumerate(members)],
        "low": low.tolist(), "high": high.tolist(), "missing": np.isnan(block).mean((2, 3)).round(6).tolist(),
    }  # fmt: skip
    being_written = _done_mark(path, group, shard).with_suffix(f".{os.getpid()}")
    being_written.write_text(json.dumps(mark))
    being_written.rename(_done_mark(path, group, shard))


def is_written(path: Path, group: str, shard: int) -> bool:
    """Whether a shard of an unfinished store is done and still what was written."""
    mark, file = _done_mark(path, group, shard), _shard_file(path, group, shard)
    if not mark.exists():
        return False
    try:
        expected = json.loads(mark.read_text())["sha256"]
    except json.JSONDecodeError:  # a node died before its page reached the disk
        return False
    return bool(expected == hash_of(file))


def finalise(path: Path, attachments: dict[str, str] | None = None) -> str:
    """Merge the shards' moments into statistics, write the fingerprint and rename the store into place.

    Args:
        attachments: text files to lay into the store, by name.

    Returns:
        The content fingerprint.

    Raises:
        DataError: shards are missing, or a variable is constant or absent over the training split.
    """
    partial = partial_path(path)
    root = zarr.open_group(partial, mode="r+")
    shard_hours = int(_attributes(root)["shard_hours"])
    fitted: dict[str, dict[str, float]] = {}
    hashes: dict[str, str] = {}
    years: dict[str, dict[str, Any]] = {}
    for group in DYNAMIC_GROUPS:
        array = root[group]
        assert isinstance(array, zarr.Array)
        shards = -(-array.shape[0] // shard_hours)
        absent = [i for i in range(shards) if not _done_mark(path, group, i).exists()]
        if absent:
            raise DataError(f"{path}: shards {absent[:8]} of '{group}' were never written ({len(absent)} in all).")
        marks = [json.loads(_done_mark(path, group, i).read_text()) for i in range(shards)]
        hashes |= {f"{group}/{i}": mark["sha256"] for i, mark in enumerate(marks)}
        for channel, variable in enumerate(variables.GROUPS[group]):
            fitted[variable.name] = statistics.merge([mark["statistics"][channel] for mark in marks], variable)
        missing = np.array([step for mark in marks for step in mark["missing"]], "f4")
        _coordinate(root, f"{group}_missing", missing, ("time", f"{group}_variable"),
                    long_name="share of missing cells", units="1")  # fmt: skip
        _summarise_years(years, root, group, marks, missing)
    for name, field in zip(variables.names("static"), np.asarray(root["static"], "f8"), strict=True):
        fitted[name] = {"mean": field.mean(), "std": field.std(), "min": field.min(), "max": field.max(),
                            "count": field.size}  # fmt: skip
    for name, numbers in fitted.items():
        if not numbers["count"]:
            raise DataError(f"{path}: '{name}' has no valid value in the training split; statistics cannot be fitted.")
    root.attrs["statistics"] = {name: {k: float(x) for k, x in s.items()} for name, s in fitted.items()}
    root.attrs["years"] = years
    root.attrs["content"] = _content_of(hashes)
    root.attrs["tables"] = _tables_of(root)
    fingerprint = _fingerprint(root)
    root.attrs["fingerprint"] = fingerprint
    for remnant in partial.rglob("*.partial"):  # of writers that were killed
        remnant.unlink()
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Consolidated metadata")
        zarr.consolidate_metadata(partial)
    for name, text in {"shards.json": json.dumps(hashes, indent=0), **(attachments or {})}.items():
        (partial / name).write_text(text)
    partial.rename(path)
    shutil.rmtree(parts_path(path))
    return fingerprint


def open_store(path: str | Path) -> Store:
    """Open a finished store and check it against its own fingerprint.

    Raises:
        DataError: absent, unfinished, of another format, or its metadata was edited after it was written.
    """
    path = Path(path)
    if not (path / "zarr.json").exists():
        if partial_path(path).exists():
            raise DataError(f"{path} is unfinished ({partial_path(path).name} exists): run the command that builds it.")
        raise DataError(
            f"no store at {path}. Build one with\n  python -m data synthesize {path}\n"
            "or correct `data.store` in the configuration."
        )
    try:
        return _opened(path)
    except DAMAGE as error:
        told = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise DataError(f"{path} is damaged, or no store of ours ({told}). Copy or build it again.") from error


def _opened(path: Path) -> Store:
    root = zarr.open_group(path, mode="r")
    attrs = _attributes(root)
    if attrs.get("store_format") != FORMAT:
        raise DataError(f"{path} has store format {attrs.get('store_format')}, this code reads {FORMAT}: rebuild it.")
    if _fingerprint(root) != attrs.get("fingerprint"):
        raise DataError(
            f"{path}: metadata does not match its fingerprint; statistics or coordinates were changed after the "
            "store was written. Rebuild the store, or restore it from where it was copied."
        )
    if "tables" in attrs and _tables_of(root) != attrs["tables"]:  # stores of the first versions have no such hash
        raise DataError(f"{path}: its times or missing shares are not what was written. Copy the store again.")
    times = EPOCH + np.asarray(root["time"]).astype("timedelta64[h]")
    static = np.asarray(root["static"])
    return Store(
        path=path, times=times, lat=np.asarray(root["lat"]), lon=np.asarray(root["lon"]),
        static=dict(zip(variables.names("static"), static, strict=True)),
        missing={group: np.asarray(root[f"{group}_missing"]) for group in DYNAMIC_GROUPS},
        statistics=attrs["statistics"], years=attrs.get("years", {}), splits=_split_indices(root),
        shard_hours=attrs["shard_hours"], provenance=attrs["provenance"], content=attrs["content"],
        fingerprint=attrs["fingerprint"],
    )  # fmt: skip


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


def verify(store: Store) -> list[str]:
    """Re-hash every shard; what differs from what was written, a line each."""
    wrong = []
    for name, expected in store.shard_hashes().items():
        group, shard = name.split("/")
        first = int(shard) * store.shard_hours
        last = min(first + store.shard_hours, len(store.times)) - 1
        file = store.path / shard_file(name)
        if hash_of(file) != expected:
            wrong.append(f"{group} from {store.times[first]} to {store.times[last]} ({file}) is not what was written")
    return wrong


def _coordinate(root: zarr.Group, name: str, values: np.ndarray, dims: tuple[str, ...], **attrs: str) -> None:
    if values.dtype == object:
        array = root.create_array(name, shape=values.shape, dtype=str, dimension_names=dims)
        array[:] = values
    else:
        array = root.create_array(name, data=values, dimension_names=dims, overwrite=True)
    array.attrs.update(attrs)


def _extremes(block: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Least and largest value of every hour and variable of (T, V, H, W), NaN where there is none."""
    low, high = block.min((2, 3)), block.max((2, 3))
    for hour, channel in np.argwhere(np.isnan(low)):
        field = block[hour, channel]
        valid = field[~np.isnan(field)]
        if valid.size:
            low[hour, channel], high[hour, channel] = valid.min(), valid.max()
    return low, high


def _check_range(name: str, low: float, high: float, where: str) -> None:
    variable = variables.BY_NAME[name]
    if np.isinf(low) or np.isinf(high):
        raise DataError(f"{where}: '{name}' holds infinities. Missing values are NaN.")
    if low < variable.valid_min or high > variable.valid_max:
        raise DataError(
            f"{where}: '{name}' spans {low:.6g} .. {high:.6g}, possible is {variable.valid_min:g} .. "
            f"{variable.valid_max:g} {variable.units}. Check the unit of the source, or whether it has a fill value that its "
            "files do not declare."
        )


def _summarise_years(
    years: dict[str, Any], root: zarr.Group, group: str, marks: list[dict[str, Any]], missing: np.ndarray
) -> None:
    """Of every calendar year: hours, wholly missing hours, and missing share and range of every variable of `group`."""
    low, high = (np.array([hour for mark in marks for hour in mark[key]], "f8") for key in ("low", "high"))
    year_of = (EPOCH + np.asarray(root["time"]).astype("timedelta64[h]")).astype("datetime64[Y]")
    for year in np.unique(year_of):
        mine = year_of == year
        entry = years.setdefault(str(year), {"hours": int(mine.sum()), "gaps": {}, "variables": {}})
        entry["gaps"][group] = int((missing[mine] >= 1.0).all(1).sum())
        for channel, name in enumerate(variables.names(group)):
            valid = np.isfinite(low[mine, channel])
            ends = [float(low[mine, channel][valid].min()), float(high[mine, channel][valid].max())] if valid.any() else None
            entry["variables"][name] = {"missing": float(missing[mine, channel].mean()), "range": ends}


def _split_indices(root: zarr.Group) -> dict[str, tuple[int, int]]:
    first = EPOCH + np.asarray(root["time"])[0]
    hour = np.timedelta64(1, "h")
    bounds = {name: [int((np.datetime64(t, "h") - first) // hour) for t in ends]
              for name, ends in _attributes(root)["splits"].items()}  # fmt: skip
    return {name: (a, b + 1) for name, (a, b) in bounds.items()}


def _attributes(root: zarr.Group) -> dict[str, Any]:
    return dict(root.attrs)


def _fingerprint(root: zarr.Group) -> str:
    """Identity of content and metadata: any change of values, coordinates, statistics or splits changes it."""
    described = {k: root.attrs[k] for k in ("store_format", "splits", "statistics", "content")}
    described |= {k: np.asarray(root[k]).tolist() for k in ("lat", "lon")}
    described["static"] = hashlib.sha256(np.ascontiguousarray(np.asarray(root["static"])).tobytes()).hexdigest()
    described["time"] = [int(np.asarray(root["time"])[i]) for i in (0, -1)]
    described["variables"] = {g: [[v.name, v.units] for v in members] for g, members in variables.GROUPS.items()}
    return hashlib.sha256(json.dumps(described, sort_keys=True).encode()).hexdigest()


def _content_of(hashes: Any) -> str:
    return hashlib.sha256(json.dumps(hashes).encode()).hexdigest()


def _tables_of(root: zarr.Group) -> str:
    """Hash of what grows with the length of the data and is no shard: the times, and which cells are missing."""
    digest = hashlib.sha256()
    for name in ("time", *(f"{group}_missing" for group in DYNAMIC_GROUPS)):
        digest.update(np.ascontiguousarray(np.asarray(root[name])).tobytes())
    return digest.hexdigest()


def _shard_file(path: Path, group: str, shard: int) -> Path:
    return partial_path(path) / shard_file(f"{group}/{shard}")


def _done_mark(path: Path, group: str, shard: int) -> Path:
    return parts_path(path) / f"{group}-{shard}.json"
