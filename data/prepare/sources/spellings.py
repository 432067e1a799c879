"""How sources call their variables, in which units they are, where their files say nothing, and how hours are read.

CAQRA: Kong et al. (2021), Earth Syst. Sci. Data 13, 529. CAMS: Inness et al. (2019), Atmos. Chem. Phys. 19, 3515 (EAC4).
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from data import DataError
from data.strict import parse_yaml
from data.variables import ALWAYS, BY_NAME, PUBLISHED, Contents, Variable

DEW_POINT = "dew_point"  # read where a source has no relative humidity


@dataclass(frozen=True)
class Named:
    """How a source's files call one field, and its unit where they state none."""

    spellings: tuple[str, ...]
    units: str
    stated: bool = False  # by the user's map: then it overrules what the file says
    level: int | None = None  # which one of several


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
    "topoflow": {
        "u": Named(("u",), "m s-1"),
        "v": Named(("v",), "m s-1"),
        "temp": Named(("temp",), "K"),
        "rh": Named(("rh",), "%"),
        "psfc": Named(("psfc",), "Pa"),
        **{name: _concentration(name) for name in ("pm25", "pm10", "so2", "no2", "co", "o3")},
    },
    "cams": {
        "u": Named(("u10", "10u"), "m s-1"),
        "v": Named(("v10", "10v"), "m s-1"),
        "temp": Named(("t2m", "2t"), "K"),
        DEW_POINT: Named(("d2m", "2d"), "K"),
        "psfc": Named(("sp",), "Pa"),
        "pm25": _concentration("pm2p5", units="kg m-3"),
        "pm10": _concentration("pm10", units="kg m-3"),
        "so2": _concentration("so2", units="kg kg-1"),
        "no2": _concentration("no2", units="kg kg-1"),
        "co": _concentration("co", units="kg kg-1"),
        "o3": _concentration("go3", "o3", units="kg kg-1"),
    },
}


# Hours ahead of UTC, of an hour that stands in the name of a file. CAQRA's is said to be Beijing time.
NAME_ZONES = {"caqra": 8.0}


@dataclass(frozen=True)
class Clock:
    """How the hours of files are read."""

    lead_hours: tuple[float, ...] | None = None  # of forecasts, those to take; None: all, each hour once
    zone: float = 0.0  # hours that the times in files are ahead of UTC
    stamps: str = "end"  # where in an averaged hour its time lies; means are stored at the end, when all of it is known
    name_zone: float | None = None  # the same of an hour that stands in a file's name only; None: it has to be said

    def described(self) -> str:
        """For the output and the provenance."""
        named = "" if self.name_zone is None else f", in names {self.name_zone:+g} h"
        of_means = "" if self.stamps == "end" else f", at the {self.stamps} of averaged hours"
        return f"times in files are UTC{self.zone:+g} h{named}{of_means}"


STAMPS = ("end", "centre")
DEFAULT_CLOCK = Clock()


def fields_of(source: str, path: Path | None, defined: tuple[Variable, ...]) -> dict[str, Named]:
    """What is read: the fields of a source, changed and completed by the lines of a map; and what the user has defined.

    Args:
        path: YAML, our name -> {name: file's name, units: overrule those of the file, level: one of several}, or nothing
            after the colon to leave the source's field out. The source `generic` has no fields of its own.

    Raises:
        DataError: a name that is not known here, a line that says nothing, or no wind or no pollutant is left.
    """
    fields = dict(SOURCES.get(source, {}))
    fields |= {variable.name: Named((variable.name,), variable.units) for variable in defined}
    own = read_as(defined)
    tree = {} if path is None else _mapping(path, "write one line a variable, as  pm25: {name: PM2.5, units: ug/m3}")
    Contents({"": tuple(own.values())}).require(tree, str(path))
    for name, entry in tree.items():
        if entry is None and name in fields:
            del fields[name]
            continue
        if not isinstance(entry, dict) or "name" not in entry:
            raise DataError(
                f"{path}: '{name}' says nothing: write  {name}: {{name: NAME_IN_THE_FILES, units: {own[name].units}}}"
            )
        fields[name] = Named(
            (str(entry["name"]),), str(entry.get("units", own[name].units)), "units" in entry, entry.get("level")
        )
        if name == "rh":
            fields.pop(DEW_POINT, None)
    static = [name for name in fields if name in PUBLISHED.names("static")]
    if static:
        raise DataError(f"{path}: '{static[0]}' has no time; such fields come with --elevation, --population and --land-mask.")
    absent = [name for name in ALWAYS if name not in fields]
    if absent:
        raise DataError(f"{path}: nothing is given for {', '.join(absent)}; the wind is always needed.")
    return fields


def read_as(defined: tuple[Variable, ...]) -> dict[str, Variable]:
    """What the fields of files become, by name."""
    dew_point = Variable(DEW_POINT, "K", "dew point at 2 m", "dew_point_temperature", 150.0, 340.0)
    return BY_NAME | {variable.name: variable for variable in (*defined, dew_point)}


def read_variables(path: Path) -> tuple[Variable, ...]:
    """Variables that a user defines, from YAML: name -> {units, range, group, long_name, standard_name, typical}.

    Raises:
        DataError: a line lacks its units or range, or has a name that is known already.
    """
    example = "write one line a variable, as  dust: {units: ug m-3, range: [0, 20000], group: chemistry}"
    found = []
    for name, about in _mapping(path, example).items():
        known = {"units", "range", "group", "long_name", "standard_name", "typical"}
        if not isinstance(about, dict) or not {"units", "range"} <= set(about) <= known:
            raise DataError(f"{path}: '{name}' needs units and range, and may have {', '.join(sorted(known))}: {example}")
        if name in BY_NAME:
            raise DataError(f"{path}: '{name}' is known already, in {BY_NAME[name].units}; to read it, add it to --map.")
        (low, high), typical = about["range"], about.get("typical")
        group = str(about.get("group", "own"))
        if group == "static" or not group.isidentifier():
            raise DataError(
                f"{path}: '{name}' cannot be in the group '{group}': use weather, chemistry, or a name of your own."
            )
        description = str(about.get("long_name", name)), str(about.get("standard_name", ""))
        usual = None if typical is None else (float(typical[0]), float(typical[1]))
        found.append(Variable(name, str(about["units"]), *description, float(low), float(high), usual, group))
    return tuple(found)


def _mapping(path: Path, example: str) -> dict[str, Any]:
    try:
        tree = parse_yaml(path.read_text(encoding="utf-8"), str(path))
    except UnicodeDecodeError as error:
        raise DataError(f"{path} is not text ({error}).") from error
    if not isinstance(tree, dict):
        raise DataError(f"{path}: {example}")
    return tree
