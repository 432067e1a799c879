"""The node-local copy: filled by parts, checked, shared, and mended."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest

from data import DataError
from data.store import node_copy
from data.store.layout import Store
from data.store.opening import open_store
from data.store.reader import ShardReader


def test_parts_fill_a_copy_that_opens_and_reads_the_same(tiny: Store, tmp_path: Path) -> None:
    for part in range(3):
        node_copy.fill(tiny, tmp_path / "cache", part, 3)
    copy = open_store(node_copy.place(tiny, tmp_path / "cache"))
    assert copy.fingerprint == tiny.fingerprint
    hours = np.arange(0, len(tiny.times), 7)
    np.testing.assert_array_equal(ShardReader(copy, "chemistry").read(hours), ShardReader(tiny, "chemistry").read(hours))


def test_a_second_run_copies_nothing_but_what_rotted(tiny: Store, tmp_path: Path) -> None:
    node_copy.fill(tiny, tmp_path, 0, 1)
    copy = node_copy.place(tiny, tmp_path)
    rotten, whole = copy / "weather/c/0/0/0/0", copy / "weather/c/1/0/0/0"
    truth, untouched = rotten.read_bytes(), whole.stat().st_mtime_ns
    rotten.write_bytes(truth[:1000] + b"?" + truth[1001:])
    node_copy.fill(tiny, tmp_path, 0, 1)
    assert rotten.read_bytes() == truth
    assert whole.stat().st_mtime_ns == untouched


def test_a_source_that_rotted_is_refused_and_leaves_no_copy(tiny: Store, tmp_path: Path) -> None:
    shutil.copytree(tiny.path, tmp_path / "s.zarr")
    shard = tmp_path / "s.zarr/chemistry/c/2/0/0/0"
    shard.write_bytes(shard.read_bytes()[:-9] + b"123456789")
    with pytest.raises(DataError, match="is not what was written"):
        node_copy.fill(open_store(tmp_path / "s.zarr"), tmp_path / "cache", 0, 1)
    assert not list((tmp_path / "cache").rglob("chemistry/c/2/0/0/*"))


def test_no_room_is_said_before_anything_is_copied(tiny: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(10**6, 10**6, 10))  # type: ignore[attr-defined]
    with pytest.raises(DataError, match=r"1/2 of the copy of .* needs 0.0 GB"):
        node_copy.fill(tiny, tmp_path, 0, 2)
    assert not list(tmp_path.rglob("*"))
