"""The store: layout, statistics, fingerprint, and what it refuses."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import xarray as xr
import zarr

from data import DataError, variables
from data.store import finishing, layout, opening, writing
from data.store.layout import Store
from data.store.opening import open_store
from data.store.reader import ShardReader
from data.synthetic.synthesize import load_static, synthesize
from tests.conftest import TINY


def read(path: Path, group: str) -> np.ndarray:
    return np.asarray(zarr.open_group(path, mode="r")[group])


def write_small(path: Path, weather: np.ndarray, chemistry: np.ndarray, shard_hours: int = 5) -> None:
    hours, _, rows, cols = weather.shape
    lat, lon, static = load_static(rows, cols)
    writing.create(
        path,
        times=np.datetime64("2020-02-27", "h") + np.arange(hours),
        lat=lat,
        lon=lon,
        static=static,
        splits={"train": (0, 7), "validation": (7, hours)},
        shard_hours=shard_hours,
        provenance={},
    )
    for start in range(0, hours, shard_hours):
        writing.write_block(path, "weather", start, weather[start : start + shard_hours])
        writing.write_block(path, "chemistry", start, chemistry[start : start + shard_hours])


def small_fields(hours: int = 12) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(0)
    weather = rng.uniform(1, 9, (hours, 5, 8, 16)).astype("f4")
    weather[:, 2], weather[:, 4] = weather[:, 2] + 280, weather[:, 4] * 100 + 9e4
    chemistry = rng.uniform(1, 90, (hours, 6, 8, 16)).astype("f4")
    chemistry[rng.random(chemistry.shape) < 0.1] = np.nan
    return weather, chemistry


def test_xarray_shows_a_meaningful_dataset(tiny: Store) -> None:
    with xr.open_zarr(tiny.path) as dataset:
        assert dataset["chemistry"].dims == ("time", "chemistry_variable", "lat", "lon")
        assert dataset["time"].values[0] == np.datetime64("2015-01-01T00")
        assert dataset["lat"].attrs["units"] == "degrees_north"
        pm25 = dataset["chemistry"].sel(chemistry_variable="pm25")
        assert str(pm25["chemistry_units"].values) == "ug m-3"
        assert float(dataset["static"].sel(static_variable="elevation").max()) > 4000.0
        assert dataset.attrs["Conventions"].startswith("CF-")


def test_statistics_are_those_of_the_training_split_alone(tmp_path: Path) -> None:
    weather, chemistry = small_fields()
    chemistry[7:] *= 10.0  # validation hours must not be seen
    write_small(tmp_path / "s.zarr", weather, chemistry)
    finishing.finalise(tmp_path / "s.zarr")
    statistics = open_store(tmp_path / "s.zarr").statistics
    for channel, name in enumerate(variables.PUBLISHED.names("chemistry")):
        values = chemistry[:7, channel].astype("f8")
        truth = {
            "mean": np.nanmean(values),
            "std": np.nanstd(values),
            "min": np.nanmin(values),
            "max": np.nanmax(values),
            "count": np.isfinite(values).sum(),
        }
        for key, value in truth.items():
            assert statistics[name][key] == pytest.approx(value, rel=1e-12), (name, key)


def test_values_and_missing_shares_come_back(tmp_path: Path) -> None:
    weather, chemistry = small_fields()
    write_small(tmp_path / "s.zarr", weather, chemistry)
    finishing.finalise(tmp_path / "s.zarr")
    np.testing.assert_array_equal(read(tmp_path / "s.zarr", "chemistry"), chemistry)
    opened = open_store(tmp_path / "s.zarr")
    np.testing.assert_allclose(opened.missing["chemistry"], np.isnan(chemistry).mean((2, 3)), atol=1e-6)
    read_back = ShardReader(opened, "weather").read(np.array([11, 0]))
    np.testing.assert_array_equal(read_back, weather[[11, 0]])


def test_shards_are_to_the_byte_what_zarr_writes(tmp_path: Path) -> None:
    """Whole ones, a last one that is short, hours that are missing at an end or between, and a shard of nothing but them."""
    weather, chemistry = small_fields(19)
    weather[[0, 3, 9]] = np.nan
    weather[10:15] = np.nan
    chemistry[:, :, 0, 0] = np.nan
    write_small(tmp_path / "s.zarr", weather, chemistry)
    partial = layout.partial_path(tmp_path / "s.zarr")
    written = {name: (partial / name).read_bytes() for name in shard_files(partial)}
    assert "weather/c/2/0/0/0" not in written
    assert len(written) == 7
    root = zarr.open_group(partial, mode="r+")
    for group, fields in (("weather", weather), ("chemistry", chemistry)):
        shutil.rmtree(partial / group / "c")
        root[group][:] = fields
    assert {name: (partial / name).read_bytes() for name in shard_files(partial)} == written


def shard_files(store: Path) -> list[str]:
    return sorted(
        str(file.relative_to(store)) for group in ("weather", "chemistry") for file in store.glob(f"{group}/c/*/0/0/0")
    )


def test_fingerprint_follows_every_value(tmp_path: Path) -> None:
    weather, chemistry = small_fields()
    prints = []
    for name, change in (("a", 0.0), ("b", 0.0), ("c", 1e-3)):
        altered = chemistry.copy()
        altered[11, 5, 7, 15] = 40.0 + change  # outside the training split: statistics stay equal
        write_small(tmp_path / name, weather, altered)
        prints.append(finishing.finalise(tmp_path / name))
    assert prints[0] == prints[1] != prints[2]


def test_synthesis_is_reproducible_by_seed(tiny: Store, tmp_path: Path) -> None:
    assert synthesize(tmp_path / "again.zarr", TINY) == tiny.fingerprint


def test_edited_statistics_are_refused(tiny: Store, tmp_path: Path) -> None:
    path = tmp_path / "edited.zarr"
    shutil.copytree(tiny.path, path)
    metadata = json.loads((path / "zarr.json").read_text())
    metadata["attributes"]["statistics"]["pm25"]["mean"] += 1.0
    (path / "zarr.json").write_text(json.dumps(metadata))
    with pytest.raises(DataError, match="does not match its fingerprint"):
        open_store(path)


def test_verify_names_the_hours_of_a_flipped_byte(tiny: Store, tmp_path: Path) -> None:
    path = tmp_path / "flipped.zarr"
    shutil.copytree(tiny.path, path)
    assert opening.verify(open_store(path)) == []
    shard = path / "chemistry/c/1/0/0/0"
    content = bytearray(shard.read_bytes())
    content[1000] ^= 1
    shard.write_bytes(content)
    (wrong,) = opening.verify(open_store(path))
    assert wrong.startswith("chemistry from 2015-01-03T00 to 2015-01-04T23")


def test_edited_terrain_is_refused(tiny: Store, tmp_path: Path) -> None:
    path = tmp_path / "flat.zarr"
    shutil.copytree(tiny.path, path)
    zarr.open_group(path, mode="r+")["static"][2] = 7.0
    with pytest.raises(DataError, match="does not match its fingerprint"):
        open_store(path)


def test_unfinished_store_does_not_open_and_names_what_is_absent(tmp_path: Path) -> None:
    path = tmp_path / "s.zarr"
    weather, chemistry = small_fields()
    write_small(path, weather, chemistry)
    (layout.parts_path(path) / "weather-1.json").unlink()
    with pytest.raises(DataError, match="unfinished"):
        open_store(path)
    with pytest.raises(DataError, match=r"shards \[1\] of 'weather'"):
        finishing.finalise(path)


@pytest.mark.parametrize(
    ("group", "channel", "value", "message"),
    [("weather", 2, 15.0, "'temp' spans 15"), ("chemistry", 0, -3.0, "'pm25' spans -3"), ("weather", 0, np.inf, "infinities")],
)
def test_impossible_values_are_refused(tmp_path: Path, group: str, channel: int, value: float, message: str) -> None:
    weather, chemistry = small_fields()
    {"weather": weather, "chemistry": chemistry}[group][2, channel, 3, 3] = value
    with pytest.raises(DataError, match=message):
        write_small(tmp_path / "s.zarr", weather, chemistry)


def test_constant_variable_is_refused(tmp_path: Path) -> None:
    weather, chemistry = small_fields()
    weather[:, 3] = 50.0
    write_small(tmp_path / "s.zarr", weather, chemistry)
    with pytest.raises(DataError, match="'rh' is constant"):
        finishing.finalise(tmp_path / "s.zarr")


def test_overlapping_splits_are_refused(tmp_path: Path) -> None:
    lat, lon, static = load_static(8, 16)
    with pytest.raises(DataError, match="not overlap"):
        writing.create(
            tmp_path / "s.zarr",
            times=np.datetime64("2020-01-01", "h") + np.arange(10),
            lat=lat,
            lon=lon,
            static=static,
            splits={"train": (0, 6), "test": (5, 10)},
            shard_hours=5,
            provenance={},
        )


def test_existing_store_is_not_overwritten(tiny: Store) -> None:
    with pytest.raises(DataError, match="already exists"):
        synthesize(tiny.path, TINY)
