"""Wind caches of the old code: made here with the old formula written out, read without executing anything."""

from __future__ import annotations

import os
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from data import DataError
from data.store.layout import Store
from data.wind_scan.cache import ScanCache, open_cache
from data.wind_scan.legacy import one_regional_table, ours, read_tables
from tests.launching import module


def old_order(rows: int, cols: int, gh: int, gw: int, angle: float) -> torch.Tensor:
    """Patch by patch, as legacy.md has it: projection of scaled row and column on the wind, stable ascending sort."""
    along = [
        (k % cols / (gw - 1) * 2 - 1) * np.cos(angle) - (k // cols / (gh - 1) * 2 - 1) * np.sin(angle)
        for k in range(rows * cols)
    ]
    return torch.tensor(sorted(range(rows * cols), key=lambda k: round(along[k], 9)))


def old_cache(gh: int = 8, gw: int = 16, regions: tuple[int, int] = (4, 4)) -> dict[str, Any]:
    angles = [2 * np.pi * s / 16 for s in range(16)]
    rh, rw = gh // regions[0], gw // regions[1]
    table = {s: old_order(rh, rw, gh, gw, a) for s, a in enumerate(angles)}
    return {
        "grid_h": gh,
        "grid_w": gw,
        "num_sectors": 16,
        "regions_h": regions[0],
        "regions_w": regions[1],
        "sector_angles": angles,
        "cached_orders": {s: old_order(gh, gw, gh, gw, a) for s, a in enumerate(angles)},
        "regional_cached_orders": {r: {s: o.clone() for s, o in table.items()} for r in range(regions[0] * regions[1])},
    }


def write(path: Path, content: object) -> Path:
    path.write_bytes(pickle.dumps(content))
    return path


def test_orders_come_back_and_equal_ours_on_the_old_units(tmp_path: Path) -> None:
    content = old_cache()
    tables = read_tables(write(tmp_path / "old.pkl", content))
    for s in range(16):
        np.testing.assert_array_equal(tables.global_orders[s], content["cached_orders"][s])
        np.testing.assert_array_equal(one_regional_table(tables)[s], content["regional_cached_orders"][3][s])
    assert tables.differences(ours(tables, tables.geometry.aspect)) == [(0, 0)] * 16
    assert sum(a for a, _ in tables.differences(ours(tables, 1.0))) > 0


def test_f09_pickles_of_equal_orders_differ_in_bytes_and_compare_as_equal(tmp_path: Path) -> None:
    """Two caches with different MD5: a pickle embeds storage pointers, so only the orders can be compared."""
    first, second = old_cache(), old_cache()
    second["cached_orders"] = {s: torch.stack([o, o])[1] for s, o in second["cached_orders"].items()}  # other storages
    a, b = write(tmp_path / "a.pkl", first), write(tmp_path / "b.pkl", second)
    assert a.read_bytes() != b.read_bytes()
    done = module("data", "wind-scan", "compare", str(a), str(b))
    assert done.returncode == 0, done.stderr
    assert "orders are equal" in done.stdout
    second["cached_orders"][5][[3, 7]] = second["cached_orders"][5][[7, 3]]
    second["regional_cached_orders"][2][1] = second["regional_cached_orders"][2][1].flip(0)
    differences = read_tables(a).differences(read_tables(write(b, second)))
    assert [d for d in differences if d != (0, 0)] == [(0, 8), (2, 0)]
    assert (
        "orders differ in 1 (global) and 1 (regional) of 16 sectors"
        in module("data", "wind-scan", "compare", str(a), str(b)).stdout
    )


def test_an_imported_cache_is_one_of_ours_with_the_old_orders(tiny: Store, tiny_scan: ScanCache, tmp_path: Path) -> None:
    content = old_cache()
    file, out = write(tmp_path / "old.pkl", content), tmp_path / "imported"
    done = module("data", "wind-scan", "import-pickle", str(file), "--store", str(tiny.path), "--out", str(out))
    assert done.returncode == 0, done.stderr
    cache = open_cache(out, tiny, patch=2)
    np.testing.assert_array_equal(cache.global_orders[3], content["cached_orders"][3])
    everything = np.arange(cache.hours)
    np.testing.assert_array_equal(cache.sectors(everything), tiny_scan.sectors(everything))
    assert cache.orders_hash != tiny_scan.orders_hash


class Command:
    def __init__(self, command: str) -> None:
        self.command = command

    def __reduce__(self) -> Any:
        return os.system, (self.command,)


class InnerCommand:
    """What a pickled tensor becomes, with a malicious inner pickle for torch to load."""

    def __init__(self, inner: bytes) -> None:
        self.inner = inner

    def __reduce__(self) -> Any:
        return torch.storage._load_from_bytes, (self.inner,)


@pytest.mark.parametrize("level", ["outer", "inner", "inner, plain pickle"])
def test_a_cache_that_runs_a_command_is_refused_and_runs_nothing(level: str, tmp_path: Path) -> None:
    evidence = tmp_path / "executed"
    command = Command(f"touch {evidence}")
    content: dict[str, Any] = old_cache()
    if level == "outer":
        content["sector_angles"] = command
    else:
        torch.save({"x": command}, tmp_path / "inner.pt", _use_new_zipfile_serialization=level == "inner")
        inner = (tmp_path / "inner.pt").read_bytes() if level == "inner" else pickle.dumps(command)
        content["cached_orders"][0] = InnerCommand(inner)
    file = write(tmp_path / "old.pkl", content)
    with pytest.raises(DataError, match="is not opened"):
        read_tables(file)
    assert not evidence.exists()


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda c: c.pop("grid_h"), "has no int 'grid_h'"),
        (lambda c: c["cached_orders"].pop(7), "lacks an order"),
        (lambda c: c["cached_orders"][2].fill_(0), "not a permutation"),
    ],
)
def test_incomplete_caches_are_refused(spoil: Any, message: str, tmp_path: Path) -> None:
    content = old_cache()
    spoil(content)
    with pytest.raises(DataError, match=message):
        read_tables(write(tmp_path / "old.pkl", content))


def test_absent_truncated_and_region_dependent_caches_are_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no wind cache at"):
        read_tables(tmp_path / "none.pkl")
    content = old_cache()
    file = write(tmp_path / "old.pkl", content)
    file.write_bytes(file.read_bytes()[:500])
    with pytest.raises(DataError, match="is damaged|is not opened"):
        read_tables(file)
    content["regional_cached_orders"][5][0] = content["regional_cached_orders"][5][0].flip(0)
    with pytest.raises(DataError, match=r"regions \[5\] have other orders"):
        one_regional_table(read_tables(write(file, content)))
