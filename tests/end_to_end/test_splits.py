"""Splits that a run chooses itself: their statistics, their samples, and what is refused."""

from __future__ import annotations

import json
import shlex
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from data import DataError, splits
from data.__main__ import main
from data.samples import index_samples
from data.store.layout import Store
from data.store.opening import open_store
from data.store.reader import ShardReader
from data.wind_scan.cache import ScanCache
from tests.launching import manifest, tiny_config, train
from trainer.config import ConfigError
from trainer.config_file import dump, load

# The tiny store begins on 2015-01-01, has 16 days, and trains on the first 9.
CHOSEN = {"train": [("2015-01-01", "2015-01-03"), ("2015-01-06", "2015-01-09")], "validation": [("2015-01-11", "2015-01-13")]}


@pytest.fixture(scope="module")
def measured(tiny_scan: ScanCache, tiny_path: Path, tmp_path_factory: pytest.TempPathFactory) -> Store:
    """A copy of the tiny store whose chosen training split was measured by the command that the refusal names."""
    copy = Path(shutil.copytree(tiny_path, tmp_path_factory.mktemp("splits") / "tiny.zarr"))
    shutil.copytree(tiny_scan.path, copy.with_suffix(".wind_scan"))
    with pytest.raises(DataError, match="were never measured. Run once") as refused:
        splits.split_as(open_store(copy), CHOSEN)
    command = shlex.split(str(refused.value).splitlines()[-1])
    assert command[:3] == ["python", "-m", "data"]
    assert main(command[3:]) == 0
    return splits.split_as(open_store(copy), CHOSEN)


def test_statistics_of_several_ranges_are_those_of_their_hours(measured: Store) -> None:
    hours = np.flatnonzero(measured.inside("train"))
    assert len(hours) == 7 * 24
    for group in measured.contents.dynamic:
        fields = ShardReader(measured, group).read(hours).astype("f8")
        for channel, name in enumerate(measured.contents.names(group)):
            values = fields[:, channel][np.isfinite(fields[:, channel])]
            found = measured.statistics[name]
            expected = [values.mean(), values.std(), values.min(), values.max(), values.size]
            np.testing.assert_allclose([found[k] for k in ("mean", "std", "min", "max", "count")], expected, rtol=1e-9)
    assert measured.statistics["elevation"] == open_store(measured.path).statistics["elevation"]


def test_the_stores_own_split_has_the_stores_own_statistics(measured: Store) -> None:
    """To the bit: the same shards, measured in the same pieces and merged in the same order."""
    store = open_store(measured.path)
    ((first, last),) = store.splits["train"]
    list(splits.measure(store, ((first, last),), workers=2))
    assert json.loads(splits.kept_at(store, ((first, last),)).read_text())["statistics"] == store.statistics


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(st.integers(0, 384), min_size=2, max_size=8, unique=True), st.sampled_from([1, 6, 24, 96]))
def test_no_target_lies_outside_its_split(tiny: Store, ends: list[int], lead: int) -> None:
    """Against trying every hour, in ranges with anything between them."""
    ends = sorted(ends[: len(ends) // 2 * 2])
    ranges = tuple(zip(ends[::2], ends[1::2], strict=True))
    store = replace(tiny, splits={"train": ranges})
    inside = {hour for first, last in ranges for hour in range(first, last)}
    there = [(tiny.missing[group] < 1).any(1) for group in ("weather", "chemistry")]
    expected = [t for t in sorted(inside) if t + lead in inside and there[0][t] and there[1][t] and there[1][t + lead]]
    try:
        found = index_samples(store, "train", [lead], None, "none", 0).t.tolist()
    except DataError:
        found = []
    assert found == expected


def test_a_run_is_trained_with_the_splits_it_chooses(measured: Store, tmp_path: Path) -> None:
    """Its statistics stand in the checkpoint, and another choice does not continue it."""
    config = tiny_config(tmp_path, measured.path)
    days = "{train: [[2015-01-01, 2015-01-03], [2015-01-06, 2015-01-09]], validation: [2015-01-11, 2015-01-13]}"
    chosen = [f"data.splits={days}", "steps=2", "checkpoint.every=2"]
    done = train(config, *chosen, ranks=1)
    assert done.returncode == 0, done.stderr
    remembered = manifest(tmp_path / "run" / "checkpoints" / "latest")
    assert remembered["statistics"] == measured.statistics
    assert remembered["fingerprints"]["splits"] == measured.chosen
    for other in (["steps=4"], ["steps=4", f"data.splits={days.replace('13', '14')}"]):
        refused = train(config, *other, ranks=1)
        assert refused.returncode == 2
        assert "was trained differently" in refused.stderr
        assert "splits" in refused.stderr
    again = train(config, *chosen[:1], "steps=3", ranks=1)
    assert "resumed from" in again.stderr


def test_kept_statistics_that_were_changed_are_refused(measured: Store, tmp_path: Path) -> None:
    copy = open_store(shutil.copytree(measured.path, tmp_path / "tiny.zarr"))
    shutil.copytree(f"{measured.path}.statistics", tmp_path / "tiny.zarr.statistics")
    kept = splits.kept_at(copy, splits.hours_of(copy, "train", CHOSEN["train"]))
    tree = json.loads(kept.read_text())
    tree["statistics"]["o3"]["mean"] *= 1.1
    kept.write_text(json.dumps(tree))
    with pytest.raises(DataError, match="is not what was measured. Remove it"):
        splits.split_as(copy, CHOSEN)


@pytest.mark.parametrize(
    ("days", "told"),
    [
        ("{train: [2015-01-01, 2015-01-03]}", "splits must have validation"),
        ("{train: [2015-01-03, 2015-01-01], validation: [2015-01-05, 2015-01-06]}", "ends before it begins"),
        ("{train: [2015-01-01, 2015-01-05], validation: [2015-01-05, 2015-01-06]}", "overlaps splits.validation"),
        ("{trian: [2015-01-01, 2015-01-05], validation: [2015-01-05, 2015-01-06]}", "Input should be 'train'"),
        ("{train: [], validation: [2015-01-05, 2015-01-06]}", "should have at least 1 item"),
    ],
)
def test_splits_that_cannot_be_meant_are_refused(days: str, told: str, measured: Store, tmp_path: Path) -> None:
    with pytest.raises(ConfigError) as refused:
        load(tiny_config(tmp_path, measured.path), [f"data.splits={days}"])
    assert told in str(refused.value)


def test_splits_come_back_from_their_dump(measured: Store, tmp_path: Path) -> None:
    run = load(
        tiny_config(tmp_path, measured.path),
        ["data.splits={train: [2015-01-01, 2015-01-03], validation: [2015-01-05, 2015-01-06]}"],
    )
    (tmp_path / "again.yaml").write_text(dump(run))
    assert load(tmp_path / "again.yaml") == run


def test_a_range_beyond_the_data_is_refused(measured: Store) -> None:
    with pytest.raises(DataError, match=r"split 'train': 2016-01-01 .. 2016-12-31 holds no hour"):
        splits.hours_of(measured, "train", [("2016-01-01", "2016-12-31")])
