"""Files of drawn structure: two of them, each of its own, are read as the analytic truth at every hour, or refused by name.

What varies: order of dimensions and of axes, names of coordinates, regular or curvilinear grids,
longitudes, levels, how time is stated (valid, start and lead, text, bounds, name of the file),
calendars, packing, missing cells, units, and the format.
"""

from __future__ import annotations

import os
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import xarray as xr
from hypothesis import HealthCheck, given, note, settings
from hypothesis import strategies as st

from data import DataError
from data.prepare.catalogue.search import make_catalogue
from data.prepare.fields import Reader
from data.prepare.grids import regrid
from data.prepare.grids.grid import Grid
from data.prepare.sources.source import Clock, Named, Source, read_as

DRAWS = 20_000 if "TOPOFLOW_ALL_WAYS" in os.environ else 100
FIRST = np.datetime64("2015-02-27T20", "h")  # a month ends meanwhile
MARGIN = 8  # hours before and after, in which nothing may be stored
TARGET = Grid(np.array([33.0, 32.0, 31.0]), np.array([109.0, 110.5, 112.0, 113.0]))
LEVELS = (1000.0, 925.0, 850.0)  # the truth lies on the first
# field -> value = base + a * (lat - 32) + b * (lon - 111) + c * (hours since FIRST), in our units
TRUTH = {
    "u": (3.0, 0.2, -0.1, 0.05),
    "temp": (285.0, -0.8, 0.1, 0.2),
    "psfc": (95000.0, 120.0, -60.0, 3.0),
    "pm25": (60.0, 1.5, 1.0, 0.5),
}
# field -> units -> (factor, offset) from ours
UNITS: dict[str, dict[str, tuple[float, float]]] = {
    "u": {"m s-1": (1, 0), "m/s": (1, 0), "km h-1": (3.6, 0), "m s**-1": (1, 0)},
    "temp": {"K": (1, 0), "degC": (1, -273.15), "deg C": (1, -273.15), "K @ 273.15": (1, -273.15)},
    "psfc": {"Pa": (1, 0), "hPa": (0.01, 0), "mbar": (0.01, 0)},
    "pm25": {"ug m-3": (1, 0), "ug/m3": (1, 0), "kg m-3": (1e-9, 0), "microgram m-3": (1, 0)},
}
CHOICES: dict[str, list[Any]] = {
    "grid": ["regular", "curvilinear", "cell numbers", "repeated"],
    "names": [("lat", "lon"), ("latitude", "longitude"), ("nav_lat", "nav_lon"), ("phi", "lambda")],
    "circle": [180.0, 360.0],  # where longitudes end
    "rows": [1, -1],
    "columns": [1, -1],
    "level": [(), LEVELS[:1], LEVELS, LEVELS[::-1]],
    "time": ["valid", "named otherwise", "scalar", "name", "lead selected", "leads", "valid beside", "text", "bounds", "dates"],
    "unit": ["hours", "minutes", "seconds", "days"],
    "calendar": ["standard", "proleptic_gregorian", "noleap"],
    "packing": ["f4", "f8", ">f4", "i2"],
    "missing": [False, True],
    "format": ["NETCDF4", "NETCDF4_CLASSIC", "NETCDF3_CLASSIC", "zarr2", "zarr3"],
}
PER_HOUR = {"hours": 1.0, "minutes": 60.0, "seconds": 3600.0, "days": 1 / 24}
COUNTED = {"read": 0, "refused": 0}


@st.composite
def structures(draw: st.DrawFn) -> dict[str, Any]:
    """How a file is made."""
    how = {key: draw(st.sampled_from(values)) for key, values in CHOICES.items()}
    how["units"] = {name: draw(st.sampled_from(sorted(known))) for name, known in UNITS.items()}
    how["order"] = draw(st.randoms(use_true_random=False))
    how["count"] = 1 if how["time"] in ("scalar", "name") else draw(st.integers(1, 4))
    if how["time"] == "text" and how["format"].startswith("zarr"):
        how["time"] = "valid"
    return how


def truth(name: str, lat: np.ndarray, lon: np.ndarray, hour: int) -> np.ndarray:
    base, a, b, c = TRUTH[name]
    return np.asarray(base + a * (lat - 32) + b * (lon - 111) + c * hour)


def made(how: dict[str, Any], first: int) -> xr.Dataset:
    """The dataset of hours from `first` on, since FIRST."""
    lat, lon = np.arange(29.0, 35.1, 0.5)[:: how["rows"]], np.arange(107.0, 115.1, 0.5)[:: how["columns"]]
    lat2, lon2 = np.meshgrid(lat, lon, indexing="ij")
    regular = how["grid"] == "regular"
    if not regular:
        lat2, lon2 = lat2 + 0.02 * (lon2 - 111), lon2 + 0.03 * (lat2 - 32)
    times, along = stated_times(how, np.arange(first, first + how["count"]))
    y, x = how["names"] if regular else ("y", "x")
    dims = [*([along] if along else []), *(["level"] if how["level"] else []), y, x]
    how["order"].shuffle(dims)
    dataset = xr.Dataset(coords=times)
    for name in TRUTH:
        hours = range(first, first + how["count"])
        values = np.stack([truth(name, lat2, lon2, hour) for hour in hours])
        values = np.stack([values * (1.0 if level == LEVELS[0] else 0.9) for level in how["level"] or [LEVELS[0]]], 1)
        stored, about = packed(name, values, how)
        field = xr.DataArray(stored, dims=("time?", "level", y, x))
        field = field.isel({} if along else {"time?": 0}).rename({"time?": along} if along else {})
        field = field if how["level"] else field.isel(level=0)
        dataset[name] = field.transpose(*dims).assign_attrs(about)
    if how["level"]:
        dataset["level"] = ("level", np.array(how["level"]), {"units": "hPa"})
    south, west = how["names"]
    wrapped = (lon2 - how["circle"]) % 360.0 + how["circle"] - 360.0
    unnamed = how["names"] == ("phi", "lambda")
    about = [{"units": f"degrees_{to}"} if unnamed or how["circle"] == 360.0 else {} for to in ("north", "east")]
    if regular:
        dataset = dataset.assign_coords({south: (y, lat, about[0]), west: (x, wrapped[0], about[1])})
    elif how["grid"] == "repeated" and along:
        for name, values in ((south, lat2), (west, wrapped)):
            wide = np.broadcast_to(values, (dataset.sizes[along], *values.shape)).copy()
            dataset[name] = ((along, y, x), wide, about[name == west])
    else:
        dataset = dataset.assign_coords({south: ((y, x), lat2, about[0]), west: ((y, x), wrapped, about[1])})
    if how["grid"] == "cell numbers":
        dataset = dataset.assign_coords(y=("y", np.arange(len(lat)) + 25.0), x=("x", np.arange(len(lon)) + 105.0))
    return dataset


def packed(name: str, values: np.ndarray, how: dict[str, Any]) -> tuple[np.ndarray, dict[str, Any]]:
    """(time, level, y, x) in the units of the file, as they are stored, and their attributes."""
    factor, offset = UNITS[name][how["units"][name]]
    values, about = values * factor + offset, {"units": how["units"][name]}
    if how["missing"]:
        values[..., 0, 0] = np.nan
    if how["packing"] != "i2":
        fill = np.dtype(how["packing"]).type(-9999.0)
        values = values.astype(how["packing"])
        return np.where(np.isnan(values), fill, values), about | ({"missing_value": fill} if how["missing"] else {})
    low, high = np.nanmin(values), np.nanmax(values)
    scale, middle = (high - low) / 60000.0, (high + low) / 2
    stored = np.where(np.isnan(values), -32768, np.round((values - middle) / scale)).astype("i2")
    about |= {"scale_factor": scale, "add_offset": middle}
    return stored, about | ({"_FillValue": np.int16(-32768)} if how["missing"] else {})


def stated_times(how: dict[str, Any], hours: np.ndarray) -> tuple[dict[str, Any], str]:
    """What states the hours, and the dimension along which they lie; empty where there is none."""
    per, about = PER_HOUR[how["unit"]], {"calendar": how["calendar"]}
    about["units"] = f"{how['unit']} since {str(FIRST).replace('T', ' ')}:00"
    reference = about | {"standard_name": "forecast_reference_time"}
    exact = [FIRST + int(hour) for hour in hours]
    kinds: dict[str, tuple[dict[str, Any], str]] = {
        "valid": ({"time": ("time", hours * per, about)}, "time"),
        "named otherwise": ({"Time": ("Time", hours * per, about)}, "Time"),
        "scalar": ({"time": ((), hours[0] * per, about)}, ""),
        "name": ({}, ""),
        "lead selected": ({"time": ("time", (hours - 6) * per, reference), "step": ((), 6.0, {"units": "hours"})}, "time"),
        "leads": (
            {"time": ((), (hours[0] - 3) * per, about), "lead_time": ("lead_time", hours - hours[0] + 3.0, {"units": "h"})},
            "lead_time",
        ),
        "valid beside": (
            {"time": ("time", (hours - 6) * per, about), "valid_time": ("time", hours * per, about)},
            "time",
        ),
        "text": ({"Times": ("Time", np.array([f"{time}:00:00".replace("T", "_") for time in exact], "S19"))}, "Time"),
        "bounds": (
            {
                "time": ("time", (hours - 1) * per, about | {"bounds": "time_bnds"}),
                "time_bnds": (("time", "nv"), np.stack([hours - 1, hours], 1) * per),
            },
            "time",
        ),
        "dates": (
            {
                "time": (
                    "time",
                    [int(str(t)[:10].replace("-", "")) + int(str(t)[11:]) / 24 for t in exact],
                    {"units": "day as %Y%m%d.%f"},
                )
            },
            "time",
        ),
    }
    return kinds[how["time"]]


def write(folder: Path, dataset: xr.Dataset, how: dict[str, Any], first: int) -> Path:
    stamp = str(FIRST + first).replace("-", "").replace("T", "")
    path = folder / f"f{stamp}{'.zarr' if how['format'].startswith('zarr') else '.nc'}"
    for variable in dataset.variables.values():
        variable.encoding = {"_FillValue": None} if "_FillValue" not in variable.attrs else {}
    if path.suffix == ".zarr":
        dataset.to_zarr(path, zarr_format=int(how["format"][-1]), consolidated=False)
    else:
        dataset.to_netcdf(path, format=how["format"])
    return path


@settings(max_examples=DRAWS, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(structures(), structures())
def require_truth_or_refusal(one: dict[str, Any], two: dict[str, Any]) -> None:
    two |= {key: one[key] for key in ("rows", "columns")}  # another order of cells is another grid, and refused
    if "regular" in (one["grid"], two["grid"]):
        two["grid"] = one["grid"]
    with tempfile.TemporaryDirectory() as name:
        folder, files, count = Path(name), [], 0
        for how in (one, two):
            files.append(write(folder, made(how, count), how, count))
            count += how["count"]
        level = LEVELS[0] if max(len(one["level"]), len(two["level"])) > 1 else None
        fields = {name: Named((name,), next(iter(UNITS[name])), False, level) for name in TRUTH}
        read = {name: np.full((count + 2 * MARGIN, *TARGET.shape), np.nan, "f4") for name in TRUTH}
        try:
            found = make_catalogue(folder / "s.zarr", (Source("generic", fields, sorted(files), Clock(name_zone=0.0)),), ())
            regridders = [regrid.build(grid, TARGET, "bilinear") for grid in found.grids]
            Reader(found, regridders, read_as(()), read, FIRST - MARGIN).read()
        except DataError as error:
            note(str(error))
            COUNTED["refused"] += 1
            return
    COUNTED["read"] += 1
    lon, lat = np.meshgrid(TARGET.lon, TARGET.lat)
    for name, values in read.items():
        expected = np.full_like(values, np.nan)
        for hour in range(count):
            expected[MARGIN + hour] = truth(name, lat, lon, hour)
        np.testing.assert_allclose(values, expected, rtol=0, atol=2e-4 * np.nanmax(abs(expected)) + 2e-3, err_msg=name)


def test_every_value_is_the_truth_or_the_file_is_refused() -> None:
    """Of what was drawn nine in ten are read: refusing everything is no answer."""
    require_truth_or_refusal()
    assert COUNTED["read"] > 0.9 * DRAWS, COUNTED
