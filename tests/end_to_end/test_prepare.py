"""`python -m data prepare` on files as CAQRA and CAMS publish them: values, restarts, parallel runs, and bad input."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import netCDF4
import numpy as np
import pytest
import xarray as xr
import xarray_regrid  # noqa: F401 - gives data arrays their .regrid
import zarr

from data import DataError, variables
from data.prepare import beginning, preparation, stages, static
from data.prepare.grids import regrid
from data.prepare.grids.grid import Grid
from data.prepare.plan import Plan, Scan
from data.prepare.preparation import Preparation
from data.prepare.sources.source import Source, known_fields
from data.process import locks
from data.store import layout
from data.store.opening import open_store
from data.wind_scan import cache
from tests.launching import BIN, ROOT, environment, run
from tests.reanalysis import lambert, write_cams, write_caqra, write_static

LAT, LON, GRID = (24.0, 46.0), (92.0, 116.0), (16, 32)
GAP = (30, 31, 50)


@pytest.fixture(scope="module")
def raw(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two CAQRA-like days in one file and one in another, four CAMS-like days, and static fields."""
    folder = tmp_path_factory.mktemp("raw")
    write_static(folder / "static.nc")
    write_caqra(folder / "jan.nc", start="2014-12-31", hours=72, without=GAP)
    write_caqra(folder / "feb.nc", start="2015-01-03", hours=30, names={"pm2_5": "PM25", "temp": "T2"}, seed=1)
    (folder / "cams").mkdir()
    write_cams(folder / "cams", start="2016-02-27", days=4)
    return folder


def arguments(raw: Path, out: Path, *files: Path, source: str = "caqra", train: str = "2014-12-31 2015-01-02") -> list[str]:
    static = raw / "static.nc"
    return [
        source,
        str(out),
        *(str(f) for f in files),
        "--lat",
        *map(str, LAT),
        "--lon",
        *map(str, LON),
        "--grid",
        *map(str, GRID),
        "--elevation",
        f"{static}:z",
        "--population",
        f"{static}:people",
        "--land-mask",
        f"{static}:land",
        "--train",
        *train.split(),
        "--shard-hours",
        "24",
    ]


def both_files(raw: Path, out: Path, scan: Path) -> list[str]:
    return [*arguments(raw, out, raw / "feb.nc", raw / "jan.nc"), "--wind-scan", str(scan), "--regions", "4", "4"]


def command(*given: str) -> subprocess.CompletedProcess[str]:
    return run([sys.executable, "-m", "data", "prepare", *given])


def plan(raw: Path, *files: Path, **changes: object) -> Plan:
    static = raw / "static.nc"
    fields: dict[str, object] = {
        "sources": (Source("caqra", known_fields("caqra"), list(files)),),
        "lat": LAT,
        "lon": LON,
        "grid": GRID,
        "splits": {"train": ("2014-12-31", "2015-01-02")},
        "elevation": f"{static}:z",
        "population": f"{static}:people",
        "land_mask": f"{static}:land",
        "shard_hours": 24,
    }
    return Plan(**(fields | changes))  # type: ignore[arg-type]


def content(path: Path) -> dict[str, bytes]:
    return {str(file.relative_to(path)): file.read_bytes() for file in path.rglob("*") if file.is_file()}


@pytest.fixture(scope="module")
def caqra(raw: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The store of both files, uninterrupted, one worker."""
    path = tmp_path_factory.mktemp("caqra") / "china.zarr"
    done = command(*both_files(raw, path, path.with_suffix(".wind_scan")))
    assert done.returncode == 0, done.stderr
    assert "summary of years" in done.stdout
    assert path.with_suffix(".png").read_bytes().startswith(b"\x89PNG")
    return path


def test_caqra_values_agree_with_an_independent_computation(raw: Path, caqra: Path) -> None:
    """xarray decodes, dense polygon weights of the library regrid; CO from mg to ug; gaps and both files' spellings."""
    weights = regrid.build(Grid(*lambert(40, 52, 100.0)), plan(raw).target, "conservative").weights.toarray().astype("f8")
    opened = xr.open_zarr(caqra)
    cases = (("co", "jan", "co", 5), ("u", "jan", "u", 49), ("pm25", "feb", "PM25", 3), ("temp", "feb", "T2", 29))
    for name, file, spelt, hour in cases:
        with xr.open_dataset(raw / f"{file}.nc") as source:
            when = np.datetime64("2014-12-31" if file == "jan" else "2015-01-03", "h") + hour
            field = source[spelt].sel(time=when).to_numpy().astype("f8").ravel()
        valid = np.isfinite(field)
        truth = weights @ np.where(valid, field, 0.0) / (weights @ valid) * (1000.0 if name == "co" else 1.0)
        truth[weights @ valid < 0.5] = np.nan
        group = variables.PUBLISHED.group(name)
        ours = opened[group].sel(time=when, **{f"{group}_variable": name})
        np.testing.assert_allclose(ours.to_numpy().ravel(), truth, rtol=1e-5, atol=1e-5)
        assert str(ours[f"{group}_units"].values) == variables.BY_NAME[name].units


def test_gaps_are_recorded_and_statistics_are_of_the_training_days(caqra: Path) -> None:
    opened = open_store(caqra)
    assert opened.times[0] == np.datetime64("2014-12-31T00")
    assert len(opened.times) == 102
    assert np.flatnonzero(opened.missing["chemistry"].min(1) >= 1.0).tolist() == list(GAP)
    assert opened.years["2015"]["gaps"] == {"weather": 3, "chemistry": 3}
    assert opened.years["2014"]["gaps"] == {"weather": 0, "chemistry": 0}
    chemistry = np.asarray(zarr.open_group(caqra, mode="r")["chemistry"])
    pm10 = chemistry[:72, 1].astype("f8")
    numbers = opened.statistics["pm10"]
    assert numbers["mean"] == pytest.approx(np.nanmean(pm10), rel=1e-9)
    assert numbers["log_mean"] == pytest.approx(np.nanmean(np.log1p(pm10)), rel=1e-6)
    assert numbers["log_std"] == pytest.approx(np.nanstd(np.log1p(pm10)), rel=1e-5)
    assert opened.years["2014"]["variables"]["pm10"]["range"] == pytest.approx([np.nanmin(pm10[:24]), np.nanmax(pm10[:24])])


def test_static_fields_know_sea_floor_and_empty_sea(caqra: Path) -> None:
    static = open_store(caqra).static
    assert static["elevation"].min() >= 0.0
    assert static["elevation"].max() > 2000.0
    assert np.isfinite(static["population"]).all()
    assert set(np.unique(static["domain_mask"])) == {1.0}


def test_sectors_of_the_same_pass_are_those_of_a_pass_of_their_own(caqra: Path, tmp_path: Path) -> None:
    opened = open_store(caqra)
    together = cache.open_cache(caqra.with_suffix(".wind_scan"), opened, patch=2)
    apart = cache.build(opened, tmp_path / "apart", patch=2, regions=(4, 4), sectors=16)
    everything = np.arange(apart.hours)
    np.testing.assert_array_equal(together.sectors(everything), apart.sectors(everything))


def test_cams_values_agree_with_an_independent_computation(raw: Path, tmp_path: Path) -> None:
    """Latitudes down, longitudes 0..360, packed integers, two files, 3-hourly; mixing ratios with p / (R T), RH by Magnus."""
    out = tmp_path / "cams.zarr"
    files = [raw / "cams" / f"{kind}.nc" for kind in ("surface", "level")]
    done = command(*arguments(raw, out, *files, source="cams", train="2016-02-27 2016-02-29"), "--method", "bilinear")
    assert done.returncode == 0, done.stderr
    surface, level = (xr.open_dataset(file) for file in files)
    target = plan(raw).target
    density = surface["sp"].astype("f8") / (287.05 * surface["t2m"])
    dew, air = (surface[name].astype("f8") - 273.15 for name in ("d2m", "t2m"))
    saturation = {key: 6.1094 * np.exp(17.625 * c / (c + 243.04)) for key, c in (("dew", dew), ("air", air))}
    truth = {
        "o3": 1e9 * density * level["go3"].squeeze("level"),
        "rh": 100 * saturation["dew"] / saturation["air"],
        "pm25": 1e9 * surface["pm2p5"].astype("f8"),
        "temp": surface["t2m"].astype("f8"),
    }
    opened = xr.open_zarr(out)
    for name, field in truth.items():
        expected = field.interp(latitude=target.lat, longitude=target.lon, method="linear").to_numpy()
        group = variables.PUBLISHED.group(name)
        ours = opened[group].sel({f"{group}_variable": name}).to_numpy()
        np.testing.assert_allclose(ours[::3], expected, rtol=1e-5)
        assert np.isnan(ours[1::3]).all()
    # hours that no file has cost no bytes
    size = sum(f.stat().st_size for f in (out / "chemistry" / "c").rglob("*") if f.is_file())
    assert size < 1.1 * len(surface["time"]) * 6 * GRID[0] * GRID[1] * 4


@pytest.mark.slow
def test_four_mpi_ranks_give_the_same_bytes(raw: Path, caqra: Path, tmp_path: Path) -> None:
    path = tmp_path / "china.zarr"
    given = both_files(raw, path, caqra.with_suffix(".wind_scan"))
    done = run([str(BIN / "mpirun"), "-n", "4", sys.executable, "-m", "data", "prepare", *given])
    assert done.returncode == 0, done.stderr
    assert content(path) == content(caqra)
    absent = arguments(raw, tmp_path / "b.zarr", raw / "none.nc")
    failed = run([str(BIN / "mpirun"), "-n", "2", sys.executable, "-m", "data", "prepare", *absent])
    assert failed.returncode != 0
    assert "none.nc cannot be read" in failed.stderr


@pytest.mark.slow
def test_killed_five_times_and_started_again_it_gives_the_same_bytes(raw: Path, caqra: Path, tmp_path: Path) -> None:
    path = tmp_path / "china.zarr"
    given = both_files(raw, path, caqra.with_suffix(".wind_scan"))
    start = [sys.executable, "-m", "data", "prepare", *given, "--workers", "2"]
    rng = np.random.default_rng(0)
    for _ in range(5):
        process = subprocess.Popen(start, cwd=ROOT, env=environment(), start_new_session=True, stderr=subprocess.DEVNULL)
        while not layout.partial_path(path).exists() and process.poll() is None:
            time.sleep(0.01)
        time.sleep(rng.uniform(0.0, 2.5))
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        if layout.partial_path(path).exists():
            with pytest.raises(DataError, match="unfinished"):
                open_store(path)
    last = run(start)
    assert last.returncode == 0, last.stderr
    assert content(path) == content(caqra)


def test_what_is_done_is_verified_and_only_the_rest_is_written(raw: Path, caqra: Path, tmp_path: Path) -> None:
    """Stages and parts as an array job runs them; a shard that rots in between is written again."""
    path = tmp_path / "china.zarr"
    wish = Scan(caqra.with_suffix(".wind_scan"), 2, (4, 4))
    ours = plan(raw, raw / "feb.nc", raw / "jan.nc", scan=wish)
    with pytest.raises(DataError, match="nothing was begun"):
        Preparation(path)
    begun = beginning.begin(path, ours)
    assert begun
    begun.load(begun.remaining(1, 2), workers=1)
    assert begun.remaining() == [0, 2, 4]
    with pytest.raises(DataError, match="3 of 5 shards are not written"):
        begun.finish()
    rotten = layout.partial_path(path) / "chemistry/c/1/0/0/0"
    rotten.write_bytes(rotten.read_bytes()[:-1] + b"x")
    with pytest.raises(DataError, match="begun with other shard_hours"):
        beginning.begin(path, plan(raw, raw / "feb.nc", raw / "jan.nc", scan=wish, shard_hours=48))
    again = beginning.begin(path, ours)
    assert again
    assert again.remaining() == [0, 1, 2, 4]
    again.load(again.remaining(), workers=2)
    again.finish()
    described = ("zarr.json", "plan.json")
    assert {name: body for name, body in content(path).items() if name not in described} == {
        name: body for name, body in content(caqra).items() if name not in described
    }
    assert not beginning.begin(path, ours)
    with pytest.raises(DataError, match="from another plan"):
        beginning.begin(path, plan(raw, raw / "jan.nc"))


def test_a_generic_source_is_mapped_by_a_file(raw: Path, tmp_path: Path) -> None:
    names = {"u": "U", "v": "V", "temp": "T", "rh": "R", "psfc": "P", "pm2_5": "fine"}
    write_caqra(tmp_path / "a.nc", start="2014-12-31", hours=24, names=names, units={"pm2_5": ""}, scale={"pm2_5": 1e-3})
    lines = [f"{name}: {{name: {spelt}}}" for name, spelt in {"u": "U", "v": "V", "temp": "T", "rh": "R", "psfc": "P"}.items()]
    lines += ["pm25: {name: fine, units: mg/m3}", *(f"{name}: {{name: {name}}}" for name in ("pm10", "so2", "no2", "co", "o3"))]
    (tmp_path / "map.yaml").write_text("\n".join(lines))
    prepared = arguments(raw, tmp_path / "g.zarr", tmp_path / "a.nc", source="generic")
    done = command(*prepared, "--map", str(tmp_path / "map.yaml"))
    assert done.returncode == 0, done.stderr
    assert 5.0 < open_store(tmp_path / "g.zarr").statistics["pm25"]["mean"] < 150.0
    (tmp_path / "map.yaml").write_text("\n".join(lines[1:]))
    done = command(*prepared, "--map", str(tmp_path / "map.yaml"))
    assert done.returncode == 2
    assert "map.yaml: nothing is given for u; the wind is always needed." in done.stderr


def copied(raw: Path, folder: Path) -> Path:
    return Path(shutil.copy(raw / "jan.nc", folder / "jan.nc"))


def truncate(file: Path) -> None:
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])


def rename_variable(file: Path) -> None:
    with netCDF4.Dataset(file, "a") as dataset:
        dataset.renameVariable("so2", "sulphur")


def swap_coordinates(file: Path) -> None:
    with netCDF4.Dataset(file, "a") as dataset:
        lat, lon = dataset["lat2d"][:], dataset["lon2d"][:]
        dataset["lat2d"][:], dataset["lon2d"][:] = lon, lat


def repeat_hour(file: Path) -> None:
    with netCDF4.Dataset(file, "a") as dataset:
        dataset["time"][7] = dataset["time"][6]


def shift_half_hour(file: Path) -> None:
    with netCDF4.Dataset(file, "a") as dataset:
        dataset["time"][:] = dataset["time"][:] + 0.5


def state_wrong_unit(file: Path) -> None:
    with netCDF4.Dataset(file, "a") as dataset:
        dataset["co"].units = "ug/m3"  # the values are mg/m3


def state_unknown_unit(file: Path) -> None:
    with netCDF4.Dataset(file, "a") as dataset:
        dataset["o3"].units = "furlongs"


def write_celsius(file: Path) -> None:
    with netCDF4.Dataset(file, "a") as dataset:
        dataset["temp"][:] = dataset["temp"][:] - 273.15


def hide_everything(file: Path) -> None:
    with netCDF4.Dataset(file, "a") as dataset:
        dataset["no2"][:] = np.nan


def forget_fill_value(file: Path) -> None:
    with netCDF4.Dataset(file, "a") as dataset:
        fields = dataset["psfc"][:]
        fields.mask = False
        dataset["psfc"].setncattr("missing_value", -5.0)
        fields[fields > 9e4] = -888.0
        dataset["psfc"][:] = fields


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (truncate, "jan.nc cannot be read"),
        (rename_variable, r"none of the 1 files \(caqra\) holds: so2 \(so2, SO2\)"),
        (swap_coordinates, "latitude and longitude look swapped"),
        (repeat_hour, "at 2014-12-31T06 is twice in"),
        (shift_half_hour, "2014-12-31T00:30:00 is not on a whole hour"),
        (state_wrong_unit, r"'co' at 2014-12-31T00.*It looks like mg m-3 \(factor 1000\)"),
        (state_unknown_unit, "is in 'furlongs', which cannot be turned into"),
        (write_celsius, r"'temp' at .*looks like degC \(factor 1, then \+ 273.15\)"),
        (hide_everything, "'no2' has no valid value in the training split"),
        (forget_fill_value, "fill value that its files do not declare"),
    ],
)
def test_bad_files_are_refused_by_name_and_leave_nothing_that_opens(
    raw: Path, tmp_path: Path, spoil: Callable[[Path], None], message: str
) -> None:
    file = copied(raw, tmp_path)
    spoil(file)
    with pytest.raises(DataError, match=message):
        stages.prepare(tmp_path / "s.zarr", plan(raw, file), workers=1)
    with pytest.raises(DataError):
        open_store(tmp_path / "s.zarr")


def test_an_hour_in_two_files_is_refused(raw: Path, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"at 2014-12-31T00 is in .*jan.nc and in .*jan.nc"):
        stages.prepare(tmp_path / "s.zarr", plan(raw, raw / "jan.nc", copied(raw, tmp_path)), workers=1)


def test_other_calendars_keep_the_name_of_their_days(raw: Path, tmp_path: Path) -> None:
    file = copied(raw, tmp_path)
    with netCDF4.Dataset(file, "a") as dataset:
        dataset["time"].calendar = "noleap"
        dataset["time"].units = "hours since 2015-02-27 00:00:00"
    stages.prepare(tmp_path / "s.zarr", plan(raw, file, splits={"train": ("2015-02-27", "2015-03-01")}), workers=1)
    assert open_store(tmp_path / "s.zarr").times[-1] == np.datetime64("2015-03-01T23")


@pytest.mark.slow
def test_a_full_disk_is_named_and_the_run_goes_on_when_there_is_room(raw: Path, caqra: Path, tmp_path: Path) -> None:
    path = tmp_path / "china.zarr"
    given = both_files(raw, path, caqra.with_suffix(".wind_scan"))
    limited = run(["bash", "-c", 'ulimit -f 200; exec "$@"', "-", sys.executable, "-m", "data", "prepare", *given])
    assert limited.returncode == 2
    assert "make room, and run the same command again" in limited.stderr
    assert "Traceback" not in limited.stderr
    done = command(*given)
    assert done.returncode == 0, done.stderr
    assert content(path) == content(caqra)


def test_a_target_without_room_is_refused_before_anything_is_read(
    raw: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(10**9, 10**9, 0))  # type: ignore[attr-defined]
    with pytest.raises(DataError, match=r"will take up to 0.0 GB, .* has 0.0 GB free"):
        stages.prepare(tmp_path / "s.zarr", plan(raw, raw / "jan.nc"), workers=1)


def test_domains_come_as_arrays_polygons_and_fields(raw: Path, tmp_path: Path) -> None:
    target = plan(raw).target
    mask = np.zeros(GRID)
    mask[3:7, 4:9] = 1
    np.save(tmp_path / "d.npy", mask)
    np.testing.assert_array_equal(static._domain(str(tmp_path / "d.npy"), target), mask > 0)
    (tmp_path / "d.geojson").write_text('{"type": "Polygon", "coordinates": [[[95,30],[100,30],[100,35],[95,35],[95,30]]]}')
    inside = (abs(target.lat[:, None] - 32.5) < 2.5) & (abs(target.lon - 97.5) < 2.5)
    np.testing.assert_array_equal(static._domain(str(tmp_path / "d.geojson"), target), inside)
    land = static._domain(f"{raw / 'static.nc'}:land", target)
    np.testing.assert_array_equal(land, np.repeat(target.lon[None] < 118, GRID[0], 0))


def test_a_run_killed_before_its_wind_scan_writes_it_when_started_again(
    raw: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    scan = Scan(tmp_path / "s.wind_scan", 2, (4, 4))
    ours = plan(raw, raw / "jan.nc", scan=scan)
    with monkeypatch.context() as killed:
        killed.setattr(preparation, "build_scan", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            stages.prepare(tmp_path / "s.zarr", ours, workers=1)
    stages.prepare(tmp_path / "s.zarr", ours, workers=1)
    cache.open_cache(scan.out, open_store(tmp_path / "s.zarr"), patch=2)


def test_a_shard_has_one_writer_and_tasks_without_mpi_are_refused(
    raw: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, ours = tmp_path / "s.zarr", plan(raw, raw / "jan.nc")
    begun = beginning.begin(path, ours)
    assert begun
    with (
        locks.hold(layout.parts_path(path) / "lock-1"),
        pytest.raises(DataError, match=f"shard 1 of .* is being written by process {os.getpid()}"),
    ):
        begun.load([1], workers=1)
    slurm = {"SLURM_PROCID": "3", "SLURM_LOCALID": "0", "SLURM_STEP_NUM_TASKS": "64"}
    for name, value in slurm.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(DataError, match="srun started 64 processes without MPI"):
        stages.prepare(path, ours, workers=1)
