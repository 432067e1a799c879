"""Later hours appended to a store: what comes out is what preparing all files at once gives, whatever happens on the way."""

from __future__ import annotations

import json
import shutil
import threading
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from data import DataError
from data.__main__ import main
from data.prepare import appending, stages
from data.prepare.appending import append
from data.prepare.plan import Scan
from data.prepare.preparation import Preparation
from data.store.layout import Store
from data.store.opening import open_store, verify
from data.store.reader import ShardReader
from data.wind_paths import cache as wind_paths
from data.wind_scan.cache import open_cache
from tests.end_to_end.test_prepare import GRID, content, plan
from tests.launching import manifest, tiny_config, train
from tests.reanalysis import write_caqra, write_static
from trainer.checkpoint.manifest import CheckpointError
from trainer.forecaster import forecast, load_forecaster

HOURS = 72  # of the first file; shards of 20 hours, so the fourth is not full


@pytest.fixture(scope="module")
def raw(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("raw")
    write_static(folder / "static.nc")
    write_caqra(folder / "jan.nc", start="2014-12-31", hours=HOURS, without=(30, 31, 50))
    write_caqra(folder / "feb.nc", start="2015-01-03", hours=30, without=(2,), names={"pm2_5": "PM25"}, seed=1)
    return folder


def prepared(raw: Path, path: Path, *files: str) -> Path:
    splits = {"train": ("2014-12-31", "2015-01-01"), "validation": ("2015-01-02", "2015-01-02")}
    scan = Scan(path.with_suffix(".wind_scan"), 2, (4, 4))
    stages.prepare(path, plan(raw, *(raw / file for file in files), splits=splits, shard_hours=20, scan=scan), workers=1)
    return path


@pytest.fixture(scope="module")
def short(raw: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return prepared(raw, tmp_path_factory.mktemp("short") / "s.zarr", "jan.nc")


@pytest.fixture(scope="module")
def at_once(raw: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return prepared(raw, tmp_path_factory.mktemp("once") / "s.zarr", "jan.nc", "feb.nc")


def copied(short: Path, folder: Path) -> Path:
    """A copy that knows its own wind scan."""
    copy = Path(shutil.copytree(short, folder / "s.zarr"))
    shutil.copytree(short.with_suffix(".wind_scan"), copy.with_suffix(".wind_scan"))
    tree = json.loads((copy / "plan.json").read_text())
    tree["scan"]["out"] = str(copy.with_suffix(".wind_scan"))
    (copy / "plan.json").write_text(json.dumps(tree))
    return copy


def same(longer: Path, at_once: Path) -> bool:
    """Every file but those that say how it was made."""
    mine, theirs = content(longer), content(at_once)
    assert mine.keys() == theirs.keys()
    differing = [name for name in mine if mine[name] != theirs[name]]
    assert set(differing) <= {"zarr.json", "plan.json", "sources.json"}
    assert json.loads(mine["sources.json"]) == json.loads(theirs["sources.json"])
    own, other = open_store(longer), open_store(at_once)
    assert (own.fingerprint, own.years, own.statistics) == (other.fingerprint, other.years, other.statistics)
    codes = [np.load(path.with_suffix(".wind_scan") / "sectors.npy") for path in (longer, at_once)]
    np.testing.assert_array_equal(*codes)
    return True


def test_appending_gives_what_preparing_at_once_gives(
    raw: Path, short: Path, at_once: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The files that the store was made of are left out, its splits stay, and the wind scan grows with it."""
    path = copied(short, tmp_path)
    before = open_store(path)
    assert main(["append", str(path), str(raw / "*.nc").replace("*", "[fj]*")]) == 0
    assert same(path, at_once)
    longer = open_store(path)
    assert longer.earlier == (before.fingerprint,)
    assert longer.splits == before.splits
    assert verify(longer) == []
    assert open_cache(path.with_suffix(".wind_scan"), longer, patch=2).hours == HOURS + 30
    assert f"after {before.fingerprint[:12]}" in capsys.readouterr().out
    assert not list(path.parent.glob("*.appended*")) + list(path.parent.glob("*.replaced"))
    assert append(path, [raw / "feb.nc", raw / "jan.nc"], workers=1) is None


def test_hours_of_old_shards_are_not_written_again(raw: Path, short: Path, tmp_path: Path) -> None:
    path = copied(short, tmp_path)
    kept = [
        (path / group / "c" / str(shard) / "0/0/0").stat().st_ino for group in ("weather", "chemistry") for shard in range(3)
    ]
    append(path, [raw / "feb.nc"], workers=1)
    found = [
        (path / group / "c" / str(shard) / "0/0/0").stat().st_ino for group in ("weather", "chemistry") for shard in range(3)
    ]
    assert found == kept


class Killed(BaseException):
    pass


@pytest.mark.parametrize("where", ["_keep_shards", "finish", "_settle", pytest.param("build_scan", marks=pytest.mark.slow)])
def test_an_append_that_was_killed_goes_on(
    where: str, raw: Path, short: Path, at_once: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """After each of its steps; and what opens in between is whole, the old store or the new one."""
    path = copied(short, tmp_path)
    home: Any = Preparation if where == "finish" else appending
    own: Callable[..., Any] = getattr(home, where)
    calls = []

    def dies(*given: Any) -> None:
        calls.append(where)
        if where == "_settle" and len(calls) == 1:  # there is nothing to settle at its beginning
            own(*given)
            return
        if where not in ("_settle", "build_scan"):  # before the longer store takes its place, or after
            own(*given)
        raise Killed

    with monkeypatch.context() as patched:
        patched.setattr(home, where, dies)
        with pytest.raises(Killed):
            append(path, [raw / "feb.nc"], workers=1)
    open_store(path)
    if where == "build_scan":  # the store is whole, and its cache says that it is stale
        with pytest.raises(DataError, match="is stale"):
            open_cache(path.with_suffix(".wind_scan"), open_store(path), patch=2)
    append(path, [raw / "feb.nc"], workers=1)
    assert same(path, at_once)


def test_who_reads_meanwhile_sees_the_old_store_or_the_new_one(raw: Path, short: Path, tmp_path: Path) -> None:
    """Between two renames there was none; a run that trained then ended. What was read before is read again, to the bit."""
    path = copied(short, tmp_path)
    before, hours = open_store(path), np.array([0, 25, HOURS - 1])
    truth = ShardReader(before, "weather").read(hours)
    done, lengths = threading.Event(), set[int]()

    def appends() -> None:
        append(path, [raw / "feb.nc"], workers=1)
        done.set()

    thread = threading.Thread(target=appends)
    thread.start()
    while not done.is_set():
        lengths.add(len(open_store(path).times))
        np.testing.assert_array_equal(ShardReader(before, "weather").read(hours), truth)
    thread.join()
    assert HOURS in lengths <= {HOURS, HOURS + 30}


def test_paths_of_the_air_grow_with_the_store(
    raw: Path, short: Path, at_once: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is known is not computed again; the cache is that of the whole store."""
    path, paths, starts = copied(short, tmp_path), tmp_path / "paths", []
    wind_paths.build(open_store(path), paths, patch=2, hours=12)
    append(path, [raw / "feb.nc"], workers=1)
    with pytest.raises(DataError, match="is stale"):
        wind_paths.open_cache(paths, open_store(path), patch=2, hours=12)
    compute = wind_paths.paths_of

    def counted(store: Store, geometry: wind_paths.PathGeometry, start: int, stop: int) -> np.ndarray:
        starts.append(start)
        return compute(store, geometry, start, stop)

    monkeypatch.setattr(wind_paths, "paths_of", counted)
    wind_paths.build(open_store(path), paths, patch=2, hours=12)
    assert starts == [60, 80, 100]
    wind_paths.build(open_store(at_once), tmp_path / "whole", patch=2, hours=12)
    for name in ("paths.bin", "manifest.json"):
        assert (paths / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()


def test_files_are_known_by_their_content(raw: Path, short: Path, tmp_path: Path) -> None:
    """By another path the same hours were refused as not later ones."""
    path = copied(short, tmp_path)
    assert append(path, [Path(shutil.copy(raw / "jan.nc", tmp_path / "again.nc"))], workers=1) is None


def test_what_cannot_be_appended_is_refused_and_changes_nothing(
    raw: Path, short: Path, tiny_path: Path, tmp_path: Path
) -> None:
    path = copied(short, tmp_path)
    before = content(path)
    write_caqra(tmp_path / "early.nc", start="2015-01-02", hours=30)
    write_caqra(tmp_path / "wide.nc", start="2015-01-03", hours=4, grid=(42, 52))
    for file, told in (("early.nc", "only later hours can be"), ("wide.nc", "are on another grid")):
        with pytest.raises(DataError, match=told):
            append(path, [tmp_path / file], workers=1)
    copy = Path(shutil.copytree(tiny_path, tmp_path / "tiny.zarr"))
    with pytest.raises(DataError, match="does not say how it was prepared"):
        append(copy, [raw / "feb.nc"], workers=1)
    assert content(path) == before


def test_a_file_that_has_changed_since_is_refused(raw: Path, short: Path, tmp_path: Path) -> None:
    own = tmp_path / "raw"
    shutil.copytree(raw, own)
    path = prepared(own, tmp_path / "s.zarr", "jan.nc")
    write_caqra(own / "jan.nc", start="2014-12-31", hours=HOURS, seed=9)
    with pytest.raises(DataError, match="has another content than when"):
        append(path, [own / "jan.nc", own / "feb.nc"], workers=1)


def test_a_run_goes_on_and_forecasts_from_hours_that_came_later(raw: Path, short: Path, tmp_path: Path) -> None:
    """A checkpoint knows the store by its fingerprint; one that continues it is the same data, and remembers that it is."""
    path = copied(short, tmp_path)
    scan = {"mode": "regional", "cache": str(path.with_suffix(".wind_scan"))}
    config = tiny_config(tmp_path, path, data={"store": str(path), "lead_hours": [3]}, wind_scan=scan)
    assert train(config, "steps=2", "checkpoint.every=2", ranks=1).returncode == 0
    first = open_store(path).fingerprint
    append(path, [raw / "feb.nc"], workers=1)
    forecaster = load_forecaster(tmp_path / "run")
    batch, fields = forecast(forecaster, HOURS + 4, [3])
    assert batch.fields["weather"].isfinite().any()
    assert tuple(fields.shape[-2:]) == GRID
    done = train(config, "steps=3", ranks=1)
    assert "resumed from" in done.stderr
    newest = manifest(tmp_path / "run" / "checkpoints" / "latest")
    changed = next(change for change in newest["progress"]["changes"] if change["name"] == "data")
    assert (changed["before"], changed["after"]) == (first, open_store(path).fingerprint)
    other = replace(forecaster.dataset.store, earlier=())
    assert other.fingerprint != first
    root = json.loads((path / "zarr.json").read_text())
    root["attributes"]["earlier"] = []
    (path / "zarr.json").write_text(json.dumps(root))
    with pytest.raises(CheckpointError, match="was trained with data"):
        load_forecaster(tmp_path / "run", tmp_path / "run" / "checkpoints" / "step-00000002")
