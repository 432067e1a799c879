"""What can be known of a file in milliseconds: whether it is made like one that was looked into already, and its times.

Six years of one file an hour are 52,584 files. Guessing which of their variables are coordinates takes a tenth of a second
a file; so it is done once for all files whose headers differ in nothing but times. The NetCDF library takes 4 ms to open a
file, and as long to unpack its fields of coordinates: NetCDF-4 is HDF5, which tells the same in 1 ms, and compressed
coordinates are compared as they are stored.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import h5py
import netCDF4
import numpy as np
import xarray as xr

from data.prepare.inputs import given, hdf5
from data.prepare.sources.source import Clock
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
    found = _described_as_hdf5(path, content) if hdf5.is_hdf5(path, content) else None
    if found is not None:
        return found
    try:
        with netCDF4.Dataset(path, memory=content) as file:
            file.set_auto_maskandscale(False)
            return _described(file)
    except (OSError, RuntimeError):  # what is wrong with it is said where it is opened for good
        return None


def _described_as_hdf5(path: Path, content: bytes | None) -> Header | None:
    """None where the NetCDF library has to be asked: h5py cannot read it, or two dimensions are as long (which of them a
    variable has is dear to find out)."""
    try:
        return _looked_into(path, content)
    except hdf5.NOT_READ:
        return None


def _looked_into(path: Path, content: bytes | None) -> Header | None:
    digest, times = hashlib.sha256(), {}
    lengths: list[int] = []
    for name, variable in hdf5.variables(hdf5.opened(path, content)):
        own = name.removeprefix(hdf5.NOT_ITS_OWN)
        attributes = {key: str(hdf5.attribute(variable, key)) for key in TOLD if h5py.h5a.exists(variable, key.encode())}
        is_dimension = h5py.h5ds.is_scale(variable)
        if is_dimension:
            lengths.append(variable.shape[0])
        if "since" in attributes.get("units", "") and is_dimension:
            known = h5py.h5a.exists(variable, b"calendar")
            calendar = {"calendar": str(hdf5.attribute(variable, "calendar"))} if known else {}
            times[own] = (np.asarray(h5py.Dataset(variable)[:]), attributes | calendar)
            attributes = {}
        digest.update(f"{own} {is_dimension} {variable.shape} {variable.dtype} {sorted(attributes.items())}\n".encode())
        if own in (*LATITUDES, *LONGITUDES):
            digest.update(_content(h5py.Dataset(variable)))
    return Header(digest.hexdigest(), times) if len(set(lengths)) == len(lengths) else None


def _content(coordinate: h5py.Dataset) -> bytes:
    """What tells the values of a coordinate from others: compressed ones as they are stored, with how they are."""
    if coordinate.ndim > 2 and coordinate.shape[0] > 1:
        return np.ascontiguousarray(coordinate[0]).tobytes()
    if coordinate.chunks is None:
        return np.ascontiguousarray(coordinate[()]).tobytes()
    stored, how = coordinate.id, coordinate.id.get_create_plist()
    filters = [how.get_filter(number)[0] for number in range(how.get_nfilters())]
    parts = [f"{coordinate.chunks} {filters}".encode()]
    for number in range(stored.get_num_chunks()):
        offset = stored.get_chunk_info(number).chunk_offset
        parts += [str(offset).encode(), stored.read_direct_chunk(offset)[1]]
    return b" ".join(parts)


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
