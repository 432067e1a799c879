"""Files as people hold them: each structure is written with analytic values, prepared, and every stored number compared.

Fields are linear in latitude, longitude and time, so bilinear regridding of a regular grid is exact.
"""

from __future__ import annotations

import json
import sys
import tarfile
import zipfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import netCDF4
import numpy as np
import pytest
import xarray as xr
import yaml

from data import DataError
from data.__main__ import main
from data.prepare.sources.units import conversion, mass_mixing_ratio
from data.store.layout import Store
from data.store.opening import open_store
from data.store.reader import ShardReader
from data.variables import PUBLISHED
from data.wind_scan.cache import open_cache
from tests.reanalysis import lambert

DAY = np.datetime64("2015-03-01T00", "h")
HOURS = 24
# name -> value at 32 N, 111 E and DAY, and its slopes along latitude, longitude and hours
TRUTH = {
    "u": (3.0, 0.2, -0.1, 0.05), "v": (-2.0, -0.1, 0.15, -0.04), "temp": (285.0, -0.8, 0.1, 0.2), "rh": (55.0, 1.0, 0.5, 0.1),
    "psfc": (95e3, 120.0, -60.0, 3.0), "pm25": (60.0, 1.5, 1.0, 0.5), "pm10": (90.0, 2.0, -1.0, 0.6), 
    "so2": (15.0, 0.3, 0.2, 0.05), "no2": (30.0, -0.4, 0.6, 0.1), "co": (800.0, 15.0, 10.0, 4.0), "o3": (70.0, 2.0, -1.5, 0.4),
}  # fmt: skip
LAT1, LON1 = np.arange(28.0, 36.1, 0.5), np.arange(106.0, 116.1, 0.5)
UNITS = {"u": "m s-1", "v": "m s-1", "temp": "K", "rh": "%", "psfc": "Pa"}
OPTIONS = ("elevation", "population", "land-mask")
TARGET = ["--lat", "30", "34", "--lon", "108", "114", "--grid", "8", "12"]


def truth(name: str, lat: np.ndarray, lon: np.ndarray, hours: Any) -> np.ndarray:
    """(T, H, W) of (H, W) coordinates and hours since DAY."""
    base, by_lat, by_lon, by_hour = TRUTH[name]
    return (base + by_lat * (lat - 32) + by_lon * (lon - 111))[None] + by_hour * np.asarray(hours)[:, None, None]


def regular(hours: Any = range(HOURS), **units: str) -> xr.Dataset:
    lon, lat = np.meshgrid(LON1, LAT1)
    fields = {
        name: (("time", "lat", "lon"), truth(name, lat, lon, list(hours)).astype("f4"),
               {"units": units.get(name, UNITS.get(name, "ug m-3"))})
        for name in TRUTH
    }  # fmt: skip
    return xr.Dataset(fields, {
        "time": ("time", list(hours), {"units": "hours since 2015-03-01"}),
        "lat": ("lat", LAT1, {"units": "degrees_north"}), "lon": ("lon", LON1, {"units": "degrees_east"}),
    })  # fmt: skip


def prepare(source: str, store: Path, *given: object, code: int = 0, days: str = "2015-03-01 2015-03-01") -> Store | None:
    method = [] if source == "several" else ["--method", "bilinear"]
    arguments = ["prepare", source, str(store), *map(str, given), *TARGET, *method, "--train", *days.split()]
    assert main(arguments) == code
    return open_store(store) if code == 0 else None


def values_agree(store: Store | None, least: float = 0.4) -> bool:
    """Every stored value that is not missing is the truth at its own hour, and so many of them are there."""
    assert store
    lon, lat = np.meshgrid(store.lon, store.lat)
    hours = (store.times - DAY).astype(int)
    wrong = []
    for group in ("weather", "chemistry"):
        fields = ShardReader(store, group).read(np.arange(len(hours)))
        for variable in PUBLISHED.groups[group]:
            found, wanted = fields[:, PUBLISHED.channel(variable.name)], truth(variable.name, lat, lon, hours)
            error = np.abs(found - wanted) / (np.abs(wanted) + 1)
            if not np.nanmax(error) < 2e-3 or np.isfinite(found).mean() < least:
                wrong.append((variable.name, float(np.nanmax(error)), float(np.isfinite(found).mean())))
    assert wrong == []
    return True


@pytest.fixture(scope="module")
def caqra(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A day of 24 files as CAQRA is distributed: no time, no attributes, hyphens, co in mg m-3; the hour, Beijing's, in the
    name."""
    folder = tmp_path_factory.mktemp("caqra") / "raw"
    (folder / "201503").mkdir(parents=True)
    lat, lon = lambert(40, 46, 27.0)
    lat, lon = lat + 32.0 - lat.mean(), lon + 111.0 - lon.mean()
    for hour in range(HOURS):
        with netCDF4.Dataset(folder / f"201503/CN-Reanalysis20150301{hour:02d}.nc", "w", format="NETCDF3_CLASSIC") as file:
            dims = ("bottom-top", "south-north", "west-east")
            for dim, size in zip(dims, (1, *lat.shape), strict=True):
                file.createDimension(dim, size)
            fields = {name: truth(name, lat, lon, [hour - 8]) for name in TRUTH} | {"lat2d": lat[None], "lon2d": lon[None]}
            fields["co"] = fields["co"] / 1000
            for name, values in fields.items():
                file.createVariable(name, "f4", dims)[:] = values
    with tarfile.open(folder.parent / "CN-Reanalysis20150301.tar.gz", "w:gz") as tar:
        for path in sorted((folder / "201503").iterdir()):
            tar.add(path, path.name)
    with zipfile.ZipFile(folder.parent / "CN-Reanalysis20150301.zip", "w") as archive:
        for path in sorted((folder / "201503").iterdir()):
            archive.write(path, path.name)
    (folder.parent / "list.txt").write_text("\n".join(str(p) for p in (folder / "201503").iterdir()) + "\n")
    return folder.parent


@pytest.mark.parametrize("given", ["raw", "raw/201503/*.nc", "*.tar.gz", "CN-Reanalysis20150301.zip", "--files-from list.txt"])
def test_caqra_as_it_is_distributed(given: str, caqra: Path, static: list[str], tmp_path: Path) -> None:
    """Directories, patterns, archives and lists are the same files, and hours in names are those of Beijing."""
    option, _, where = given.rpartition(" ")
    days = "2015-02-28 2015-03-01"
    store = prepare("caqra", tmp_path / "s.zarr", *filter(None, [option]), caqra / where, *static, days=days)
    assert values_agree(store)
    assert store
    assert store.times[0] == np.datetime64("2015-02-28T16")
    assert store.provenance["hours"] == "times in files are UTC+0 h, in names +8 h"


def test_another_time_zone_is_said_and_an_unsaid_one_is_asked_for(
    caqra: Path, static: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    store = prepare("caqra", tmp_path / "s.zarr", caqra / "raw", *static, "--zone", "0")
    assert store
    assert store.times[0] == DAY
    (tmp_path / "map.yaml").write_text("".join(f"{name}: {{name: {name}}}\n" for name in TRUTH))
    mapped = [caqra / "raw", *static, "--map", tmp_path / "map.yaml"]
    prepare("generic", tmp_path / "g.zarr", *mapped, code=2)
    assert "its hour stands in its name only: say in which time zone, as --zone 0" in capsys.readouterr().err


@pytest.mark.parametrize(("zone", "hour_of_peak", "warned"), [("0", 14.0, False), ("8", 6.0, True), ("-8", 22.0, True)])
def test_the_day_of_ozone_shows_a_wrong_time_zone(
    zone: str, hour_of_peak: float, warned: bool, static: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    dataset = regular()
    local = np.arange(HOURS)[:, None, None] + LON1 / 15 + 0 * LAT1[:, None]
    dataset["o3"] = dataset["o3"].copy(data=(70 + 30 * np.cos(2 * np.pi * (local - 14) / 24)).astype("f4"))
    dataset.to_netcdf(tmp_path / "y.nc")
    (tmp_path / "map.yaml").write_text("".join(f"{name}: {{name: {name}}}\n" for name in TRUTH))
    given = [tmp_path / "y.nc", "--map", tmp_path / "map.yaml", *static, "--zone", zone]
    prepare("generic", tmp_path / "s.zarr", *given, days="2015-02-28 2015-03-02")
    shown = capsys.readouterr()
    peak = float(shown.out.split("peak of its daily wave at ")[1].split(" h")[0])
    assert peak == pytest.approx(hour_of_peak, abs=0.3)
    assert ("`--zone HOURS`" in shown.err) == warned


def topoflow(year_start: str, folder: Path, zarr_format: Any = 2, both: bool = False) -> Path:
    lat1, lon1 = np.linspace(27, 37, 41), np.linspace(104, 118, 57)
    lon, lat = np.meshgrid(lon1, lat1)
    china = ((lat - 32) ** 2 + ((lon - 111) / 1.6) ** 2) < 9
    start = np.datetime64(year_start, "h")
    hours = (start - DAY).astype(int) + np.arange(12)
    fields: dict[str, Any] = {
        name: (("time", "lat", "lon"), np.where(china, truth(name, lat, lon, hours), np.nan).astype("f4")) for name in TRUTH
    }
    fields["elevation"] = (("lat", "lon"), np.where(china, 500.0, np.nan).astype("f4"))
    fields["population"] = (("lat", "lon"), np.where(china, 13381.0, np.nan).astype("f4"))
    times = (start + np.arange(12)).astype("datetime64[ns]")
    coordinates: dict[str, Any] = {"time": times, "lat2d": ("lat", lat1), "lon2d": ("lon", lon1)}
    if both:
        coordinates |= {"lat": lat1, "lon": lon1}
    path = folder / f"data_{year_start}_china_masked.zarr"
    xr.Dataset(fields, coordinates).to_zarr(path, zarr_format=zarr_format, consolidated=zarr_format == 2)
    return path


@pytest.mark.parametrize(("zarr_format", "both"), [(2, False), (2, True), (3, False)])
def test_the_yearly_stores_of_the_public_code_bring_their_static_fields(zarr_format: int, both: bool, tmp_path: Path) -> None:
    """Two of them, one after the other; NaN outside China becomes the domain."""
    years = [topoflow(start, tmp_path, zarr_format, both) for start in ("2015-03-01T00", "2015-03-01T12")]
    store = prepare("topoflow", tmp_path / "s.zarr", *years)
    assert values_agree(store)
    assert store
    lon, lat = np.meshgrid(store.lon, store.lat)
    inside = ((lat - 32) ** 2 + ((lon - 111) / 1.6) ** 2) < 9
    assert (store.static["domain_mask"].astype(bool) == inside).mean() > 0.93
    assert np.allclose(store.static["elevation"][store.static["domain_mask"] > 0], 500.0, atol=260.0)


def test_yearly_stores_smaller_than_the_target_leave_hours_to_train_on(tmp_path: Path) -> None:
    """Beyond the source there is no terrain, nobody lives, nothing is forecast, and the wind scan has an order all the same."""
    years = [topoflow(start, tmp_path) for start in ("2015-03-01T00", "2015-03-01T12")]
    larger = ["--lat", "20", "44", "--lon", "95", "127", "--grid", "24", "32"]
    scan = ["--wind-scan", tmp_path / "scan", "--regions", "4", "4"]
    arguments = ["prepare", "topoflow", tmp_path / "s.zarr", *years, *larger, *scan, "--train", "2015-03-01", "2015-03-01"]
    assert main([str(argument) for argument in arguments]) == 0
    store = open_store(tmp_path / "s.zarr")
    outside = store.static["domain_mask"] == 0
    assert outside[0].all()
    assert not outside.all()
    assert not store.static["elevation"][0].any()
    assert not store.static["land_fraction"][0].any()
    assert open_cache(tmp_path / "scan", store, patch=2).usable("regional").all()


def test_a_source_without_static_fields_says_which_option_is_missing(
    caqra: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    prepare("caqra", tmp_path / "s.zarr", caqra / "raw", code=2, days="2015-02-28 2015-03-01")
    assert "--elevation FILE[:VARIABLE] is needed" in capsys.readouterr().err


def cams_surface_and_level(folder: Path, first: int = 0) -> list[Path]:
    """As the Atmosphere Data Store delivers analyses since 2024."""
    lon, lat = np.meshgrid(LON1, LAT1[::-1])
    hours = np.arange(first, first + HOURS, 3)
    value = {name: truth(name, lat, lon, hours) for name in TRUTH}
    celsius = value["temp"] - 273.15
    humid = np.log(value["rh"] / 100) + 17.625 * celsius / (celsius + 243.04)
    air = value["psfc"] / (287.05 * value["temp"])
    surface = {"u10": value["u"], "v10": value["v"], "t2m": value["temp"], "sp": value["psfc"], "pm2p5": value["pm25"] * 1e-9,
               "pm10": value["pm10"] * 1e-9, "d2m": 273.15 + 243.04 * humid / (17.625 - humid)}  # fmt: skip
    level = {"so2": value["so2"], "no2": value["no2"], "co": value["co"], "go3": value["o3"]}
    units = {"u10": "m s**-1", "v10": "m s**-1", "t2m": "K", "d2m": "K", "sp": "Pa"}
    seconds = (DAY - np.datetime64("1970-01-01", "h")).astype(int) * 3600 + hours * 3600
    time = {"units": "seconds since 1970-01-01", "standard_name": "time", "calendar": "proleptic_gregorian"}
    coordinates: dict[str, Any] = {
        "latitude": ("latitude", LAT1[::-1], {"units": "degrees_north", "stored_direction": "decreasing"}),
        "longitude": ("longitude", LON1, {"units": "degrees_east"}), "number": ((), 0, {"units": "1"}),
        "valid_time": ("valid_time", seconds, time), "expver": ("valid_time", np.array(["0001"] * len(hours), object)),
    }  # fmt: skip
    written = []
    for name, fields in (("data_sfc.nc", surface), ("data_mlev.nc", {k: x * 1e-9 / air for k, x in level.items()})):
        dims: tuple[str, ...] = ("valid_time", "latitude", "longitude")
        if name == "data_mlev.nc":
            dims, coordinates = (dims[0], "model_level", *dims[1:]), coordinates | {"model_level": ("model_level", [60.0])}
            fields = {k: x[:, None] for k, x in fields.items()}
        dataset = xr.Dataset(
            {
                k: (dims, x.astype("f4"), {"units": units.get(k, "kg m**-3" if "pm" in k else "kg kg**-1")})
                for k, x in fields.items()
            },
            coordinates,
        )
        dataset.to_netcdf(folder / name)
        written.append(folder / name)
    return written


def test_cams_is_read_from_the_zip_that_was_saved_as_nc(static: list[str], tmp_path: Path) -> None:
    files = cams_surface_and_level(tmp_path)
    assert values_agree(prepare("cams", tmp_path / "a.zarr", *files, *static), least=8 / 22)
    with zipfile.ZipFile(tmp_path / "download.nc", "w") as archive:
        for file in files:
            archive.write(file, file.name)
    again = prepare("cams", tmp_path / "b.zarr", tmp_path / "download.nc", *static)
    assert again
    assert again.content == open_store(tmp_path / "a.zarr").content


# Of CAMS: name in our truth's files -> paramId of ECMWF
PARAMETERS = {"u10": 165, "v10": 166, "t2m": 167, "d2m": 168, "sp": 134, "pm2p5": 210073, "pm10": 210074, "so2": 210122,
              "no2": 210121, "co": 210123, "go3": 210203}  # fmt: skip


def test_cams_in_grib_has_the_values_of_the_same_in_netcdf(static: list[str], tmp_path: Path) -> None:
    """Surface and model level in one file, analyses by reference time and a step of 0."""
    eccodes = pytest.importorskip("eccodes")
    with open(tmp_path / "cams.grib", "wb") as out:
        for file in cams_surface_and_level(tmp_path):
            with xr.open_dataset(file) as dataset:
                for name in dataset.data_vars:
                    for time in dataset["valid_time"].to_numpy():
                        hour = str(time.astype("datetime64[h]"))
                        message = eccodes.codes_grib_new_from_samples("regular_ll_sfc_grib1")
                        keys = {
                            "Ni": len(LON1), "Nj": len(LAT1), "latitudeOfFirstGridPointInDegrees": LAT1[-1],
                            "latitudeOfLastGridPointInDegrees": LAT1[0], "longitudeOfFirstGridPointInDegrees": LON1[0],
                            "longitudeOfLastGridPointInDegrees": LON1[-1], "iDirectionIncrementInDegrees": 0.5,
                            "jDirectionIncrementInDegrees": 0.5, "dataDate": int(hour[:10].replace("-", "")),
                            "dataTime": 100 * int(hour[11:13]), "paramId": PARAMETERS[str(name)], "bitsPerValue": 24,
                        }  # fmt: skip
                        if file.name == "data_mlev.nc":
                            keys |= {"typeOfLevel": "hybrid", "level": 60}
                        for key, value in keys.items():
                            eccodes.codes_set(message, key, value)
                        eccodes.codes_set_values(message, dataset[name].sel(valid_time=time).to_numpy().ravel().astype("f8"))
                        eccodes.codes_write(message, out)
                        eccodes.codes_release(message)
    assert values_agree(prepare("cams", tmp_path / "a.zarr", tmp_path / "cams.grib", *static), least=8 / 22)


def test_grib_without_its_packages_says_which(
    static: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "cams.grib").write_bytes(b"GRIB\0\0\0\2" + bytes(500) + b"7777")
    monkeypatch.setitem(sys.modules, "eccodes", None)
    prepare("cams", tmp_path / "s.zarr", tmp_path / "cams.grib", *static, code=2)
    assert "is GRIB, which is read with one more package: pip install eccodes" in capsys.readouterr().err


@pytest.mark.parametrize("packed", [False, True])
def test_the_pieces_of_era5_are_joined(packed: bool, plain: list[object], static: list[str], tmp_path: Path) -> None:
    """Final analyses (expver 1) until an hour, preliminary ones (expver 5) after it; the other piece is missing."""
    files = regular()
    final = (np.arange(HOURS) < 15)[:, None, None]
    for name in ("u", "v", "temp", "rh", "psfc"):
        values = files[name].to_numpy()
        pieces = np.stack([np.where(final, values, np.nan), np.where(final, np.nan, values)], 1)
        files[name] = (("time", "expver", "lat", "lon"), pieces, files[name].attrs)
    files["expver"] = ("expver", np.array([1, 5], "i4"))
    names = ("u", "v", "temp", "rh", "psfc")
    packing = {name: {"dtype": "i2", "scale_factor": float(files[name].max() - files[name].min()) / 6e4,
                      "add_offset": float(files[name].mean()), "_FillValue": -32768} for name in names}  # fmt: skip
    files.to_netcdf(tmp_path / "era5.nc", encoding=packing if packed else None)
    assert values_agree(prepare("generic", tmp_path / "s.zarr", tmp_path / "era5.nc", *plain[1:], *static))


def test_the_european_product_as_it_is_delivered(static: list[str], tmp_path: Path) -> None:
    """Hours since a day that stands in a description, longitudes that wrap inside the domain, a micro sign of Latin-1."""
    east = np.arange(-6.0, 6.1, 0.5)
    lon, lat = np.meshgrid(east + 111.0, LAT1)  # the truth is that of 111 degrees farther east
    with netCDF4.Dataset(tmp_path / "europe.nc", "w") as file:
        for dim, size in (("time", HOURS), ("level", 1), ("latitude", len(LAT1)), ("longitude", len(east))):
            file.createDimension(dim, size)
        times = file.createVariable("time", "f4", ("time",))
        times.units, times.long_name, times[:] = "hours", "ANALYSIS time from 20150301", np.arange(HOURS)
        file.createVariable("latitude", "f4", ("latitude",))[:] = LAT1
        file["latitude"].units = "degrees_north"
        file.createVariable("longitude", "f4", ("longitude",))[:] = np.mod(east, 360.0)
        file["longitude"].units = "degrees_east"
        for name in TRUTH:
            variable = file.createVariable(name, "f4", ("time", "level", "latitude", "longitude"))
            variable[:] = truth(name, lat, lon, range(HOURS))[:, None]
            unit = UNITS.get(name, "\xb5g/m3")
            variable.setncattr("units", unit)
    latin = (tmp_path / "europe.nc").read_bytes().replace("\xb5g/m3".encode(), b"\xb5g/m3\0")
    (tmp_path / "europe.nc").write_bytes(latin)
    store = tmp_path / "s.zarr"
    target = ["--lat", "30", "34", "--lon", "-3", "3", "--grid", "8", "12", "--method", "bilinear"]
    (tmp_path / "map.yaml").write_text("".join(f"{name}: {{name: {name}}}\n" for name in TRUTH))
    lon, lat = np.meshgrid(np.arange(-10.0, 10.1, 0.5), np.arange(25.0, 40.0, 0.5))
    axes = {"lat": ("lat", lat[:, 0], {"units": "degrees_north"}), "lon": ("lon", lon[0], {"units": "degrees_east"})}
    fields = {name: (("lat", "lon"), np.ones_like(lon)) for name in ("z", "people", "land")}
    xr.Dataset(fields, axes).to_netcdf(tmp_path / "st.nc")
    own = [f"--{option}={tmp_path}/st.nc:{name}" for option, name in zip(OPTIONS, fields, strict=True)]
    given = ["prepare", "generic", store, tmp_path / "europe.nc", "--map", tmp_path / "map.yaml", *target, *own]
    assert main([*map(str, given), "--train", "2015-03-01", "2015-03-01"]) == 0
    opened = open_store(store)
    assert values_agree(replace(opened, lon=opened.lon + 111.0))


def test_wrf_chem_as_it_writes_it_and_the_level_that_its_refusal_asks_for(
    static: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Times as text, coordinates along Time, gases in ppmv on levels, colons in the names of files."""
    lat, lon = lambert(40, 46, 27.0)
    lat, lon = lat + 32.0 - lat.mean(), lon + 111.0 - lon.mean()
    names = {"u": "U10", "v": "V10", "temp": "T2", "psfc": "PSFC", "rh": "RH2", "pm25": "PM2_5_DRY", "pm10": "PM10"}
    names |= {name: name for name in ("so2", "no2", "co", "o3")}
    mass = {"so2": 64.066, "no2": 46.0055, "co": 28.010, "o3": 47.998}
    air = truth("psfc", lat, lon, range(HOURS)) / (287.05 * truth("temp", lat, lon, range(HOURS)))
    file = tmp_path / "wrfout_d01_2015-03-01_00:00:00"
    with netCDF4.Dataset(file, "w") as wrf:
        sizes = {"Time": None, "DateStrLen": 19, "south_north": lat.shape[0], "west_east": lat.shape[1], "bottom_top": 3}
        for dim, size in sizes.items():
            wrf.createDimension(dim, size)
        texts = np.array([f"2015-03-01_{hour:02d}:00:00" for hour in range(HOURS)], "S19")
        wrf.createVariable("Times", "S1", ("Time", "DateStrLen"))[:] = netCDF4.stringtochar(texts)
        for name, values, units in (("XLAT", lat, "degree_north"), ("XLONG", lon, "degree_east")):
            written = wrf.createVariable(name, "f4", ("Time", "south_north", "west_east"))
            written.units = units
            written[:] = np.repeat(values[None], HOURS, 0)
        for name, theirs in names.items():
            values = truth(name, lat, lon, range(HOURS))
            if name in mass:
                values = values * 1e-9 / air * 28.9647 / mass[name] * 1e6
            on_levels = name in mass or name.startswith("pm")
            dims = ("Time", *(("bottom_top",) if on_levels else ()), "south_north", "west_east")
            written = wrf.createVariable(theirs, "f4", dims)
            written.units = UNITS.get(name, "ppmv" if name in mass else "ug m^-3")
            written[:] = np.stack([values, values * 0.5, values * 0.1], 1) if on_levels else values
    plain = "".join(f"{name}: {{name: {theirs}}}\n" for name, theirs in names.items())
    (tmp_path / "map.yaml").write_text(plain)
    prepare("generic", tmp_path / "s.zarr", file, *static, "--map", tmp_path / "map.yaml", code=2)
    assert "as  pm25: {name: PM2_5_DRY, level: 0}" in capsys.readouterr().err
    lowest = "".join(f"{name}: {{name: {theirs}, level: 0}}\n" for name, theirs in names.items())
    (tmp_path / "map.yaml").write_text(lowest)
    assert values_agree(prepare("generic", tmp_path / "s.zarr", file, *static, "--map", tmp_path / "map.yaml"))


def test_weather_and_pollutants_on_grids_of_their_own(static: list[str], tmp_path: Path) -> None:
    """ERA5 beside a product of pollutants; its gases as mixing ratios in ERA5's air."""
    weather, pollutants = regular()[list(UNITS)], regular()[[name for name in TRUTH if name not in UNITS]]
    coarse = weather.isel(lat=slice(None, None, 2), lon=slice(None, None, 2))
    coarse.to_netcdf(tmp_path / "era5.nc")
    pollutants.to_netcdf(tmp_path / "pollutants.nc")
    (tmp_path / "map.yaml").write_text("".join(f"{name}: {{name: {name}}}\n" for name in TRUTH))
    given = [tmp_path / "era5.nc", tmp_path / "pollutants.nc", *static, "--map", tmp_path / "map.yaml", "--workers", 2]
    store = prepare("generic", tmp_path / "s.zarr", *given)
    assert values_agree(store)
    assert store
    assert store.provenance["source_grids"] == [[9, 11], [17, 21]]
    air = weather["psfc"] / (287.05 * weather["temp"])
    for name in ("so2", "no2", "co", "o3"):
        pollutants[name] = (pollutants[name] * 1e-9 / air).assign_attrs(units="kg kg-1").astype("f4")
    pollutants.to_netcdf(tmp_path / "pollutants.nc")
    assert values_agree(prepare("generic", tmp_path / "ratios.zarr", *given))


def test_one_variable_on_two_grids_is_refused_and_goes_as_it_says(
    static: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    files = [tmp_path / "a.nc", tmp_path / "b.nc"]
    regular().to_netcdf(files[0])
    regular(range(24, 48)).isel(lat=slice(1, None)).to_netcdf(files[1])
    (tmp_path / "map.yaml").write_text("".join(f"{name}: {{name: {name}}}\n" for name in TRUTH))
    given = [*static, "--map", tmp_path / "map.yaml"]
    prepare("generic", tmp_path / "s.zarr", *files, *given, code=2)
    assert "b.nc has 'u' on another grid (16 x 21) than the files before it (17 x 21)" in capsys.readouterr().err
    assert values_agree(prepare("generic", tmp_path / "s.zarr", files[0], *given))


def listed(path: Path, *sources: dict[str, Any]) -> Path:
    path.write_text(yaml.safe_dump(list(sources)))
    return path


WEATHER = {name: {"name": name} for name in UNITS}
POLLUTANTS = {name: {"name": name} for name in TRUTH if name not in UNITS}


def test_several_sources_have_each_its_own_map_hours_method_and_grid(
    caqra: Path, static: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Weather of means stamped in the middle of their hour, UTC, beside CAQRA's pollutants, in Beijing's hours; both products
    hold weather, so one of them leaves it out, as the refusal says."""
    dataset = regular(range(-7, 16))
    dataset["time"] = ("time", np.arange(-7, 16) - 0.5, dataset["time"].attrs)
    dataset.to_netcdf(tmp_path / "merra.nc")
    merra = {"kind": "generic", "files": str(tmp_path / "*.nc"), "map": WEATHER, "stamps": "centre", "method": "conservative"}
    both = {"kind": "caqra", "files": [str(caqra / "*.tar.gz")], "method": "bilinear"}
    given = ["--config", tmp_path / "sources.yaml", *static, "--workers", "2"]
    listed(given[1], merra, both)
    prepare("several", tmp_path / "s.zarr", *given, code=2)
    told = capsys.readouterr().err
    assert "'u' is read from source 1 (generic) and source 2 (caqra): leave it out of one of them, by `u:` in the map" in told
    listed(given[1], merra, both | {"map": dict.fromkeys(UNITS)})
    store = prepare("several", tmp_path / "s.zarr", *given, days="2015-02-28 2015-03-01")
    assert values_agree(store)
    assert store
    assert store.times[0] == np.datetime64("2015-02-28T16")
    assert store.provenance["methods"] == ["conservative", "bilinear"]
    assert store.provenance["hours"] == (
        "times in files are UTC+0 h, at the centre of averaged hours; times in files are UTC+0 h, in names +8 h"
    )
    written = (tmp_path / "s.zarr/zarr.json").stat().st_mtime_ns
    prepare("several", tmp_path / "s.zarr", *given, days="2015-02-28 2015-03-01")
    assert (tmp_path / "s.zarr/zarr.json").stat().st_mtime_ns == written


def test_ratios_of_one_source_become_concentrations_in_the_air_of_another(static: list[str], tmp_path: Path) -> None:
    """And the dew point of a source is left out with its `rh`."""
    dataset = regular()
    dataset.to_netcdf(tmp_path / "weather.nc")
    air = dataset["psfc"] / (287.05 * dataset["temp"])
    for name in ("so2", "no2", "co", "o3"):
        dataset[name] = (dataset[name] * 1e-9 / air).assign_attrs(units="kg kg-1").astype("f4")
    theirs = {"temp": "t2m", "psfc": "sp", "u": "u10", "v": "v10", "rh": "d2m", "o3": "go3", "pm25": "pm2p5"}
    dataset.isel(lat=slice(None, None, 2)).rename(theirs).to_netcdf(tmp_path / "cams.nc")
    given = listed(
        tmp_path / "sources.yaml",
        {"kind": "cams", "files": str(tmp_path / "cams.nc"), "method": "bilinear", "map": dict.fromkeys(UNITS)},
        {"kind": "topoflow", "files": str(tmp_path / "weather.nc"), "method": "bilinear", "map": dict.fromkeys(POLLUTANTS)},
    )
    assert values_agree(prepare("several", tmp_path / "s.zarr", "--config", given, *static))


def test_a_shard_of_cams_keeps_its_hours_when_later_ones_are_appended(static: list[str], tmp_path: Path) -> None:
    """Humidity from dew points, and gases from mixing ratios, are of the new hours; those before them stay."""
    for day in (0, 1):
        (tmp_path / str(day)).mkdir()
        cams_surface_and_level(tmp_path / str(day), 24 * day)
    at_once = prepare("cams", tmp_path / "once.zarr", tmp_path / "0", tmp_path / "1", *static)
    prepare("cams", tmp_path / "s.zarr", tmp_path / "0", *static)
    assert main(["append", str(tmp_path / "s.zarr"), str(tmp_path / "1")]) == 0
    assert at_once
    assert open_store(tmp_path / "s.zarr").content == at_once.content


@pytest.mark.parametrize("ratios", [pytest.param(False, marks=pytest.mark.slow), True])
def test_later_hours_of_several_sources_are_appended_as_they_come(
    ratios: bool, static: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """One source lags behind the other, as CAQRA's hours of Beijing behind those of UTC, or comes days later: hours are taken
    as far as both reach; what comes out is what preparing all at once gives, also of mixing ratios."""
    spans = (("weather", (-24, 24, 48), UNITS), ("pollutants", (-24, 16, 40, 48), POLLUTANTS))
    for file, ends, names in spans:
        for day, hours in enumerate(map(range, ends, ends[1:])):
            dataset = regular(hours)
            if ratios:
                density = dataset["psfc"] / (287.05 * dataset["temp"])
                for name in ("so2", "no2", "co", "o3"):
                    dataset[name] = (dataset[name] * 1e-9 / density).assign_attrs(units="kg kg-1").astype("f4")
            dataset[list(names)].isel(lat=slice(file == "pollutants", None)).to_netcdf(tmp_path / f"{file}{day}.nc")

    def of_days(weather: str, pollutants: str, **changes: Any) -> Path:
        kinds = (("weather", weather, WEATHER), ("pollutants", pollutants, POLLUTANTS))
        sources = [{"kind": "generic", "files": str(tmp_path / f"{n}{d}.nc"), "map": m} | changes for n, d, m in kinds]
        return listed(tmp_path / f"{weather}{pollutants}{len(changes)}.yaml", *sources)

    def appended(*given: object) -> int:
        return main(["append", str(tmp_path / "s.zarr"), *map(str, given)])

    def made(name: str, given: Path) -> Store:
        short = ["--shard-hours", "12", "--wind-scan", tmp_path / f"{name}.scan", "--regions", "2", "2"]
        store = prepare("several", tmp_path / f"{name}.zarr", "--config", given, *static, *short, days="2015-02-28 2015-02-28")
        assert store
        return store

    made("s", of_days("0", "0"))
    at_once = made("once", of_days("[01]", "[012]"))
    for given, told in (
        ([tmp_path / "weather1.nc"], "was made of 2 sources: append with --config FILE"),
        (["--config", of_days("[01]", "[01]", zone=1)], "is not what"),
        (["--config", of_days("[01]", "[01]"), tmp_path / "weather1.nc"], "lists the files of every source"),
    ):
        assert appended(*given) == 2
        assert told in capsys.readouterr().err
    for weather, pollutants, hours in (("[01]", "0", 40), ("0", "[01]", 48), ("[01]", "[01]", 64)):
        assert appended("--config", of_days(weather, pollutants)) == 0
        between = open_store(tmp_path / "s.zarr")
        assert (between.missing["chemistry"] < 1).all(1).sum() == hours
    assert "appended as far as 2015-03-02T15, to which generic reaches" in " ".join(capsys.readouterr().err.split())
    assert appended("--config", of_days("[01]", "[012]")) == 0
    longer = open_store(tmp_path / "s.zarr")
    assert values_agree(longer)
    assert longer.fingerprint == at_once.fingerprint
    assert longer.statistics == at_once.statistics
    assert appended("--config", of_days("[01]", "[012]")) == 0
    assert "it was made of all these files already" in capsys.readouterr().out


def test_wind_that_came_later_is_in_the_scan_that_grows_with_the_store(static: list[str], tmp_path: Path) -> None:
    """Its sectors were those of the hours without wind. The sources are on one grid, and regridded in their own ways."""
    for day in (0, 1, 2):
        dataset = regular(range(24 * day, 24 * day + 24))
        dataset[list(UNITS)].to_netcdf(tmp_path / f"weather{day}.nc")
        dataset[list(POLLUTANTS)].to_netcdf(tmp_path / f"pollutants{day}.nc")

    def of(name: str, weather: str, pollutants: str) -> list[object]:
        scan = ["--wind-scan", tmp_path / f"{name}.scan", "--regions", "2", "2", "--shard-hours", "48", *static]
        kinds = (("weather", weather, WEATHER, "bilinear"), ("pollutants", pollutants, POLLUTANTS, "conservative"))
        sources = [
            {"kind": "generic", "files": str(tmp_path / f"{name}{days}.nc"), "map": lines, "method": method}
            for name, days, lines, method in kinds
        ]
        return ["--config", listed(tmp_path / "sources.yaml", *sources), *scan]

    at_once = prepare("several", tmp_path / "once.zarr", *of("once", "[012]", "[012]"))
    prepare("several", tmp_path / "s.zarr", *of("s", "0", "[01]"))
    more = of("s", "[012]", "[012]")[:2]
    assert main(["append", str(tmp_path / "s.zarr"), *map(str, more)]) == 0
    store = open_store(tmp_path / "s.zarr")
    assert at_once
    assert store.fingerprint == at_once.fingerprint
    for name in ("s", "once"):
        open_cache(tmp_path / f"{name}.scan", open_store(tmp_path / f"{name}.zarr"), patch=2)
    np.testing.assert_array_equal(*(np.load(tmp_path / f"{name}.scan/sectors.npy") for name in ("s", "once")))


def test_hours_inside_a_split_stay_as_they_are(static: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A run has been trained and validated on them."""
    regular()[list(UNITS)].to_netcdf(tmp_path / "weather.nc")
    regular(range(12))[list(POLLUTANTS)].to_netcdf(tmp_path / "early.nc")
    regular(range(12, 24))[list(POLLUTANTS)].to_netcdf(tmp_path / "late.nc")

    def of(pollutants: str) -> list[object]:
        kinds = (("weather", WEATHER), (pollutants, POLLUTANTS))
        sources = [{"kind": "generic", "files": str(tmp_path / f"{name}.nc"), "map": lines} for name, lines in kinds]
        return ["--config", listed(tmp_path / "sources.yaml", *sources)]

    prepare("several", tmp_path / "s.zarr", *of("early"), *static)
    assert main(["append", str(tmp_path / "s.zarr"), *map(str, of("*[lr]*e"))]) == 2
    assert "late.nc holds 'co' at 2015-03-01T12, where it is missing in" in capsys.readouterr().err


def test_cams_of_the_old_and_the_new_data_store_in_one_series(static: list[str], tmp_path: Path) -> None:
    """Time is called otherwise, a level has come and packing has gone; one shard holds both."""
    packed = {"dtype": "int16", "scale_factor": 0.01, "add_offset": 60.0, "_FillValue": np.int16(-32767)}
    regular().rename(lat="latitude", lon="longitude").to_netcdf(tmp_path / "0.nc", encoding={"pm25": packed})
    dataset = regular(range(24, 48)).rename(time="valid_time", lat="latitude", lon="longitude")
    dataset["pm25"] = dataset["pm25"].expand_dims(model_level=[60.0], axis=1)
    dataset.to_netcdf(tmp_path / "1.nc")
    listed_map = tmp_path / "map.yaml"
    listed_map.write_text("".join(f"{name}: {{name: {name}}}\n" for name in TRUTH))
    store = prepare("generic", tmp_path / "s.zarr", tmp_path / "0.nc", tmp_path / "1.nc", *static, "--map", listed_map)
    assert values_agree(store)
    assert store
    assert len(store.times) == 48
    assert (store.missing["chemistry"] < 1).all()


def test_gases_that_became_mixing_ratios_since_the_beginning_are_refused(
    static: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Air was not read for them, and they were missing, exit 0."""
    for day in (0, 1):
        regular(range(24 * day, 24 * day + 24)).to_netcdf(tmp_path / f"{day}.nc")
    (tmp_path / "map.yaml").write_text("".join(f"{name}: {{name: {name}}}\n" for name in TRUTH))
    given = ["generic", tmp_path / "s.zarr", tmp_path / "0.nc", tmp_path / "1.nc", *static, "--map", tmp_path / "map.yaml"]
    options = [*TARGET, "--train", "2015-03-01", "2015-03-01"]
    assert main(list(map(str, ["prepare", *given, *options, "--stage", "begin"]))) == 0
    dataset = regular(range(24, 48))
    dataset["so2"] = (dataset["so2"] * 1e-9).assign_attrs(units="kg kg-1")
    dataset.to_netcdf(tmp_path / "1.nc")
    assert main(list(map(str, ["prepare", *given, *options]))) == 2
    assert "1.nc holds other hours, or another grid or kind of unit, than when" in capsys.readouterr().err


def test_what_another_version_has_begun_is_refused_with_what_to_remove(
    static: list[str], plain: list[object], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """It was a KeyError."""
    given = list(
        map(str, ["prepare", "generic", tmp_path / "s.zarr", *plain, *static, *TARGET, "--train", *2 * ["2015-03-01"]])
    )
    assert main([*given, "--stage", "begin"]) == 0
    table = tmp_path / "s.zarr.parts/catalogue.npz"
    with np.load(table) as file:
        columns = dict(file)
    about = json.loads(str(columns["about"]))
    del about["version"]
    np.savez(table, **(columns | {"about": np.array(json.dumps(about))}))
    assert main([*given, "--stage", "load"]) == 2
    assert f"{table.parent} was begun by another version: remove it" in capsys.readouterr().err


def test_static_fields_of_any_source_are_found(tmp_path: Path, static: list[str]) -> None:
    """They were looked for in the first one only."""
    regular()[list(UNITS)].to_netcdf(tmp_path / "weather.nc")
    dataset = regular()[list(POLLUTANTS)]
    for name in ("elevation", "population"):
        dataset[name] = (("lat", "lon"), np.full((len(LAT1), len(LON1)), 7.0))
    dataset.to_netcdf(tmp_path / "pollutants.nc")
    kinds = (("weather", WEATHER), ("pollutants", POLLUTANTS))
    sources = [{"kind": "generic", "files": str(tmp_path / f"{name}.nc"), "map": lines} for name, lines in kinds]
    store = prepare("several", tmp_path / "s.zarr", "--config", listed(tmp_path / "sources.yaml", *sources))
    assert store
    np.testing.assert_allclose(store.static["elevation"], 7.0)


@pytest.mark.parametrize(
    ("wrong", "told"),
    [
        ({"kind": "camps"}, "entry 1: kind is 'camps', not one of cams, caqra, topoflow, generic"),
        ({"grid": [1, 2]}, "entry 1, 'grid': Extra inputs are not permitted. Write a list of sources, as  - {kind: cams"),
        ({"zone": [8, 9]}, "entry 1, 'zone': Input should be a valid number"),
        ({"zone": 480}, "entry 1, 'zone': Input should be less than or equal to 14"),
        ({"zone": float("nan")}, "entry 1, 'zone': Input should be a finite number"),
        ({"lead": 10**400}, "entry 1, 'lead': Input should be a valid number or"),
        ({"map": {}}, "entry 1 reads nothing: give it a map"),
        ({"map": False}, "entry 1, 'map': Input should be a valid string or"),
        ({"map": {False: {"name": "no"}}}, "entry 1, 'map': Input should be a valid string"),
        ({"map": {"u": {"name": "u", "unit": "km h-1"}}}, "entry 1, 'map', 'u', 'unit': Extra inputs are not permitted"),
        ({"map": {"u": {"name": "u", "level": "0"}}}, "entry 1, 'map', 'u', 'level': Input should be a valid number"),
        ({"map": {"v": WEATHER["v"]}, "winds": "grid"}, "entry 1: winds along the grid are turned together"),
        ({"lead": "3"}, "entry 1, 'lead': Input should be a valid number or"),
        ({"winds": "west"}, "entry 1, 'winds': Input should be 'earth' or 'grid'"),
        ({"map": ["u"]}, "entry 1, 'map': Input should be a valid string or"),
        ({"map": {"pm2": {"name": "x"}}}, "entry 1: unknown variable 'pm2'. Did you mean 'pm25'?"),
        ({"map": {"u": None}}, "entry 1: 'u' says nothing"),
        ({"map": {name: line for name, line in WEATHER.items() if name != "v"}}, "nothing is given for v"),
        ({"files": "none/*.nc"}, "none/*.nc cannot be read: there is no such file"),
    ],
)
def test_a_wrong_entry_of_a_list_of_sources_is_named(
    wrong: dict[str, Any], told: str, static: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    regular().to_netcdf(tmp_path / "a.nc")
    right = {"kind": "generic", "files": str(tmp_path / "a.nc"), "map": WEATHER}
    given = listed(tmp_path / "sources.yaml", right | wrong)
    prepare("several", tmp_path / "s.zarr", "--config", given, *static, code=2)
    assert told in capsys.readouterr().err


def test_options_of_one_source_do_not_stand_beside_a_list(
    static: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    given = listed(tmp_path / "sources.yaml")
    (tmp_path / "dust.yaml").write_text("dust: {units: ug m-3, range: [0, 20000], group: chemistry}")
    whole = listed(tmp_path / "whole.yaml", {"kind": "caqra", "files": static[1].split(":")[0]})
    for source, options, told in (
        (
            "several",
            ["--config", whole, "--variables", tmp_path / "dust.yaml"],
            "no source has dust of --variables: add a line",
        ),
        ("several", ["--config", given, "--zone", "0"], "(not zone beside it)"),
        ("several", [], "`several` and --config SOURCES belong together"),
        ("caqra", ["--config", given], "`several` and --config SOURCES belong together"),
        ("several", ["--config", given], "Write a list of sources, as  - {kind: cams"),
    ):
        prepare(source, tmp_path / "s.zarr", *options, *static, code=2)
        assert told in capsys.readouterr().err


def test_winds_along_the_axes_of_a_grid_are_turned(static: list[str], tmp_path: Path) -> None:
    """The truth is the convergence of meridians of a Lambert cone, n (longitude - 103 E); from either side, and appended."""
    lat, lon = lambert(60, 110, 27.0)
    radians = np.deg2rad([25.0, 40.0])
    n = np.log(np.cos(radians[0]) / np.cos(radians[1])) / np.log(np.divide(*np.tan(np.pi / 4 + radians[::-1] / 2)))
    angle = np.deg2rad(n * (lon - 103.0))
    fields = {name: truth(name, lat, lon, range(2 * HOURS)) for name in TRUTH}
    u, v = fields["u"], fields["v"]
    fields |= {"u": u * np.cos(angle) - v * np.sin(angle), "v": u * np.sin(angle) + v * np.cos(angle)}
    planes = {
        name: (("time", "y", "x"), values.astype("f4"), {"units": UNITS.get(name, "ug m-3")}) for name, values in fields.items()
    }
    axes = {
        "time": ("time", range(2 * HOURS), {"units": "hours since 2015-03-01"}),
        "lat": (("y", "x"), lat),
        "lon": (("y", "x"), lon),
    }
    (tmp_path / "map.yaml").write_text("".join(f"{name}: {{name: {name}}}\n" for name in TRUTH))
    for step in (1, -1):
        dataset = xr.Dataset(planes, axes).isel(x=slice(None, None, step))
        for day in (0, 1):
            dataset.isel(time=slice(HOURS * day, HOURS * (day + 1))).to_netcdf(tmp_path / f"{day}.nc")
        options = [*static, "--map", tmp_path / "map.yaml", "--winds", "grid"]
        prepare("generic", tmp_path / f"s{step}.zarr", tmp_path / "0.nc", *options)
        assert main(["append", str(tmp_path / f"s{step}.zarr"), str(tmp_path / "1.nc")]) == 0
        assert values_agree(open_store(tmp_path / f"s{step}.zarr"))


def test_winds_along_a_regular_grid_are_eastward_already(
    plain: list[object], static: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    prepare("generic", tmp_path / "s.zarr", *plain, *static, "--winds", "grid", code=2)
    assert "they are `earth`" in capsys.readouterr().err
    assert values_agree(prepare("generic", tmp_path / "s.zarr", *plain, *static, "--winds", "earth"))


def test_means_stamped_in_the_middle_of_their_hour_are_stored_at_its_end(
    static: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """MERRA-2 and GEOS-CF: 00:30 is the mean from 00 to 01, which nobody knows before 01."""
    dataset = regular(range(1, HOURS))
    dataset["time"] = ("time", np.arange(1, HOURS) - 0.5, dataset["time"].attrs)
    dataset.to_netcdf(tmp_path / "merra.nc")
    (tmp_path / "map.yaml").write_text("".join(f"{name}: {{name: {name}}}\n" for name in TRUTH))
    given = [tmp_path / "merra.nc", *static, "--map", tmp_path / "map.yaml"]
    prepare("generic", tmp_path / "s.zarr", *given, code=2)
    assert "say --stamps centre" in capsys.readouterr().err
    store = prepare("generic", tmp_path / "s.zarr", *given, "--stamps", "centre")
    assert values_agree(store)
    assert store
    assert store.times[0] == DAY + 1
    dataset.isel(time=slice(None, None, 3)).to_netcdf(tmp_path / "merra.nc")
    prepare("generic", tmp_path / "three.zarr", *given, "--stamps", "centre", code=2)
    assert "its times are 3 h and more apart" in capsys.readouterr().err


@pytest.fixture
def plain(tmp_path: Path) -> list[object]:
    """A file that the generic source reads, and its map."""
    regular().to_netcdf(tmp_path / "y.nc")
    (tmp_path / "map.yaml").write_text("".join(f"{name}: {{name: {name}}}\n" for name in TRUTH))
    return [tmp_path / "y.nc", "--map", tmp_path / "map.yaml"]


def test_the_raster_of_a_census_is_chosen_as_its_refusal_says(
    plain: list[object], static: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """GPW has one variable of twenty rasters, and colons in its name."""
    name = "UN WPP-Adjusted Population Density, v4.11 (2000, 2005): 2.5 arc-minutes"
    people = np.stack([np.full((len(LAT1), len(LON1)), 100.0 * (raster + 1)) for raster in range(20)]).astype("f4")
    axes = {"raster": np.arange(1, 21), "latitude": LAT1, "longitude": LON1}
    xr.Dataset({name: (("raster", "latitude", "longitude"), people)}, axes).to_netcdf(tmp_path / "gpw.nc")
    others = [*static[:2], *static[4:]]
    prepare("generic", tmp_path / "s.zarr", *plain, *others, "--population", tmp_path / "gpw.nc", code=2)
    assert "say which as FILE:VARIABLE[raster=0]" in capsys.readouterr().err
    chosen = f"{tmp_path}/gpw.nc:{name}[raster=4]"
    store = prepare("generic", tmp_path / "s.zarr", *plain, *others, "--population", chosen)
    assert store
    np.testing.assert_allclose(store.static["population"], 500.0)


@pytest.mark.parametrize("units", ["Persons", "number of people per grid-cell"])
def test_people_a_cell_become_people_a_km2(units: str, plain: list[object], static: list[str], tmp_path: Path) -> None:
    """The truth is a sphere's: a cell of 1/2 degree at latitude phi has (pi 6371 km / 360)^2 cos(phi), to first order."""
    density = 50.0 + 10.0 * (LAT1[:, None] - 32) + 0 * LON1
    people = density * (np.pi * 6371 / 360) ** 2 * np.cos(np.deg2rad(LAT1))[:, None]
    axes = {"lat": ("lat", LAT1, {"units": "degrees_north"}), "lon": ("lon", LON1, {"units": "degrees_east"})}
    xr.Dataset({"people": (("lat", "lon"), people, {"units": units})}, axes).to_netcdf(tmp_path / "people.nc")
    others = [*static[:2], *static[4:]]
    store = prepare("generic", tmp_path / "s.zarr", *plain, *others, "--population", tmp_path / "people.nc")
    assert store
    np.testing.assert_allclose(store.static["population"], (50 + 10 * (store.lat[:, None] - 32)) + 0 * store.lon, rtol=1e-3)


def test_terrain_on_axes_x_and_y_and_in_a_file_with_colons(plain: list[object], static: list[str], tmp_path: Path) -> None:
    """ETOPO1's gmt4 grid; the names that WRF gives its files."""
    heights = (100 + 10 * (LAT1[:, None] - 32) + 0 * LON1).astype("f4")
    file = tmp_path / "wrfinput_d01_2015-03-01_00:00:00"
    xr.Dataset({"z": (("y", "x"), heights)}, {"x": ("x", LON1), "y": ("y", LAT1)}).to_netcdf(file)
    store = prepare("generic", tmp_path / "s.zarr", *plain, *static[2:], "--elevation", f"{file}:z")
    assert store
    lat = store.lat[:, None] + 0 * store.lon
    np.testing.assert_allclose(store.static["elevation"], 100 + 10 * (lat - 32), atol=1e-3)


@pytest.mark.parametrize(("option", "expected"), [("--clip", 5000.0), ("--mask-beyond", np.nan)])
def test_a_real_extreme_is_refused_until_it_is_judged(
    option: str, expected: float, plain: list[object], static: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A fire of 12,000 ug m-3; the refusal names both ways."""
    dataset = regular()
    dataset["pm25"][5, 6:12, 6:12] = 12_000.0
    dataset.to_netcdf(tmp_path / "y.nc")
    prepare("generic", tmp_path / "s.zarr", *plain, *static, code=2)
    assert "--clip pm25 or --mask-beyond pm25" in capsys.readouterr().err
    store = prepare("generic", tmp_path / "t.zarr", *plain, *static, option, "pm25")
    assert store
    field = ShardReader(store, "chemistry").read(np.array([5]))[0, PUBLISHED.channel("pm25")]
    assert np.nanmax(field) <= 5000.0
    assert np.array_equal(field[3, 4], expected, equal_nan=True)


def write_tiff(path: Path, values: np.ndarray, crs: str, description: str = "") -> str:
    rasterio = pytest.importorskip("rasterio")
    north_west = rasterio.transform.from_origin(99.875, 40.125, 0.25, 0.25)
    about = {"height": values.shape[0], "width": values.shape[1], "count": 2, "dtype": "float32", "crs": crs, "nodata": -9.0}
    with rasterio.open(path, "w", driver="GTiff", transform=north_west, **about) as raster:
        raster.write(np.stack([values, values + 1000.0]).astype("f4"))
        raster.set_band_description(1, description)
    return str(path)


def test_static_fields_from_geotiff(
    plain: list[object], static: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Rows from the north, bands by their descriptions or numbers, missing values as the file states them."""
    lat, lon = np.arange(40.0, 24.9, -0.25), np.arange(100.0, 122.1, 0.25)
    people = np.repeat(200.0 + 10 * (lat[:, None] - 32), len(lon), 1)
    people[-1] = -9.0
    file = write_tiff(tmp_path / "gpw.tif", people, "EPSG:4326", "density")
    prepare("generic", tmp_path / "s.zarr", *plain, *static[:2], "--population", file, *static[4:], code=2)
    assert "holds density, band_2: say which as FILE:VARIABLE" in capsys.readouterr().err
    for name, more in (("density", 0.0), ("band_2", 1000.0)):
        store = prepare(
            "generic", tmp_path / f"{name}.zarr", *plain, *static[:2], "--population", f"{file}:{name}", *static[4:]
        )
        assert store
        expected = np.repeat(200.0 + 10 * (store.lat[:, None] - 32), len(store.lon), 1) + more
        np.testing.assert_allclose(store.static["population"], expected, rtol=1e-4)
    metres = write_tiff(tmp_path / "utm.tif", people, "EPSG:32649")
    prepare("generic", tmp_path / "u.zarr", *plain, *static[:2], "--population", metres, *static[4:], code=2)
    assert "is not on latitudes and longitudes: `gdalwarp -t_srs EPSG:4326`" in capsys.readouterr().err


def test_a_geotiff_without_its_package_says_which(
    plain: list[object], static: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "x.tif").write_bytes(b"II*\0\x08\0\0\0" + bytes(300))
    monkeypatch.setitem(sys.modules, "rasterio", None)
    prepare("generic", tmp_path / "s.zarr", *plain, *static[:2], "--population", tmp_path / "x.tif", *static[4:], code=2)
    assert "is a GeoTIFF, which is read with one more package: pip install rasterio" in capsys.readouterr().err


WRONG: dict[str, tuple[bytes, str]] = {
    "GRIB": (b"GRIB\0\0\0\2" + bytes(500) + b"7777", "is damaged or cut off GRIB"),
    "HDF4": (b"\x0e\x03\x13\x01" + bytes(500), "is HDF4: turn it into NetCDF first"),
    "page": (b"<!DOCTYPE html><html>404</html>", "is a web page or XML"),
    "JSON": (b'{"error": "quota"}', "is JSON, often an error message"),
    "gzip": (b"\x1f\x8b" + bytes(100), "compressed by gzip: unpack it first"),
    "empty": (b"", "is empty: the copy or download failed"),
}


@pytest.mark.parametrize("kind", WRONG)
def test_a_wrong_kind_of_file_is_told_by_its_first_bytes(
    kind: str, plain: list[object], static: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    content, message = WRONG[kind]
    (tmp_path / "x.nc").write_bytes(content)
    prepare("generic", tmp_path / "s.zarr", tmp_path / "x.nc", *plain[1:], *static, code=2)
    said = capsys.readouterr().err
    assert message in said
    assert len(said.splitlines()) < 5


REAL: list[tuple[str, str, float, float]] = [
    *(("ug m-3", text, 1.0, 0.0) for text in (
        "µg/m3", "µg/m³", "μg/m³", "ug m^-3", "ug/m^3", "µg m⁻³", "ugm-3", "ug.m-3", "microgram/m3", "ug m-3 ", "ug/m3\0",
        "1e-9 kg m-3", "micrograms/m**3", "\ufffdg/m3")),
    ("ug m-3", "kg m**-3", 1e9, 0.0), ("ug m-3", "mg/m3", 1e3, 0.0),
    *(("K", text, 1.0, 0.0) for text in ("K", "degK", "kelvin", "Kelvin")),
    *(("K", text, 1.0, 273.15) for text in ("degC", "°C", "deg_C", "Celsius", "C", "degrees_celsius")),
    *(("Pa", text, 1.0, 0.0) for text in ("Pa", "Pascals")),
    *(("Pa", text, 100.0, 0.0) for text in ("mb", "mbar", "millibar", "millibars", "hPa", "hectopascals")),
    *(("m s-1", text, 1.0, 0.0) for text in ("m/s", "m s**-1", "meter/sec", "m.s-1")),
    *(("%", text, 1.0, 0.0) for text in ("%", "percent")), *(("%", text, 100.0, 0.0) for text in ("1", "(0 - 1)", "0-1")),
]  # fmt: skip


@pytest.mark.parametrize(("canonical", "text", "factor", "offset"), REAL, ids=lambda value: repr(value))
def test_units_as_files_spell_them(canonical: str, text: str, factor: float, offset: float) -> None:
    assert conversion(text, canonical, "here") == pytest.approx((factor, offset), rel=1e-12)


@pytest.mark.parametrize(
    ("text", "ratio"),
    [("kg kg-1", 1.0), ("kg kg**-1", 1.0), ("ug kg-1", 1e-9), ("mol mol-1", 47.998 / 28.9647),
     ("mole mole-1", 47.998 / 28.9647), ("ppmv", 47.998e-6 / 28.9647), ("ppb", 47.998e-9 / 28.9647),
     ("ug m-3", None), ("1", None)],
)  # fmt: skip
def test_mixing_ratios_by_mass_and_by_number(text: str, ratio: float | None) -> None:
    assert mass_mixing_ratio(text, "o3") == (None if ratio is None else pytest.approx(ratio, rel=1e-9))


def test_a_unit_with_a_byte_that_cannot_be_read_is_not_taken_for_what_is_left_of_it() -> None:
    """pint reads it as g m-3, a million times too much."""
    with pytest.raises(DataError, match="cannot be turned into ug m-3"):
        conversion("k\ufffdg/m3", "ug m-3", "x")


def test_particles_have_no_molar_mass(plain: list[object], static: list[str], tmp_path: Path, capsys: Any) -> None:
    changed: Callable[..., xr.Dataset] = regular
    changed(pm25="ppbv").to_netcdf(tmp_path / "y.nc")
    prepare("generic", tmp_path / "s.zarr", *plain, *static, code=2)
    assert "'pm25' is in 'ppbv', which cannot be turned into ug m-3" in capsys.readouterr().err
