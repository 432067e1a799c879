"""How sources call their variables and in which units they are, where their files say nothing.

CAQRA: Kong et al. (2021), Earth Syst. Sci. Data 13, 529. CAMS: Inness et al. (2019), Atmos. Chem. Phys. 19, 3515 (EAC4).
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from data import DataError, variables
from data.strict import parse_yaml

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
    return {
        name: Named((str(entry["name"]),), str(entry.get("units", own[name])), "units" in entry, entry.get("level"))
        for name, entry in tree.items()
    }


def needed() -> list[str]:
    """The variables that a store reads from files hour by hour."""
    return [*variables.names("weather"), *variables.names("chemistry")]
