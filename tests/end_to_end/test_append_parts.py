"""Appending fields that are converted with others, and to shards that are not full: as prepared at once, or refused."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import xarray as xr

from data.__main__ import main
from data.prepare.preparation import Preparation
from data.store.opening import open_store
from tests.end_to_end.test_sources import POLLUTANTS, TRUTH, UNITS, WEATHER, listed, prepare, regular

GASES = ("so2", "no2", "co", "o3")
DAYS = "2015-03-01 2015-03-01"


def with_ratios(hours: range) -> xr.Dataset:
    dataset = regular(hours)
    density = dataset["psfc"] / (287.05 * dataset["temp"])
    for name in GASES:
        dataset[name] = (dataset[name] * 1e-9 / density).assign_attrs(units="kg kg-1").astype("f4")
    return dataset


def two_sources(folder: Path, weather: str = "*", pollutants: str = "*") -> list[object]:
    kinds = (("weather", weather, WEATHER), ("pollutants", pollutants, POLLUTANTS))
    sources = [{"kind": "generic", "files": str(folder / f"{n}{which}.nc"), "map": lines} for n, which, lines in kinds]
    return ["--config", listed(folder / "sources.yaml", *sources)]


def write(folder: Path, weather: dict[str, range], pollutants: dict[str, range]) -> None:
    for kind, files, names in (("weather", weather, UNITS), ("pollutants", pollutants, POLLUTANTS)):
        for name, hours in files.items():
            with_ratios(hours)[list(names)].isel(lat=slice(kind == "pollutants", None)).to_netcdf(folder / f"{kind}{name}.nc")


def generic(folder: Path, *files: Path, **more: str) -> list[object]:
    lines = {name: name for name in TRUTH} | more
    (folder / "map.yaml").write_text("".join(f"{name}: {{name: {spelt}}}\n" for name, spelt in lines.items()))
    return [*files, "--map", folder / "map.yaml"]


def append(store: Path, *given: object) -> int:
    return main(["append", str(store), *map(str, given)])


def test_units_of_appended_hours_are_judged_by_those_hours(
    static: list[str],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """The hours that the shard had already outvoted them: a thousandth was stored, exit 0."""
    regular(range(96)).to_netcdf(tmp_path / "a.nc")
    later = regular(range(96, 120))
    later["pm25"] = (later["pm25"] / 1000).assign_attrs(units="ug m-3")
    later.to_netcdf(tmp_path / "b.nc")
    prepare("generic", tmp_path / "s.zarr", *generic(tmp_path, tmp_path / "a.nc"), *static)
    assert append(tmp_path / "s.zarr", tmp_path / "b.nc") == 2
    assert "'pm25' at 2015-03-01T00 and after: the median is 0.1" in capsys.readouterr().err


def test_humidity_that_files_state_is_not_computed_from_their_dew_points(static: list[str], tmp_path: Path) -> None:
    """It was replaced, where both are read."""
    dataset = regular()
    dataset["d2m"] = (dataset["temp"] - 20).assign_attrs(units="K")
    dataset.to_netcdf(tmp_path / "a.nc")
    store = prepare("generic", tmp_path / "s.zarr", *generic(tmp_path, tmp_path / "a.nc", dew_point="d2m"), *static)
    assert store
    assert 40 < store.statistics["rh"]["mean"] < 70


@pytest.mark.parametrize("judged", ["--clip", "--mask-beyond"])
def test_ratios_are_converted_by_the_air_that_is_stored(judged: str, static: list[str], tmp_path: Path) -> None:
    """Appended, they were converted by judged pressures, and prepared at once by impossible ones."""
    write(tmp_path, {"0": range(48)}, {"0": range(24), "1": range(24, 48)})
    with xr.open_dataset(tmp_path / "weather0.nc", decode_times=False) as dataset:
        weather = dataset.load()
    weather["psfc"][:, 6:9, 6:9] = 125e3
    weather.to_netcdf(tmp_path / "weather0.nc")
    options = [*static, judged, "psfc"]
    at_once = prepare("several", tmp_path / "once.zarr", *two_sources(tmp_path), *options, days=DAYS)
    prepare("several", tmp_path / "s.zarr", *two_sources(tmp_path, pollutants="0"), *options, days=DAYS)
    assert append(tmp_path / "s.zarr", *two_sources(tmp_path)) == 0
    assert at_once
    assert open_store(tmp_path / "s.zarr").content == at_once.content


def test_what_was_read_without_its_air_is_said_and_a_source_that_lags_is_waited_for(
    static: list[str],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Air that came later left it missing for good, without a word; and a gap of the air refused every append.

    Hours are taken as far as every source reaches, so that nothing waits for a partner.
    """
    write(tmp_path, {"0": range(30), "1": range(30, 60), "2": range(32, 60)}, {"0": range(36), "1": range(36, 60)})
    prepare("several", tmp_path / "s.zarr", *two_sources(tmp_path, "0", "0"), *static, days=DAYS)
    told = " ".join(capsys.readouterr().err.split())
    assert "'so2' will be missing at 6 hours, first 2015-03-02T06: no file has the psfc and temp" in told
    write(tmp_path, {}, {"0": range(30)})
    prepare("several", tmp_path / "t.zarr", *two_sources(tmp_path, "0", "0"), *static, days=DAYS)
    write(tmp_path, {}, {"1": range(30, 60)})
    assert append(tmp_path / "t.zarr", *two_sources(tmp_path, "0", "[01]")) == 0
    assert "nothing is appended: generic reaches to 2015-03-02T05" in " ".join(capsys.readouterr().err.split())
    assert append(tmp_path / "t.zarr", *two_sources(tmp_path, "[02]", "[01]")) == 0
    told = " ".join(capsys.readouterr().err.split())
    assert "'so2' will be missing at 2 hours, first 2015-03-02T06" in told
    so2 = open_store(tmp_path / "t.zarr").missing["chemistry"][:, 2] == 1
    assert np.flatnonzero(so2).tolist() == [30, 31]


def test_winds_along_a_grid_wait_for_each_other(
    static: list[str],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """A shard with u alone ended in a traceback."""
    lat, lon = (c.astype("f8") for c in np.meshgrid(np.arange(28.0, 36.1, 0.5), np.arange(106.0, 116.1, 0.5), indexing="ij"))
    for name, hours, names in (("a", range(48), [n for n in TRUTH if n != "v"]), ("b", range(24), ["v"])):
        dataset = regular(hours)[names].drop_vars(["lat", "lon"]).rename(lat="y", lon="x")
        dataset.assign_coords(lat=(("y", "x"), lat), lon=(("y", "x"), lon)).to_netcdf(tmp_path / f"{name}.nc")
    given = [*generic(tmp_path, tmp_path / "a.nc", tmp_path / "b.nc"), *static, "--winds", "grid", "--shard-hours", "24"]
    store = prepare("generic", tmp_path / "s.zarr", *given)
    assert store
    assert "'u' will be missing at 24 hours, first 2015-03-02T00" in " ".join(capsys.readouterr().err.split())
    assert (store.missing["weather"][:, 0] == 1).sum() == 24


def test_a_damaged_shard_is_not_written_anew(
    static: list[str],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """What it held was given a new hash, and verified."""
    for day in (0, 1):
        regular(range(24 * day, 24 * day + 24)).to_netcdf(tmp_path / f"{day}.nc")
    prepare("generic", tmp_path / "s.zarr", *generic(tmp_path, tmp_path / "0.nc"), *static)
    shard = tmp_path / "s.zarr/weather/c/0/0/0/0"
    content = bytearray(shard.read_bytes())
    content[1000] ^= 1
    shard.write_bytes(content)
    assert append(tmp_path / "s.zarr", tmp_path / "1.nc") == 2
    assert "weather/c/0/0/0/0 is not what was written" in capsys.readouterr().err


def test_an_append_goes_on_with_the_same_hours_only_and_on_the_same_grids(
    static: list[str],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A file that was replaced meanwhile ended in a bare AssertionError; a field could change to another one's grid."""
    write(tmp_path, {"0": range(24), "1": range(24, 48)}, {"0": range(24), "1": range(24, 48)})
    prepare("several", tmp_path / "s.zarr", *two_sources(tmp_path, "0", "0"), *static, days=DAYS)

    def interrupted(*given: object) -> None:
        with monkeypatch.context() as patched:
            patched.setattr(Preparation, "load", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
            assert append(tmp_path / "s.zarr", *given) == 130

    interrupted(*two_sources(tmp_path))
    write(tmp_path, {}, {"1": range(24, 44)})
    assert append(tmp_path / "s.zarr", *two_sources(tmp_path)) == 2
    assert "pollutants1.nc holds other hours, or another grid or kind of unit" in capsys.readouterr().err
    write(tmp_path, {"1": range(24, 48), "2": range(48, 60)}, {"1": range(24, 48)})
    assert append(tmp_path / "s.zarr", *two_sources(tmp_path, "[01]")) == 0
    with_ratios(range(48, 60))[list(POLLUTANTS)].to_netcdf(tmp_path / "pollutants2.nc")
    assert append(tmp_path / "s.zarr", *two_sources(tmp_path)) == 2
    assert "are on another grid (17 x 21, 'co') than those that the store was made of (16 x 21)" in capsys.readouterr().err


def test_a_partner_that_was_read_before_is_not_waited_for(
    static: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """It was said to be nowhere, and to come first."""
    for name, air, dew in (("0", range(36), range(30)), ("1", range(36, 48), range(30, 48))):
        regular(air).drop_vars("rh").to_netcdf(tmp_path / f"air{name}.nc")
        dew_point = (regular(dew)["temp"] - 10).assign_attrs(units="K")
        dew_point.rename("d2m").to_dataset().to_netcdf(tmp_path / f"dew{name}.nc")
    given = generic(tmp_path, tmp_path / "air0.nc", tmp_path / "dew0.nc", dew_point="d2m")
    lines = (tmp_path / "map.yaml").read_text().replace("rh: {name: rh}\n", "")
    (tmp_path / "map.yaml").write_text(lines)
    prepare("generic", tmp_path / "s.zarr", *given, *static)
    assert append(tmp_path / "s.zarr", tmp_path / "air1.nc", tmp_path / "dew1.nc") == 2
    assert "'dew_point' at 2015-03-02T06, and the temp that it is converted with were read before" in capsys.readouterr().err


def test_a_field_does_not_change_to_the_grid_of_another(
    static: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Of one source with two grids; preparing at once refuses it."""
    for name, hours, step in (("0", range(24), 2), ("1", range(24, 48), 1)):
        dataset = regular(hours)
        dataset[list(UNITS)].to_netcdf(tmp_path / f"weather{name}.nc")
        dataset[list(POLLUTANTS)].isel(lat=slice(None, None, step)).to_netcdf(tmp_path / f"pollutants{name}.nc")
    given = generic(tmp_path, tmp_path / "weather0.nc", tmp_path / "pollutants0.nc")
    prepare("generic", tmp_path / "s.zarr", *given, *static)
    assert append(tmp_path / "s.zarr", tmp_path / "weather1.nc", tmp_path / "pollutants1.nc") == 2
    assert "are on another grid (17 x 21, 'pm25') than those that the store was made of (9 x 21)" in capsys.readouterr().err


def test_a_file_that_gave_no_hour_is_known_all_the_same(
    static: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A pattern may match one; it counted as new at every append."""
    regular().to_netcdf(tmp_path / "a.nc")
    regular()[["u"]].rename(u="other").to_netcdf(tmp_path / "b.nc")
    prepare("generic", tmp_path / "s.zarr", *generic(tmp_path, tmp_path / "a.nc", tmp_path / "b.nc"), *static)
    assert append(tmp_path / "s.zarr", tmp_path / "a.nc", tmp_path / "b.nc") == 0
    assert "it was made of all these files already" in capsys.readouterr().out
