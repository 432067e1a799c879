"""Splits that a run chooses itself, instead of those that a store was made with, and their statistics.

A split is one or several ranges of days; what lies in none of them is not used. The statistics of a chosen training split
are measured once, by `python -m data statistics`, and kept beside the store under a hash of content and hours.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np

from data import DataError
from data.process.workers import results
from data.process.written import write_text
from data.store import statistics
from data.store.layout import Store
from data.store.reader import ShardReader

Days = Sequence[tuple[str, str]]  # first and last day of every range, both inside
Hours = tuple[tuple[int, int], ...]  # [first, last) time index of every range


def hours_of(store: Store, name: str, days: Days) -> Hours:
    """
    Raises:
        DataError: a range holds no hour of the store, or is no range of days.
    """
    ranges = []
    for first, last in days:
        try:
            ends = [day.astype(store.times.dtype) for day in (np.datetime64(first, "D"), np.datetime64(last, "D") + 1)]
        except ValueError as error:
            raise DataError(f"split '{name}': {first} .. {last} are no days: write them as 2013-01-01.") from error
        whole = store.times[-1] + np.timedelta64(1, "h")  # where the hours of the store end
        if ends[0] < whole < ends[1]:
            last_day = whole.astype("datetime64[D]") - 1
            raise DataError(
                f"split '{name}': {first} .. {last} goes beyond {store.path}, which ends at "
                f"{store.times[-1]}: hours that are appended later would change it. Write "
                f"{last_day}, "
                "the last whole day, or an earlier one."
            )
        start, stop = (int(place) for place in np.searchsorted(store.times, ends))
        if start >= stop:
            span = f"{store.times[0]} .. {store.times[-1]}"
            raise DataError(f"split '{name}': {first} .. {last} holds no hour of {store.path}, which spans {span}.")
        ranges.append((start, stop))
    return tuple(sorted(ranges))


def split_as(store: Store, splits: dict[str, list[tuple[str, str]]]) -> Store:
    """The same store with other splits, and the statistics of their training split.

    Raises:
        DataError: a range holds no hour of the store, or the statistics were never measured or are damaged.
    """
    chosen = {name: hours_of(store, name, days) for name, days in splits.items()}
    path = kept_at(store, chosen["train"])
    try:
        kept = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        asked = " ".join(f"--split {first} {last}" for first, last in splits["train"])
        raise DataError(
            f"the statistics of {store.path} over the training split that the run chooses were never measured. Run once\n"
            f"  python -m data statistics {store.path} {asked}"
        ) from error
    except ValueError as error:
        raise DataError(f"{path} is damaged ({error}). Remove it, and run `python -m data statistics` again.") from error
    if kept.get("sha256") != _hash_of(kept.get("statistics")):
        raise DataError(f"{path} is not what was measured. Remove it, and run `python -m data statistics` again.")
    identity = _hash_of([{name: list(hours) for name, hours in chosen.items()}, kept["sha256"]])
    return replace(store, splits=chosen, statistics=kept["statistics"], chosen=identity)


def kept_at(store: Store, train: Hours) -> Path:
    """Where the statistics of a training split are kept: beside the store, named by its content and the split's hours."""
    return store.path.with_name(f"{store.path.name}.statistics") / f"{_hash_of([store.content, list(train)])[:24]}.json"


def measure(store: Store, train: Hours, workers: int) -> Iterator[int]:
    """Measure a training split and keep its statistics; the number of shards that are done, as they are.

    Raises:
        DataError: a variable is constant or absent over the split, or a shard cannot be read.
    """
    tasks = list(_tasks(store, train))
    parts: dict[str, list[dict[str, Any]]] = {}
    for done, measured in enumerate(results(_measure, tasks, workers), 1):
        for name, part in measured.items():
            parts.setdefault(name, []).append(part)
        yield done
    held = store.contents
    fitted = {name: statistics.merge(parts[name], held.variable(name)) for name in held.hourly}
    absent = [name for name, numbers in fitted.items() if not numbers["count"]]
    if absent:
        raise DataError(f"{store.path}: '{absent[0]}' has no valid value in this split; statistics cannot be measured.")
    fitted |= {name: store.statistics[name] for name in held.names("static")}
    path = kept_at(store, train)
    path.parent.mkdir(exist_ok=True)
    hours = [[str(store.times[first]), str(store.times[last - 1])] for first, last in train]
    content = {"train": hours, "sha256": _hash_of(fitted), "statistics": fitted}
    write_text(path, json.dumps(content, indent=1))


def shards_of(store: Store, train: Hours) -> int:
    """How many shards `measure` reads."""
    return len(list(_tasks(store, train)))


def _tasks(store: Store, train: Hours) -> Iterator[tuple[Path, str, int, int]]:
    """Group and hours of what is measured at once: never beyond a shard or a range, as when the store was written."""
    for group in store.contents.dynamic:
        for first, last in train:
            for start in range(first - first % store.shard_hours, last, store.shard_hours):
                yield store.path, group, max(first, start), min(last, start + store.shard_hours)


def _measure(path: Path, group: str, first: int, last: int) -> dict[str, dict[str, Any]]:
    store = _opened(path)
    fields = ShardReader(store, group).read(np.arange(first, last))
    return {v.name: statistics.measure(fields[:, channel], v) for channel, v in enumerate(store.contents.groups[group])}


@lru_cache(maxsize=1)
def _opened(path: Path) -> Store:
    from data.store.opening import open_store  # zarr is for those who open

    return open_store(path)


def _hash_of(tree: Any) -> str:
    return hashlib.sha256(json.dumps(tree, sort_keys=True).encode()).hexdigest()
