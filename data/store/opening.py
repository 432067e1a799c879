"""Open a finished store and check it: against its own fingerprint, and every shard against its hash."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import zarr
from pydantic import BaseModel, TypeAdapter

from data import DataError
from data.store.layout import (
    DAMAGE,
    EPOCH,
    FORMAT,
    Store,
    attributes_of,
    contents_of,
    fingerprint_of,
    hash_of,
    partial_path,
    shard_file,
    split_indices,
    tables_of,
)


class _Member(BaseModel):
    missing: float
    range: tuple[float, float] | None


class _Year(BaseModel):
    hours: int
    gaps: dict[str, int]
    variables: dict[str, _Member]


_YEARS = TypeAdapter(dict[str, _Year])


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
    while True:
        place = path.stat().st_ino
        try:
            store = _opened(path)
        except (DataError, *DAMAGE) as error:
            if path.stat().st_ino != place:  # a longer store has just taken its place
                continue
            if isinstance(error, DataError):
                raise
            told = (str(error).strip() or type(error).__name__).splitlines()[0]
            raise DataError(f"{path} is damaged, or no store of ours ({told}). Copy or build it again.") from error
        if path.stat().st_ino == place:
            return store


def _opened(path: Path) -> Store:
    root = zarr.open_group(path, mode="r")
    attrs = attributes_of(root)
    if attrs.get("store_format") != FORMAT:
        raise DataError(f"{path} has store format {attrs.get('store_format')}, this code reads {FORMAT}: rebuild it.")
    if fingerprint_of(root) != attrs.get("fingerprint"):
        raise DataError(
            f"{path}: metadata does not match its fingerprint; statistics or coordinates were changed after the "
            "store was written. Rebuild the store, or restore it from where it was copied."
        )
    if "tables" in attrs and tables_of(root) != attrs["tables"]:  # stores of the first versions have no such hash
        raise DataError(f"{path}: its times or missing shares are not what was written. Copy the store again.")
    times = EPOCH + np.asarray(root["time"]).astype("timedelta64[h]")
    static, held = np.asarray(root["static"]), contents_of(root)
    return Store(
        path=path,
        contents=held,
        times=times,
        lat=np.asarray(root["lat"]),
        lon=np.asarray(root["lon"]),
        static=dict(zip(held.names("static"), static, strict=True)),
        missing={group: np.asarray(root[f"{group}_missing"]) for group in held.dynamic},
        statistics=attrs["statistics"],
        years={year: about.model_dump() for year, about in _YEARS.validate_python(attrs.get("years", {})).items()},
        splits={name: (hours,) for name, hours in split_indices(root).items()},
        shard_hours=attrs["shard_hours"],
        provenance=attrs["provenance"],
        content=attrs["content"],
        fingerprint=attrs["fingerprint"],
        earlier=tuple(attrs.get("earlier", ())),
    )


def require_whole(store: Store, name: str) -> None:
    """
    Raises:
        DataError: a shard, GROUP/NUMBER, is not what was written.
    """
    file = store.path / shard_file(name)
    if hash_of(file) != store.shard_hashes()[name]:
        raise DataError(f"{file} is not what was written. Run `python -m data verify`, and copy the store again.")


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
