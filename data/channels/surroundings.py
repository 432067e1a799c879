"""What a forecast needs of a store beside its hours, in one small file: grid, static fields, statistics, orders of the scan.

A run keeps it with itself, so that it can forecast where its store is not.
"""

from __future__ import annotations

import hashlib
import json
import zipfile
import zlib
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from data import DataError
from data.process.written import being_written
from data.store.layout import DAMAGE, Store
from data.variables import contents, restored
from data.wind_scan.cache import ScanCache
from data.wind_scan.orders import Geometry

FILE = "surroundings.npz"


def keep(store: Store, scan: ScanCache | None, path: Path) -> None:
    """Write them, replacing what is there."""
    held = [variable for members in store.contents.groups.values() for variable in members]
    about = {
        "variables": [asdict(variable) for variable in held],
        "statistics": store.statistics,
        "fingerprint": store.fingerprint,
        "earlier": list(store.earlier),
        "geometry": None if scan is None else asdict(scan.geometry),
        "orders_hash": None if scan is None else scan.orders_hash,
    }
    arrays = {"lat": np.asarray(store.lat, "f8"), "lon": np.asarray(store.lon, "f8")}
    arrays |= {f"static_{name}": field for name, field in store.static.items()}
    if scan is not None:
        arrays |= {"global_orders": scan.global_orders, "regional_orders": scan.regional_orders}
    text = json.dumps(about)
    sha256 = np.array(_digest(text, arrays))
    arrays |= {"about": np.frombuffer(text.encode(), "u1"), "sha256": sha256}
    with being_written(path) as partial, partial.open("wb") as file:
        np.savez(file, allow_pickle=False, **arrays)


def restore(path: Path) -> tuple[Store, ScanCache | None]:
    """A store without hours, and the scan without sectors.

    Raises:
        DataError: the file is absent, or not what was written.
    """
    try:
        with np.load(path, allow_pickle=False) as file:
            arrays = {name: file[name] for name in file.files}
        text, sha256 = arrays.pop("about").tobytes().decode(), str(arrays.pop("sha256"))
    except FileNotFoundError as error:
        raise DataError(
            f"{path} is not there: the run is of an older version. Where its store is, `python -m trainer forecast` writes it."
        ) from error
    except (*DAMAGE, zipfile.BadZipFile, zlib.error) as error:
        raise DataError(f"{path} is damaged ({error}). Remove it; where the store is, it is written again.") from error
    if _digest(text, arrays) != sha256:
        raise DataError(f"{path} is not what was written. Remove it; where the store is, it is written again.")
    return _store(json.loads(text), arrays, path), _scan(json.loads(text), arrays, path)


def _store(about: dict[str, Any], arrays: dict[str, np.ndarray], path: Path) -> Store:
    static = {name.removeprefix("static_"): field for name, field in arrays.items() if name.startswith("static_")}
    return Store(
        path=path,
        contents=contents(restored(one) for one in about["variables"]),
        times=np.empty(0, "datetime64[h]"),
        lat=arrays["lat"],
        lon=arrays["lon"],
        static=static,
        missing={},
        statistics=about["statistics"],
        years={},
        splits={},
        shard_hours=1,
        provenance={},
        content="",
        fingerprint=about["fingerprint"],
        earlier=tuple(about.get("earlier", ())),
    )


def _scan(about: dict[str, Any], arrays: dict[str, np.ndarray], path: Path) -> ScanCache | None:
    stated = about["geometry"]
    if stated is None:
        return None
    geometry = Geometry(**{**stated, "grid": tuple(stated["grid"]), "regions": tuple(stated["regions"])})
    return ScanCache(path, geometry, arrays["global_orders"], arrays["regional_orders"], {}, about["orders_hash"])


def _digest(text: str, arrays: dict[str, np.ndarray]) -> str:
    digest = hashlib.sha256(text.encode())
    for name, values in sorted(arrays.items()):
        digest.update(name.encode() + str(values.shape).encode() + np.ascontiguousarray(values).tobytes())
    return digest.hexdigest()
