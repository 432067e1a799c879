"""Variables beyond the published ones: known ones that a map adds, those of a user, and stores that lack pollutants."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import zarr

from data import DataError
from data.__main__ import main
from data.store.layout import Store
from data.store.opening import open_store
from data.store.reader import ShardReader
from data.variables import MODEL_INPUTS, PUBLISHED
from tests.end_to_end.test_sources import LAT1, LON1, TRUTH, prepare, regular, truth
from tests.launching import tiny_config, train

HOURS = 48
# name -> value and slopes as in TRUTH, and how the user's files call it, in units of which one is that many of ours
OWN: dict[str, tuple[float, float, float, float]] = {
    "nh3": (8.0, 0.2, 0.1, 0.05),
    "pblh": (700.0, 20.0, -10.0, 9.0),
    "dust": (40.0, 1.0, 2.0, 0.3),
    "albedo": (0.2, 1e-2, 0.0, 0.0),
}
FILED = {
    "nh3": ("NH3", 1e-9, "kg m-3"),
    "pblh": ("HPBL", 1e-3, "m"),
    "dust": ("dust", 1e-3, "mg m-3"),
    "albedo": ("albedo", 100.0, "%"),
}
MAP = "so2:\nnh3: {name: NH3}\npblh: {name: HPBL, units: km}\n"
DEFINED = """
dust: {units: ug m-3, range: [0, 20000], group: chemistry, long_name: mineral dust}
albedo: {units: "1", range: [0, 1], group: ground}
"""


@pytest.fixture(scope="module")
def store(static: list[str], tmp_path_factory: pytest.TempPathFactory) -> Store:
    """A day of CAQRA's variables without so2, with two known ones and two of the user's own."""
    folder = tmp_path_factory.mktemp("own")
    with pytest.MonkeyPatch.context() as patched:
        for name, slopes in OWN.items():
            patched.setitem(TRUTH, name, slopes)
        lon, lat = np.meshgrid(LON1, LAT1)
        files = regular(range(HOURS))
        for name, (spelt, factor, units) in FILED.items():
            values = truth(name, lat, lon, range(HOURS)) * factor
            files[spelt] = (("time", "lat", "lon"), values.astype("f4"), {"units": units})
    files.drop_vars(["nh3", "pblh"]).to_netcdf(folder / "f.nc")
    (folder / "map.yaml").write_text(MAP)
    (folder / "own.yaml").write_text(DEFINED)
    options = ["--map", folder / "map.yaml", "--variables", folder / "own.yaml", "--shard-hours", 8]
    options += ["--validation", "2015-03-02", "2015-03-02"]
    opened = prepare("caqra", folder / "s.zarr", folder / "f.nc", *options, *static)
    assert opened
    return opened


def test_the_published_channels_and_their_names_stay() -> None:
    assert PUBLISHED.names("weather") == ["u", "v", "temp", "rh", "psfc"]
    assert PUBLISHED.names("chemistry") == ["pm25", "pm10", "so2", "no2", "co", "o3"]
    assert PUBLISHED.names("static") == ["lat2d", "lon2d", "elevation", "population", "land_fraction", "domain_mask"]
    assert len(MODEL_INPUTS) == 15


def test_a_store_says_what_it_holds_and_holds_it_in_our_units(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    assert {group: store.contents.names(group) for group in store.contents.dynamic} == {
        "weather": ["u", "v", "temp", "rh", "psfc"],
        "chemistry": ["pm25", "pm10", "no2", "co", "o3", "nh3", "dust"],
        "surface": ["pblh"],
        "ground": ["albedo"],
    }
    lon, lat = np.meshgrid(store.lon, store.lat)
    for name, slopes in OWN.items():
        monkeypatch.setitem(TRUTH, name, slopes)
        fields = ShardReader(store, store.contents.group(name)).read(np.arange(HOURS))
        np.testing.assert_allclose(fields[:, store.contents.channel(name)], truth(name, lat, lon, range(HOURS)), rtol=2e-3)
    assert store.contents.variable("dust").valid_max == 20_000.0
    assert store.statistics["dust"]["log_mean"] > 0
    assert "log_mean" not in store.statistics["albedo"]


def test_what_describes_a_users_variable_is_part_of_the_fingerprint(store: Store, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(store.path, tmp_path / "s.zarr"))
    text = (copy / "zarr.json").read_text()
    assert text.count("mineral dust") > 0
    (copy / "zarr.json").write_text(text.replace("20000.0", "30000.0"))
    with pytest.raises(DataError, match="does not match its fingerprint"):
        open_store(copy)


def test_a_run_trains_on_what_a_store_has_and_reads_no_more(store: Store, tmp_path: Path) -> None:
    """Groups that no input lies in may even be gone."""
    copy = Path(shutil.copytree(store.path, tmp_path / "s.zarr"))
    for shard in (copy / "ground" / "c").iterdir():
        shutil.rmtree(shard)
    own = {"inputs": ["u", "v", "pm25", "dust", "pblh", "elevation"], "targets": ["dust", "pm25"], "lead_hours": [3]}
    changes: dict[str, Any] = {"grid": [8, 12], "patch": 2}
    config = tiny_config(tmp_path, copy, **{"data": {"store": str(copy), **own}, "wind_scan": {"mode": "none"}})
    reduced = [f"model.{key}={value}" for key, value in changes.items()]
    done = train(config, "steps=2", "validation.every=100", *reduced, ranks=1)
    assert done.returncode == 0, done.stderr
    assert "loss_dust" in (tmp_path / "run" / "metrics.jsonl").read_text()
    refused = train(config, *reduced, "data.inputs=[u, v, pm25, so2]", "data.targets=[so2]", ranks=1)
    assert refused.returncode == 2
    assert "unknown variable 'so2'. Did you mean" in refused.stderr


@pytest.mark.parametrize(
    ("mapped", "defined", "told"),
    [
        ("u:", "", "nothing is given for u; the wind is always needed"),
        ("pm2_5: {name: x}", "", "map.yaml: unknown variable 'pm2_5'. Did you mean 'pm25'"),
        ("elevation: {name: z}", "", "'elevation' has no time; such fields come with --elevation"),
        ("temp:\nco: {name: co, units: kg kg-1}", "", "converted with temp, which the store leaves out"),
        ("", "o3: {units: ppb, range: [0, 1]}", "'o3' is known already, in ug m-3; to read it, add it to --map"),
        ("", "dust: {units: ug m-3}", "'dust', 'range': Field required. Write one line a variable"),
        ("", "dust: {units: ug m-3, range: [0, 1], group: static}", "cannot be in the group 'static'"),
        ("", "dust: {units: ug m-3, range: [0, 1], group: chemistry}", "none of the 1 files (caqra) holds: dust (dust)"),
    ],
)
def test_a_map_or_definition_that_cannot_be_meant_is_refused(
    mapped: str,
    defined: str,
    told: str,
    static: list[str],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    regular(range(4)).to_netcdf(tmp_path / "f.nc")
    options: list[object] = []
    for option, text in (("map", mapped), ("variables", defined)):
        if text:
            (tmp_path / f"{option}.yaml").write_text(text)
            options += [f"--{option}", tmp_path / f"{option}.yaml"]
    prepare("caqra", tmp_path / "s.zarr", tmp_path / "f.nc", *options, *static, code=2)
    assert told in capsys.readouterr().err


def test_a_line_of_a_map_leaves_a_variable_of_ones_own_out(static: list[str], tmp_path: Path) -> None:
    """A definition may be of more than these files have."""
    regular(range(4)).to_netcdf(tmp_path / "f.nc")
    (tmp_path / "map.yaml").write_text("dust:\nco: {name: co, units: ug m-3}")
    (tmp_path / "own.yaml").write_text("dust: {units: ug m-3, range: [0, 1], group: chemistry}")
    options = ["--map", tmp_path / "map.yaml", "--variables", tmp_path / "own.yaml", "--zone", "0"]
    store = prepare("caqra", tmp_path / "s.zarr", tmp_path / "f.nc", *options, *static)
    assert store
    assert store.contents.names("chemistry") == PUBLISHED.names("chemistry")


def test_a_store_of_the_first_versions_holds_the_published_variables(tiny_path: Path, tmp_path: Path) -> None:
    """It did not say what it holds, and its fingerprint is the same."""
    copy = Path(shutil.copytree(tiny_path, tmp_path / "s.zarr"))
    root = zarr.open_group(copy, mode="r+", use_consolidated=False)
    for key in ("variables", "definitions"):
        del root.attrs[key]
    zarr.consolidate_metadata(copy)
    assert open_store(copy).contents == PUBLISHED
    assert main(["inspect", str(copy)]) == 0
