"""What can be known of a file in milliseconds: whether it is made like one that was looked into already, and its times.

Six years of one file an hour are 52,584 files. Guessing which of their variables are coordinates takes a tenth of a second
a file; so it is done once for all files whose headers differ in nothing but times.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import netCDF4
import numpy as np
import xarray as xr

from data.prepare.inputs import given
from data.prepare.sources.spellings import Clock
from data.prepare.sources.tidy import LATITUDES, LONGITUDES, stamp_of
from data.prepare.sources.times import Dimensions, hours_of

TOLD = ("units", "standard_name", "axis", "coordinates", "long_name")  # by what coordinates and units are known


@dataclass(frozen=True)
class Header:
    """A file without its fields."""

    signature: str  # of names, dimensions, types and descriptions of all variables but times, and of the latitudes
    times: dict[str, tuple[np.ndarray, dict[str, Any]]]  # variables that count time along their own dimension

    def hours(self, dims: Dimensions, path: Path, clock: Clock) -> list[tuple[np.datetime64, int]] | None:
        """(hour, place) along a time dimension; None where the file itself must be asked.

        Raises:
            DataError: a time is not on a whole hour, or cannot be decoded.
        """
        stamp = stamp_of(path)
        if dims.period:
            return None
        if dims.time in self.times:
            values, attributes = self.times[dims.time]
            axis = xr.Dataset({"hours": (dims.time, np.zeros(len(values)))}, {dims.time: (dims.time, values, attributes)})
            return hours_of(axis, "hours", path, clock)
        if stamp is None or self.times or clock.stamps != "end" or clock.name_zone is None or clock.name_zone % 1:
            return None
        return [(np.datetime64(stamp, "h") - np.timedelta64(int(clock.name_zone), "h"), 0)]


def read_header(path: Path) -> Header | None:
    """The header of a NetCDF file, also in an archive; None for what is none (a zarr store)."""
    if path.is_dir():
        return None
    archive = given.archive_of(path)
    content = None if archive is None else given.read_member(path, archive)
    try:
        with netCDF4.Dataset(path, memory=content) as file:
            file.set_auto_maskandscale(False)
            return _described(file)
    except (OSError, RuntimeError):  # what is wrong with it is said where it is opened for good
        return None


def _described(file: netCDF4.Dataset) -> Header:
    digest, times = hashlib.sha256(), {}
    for name, variable in file.variables.items():
        attributes = {key: str(variable.getncattr(key)) for key in variable.ncattrs() if key in TOLD}
        if "since" in attributes.get("units", "") and variable.dimensions == (name,):
            times[name] = (np.asarray(variable[:]), attributes | _calendar(variable))
            attributes = {}
        digest.update(f"{name} {variable.dimensions} {variable.shape} {variable.dtype} {sorted(attributes.items())}\n".encode())
    for name in (*LATITUDES, *LONGITUDES):
        if name not in file.variables:
            continue
        variable = file.variables[name]
        digest.update(np.ascontiguousarray(variable[0] if variable.ndim > 2 else variable[:]).tobytes())
    return Header(digest.hexdigest(), times)


def _calendar(variable: netCDF4.Variable) -> dict[str, str]:
    return {"calendar": str(variable.calendar)} if "calendar" in variable.ncattrs() else {}
