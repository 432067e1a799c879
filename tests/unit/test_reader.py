"""Reading hours from shards, against zarr itself, and damage."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest
import zarr

from data import DataError
from data.store.layout import Store
from data.store.opening import open_store
from data.store.reader import ShardReader


@pytest.mark.parametrize("group", ["weather", "chemistry"])
def test_every_hour_is_what_zarr_reads(tiny: Store, group: str) -> None:
    whole = np.asarray(zarr.open_group(tiny.path, mode="r")[group])
    hours = np.random.default_rng(0).permutation(len(whole))
    np.testing.assert_array_equal(ShardReader(tiny, group).read(hours), whole[hours])


def test_a_shard_that_was_lost_is_not_read_as_missing_values(tiny: Store, tmp_path: Path) -> None:
    shutil.copytree(tiny.path, tmp_path / "s.zarr")
    (tmp_path / "s.zarr/weather/c/1/0/0/0").unlink()
    reader = ShardReader(open_store(tmp_path / "s.zarr"), "weather")
    assert np.isfinite(reader.read(np.array([47, 96]))).all()
    with pytest.raises(DataError, match="lacks hour 48 of the store, in shard 1, which was there"):
        reader.read(np.array([48]))


@pytest.mark.parametrize(("keep", "message"), [(-100, "the index of .* is damaged"), (2000, "the index of .* is damaged")])
def test_a_truncated_shard_is_named(tiny: Store, tmp_path: Path, keep: int, message: str) -> None:
    shutil.copytree(tiny.path, tmp_path / "s.zarr")
    shard = tmp_path / "s.zarr/weather/c/0/0/0/0"
    shard.write_bytes(shard.read_bytes()[:keep])
    with pytest.raises(DataError, match=message):
        ShardReader(open_store(tmp_path / "s.zarr"), "weather").read(np.array([40]))


def test_another_layout_is_refused(tiny: Store, tmp_path: Path) -> None:
    shutil.copytree(tiny.path, tmp_path / "s.zarr")
    path = tmp_path / "s.zarr/weather/zarr.json"
    path.write_text(path.read_text().replace('"float32"', '"float16"'))
    with pytest.raises(DataError, match="prepare it again"):
        ShardReader(open_store(tmp_path / "s.zarr"), "weather")
