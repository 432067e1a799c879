"""GRIB by an index of its messages: parameter, kind of level, level and valid time of each, whatever their order.

What is not asked for is never decoded. Fields of one name that lie on several kinds of levels are
called NAME_KIND.
"""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import xarray as xr

from data import DataError

MISSING = 9.999e20
GRID_KEYS = ("gridType", "md5GridSection")
POINTS = ("reduced_gg", "reduced_ll", "unstructured_grid", "sh")


@dataclass(frozen=True)
class _Message:
    """Where one field lies in a file, and what it is."""

    offset: int
    valid: np.datetime64
    lead: int  # hours
    level: float
    member: int


@dataclass
class _Variable:
    units: str
    grid: str
    messages: list[_Message]


def read(path: Path) -> xr.Dataset:
    """The fields of a GRIB file along their own valid times, (time[, level], y, x), decoded as they are read.

    Raises:
        DataError: a package is missing, the file is damaged, an hour stands twice, or a grid is not
            known.
    """
    eccodes = _library(path)
    found: dict[tuple[str, str], _Variable] = {}
    grids: dict[str, tuple[np.ndarray, np.ndarray]] = {}
    try:
        with path.open("rb") as file:
            while (handle := eccodes.codes_grib_new_from_file(file)) is not None:
                try:
                    _note(eccodes, handle, found, grids, path)
                finally:
                    eccodes.codes_release(handle)
    except eccodes.CodesInternalError as error:
        raise DataError(f"{path} is damaged or cut off GRIB ({error}): fetch it again.") from error
    kinds = defaultdict(list)
    for name, kind in found:
        kinds[name].append(kind)
    dataset = xr.Dataset()
    for (name, kind), variable in found.items():
        called = name if len(kinds[name]) == 1 else f"{name}_{kind}"
        dataset = dataset.merge(_field(called, variable, grids[variable.grid], path), compat="override")
    return dataset


def _library(path: Path) -> Any:
    try:
        import eccodes  # an optional extra
    except (ImportError, RuntimeError) as error:
        raise DataError(
            f"{path} is GRIB, which is read with one more package: pip install eccodes. Or turn it "
            "into NetCDF first, as with `grib_to_netcdf`."
        ) from error
    return eccodes


def _note(
    eccodes: Any,
    handle: Any,
    found: dict[tuple[str, str], _Variable],
    grids: dict[str, tuple[np.ndarray, np.ndarray]],
    path: Path,
) -> None:
    """Add one message to the index."""

    def get(key: str, kind: type | None = None, default: Any = None) -> Any:
        try:
            return eccodes.codes_get(handle, key, kind)
        except eccodes.CodesInternalError:
            if default is None:
                raise
            return default

    name = get("cfVarName", default="unknown")
    name = get("shortName") if name == "unknown" else name
    if name == "unknown":
        name = f"param{get('paramId', int)}"
    kind, grid = get("typeOfLevel", default="unknown"), get("md5GridSection")
    date, clock = get("validityDate", int), get("validityTime", int)
    day = np.datetime64(f"{date // 10000:04d}-{date // 100 % 100:02d}-{date % 100:02d}", "m")
    message = _Message(
        get("offset", int),
        day + np.timedelta64(clock // 100 * 60 + clock % 100, "m"),
        int(get("endStep", int, 0)),
        float(get("level", float, 0.0)),
        int(get("perturbationNumber", int, 0)),
    )
    variable = found.setdefault((name, kind), _Variable(get("units", default=""), grid, []))
    if grid != variable.grid:
        raise DataError(f"{path}: '{name}' is on several grids: split the file by grid, as with `grib_copy`.")
    variable.messages.append(message)
    if grid not in grids:
        grids[grid] = _grid(eccodes, handle, path)


def _grid(eccodes: Any, handle: Any, path: Path) -> tuple[np.ndarray, np.ndarray]:
    """Latitudes and longitudes, in one dimension where they are regular.

    Raises:
        DataError: the grid has no rows and columns, or they run in turns.
    """
    kind = eccodes.codes_get(handle, "gridType")
    if kind in POINTS:
        raise DataError(
            f"{path} is on the grid '{kind}', without rows and columns: make it regular first, as "
            "with `cdo -setgridtype,regular IN OUT`, or ask for a regular grid in the request "
            "(grid: 0.75/0.75)."
        )
    if eccodes.codes_get(handle, "alternativeRowScanning", int):
        raise DataError(f"{path}: its rows run in turns from west and east: `cdo copy IN OUT` puts them in order.")
    lat, lon = (_plane(eccodes, handle, key) for key in ("latitudes", "longitudes"))
    if (lat == lat[:, :1]).all() and (lon == lon[:1]).all():
        return lat[:, 0], lon[0]
    return lat, lon


def _plane(eccodes: Any, handle: Any, key: str) -> np.ndarray:
    """(rows, columns) of what a message lists in its own order of scanning."""
    values = eccodes.codes_get_array(handle, key)
    shape = tuple(eccodes.codes_get(handle, size, int) for size in ("Nj", "Ni"))
    if eccodes.codes_get(handle, "jPointsAreConsecutive", int):
        return np.asarray(values.reshape(shape[::-1]).T)
    return np.asarray(values.reshape(shape))


def _field(name: str, variable: _Variable, grid: tuple[np.ndarray, np.ndarray], path: Path) -> xr.Dataset:
    """One variable along its own times, and levels where there are several; a message that is not there is missing."""
    import dask.array

    times = sorted({(m.valid, m.lead) for m in variable.messages})
    levels = sorted({m.level for m in variable.messages})
    offsets = np.full((len(times), len(levels)), -1, "i8")
    for message in variable.messages:
        at = times.index((message.valid, message.lead)), levels.index(message.level)
        if offsets[at] >= 0:
            raise DataError(
                f"{path} holds '{name}' at {message.valid} twice (level {message.level:g}): "
                "preliminary and final analyses, or members of an ensemble. Keep one, as with "
                "`grib_copy -w`."
            )
        offsets[at] = message.offset
    lat, lon = grid
    shape = (len(lat), len(lon)) if lat.ndim == 1 else lat.shape
    place = f"{variable.grid[:8]}"
    y, x, time = f"y_{place}", f"x_{place}", f"time_{name}"
    axes = ((y,), (x,)) if lat.ndim == 1 else ((y, x), (y, x))
    lead = [hours for _, hours in times]
    coords: dict[str, Any] = {
        f"lat_{place}": (axes[0], lat, {"units": "degrees_north", "standard_name": "latitude"}),
        f"lon_{place}": (axes[1], lon, {"units": "degrees_east", "standard_name": "longitude"}),
        time: (
            (time,),
            _seconds([valid for valid, _ in times]),
            {"units": "seconds since 1970-01-01", "standard_name": "time"},
        ),
        f"lead_{name}": ((time,), np.array(lead), {"units": "hours", "standard_name": "forecast_period"}),
    }
    if not any(lead):
        del coords[f"lead_{name}"]
    dims, chunks = [time, y, x], (1, *shape)
    if len(levels) > 1:
        dims, chunks = [time, f"level_{name}", y, x], (1, 1, *shape)
        coords[f"level_{name}"] = ((f"level_{name}",), np.array(levels), {"axis": "Z"})
    else:
        coords["level"] = ((), levels[0])
        offsets = offsets[:, 0]
    values = dask.array.from_array(_Values(path, offsets, shape), chunks=chunks)
    return xr.Dataset({name: (dims, values, {"units": variable.units})}, coords)


def _seconds(times: list[np.datetime64]) -> np.ndarray:
    return np.array(times).astype("datetime64[s]").astype("i8")


class _Values:
    """The values of a variable, a message at a time."""

    dtype = np.dtype("f4")

    def __init__(self, path: Path, offsets: np.ndarray, plane: tuple[int, ...]) -> None:
        self.path, self.offsets, self.shape = path, offsets, (*offsets.shape, *plane)
        self.ndim = len(self.shape)

    def __getitem__(self, wanted: tuple[Any, ...]) -> np.ndarray:
        import eccodes

        offsets = self.offsets[wanted[:-2]]
        out = np.full((*offsets.shape, *self.shape[-2:]), np.nan, "f4")
        with self.path.open("rb") as file:
            for place, offset in np.ndenumerate(offsets):
                if offset < 0:
                    continue
                file.seek(int(offset))
                handle = eccodes.codes_grib_new_from_file(file)
                eccodes.codes_set(handle, "missingValue", MISSING)
                plane = _plane(eccodes, handle, "values")
                eccodes.codes_release(handle)
                out[place] = np.where(plane == MISSING, np.nan, plane)
        return out[(..., *wanted[-2:])]
