"""Write a store: create it, write whole shards in any order from any process.

A store is written under `STORE.partial`, with what is known of its shards under `STORE.parts`, and renamed by finishing.py:
what opens is whole.
"""

from __future__ import annotations

import json
import shutil
from dataclasses import asdict
from pathlib import Path
from typing import Any

import google_crc32c
import numpy as np
import zarr

from data import DataError
from data.process.written import write_text
from data.store import statistics
from data.store.layout import (
    EPOCH,
    FORMAT,
    attributes_of,
    contents_of,
    hash_of,
    partial_path,
    parts_path,
    shard_file,
    split_indices,
)
from data.store.reader import EMPTY_CHUNK
from data.variables import ALWAYS, BY_NAME, PUBLISHED, Contents, Variable


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
    contents: Contents = PUBLISHED,
    earlier: tuple[str, ...] = (),
) -> None:
    """Write metadata, coordinates and static fields of a new store; dynamic blocks follow by `write_block`.

    Args:
        times: (T,) hourly datetime64, without gaps (a missing hour is a step of NaN).
        splits: name -> [first, last) time index; statistics are fitted on the one called "train".
        earlier: fingerprints of the stores that this one continues.

    Raises:
        DataError: the store exists, times are not hourly, splits overlap, or a static field is missing or impossible.
    """
    _require_possible(path, times, splits)
    _require_usable(path, contents)
    _require_static(path, static, (len(lat), len(lon)))
    shutil.rmtree(parts_path(path), ignore_errors=True)
    root = zarr.open_group(partial_path(path), mode="w", zarr_format=3)
    since = {"standard_name": "time", "units": "hours since 1970-01-01 00:00:00", "calendar": "proleptic_gregorian"}
    write_array(root, "time", (times.astype("datetime64[h]") - EPOCH).astype("int32"), ("time",), **since)
    write_array(root, "lat", np.asarray(lat, "f8"), ("lat",), standard_name="latitude", units="degrees_north", axis="Y")
    write_array(root, "lon", np.asarray(lon, "f8"), ("lon",), standard_name="longitude", units="degrees_east", axis="X")
    for group, members in contents.groups.items():
        _name_variables(root, group, members)
    fields = np.stack([static[name] for name in contents.names("static")]).astype("f4")
    write_array(root, "static", fields, ("static_variable", "lat", "lon"), coordinates="static_units")
    for group in contents.dynamic:
        shape = len(times), len(contents.groups[group]), len(lat), len(lon)
        _create_dynamic(root, group, shape, shard_hours)
    described: dict[str, Any] = {
        "Conventions": "CF-1.11",
        "store_format": FORMAT,
        "shard_hours": shard_hours,
        "earlier": list(earlier),
        "variables": {group: contents.names(group) for group in contents.groups},
        "definitions": {v.name: asdict(v) for members in contents.groups.values() for v in members if v.name not in BY_NAME},
        "provenance": provenance,
        "splits": {name: [str(times[a]), str(times[b - 1])] for name, (a, b) in splits.items()},
        "missing_values": "NaN; inputs are filled with the training mean, targets get zero weight",
    }
    root.attrs.update(described)
    parts_path(path).mkdir()


def write_block(path: Path, group: str, start: int, block: np.ndarray) -> None:
    """Write one whole shard of `group` and, last, its done-mark with moments, missing shares and hash.

    Args:
        start: first time index, a multiple of the shard length.
        block: (hours, V, H, W) float32; `hours` is the shard length, or what is left of the series.

    Raises:
        DataError: the block is not exactly one shard, or holds values outside a variable's possible range.
    """
    root = zarr.open_group(partial_path(path), mode="r")
    array, shard_hours = root[group], int(attributes_of(root)["shard_hours"])
    assert isinstance(array, zarr.Array)
    expected = min(shard_hours, array.shape[0] - start)
    if start % shard_hours or len(block) != expected:
        raise DataError(f"{path}/{group}: a block must be one whole shard ({expected} hours at {start}).")
    members = contents_of(root).groups[group]
    low, high = _extremes(block)
    for channel, variable in enumerate(members):
        where = f"{path} hours {start}..{start + len(block) - 1}"
        if not np.isnan(low[:, channel]).all():
            _check_range(variable, float(np.nanmin(low[:, channel])), float(np.nanmax(high[:, channel])), where)
    shard = start // shard_hours
    _write_shard(_shard_file(path, group, shard), block, shard_hours, there=~np.isnan(low).all(1))
    train = split_indices(root)["train"]
    inside = block[max(0, train[0] - start) : max(0, train[1] - start)]
    mark = {
        "sha256": hash_of(_shard_file(path, group, shard)),
        "statistics": [statistics.measure(inside[:, channel], variable) for channel, variable in enumerate(members)],
        "low": low.tolist(),
        "high": high.tolist(),
        "missing": np.isnan(block).mean((2, 3)).round(6).tolist(),
    }
    write_text(done_mark(path, group, shard), json.dumps(mark))


def is_written(path: Path, group: str, shard: int) -> bool:
    """Whether a shard of an unfinished store is done and still what was written."""
    mark, file = done_mark(path, group, shard), _shard_file(path, group, shard)
    if not mark.exists():
        return False
    try:
        expected = json.loads(mark.read_text())["sha256"]
    except json.JSONDecodeError:  # a node died before its page reached the disk
        return False
    return bool(expected == hash_of(file))


def write_array(root: zarr.Group, name: str, values: np.ndarray, dims: tuple[str, ...], **attrs: str) -> None:
    """A whole array with its CF attributes."""
    if values.dtype == object:
        array = root.create_array(name, shape=values.shape, dtype=str, dimension_names=dims)
        array[:] = values
    else:
        array = root.create_array(name, data=values, dimension_names=dims, overwrite=True)
    array.attrs.update(attrs)


def _write_shard(file: Path, block: np.ndarray, shard_hours: int, there: np.ndarray) -> None:
    """A shard's file, as docs/data.md lays it out; zarr writes the same, and copies the block twice for it.

    Args:
        there: (hours,) bool: which of them have any value; the others take no space, and a shard without any is no file.
    """
    if not there.any():
        file.unlink(missing_ok=True)  # of an earlier attempt
        return
    size, places = block[0].nbytes, np.full((shard_hours, 2), EMPTY_CHUNK, "<u8")
    places[np.flatnonzero(there)] = [(number * size, size) for number in range(there.sum())]
    index = places.tobytes()
    file.parent.mkdir(parents=True, exist_ok=True)
    with file.open("wb") as out:
        out.write(np.ascontiguousarray(block if there.all() else block[there], "<f4").data)
        out.write(index + google_crc32c.value(index).to_bytes(4, "little"))


def _extremes(block: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Least and largest value of every hour and variable of (T, V, H, W), NaN where there is none."""
    low, high = block.min((2, 3)), block.max((2, 3))
    for hour, channel in np.argwhere(np.isnan(low)):
        field = block[hour, channel]
        valid = field[~np.isnan(field)]
        if valid.size:
            low[hour, channel], high[hour, channel] = valid.min(), valid.max()
    return low, high


def _check_range(variable: Variable, low: float, high: float, where: str) -> None:
    name = variable.name
    if np.isinf(low) or np.isinf(high):
        raise DataError(f"{where}: '{name}' holds infinities. Missing values are NaN.")
    if low < variable.valid_min or high > variable.valid_max:
        raise DataError(
            f"{where}: '{name}' spans {low:.6g} .. {high:.6g}, possible is {variable.valid_min:g} .. "
            f"{variable.valid_max:g} {variable.units}. Check the unit of the source, or whether it has a fill value that its "
            f"files do not declare; if such extremes are real, prepare with --clip {name} or --mask-beyond {name}."
        )


def _shard_file(path: Path, group: str, shard: int) -> Path:
    return partial_path(path) / shard_file(f"{group}/{shard}")


def done_mark(path: Path, group: str, shard: int) -> Path:
    return parts_path(path) / f"{group}-{shard}.json"


def _require_possible(path: Path, times: np.ndarray, splits: dict[str, tuple[int, int]]) -> None:
    if path.exists():
        raise DataError(f"{path} already exists. Remove it first, or write to another path.")
    if not (np.diff(times.astype("datetime64[h]")).astype(int) == 1).all():
        raise DataError(f"{path}: times must be hourly and without gaps (write a missing hour as NaN).")
    bounds = sorted(splits.values())
    overlap = any(a[1] > b[0] for a, b in zip(bounds, bounds[1:], strict=False))
    if "train" not in splits or overlap or bounds[0][0] < 0 or bounds[-1][1] > len(times):
        raise DataError(f"{path}: splits must include 'train', lie inside the data and not overlap: {splits}")


def _require_usable(path: Path, contents: Contents) -> None:
    contents.require(ALWAYS, str(path))
    if not contents.groups["chemistry"]:
        raise DataError(f"{path} would hold no pollutant; there would be nothing to forecast.")


def _require_static(path: Path, static: dict[str, np.ndarray], shape: tuple[int, int]) -> None:
    expected = PUBLISHED.names("static")
    if sorted(static) != sorted(expected):
        raise DataError(f"{path}: static fields must be {expected}, got {sorted(static)}.")
    for name, field in static.items():
        _check_range(BY_NAME[name], float(np.nanmin(field)), float(np.nanmax(field)), where=str(path))
        if field.shape != shape or not np.isfinite(field).all():
            raise DataError(f"{path}: static field '{name}' must be finite with shape {shape}, got {field.shape}.")


def _name_variables(root: zarr.Group, group: str, members: tuple[Variable, ...]) -> None:
    """Coordinates that say what the variables of a group are."""
    dim = f"{group}_variable"
    write_array(root, dim, np.array([v.name for v in members], object), (dim,), long_name=f"{group} variable")
    for kind in ("units", "standard_name", "long_name"):
        values = np.array([getattr(v, kind) for v in members], object)
        write_array(root, f"{group}_{kind}", values, (dim,), long_name=f"{kind} of the {group} variables")


def _create_dynamic(root: zarr.Group, group: str, shape: tuple[int, int, int, int], shard_hours: int) -> None:
    hours, channels, rows, cols = shape
    array = root.create_array(
        group,
        shape=(hours, channels, rows, cols),
        dtype="float32",
        fill_value=float("nan"),
        chunks=(1, channels, rows, cols),
        shards=(shard_hours, channels, rows, cols),
        compressors=None,
        dimension_names=("time", f"{group}_variable", "lat", "lon"),
    )
    array.attrs["coordinates"] = f"{group}_units {group}_standard_name {group}_long_name"
