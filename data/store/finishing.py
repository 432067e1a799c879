"""Closing a store: statistics of all shards together, fingerprint, its final name."""

from __future__ import annotations

import io
import json
import shutil
import warnings
import zipfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import zarr

from data import DataError
from data.store import statistics
from data.store.layout import (
    EPOCH,
    attributes_of,
    content_of,
    contents_of,
    fingerprint_of,
    partial_path,
    parts_path,
    tables_of,
)
from data.store.writing import done_mark, write_array

MARKS = "marks.zip"


def finalise(path: Path, attachments: dict[str, bytes] | None = None) -> str:
    """Merge the shards' moments into statistics, write the fingerprint and rename the store into place.

    Args:
        attachments: files to lay into the store, by name.

    Returns:
        The content fingerprint.

    Raises:
        DataError: shards are missing, or a variable is constant or absent over the training split.
    """
    partial = partial_path(path)
    root = zarr.open_group(partial, mode="r+")
    held = contents_of(root)
    fitted: dict[str, dict[str, float]] = {}
    hashes: dict[str, str] = {}
    years: dict[str, dict[str, Any]] = {}
    for group in held.dynamic:
        marks = _done_marks(path, root, group)
        hashes |= {f"{group}/{i}": mark["sha256"] for i, mark in enumerate(marks)}
        for channel, variable in enumerate(held.groups[group]):
            fitted[variable.name] = statistics.merge([mark["statistics"][channel] for mark in marks], variable)
        missing = np.array([step for mark in marks for step in mark["missing"]], "f4")
        about = {"long_name": "share of missing cells", "units": "1"}
        write_array(root, f"{group}_missing", missing, ("time", f"{group}_variable"), **about)
        _summarise_years(years, root, group, marks, missing)
    for name, field in zip(held.names("static"), np.asarray(root["static"], "f8"), strict=True):
        fitted[name] = {"mean": field.mean(), "std": field.std(), "min": field.min(), "max": field.max(), "count": field.size}
    for name, numbers in fitted.items():
        if not numbers["count"]:
            raise DataError(f"{path}: '{name}' has no valid value in the training split; statistics cannot be fitted.")
    root.attrs["statistics"] = {name: {k: float(x) for k, x in s.items()} for name, s in fitted.items()}
    root.attrs["years"] = years
    root.attrs["content"] = content_of(hashes)
    root.attrs["tables"] = tables_of(root)
    fingerprint = fingerprint_of(root)
    root.attrs["fingerprint"] = fingerprint
    _close(partial, {"shards.json": json.dumps(hashes, indent=0).encode(), MARKS: _zipped(path, hashes), **(attachments or {})})
    partial.rename(path)
    shutil.rmtree(parts_path(path))
    return fingerprint


def _done_marks(path: Path, root: zarr.Group, group: str) -> list[dict[str, Any]]:
    """What is known of every shard of a group."""
    array = root[group]
    assert isinstance(array, zarr.Array)
    shards = -(-array.shape[0] // int(attributes_of(root)["shard_hours"]))
    absent = [i for i in range(shards) if not done_mark(path, group, i).exists()]
    if absent:
        raise DataError(f"{path}: shards {absent[:8]} of '{group}' were never written ({len(absent)} in all).")
    return [json.loads(done_mark(path, group, i).read_text()) for i in range(shards)]


def _zipped(path: Path, shards: Iterable[str]) -> bytes:
    """What is known of every shard, without which a store could not be made longer; the same bytes whenever it is made."""
    content = io.BytesIO()
    with zipfile.ZipFile(content, "w") as archive:
        for name in shards:
            group, shard = name.split("/")
            mark = done_mark(path, group, int(shard))
            archive.writestr(zipfile.ZipInfo(mark.name), mark.read_bytes(), zipfile.ZIP_DEFLATED)
    return content.getvalue()


def _close(partial: Path, files: dict[str, bytes]) -> None:
    for remnant in partial.rglob("*.partial"):  # of writers that were killed
        remnant.unlink()
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Consolidated metadata")
        zarr.consolidate_metadata(partial)
    for name, content in files.items():
        (partial / name).write_bytes(content)


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
        for channel, name in enumerate(contents_of(root).names(group)):
            valid = np.isfinite(low[mine, channel])
            ends = [float(low[mine, channel][valid].min()), float(high[mine, channel][valid].max())] if valid.any() else None
            entry["variables"][name] = {"missing": float(missing[mine, channel].mean()), "range": ends}
