"""Reading hours from shards, against zarr itself; damage; and how many files a rank opens."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import zarr

from data import DataError
from data.reader import ShardReader
from data.store import Store, open_store
from data.synthesize import Recipe, synthesize
from tests.launching import ROOT, environment


@pytest.mark.parametrize("group", ["weather", "chemistry"])
def test_every_hour_is_what_zarr_reads(tiny: Store, group: str) -> None:
    whole = np.asarray(zarr.open_group(tiny.path, mode="r")[group])
    hours = np.random.default_rng(0).permutation(len(whole))
    np.testing.assert_array_equal(ShardReader(tiny, group).read(hours), whole[hours])


def test_an_absent_shard_is_missing_in_every_hour(tiny: Store, tmp_path: Path) -> None:
    shutil.copytree(tiny.path, tmp_path / "s.zarr")
    (tmp_path / "s.zarr/weather/c/1/0/0/0").unlink()
    read = ShardReader(open_store(tmp_path / "s.zarr"), "weather").read(np.array([47, 48, 95, 96]))
    np.testing.assert_array_equal(np.isnan(read).all((1, 2, 3)), [False, True, True, False])


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


COUNT_OPENS = """
import json, sys
opened = []
sys.addaudithook(lambda event, args: opened.append(str(args[0])) if event == "open" else None)
from data.store import open_store
from data.stream import Stream, index_samples
path, world = sys.argv[1], int(sys.argv[2])
store = open_store(path)
stream = Stream(store, index_samples(store, "train", [6], None, "none", 0), None, "none", 0, 1, False)
before = sum(path in name for name in opened)
next(stream.training(0, 1, 1, world, world - 1))
print(json.dumps([before, sum(path in name for name in opened)]))
"""


def test_f21_a_rank_opens_few_files_however_long_the_data_and_however_many_ranks(tmp_path: Path) -> None:
    """320 dask workers opened 34 stores each through the metadata server; start-up must not grow with data or ranks."""
    counts = {}
    for days in (3, 12):
        synthesize(tmp_path / f"{days}.zarr", Recipe(days=days, rows=16, cols=32, shard_hours=12))
        for world in (1, 400):
            command = [sys.executable, "-c", COUNT_OPENS, str(tmp_path / f"{days}.zarr"), str(world)]
            done = subprocess.run(command, cwd=ROOT, env=environment(), capture_output=True, text=True, check=True)
            counts[days, world] = json.loads(done.stdout)
    assert len({before for before, _ in counts.values()}) == 1
    for before, after in counts.values():
        assert before < 40
        assert after - before <= 3  # the shards of one sample
