"""Where reanalyses come from: the spellings and units of their NetCDF files, turned into the variables of this project.

CAQRA: Kong et al. (2021), Earth Syst. Sci. Data 13, 529. CAMS: Inness et al. (2019), Atmos. Chem. Phys. 19, 3515 (EAC4).
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import NamedTuple

import cf_xarray  # noqa: F401 - gives datasets their .cf
import numpy as np
import xarray as xr

from data import DataError, classic, variables
from data.regrid import Grid, wrapped
from data.strict import parse_yaml

GAS_CONSTANT = 287.05  # J kg-1 K-1, dry air
KELVIN = 273.15
MIXING_RATIO = "kg kg-1"
# (factor, offset) to the units of variables.py.
CONVERSIONS: dict[str, dict[str, tuple[float, float]]] = {
    "ug m-3": {"ug m-3": (1.0, 0.0), "mg m-3": (1e3, 0.0), "kg m-3": (1e9, 0.0), "g m-3": (1e6, 0.0)},
    "m s-1": {"m s-1": (1.0, 0.0)},
    "K": {"k": (1.0, 0.0), "degc": (1.0, KELVIN)},
    "%": {"%": (1.0, 0.0), "1": (100.0, 0.0)},
    "Pa": {"pa": (1.0, 0.0), "hpa": (100.0, 0.0), "kpa": (1000.0, 0.0)},
}
SYNONYMS = {"percent": "%", "c": "degc", "celsius": "degc", "degree_celsius": "degc", "degrees_celsius": "degc", "kelvin": "k",
            "mbar": "hpa", "millibars": "hpa", "fraction": "1", "(0-1)": "1", "0-1": "1", "microgram": "ug",
            "micrograms": "ug"}  # fmt: skip
SPELT_OUT = str.maketrans("µμ⁰¹²³⁴⁵⁶⁷⁸⁹⁻", "uu0123456789-")
PERIODS = ("forecast_period", "leadtime", "lead_time", "step")
UNREADABLE = (OSError, RuntimeError)  # of the NetCDF library
DEW_POINT = "dew_point"  # read where a source has no relative humidity


@dataclass(frozen=True)
class Named:
    """How a source's files call one field, and its unit where they state none."""

    spellings: tuple[str, ...]
    units: str
    stated: bool = False  # by the user's map: then it overrules what the file says


def _concentration(*spellings: str, units: str = "ug m-3") -> Named:
    return Named(spellings, units)


SOURCES: dict[str, dict[str, Named]] = {
    "caqra": {
        "u": Named(("u", "u10", "U10", "uwind", "UWIND"), "m s-1"),
        "v": Named(("v", "v10", "V10", "vwind", "VWIND"), "m s-1"),
        "temp": Named(("temp", "t2", "T2", "t2m", "TEMP", "temperature"), "K"),
        "rh": Named(("rh", "RH", "rh2", "RH2", "relative_humidity"), "%"),
        "psfc": Named(("psfc", "PSFC", "ps", "sp", "surface_pressure"), "Pa"),
        "pm25": _concentration("pm2_5", "pm25", "PM25", "PM2_5", "PM2.5", "pm2p5"),
        "pm10": _concentration("pm10", "PM10"),
        "so2": _concentration("so2", "SO2"),
        "no2": _concentration("no2", "NO2"),
        "co": _concentration("co", "CO", units="mg m-3"),
        "o3": _concentration("o3", "O3"),
    },
    "cams": {
        "u": Named(("u10", "10u"), "m s-1"),
        "v": Named(("v10", "10v"), "m s-1"),
        "temp": Named(("t2m", "2t"), "K"),
        DEW_POINT: Named(("d2m", "2d"), "K"),
        "psfc": Named(("sp",), "Pa"),
        "pm25": _concentration("pm2p5", units="kg m-3"),
        "pm10": _concentration("pm10", units="kg m-3"),
        "so2": _concentration("so2", units=MIXING_RATIO),
        "no2": _concentration("no2", units=MIXING_RATIO),
        "co": _concentration("co", units=MIXING_RATIO),
        "o3": _concentration("go3", "o3", units=MIXING_RATIO),
    },
}


def read_map(path: Path) -> dict[str, Named]:
    """The fields of a `generic` source from YAML: our name -> {name: file's name, units: overrule those of the file}.

    Raises:
        DataError: a name that is not ours, or a variable that nothing gives.
    """
    try:
        tree = parse_yaml(path.read_text(encoding="utf-8"), str(path))
    except UnicodeDecodeError as error:
        raise DataError(f"{path} is not text ({error}).") from error
    if not isinstance(tree, dict) or not all(isinstance(entry, dict) and "name" in entry for entry in tree.values()):
        raise DataError(f"{path}: write one line a variable, as  pm25: {{name: PM2.5, units: ug/m3}}")
    variables.require_known([name for name in tree if name != DEW_POINT])
    absent = [name for name in needed() if name not in tree and not (name == "rh" and DEW_POINT in tree)]
    if absent:
        raise DataError(f"{path}: nothing is given for {', '.join(absent)}.")
    own = {name: variables.BY_NAME[name].units for name in needed()} | {DEW_POINT: "K"}
    return {name: Named((str(entry["name"]),), str(entry.get("units", own[name])), "units" in entry)
            for name, entry in tree.items()}  # fmt: skip


def needed() -> list[str]:
    """The variables that a store reads from files hour by hour."""
    return [*variables.names("weather"), *variables.names("chemistry")]


class Dimensions(NamedTuple):
    """Names of a field's dimensions; a place in time is its index along `time`, or time * periods + period."""

    time: str
    y: str  # northward
    x: str  # eastward
    period: str = ""  # of a forecast: hours since `time`, which is then the reference time


@dataclass(frozen=True)
class Catalogue:
    """What files hold which hour: for every field, the hours, and the file and place of each."""

    fields: dict[str, Named]
    files: list[Path]
    grid: Grid
    dims: dict[str, Dimensions]  # field -> names of its dimensions
    hours: dict[str, np.ndarray]  # field -> (n,) ascending datetime64[h]
    file_of: dict[str, np.ndarray]  # field -> (n,) index into files
    place_of: dict[str, np.ndarray]  # field -> (n,) index along the file's time
    lead_hours: tuple[float, ...] | None = None  # of forecasts, which were taken

    @cached_property
    def span(self) -> tuple[np.datetime64, np.datetime64]:
        """First and last hour of any field."""
        return min(h[0] for h in self.hours.values()), max(h[-1] for h in self.hours.values())

    def files_between(self, start: np.datetime64, stop: np.datetime64) -> list[int]:
        """Numbers of the files that hold an hour of [start, stop)."""
        found: set[int] = set()
        for name, hours in self.hours.items():
            first, last = np.searchsorted(hours, start), np.searchsorted(hours, stop)
            found |= {int(number) for number in self.file_of[name][first:last]}
        return sorted(found)

    def equals(self, other: Catalogue) -> bool:
        """Whether the other one describes the same hours in the same files, on the same grid."""
        mine, theirs = self._columns(), other._columns()
        return (
            (self.fields, self.files, self.dims) == (other.fields, other.files, other.dims)
            and all(np.array_equal(column, theirs[kind][name]) for kind in mine for name, column in mine[kind].items())
            and np.array_equal(self.grid.lat, other.grid.lat)
            and np.array_equal(self.grid.lon, other.grid.lon)
        )

    def save(self, path: Path) -> None:
        """Write an .npz that `load` reads."""
        about = {"fields": {name: [list(named.spellings), named.units, named.stated] for name, named in self.fields.items()},
                 "files": [str(file) for file in self.files], "dims": self.dims, "lead_hours": self.lead_hours}  # fmt: skip
        tables = {f"{kind}/{name}": column for kind, columns in self._columns().items() for name, column in columns.items()}
        np.savez(path, about=np.array(json.dumps(about)), lat=self.grid.lat, lon=self.grid.lon, **tables)  # type: ignore[arg-type]

    def _columns(self) -> dict[str, dict[str, np.ndarray]]:
        return {"hours": self.hours, "file_of": self.file_of, "place_of": self.place_of}


def load(path: Path) -> Catalogue:
    """A catalogue that another process has saved."""
    with np.load(path, allow_pickle=False) as file:
        about = json.loads(str(file["about"]))
        fields = {name: Named(tuple(spellings), *more) for name, (spellings, *more) in about["fields"].items()}
        columns = ({name: file[f"{kind}/{name}"] for name in fields} for kind in ("hours", "file_of", "place_of"))
        dims = {name: Dimensions(*found) for name, found in about["dims"].items()}
        lead = None if about["lead_hours"] is None else tuple(about["lead_hours"])
        hours_of, file_of, place_of = columns
        files, grid = [Path(f) for f in about["files"]], Grid(file["lat"], file["lon"])
        return Catalogue(fields, files, grid, dims, hours_of, file_of, place_of, lead)


def catalogue(fields: dict[str, Named], files: list[Path], lead_hours: tuple[float, ...] | None = None) -> Catalogue:
    """Look into every file's header: which fields, which hours, which grid.

    Args:
        lead_hours: of forecasts, the hours since their reference time to take; None for all.

    Raises:
        DataError: a file cannot be read, grids differ, a field is in no file, or an hour is in two places.
    """
    grid: Grid | None = None
    dims: dict[str, Dimensions] = {}
    entries: dict[str, list[tuple[np.datetime64, int, int]]] = {name: [] for name in fields}
    for number, path in enumerate(files):
        with opened(path) as dataset:
            present = {name: spelt for name, named in fields.items() if (spelt := spelling(dataset, named))}
            if not present:
                continue
            here = _grid(dataset, next(iter(present.values())), path)
            grid = grid or here
            if grid.shape != here.shape or not (np.allclose(grid.lat, here.lat) and np.allclose(grid.lon, here.lon)):
                raise DataError(f"{path} is on another grid ({here.shape[0]} x {here.shape[1]}) than {files[0]}: prepare each "
                                "grid on its own.")  # fmt: skip
            hours_along: dict[tuple[str, str], list[tuple[np.datetime64, int]]] = {}  # variables may have times of their own
            for name, spelt in present.items():
                _require_known_unit(fields[name], dataset[spelt], name, path)
                found = _dimensions(dataset, spelt, path)
                along = (found.time, found.period)
                if along not in hours_along:
                    hours_along[along] = _hours(dataset, spelt, path, lead_hours)
                hours = hours_along[along]
                entries[name] += [(hour, number, place) for hour, place in hours]
                levels = [d for d in dataset[spelt].dims if dataset.sizes[d] > 1 and d not in found]
                if levels:
                    raise DataError(f"{path}: '{spelt}' has more than one of {', '.join(map(str, levels))}: select one first.")
                if dims.setdefault(name, found) != found:
                    raise DataError(f"{path}: dimensions of '{spelt}' are {found}, in the files before {dims[name]}: prepare "
                                    "each kind on its own.")  # fmt: skip
    absent = [name for name, found in entries.items() if not found]
    if absent or grid is None:
        wanted = "; ".join(f"{name} ({', '.join(fields[name].spellings)})" for name in absent)
        raise DataError(f"none of the {len(files)} files holds: {wanted}. Add the files that do, or map the names your files "
                        "use with `generic --map`.")  # fmt: skip
    columns: dict[str, tuple[np.ndarray, ...]] = {}
    for name, places in entries.items():
        places.sort()
        for (hour, first, _), (again, second, _) in zip(places, places[1:], strict=False):
            if hour == again:
                where = f"twice in {files[first]}" if first == second else f"in {files[first]} and in {files[second]}"
                remedy = "remove one of the two"
                if dims[name].period:
                    remedy = "these are forecasts of one hour with several lead times, choose which to take, as --lead 3"
                raise DataError(f"'{name}' at {hour} is {where}: {remedy}.")
        columns[name] = tuple(np.array(column) for column in zip(*places, strict=True))
    hours_of, file_of, place_of = ({name: column[i] for name, column in columns.items()} for i in range(3))
    return Catalogue(fields, files, grid, dims, hours_of, file_of, place_of, lead_hours)


@contextmanager
def opened(path: Path, encoded: bool = False) -> Iterator[xr.Dataset]:
    """A NetCDF file as xarray shows it, times raw; fill values and packing are decoded unless `encoded`.

    Raises:
        DataError: it is not NetCDF, or truncated, when it is opened or while it is read.
    """
    try:
        classic.require_whole(path)
        with xr.open_dataset(path, engine="netcdf4", decode_times=False, mask_and_scale=not encoded, cache=False) as dataset:
            yield dataset
    except UNREADABLE as error:
        raise DataError(f"{path} cannot be read ({error}): fetch it again.") from error


def read_static(dataset: xr.Dataset, name: str, path: Path, around: Grid) -> tuple[Grid, np.ndarray]:
    """A field without time and its grid; of a regular one only what lies within a cell or two of `around`."""
    grid = _grid(dataset, name, path)
    array = dataset[name].squeeze().transpose(*_horizontal(dataset, name, path))
    if grid.lat.ndim == 1:
        middle, margin = float(around.lon.mean()), 2.0
        lon = middle + wrapped(grid.lon - middle)
        rows = np.flatnonzero((grid.lat >= around.lat.min() - margin) & (grid.lat <= around.lat.max() + margin))
        columns = np.flatnonzero((lon >= around.lon.min() - margin) & (lon <= around.lon.max() + margin))
        array = array[rows[0] : rows[-1] + 1] if rows.size else array[:0]
        array, grid = array[:, columns], Grid(grid.lat[rows], grid.lon[columns])
        if not array.size:
            raise DataError(f"{path} does not cover the target.")
    return grid, array.to_numpy()


def spelling(dataset: xr.Dataset, named: Named) -> str | None:
    """The name under which `dataset` holds a field, None if it does not."""
    return next((name for name in named.spellings if name in dataset.data_vars), None)


@dataclass
class Reader:
    """Reads hours of our variables on the source's grid; files stay open from one variable to the next."""

    catalogue: Catalogue
    first: np.datetime64  # hour
    count: int
    bytes_read: int = 0
    _kept: dict[str, np.ndarray] = field(default_factory=dict)

    def variable(self, name: str) -> np.ndarray | None:
        """(count, H, W) float32 in the units of variables.py, NaN where missing; None where no hour is there.

        Raises:
            DataError: a file is damaged, its unit is unknown, or its values fit another unit.
        """
        if name == "rh" and "rh" not in self.catalogue.fields:
            dew_point, temp = self._field(DEW_POINT), self._field("temp")
            return None if dew_point is None or temp is None else relative_humidity(dew_point, temp)
        values = self._field(name)
        if values is not None:
            self._require_usual(name, values)
        return values

    def _field(self, name: str) -> np.ndarray | None:
        if name in self._kept:
            return self._kept[name]
        own = self.catalogue
        start = np.searchsorted(own.hours[name], self.first)
        stop = np.searchsorted(own.hours[name], self.first + np.timedelta64(self.count, "h"))
        if start == stop:
            return None
        slots = (own.hours[name][start:stop] - self.first).astype(int)
        files, places = own.file_of[name][start:stop], own.place_of[name][start:stop]
        out: np.ndarray | None = None
        for number in np.unique(files):
            mine = files == number
            values = self._read(name, own.files[number], places[mine])
            if len(slots) == self.count and mine.all():
                out = values
            else:
                out = np.full((self.count, *own.grid.shape), np.nan, "f4") if out is None else out
                out[slots[mine]] = values
        if name in ("temp", "psfc", DEW_POINT):
            assert out is not None
            self._kept[name] = out
        return out

    def _read(self, name: str, path: Path, places: np.ndarray) -> np.ndarray:
        named = self.catalogue.fields[name]
        with opened(path, encoded=True) as dataset:
            spelt = spelling(dataset, named)
            assert spelt is not None
            array = dataset[spelt]
            units = _units(named, array)
            dims = self.catalogue.dims[name]
            array = _at_places(array, dims, places)
            extra = [d for d in array.dims if d not in (dims.time, dims.y, dims.x) and array.sizes[d] == 1]
            values = _decoded(array.squeeze(extra).transpose(dims.time, dims.y, dims.x))
        self.bytes_read += values.nbytes
        canonical = _canonical(name)
        if normal(units) == MIXING_RATIO and canonical == "ug m-3":
            psfc, temp = self._at(path, "psfc", places, name), self._at(path, "temp", places, name)
            return values * np.float32(1e9) * psfc / (np.float32(GAS_CONSTANT) * temp)
        factor, offset = conversion(units, canonical, f"{path}: '{spelt}'")
        if factor != 1.0:
            values *= np.float32(factor)
        if offset:
            values += np.float32(offset)
        return values

    def _at(self, path: Path, name: str, places: np.ndarray, wanted_by: str) -> np.ndarray:
        """`name` at the hours that places of `wanted_by` in `path` stand for."""
        own = self.catalogue
        number = own.files.index(path)
        mine = (own.file_of[wanted_by] == number) & np.isin(own.place_of[wanted_by], places)
        whole = self._field(name)
        if whole is None:
            return np.full((len(places), *own.grid.shape), np.nan, "f4")
        return whole[(own.hours[wanted_by][mine] - self.first).astype(int)]

    def _require_usual(self, name: str, values: np.ndarray) -> None:
        variable = variables.BY_NAME[name]
        sample = values[:: max(1, len(values) // 8)]
        sample = sample[np.isfinite(sample)]
        if variable.typical is None or sample.size < 100:
            return
        low, high = variable.typical
        median = float(np.median(sample))
        if low <= median <= high:
            if variable.valid_min == 0.0:
                values[(values < 0.0) & (values > -1e-2 * low)] = 0.0  # of packing
            return
        fits = [f"{units} (factor {factor:g}{f', then + {offset:g}' if offset else ''})"
                for units, (factor, offset) in CONVERSIONS[variable.units].items()
                if (factor, offset) != (1.0, 0.0) and low <= median * factor + offset <= high]  # fmt: skip
        looks = f"It looks like {' or '.join(fits)}." if fits else "No unit known here fits."
        raise DataError(
            f"'{name}' at {self.first} and after: the median is {median:.4g} {variable.units}, usual is {low:g} .. {high:g}. "
            f"{looks} Correct the `units` attribute of the files, or map them with `generic --map`."
        )


def relative_humidity(dew_point: np.ndarray, temp: np.ndarray) -> np.ndarray:
    """Percent, over water, from K and K: ratio of Magnus saturation pressures (Alduchov and Eskridge 1996)."""

    def exponent(kelvin: np.ndarray) -> np.ndarray:
        celsius = kelvin - np.float32(KELVIN)
        return np.float32(17.625) * celsius / (celsius + np.float32(243.04))

    return np.float32(100.0) * np.exp(exponent(dew_point) - exponent(temp))


def _require_known_unit(named: Named, array: xr.DataArray, name: str, path: Path) -> None:
    """Before the first shard, not at the one that first needs it."""
    canonical, units = _canonical(name), _units(named, array)
    if not (normal(units) == MIXING_RATIO and canonical == "ug m-3"):
        conversion(units, canonical, f"{path}: '{array.name}'")


def _units(named: Named, array: xr.DataArray) -> str:
    return named.units if named.stated else str(array.attrs.get("units") or named.units)


def _canonical(name: str) -> str:
    return "K" if name == DEW_POINT else variables.BY_NAME[name].units


def normal(units: str) -> str:
    """One spelling of a unit: lower case, negative exponents, no slash."""
    text = re.sub(r"\*\*|\^", "", units.strip().lower().translate(SPELT_OUT))
    above, *below = text.split("/")
    tokens = [SYNONYMS.get(token, token) for token in re.split(r"[\s.*]+", above) if token]
    for token in below:
        base = token.strip().rstrip("0123456789")
        tokens.append(f"{base}-{token.strip()[len(base) :] or 1}")
    return " ".join(tokens)


def conversion(units: str, canonical: str, where: str) -> tuple[float, float]:
    """(factor, offset) from the units a file states to ours."""
    known = CONVERSIONS[canonical]
    if normal(units) not in known:
        raise DataError(f"{where} is in '{units}', which is not known for {canonical}: known are {', '.join(known)}.")
    return known[normal(units)]


def _decoded(array: xr.DataArray) -> np.ndarray:
    """Values of an array that was opened `encoded`, float32, NaN where missing; plain floats in place, in half the time."""
    packed = {"scale_factor", "add_offset"} & set(array.attrs)
    if packed or array.dtype.kind != "f":
        name = str(array.name)
        return np.array(xr.decode_cf(array.to_dataset(name=name), decode_times=False)[name].to_numpy(), "f4")
    values = np.array(array.to_numpy(), "f4", copy=array.dtype != np.float32 or None)
    for fill in _fill_values(array):
        values[values == fill] = np.nan
    return values


def _fill_values(array: xr.DataArray) -> list[np.float32]:
    """What stands for a missing value, rounded as the data are: files state it as a double, several times, or as text."""
    stated = [value for key in ("_FillValue", "missing_value") for value in np.atleast_1d(array.attrs.get(key, []))]
    try:
        return [np.float32(value) for value in stated]
    except ValueError as error:
        raise DataError(f"'{array.name}': its missing value {stated} is not a number. Correct the attribute.") from error


def _at_places(array: xr.DataArray, dims: Dimensions, places: np.ndarray) -> xr.DataArray:
    """The fields at places in time, one after the other along `dims.time`."""
    if not dims.period:
        along = slice(places[0], places[-1] + 1) if (np.diff(places) == 1).all() else places
        return array.isel({dims.time: along})
    array = array.drop_vars(list(array.coords))  # of the reference, which is not the time of what is read
    reference, period = np.divmod(places, array.sizes[dims.period])
    if len(np.unique(period)) == 1:
        return array.isel({dims.time: reference, dims.period: period[:1]})
    if len(np.unique(reference)) == 1:
        return array.isel({dims.time: int(reference[0]), dims.period: period}).rename({dims.period: dims.time})
    fields = [array.isel({dims.time: [int(r)], dims.period: int(p)}) for r, p in zip(reference, period, strict=True)]
    return xr.concat(fields, dims.time)


def _dimensions(dataset: xr.Dataset, name: str, path: Path) -> Dimensions:
    time, period = _time_dimension(dataset, name, path), _period(dataset, name)
    reference = _is(dataset[time], "forecast_reference_time")
    along = period is not None and reference and period.ndim == 1
    return Dimensions(time, *_horizontal(dataset, name, path), str(period.dims[0]) if along and period is not None else "")


def _time_dimension(dataset: xr.Dataset, name: str, path: Path) -> str:
    found = [str(dim) for dim in dataset[name].dims
             if dim in dataset.variables and "since" in str(dataset[dim].attrs.get("units", ""))]  # fmt: skip
    valid = [dim for dim in found if not _is(dataset[dim], "forecast_reference_time")]
    if not found:
        raise DataError(f"{path}: '{name}' has no time coordinate with units '... since ...'.")
    return (valid or found)[0]


def _is(coordinate: xr.DataArray, standard_name: str) -> bool:
    return standard_name in (coordinate.attrs.get("standard_name"), coordinate.name)


def _period(dataset: xr.Dataset, name: str) -> xr.DataArray | None:
    """The coordinate that says how long after its reference time a forecast is valid."""
    names = [str(v) for v in dataset.variables if v in PERIODS or dataset[v].attrs.get("standard_name") == "forecast_period"]
    found = [dataset[v] for v in names if set(dataset[v].dims) <= set(dataset[name].dims)]
    return found[0] if found else None


def _hours(dataset: xr.Dataset, name: str, path: Path, lead_hours: tuple[float, ...] | None) -> list[tuple[np.datetime64, int]]:
    """(hour, place) of a file's fields, hours as datetime64[h]; of forecasts the hours that they are valid at."""
    dim = _time_dimension(dataset, name, path)
    times = _exact_times(dataset, dim, path)
    periods = _period(dataset, name)
    if not _is(dataset[dim], "forecast_reference_time"):
        if lead_hours is not None and periods is None:
            raise DataError(f"{path}: --lead is for forecasts; '{name}' has times, and no lead times.")
        return [(hour, place) for place, hour in enumerate(_whole_hours(times, path))]
    if periods is None:
        raise DataError(f"{path}: '{name}' has reference times of forecasts ('{dim}') and no forecast period, so nobody can "
                        "know which hours it is valid at.")  # fmt: skip
    hours_after = _in_hours(periods, path)
    valid = _whole_hours((times[:, None] + (hours_after * 3600).round().astype("timedelta64[s]")).ravel(), path)
    wanted = np.ones(len(hours_after), bool) if lead_hours is None else np.isin(hours_after, lead_hours)
    if not wanted.any() or not np.isin(lead_hours or (), hours_after).all():
        asked, there = (", ".join(f"{x:g}" for x in hours) for hours in (lead_hours or (), hours_after))
        raise DataError(f"{path}: --lead asks for {asked} h, its lead times are {there} h.")
    places = np.flatnonzero(np.tile(wanted, len(times)))
    return [(valid[place], int(place)) for place in places]


def _in_hours(periods: xr.DataArray, path: Path) -> np.ndarray:
    units = str(periods.attrs.get("units", "")).strip().lower()
    seconds = {"hours": 3600, "hour": 3600, "h": 3600, "minutes": 60, "seconds": 1, "days": 86400, "nanoseconds": 1e-9}
    if units not in seconds:
        raise DataError(f"{path}: the lead times '{periods.name}' are in '{units}', not in hours, minutes, seconds or days.")
    return np.asarray((np.atleast_1d(periods.to_numpy()).astype("f8") * seconds[units]).round() / 3600)


def _exact_times(dataset: xr.Dataset, dim: str, path: Path) -> np.ndarray:
    """(T,) datetime64[s]; dates of other calendars that exist in ours keep their name."""
    try:
        time = xr.decode_cf(dataset[[dim]])[dim]
        if time.dtype.kind != "M":
            named = [f"{t.year:04}-{t.month:02}-{t.day:02}T{t.hour:02}:{t.minute:02}:{t.second:02}" for t in time.to_numpy()]
            time = time.copy(data=[np.datetime64(text) for text in named])
    except (ValueError, OverflowError, AttributeError) as error:
        raise DataError(f"{path}: its times cannot be decoded ({error}).") from error
    return np.asarray(time.to_numpy().astype("datetime64[s]"))


def _whole_hours(exact: np.ndarray, path: Path) -> np.ndarray:
    hours = (exact + np.timedelta64(30, "m")).astype("datetime64[h]")
    off = abs((exact - hours).astype("timedelta64[s]").astype(int))
    if np.isnat(exact).any() or (off.size and off.max() > 60):
        raise DataError(f"{path}: {exact[np.isnat(exact).argmax() or off.argmax()]} is not on a whole hour.")
    return np.asarray(hours)


def _grid(dataset: xr.Dataset, name: str, path: Path) -> Grid:
    lat, lon = (_coordinate(dataset, name, kind, path) for kind in ("latitude", "longitude"))
    if lat.ndim == 2:
        y, x = _horizontal(dataset, name, path)
        lat, lon = (c.transpose(y, x) for c in (lat, lon))
    values = Grid(lat.to_numpy().astype("f8"), lon.to_numpy().astype("f8"))
    if abs(values.lat).max() > 90.0:
        raise DataError(f"{path}: latitudes reach {values.lat.max():.2f}; latitude and longitude look swapped.")
    return values


def _coordinate(dataset: xr.Dataset, name: str, kind: str, path: Path) -> xr.DataArray:
    guessed = dataset.cf.guess_coord_axis()
    found = [c for c in guessed.cf.coordinates.get(kind, []) if set(dataset[c].dims) <= set(dataset[name].dims)]
    if len(found) != 1:
        raise DataError(f"{path}: {len(found)} coordinates of '{name}' are its {kind}: {found or list(dataset.coords)}.")
    return dataset[found[0]]


def _horizontal(dataset: xr.Dataset, name: str, path: Path) -> tuple[str, str]:
    """Names of the dimensions from south to north and from west to east."""
    lat, lon = (_coordinate(dataset, name, kind, path) for kind in ("latitude", "longitude"))
    if lat.ndim == 1:
        return str(lat.dims[0]), str(lon.dims[0])
    y, x = lat.dims
    return (str(y), str(x)) if abs(np.diff(lat.to_numpy(), axis=0)).mean() > abs(np.diff(lat.to_numpy(), axis=1)).mean() else (
        str(x), str(y))  # fmt: skip
