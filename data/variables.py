"""The only list of variables in the project: names, units, groups, possible and usual ranges."""

from __future__ import annotations

from dataclasses import dataclass
from difflib import get_close_matches

from data import DataError


@dataclass(frozen=True)
class Variable:
    name: str
    units: str
    long_name: str
    standard_name: str
    valid_min: float
    valid_max: float
    typical: tuple[float, float] | None = None  # where the median of many cells and hours lies; another unit does not


def _pollutant(name: str, long_name: str, standard_name: str, valid_max: float, typical: tuple[float, float]) -> Variable:
    standard_name = f"mass_concentration_of_{standard_name}_in_air"
    return Variable(name, "ug m-3", long_name, standard_name, 0.0, valid_max, typical)


# One array a group: fields that are always read together share a chunk (weather at t; chemistry at t and t+h).
GROUPS: dict[str, tuple[Variable, ...]] = {
    "weather": (
        Variable("u", "m s-1", "eastward wind", "eastward_wind", -120.0, 120.0),
        Variable("v", "m s-1", "northward wind", "northward_wind", -120.0, 120.0),
        Variable("temp", "K", "air temperature", "air_temperature", 180.0, 340.0, (220.0, 320.0)),
        Variable("rh", "%", "relative humidity", "relative_humidity", 0.0, 110.0, (3.0, 100.0)),
        Variable("psfc", "Pa", "surface pressure", "surface_air_pressure", 40_000.0, 110_000.0, (50_000.0, 105_000.0)),
    ),
    "chemistry": (
        _pollutant("pm25", "fine particulate matter", "pm2p5_ambient_aerosol_particles", 5_000.0, (0.5, 800.0)),
        _pollutant("pm10", "particulate matter under 10 um", "pm10_ambient_aerosol_particles", 20_000.0, (0.5, 2_000.0)),
        _pollutant("so2", "sulphur dioxide", "sulfur_dioxide", 5_000.0, (0.02, 500.0)),
        _pollutant("no2", "nitrogen dioxide", "nitrogen_dioxide", 2_000.0, (0.02, 400.0)),
        _pollutant("co", "carbon monoxide", "carbon_monoxide", 50_000.0, (15.0, 8_000.0)),
        _pollutant("o3", "ozone", "ozone", 1_500.0, (2.0, 400.0)),
    ),
    "static": (
        Variable("lat2d", "degrees_north", "latitude", "latitude", -90.0, 90.0),
        Variable("lon2d", "degrees_east", "longitude", "longitude", -180.0, 360.0),
        Variable("elevation", "m", "surface altitude", "surface_altitude", -500.0, 9_000.0),
        Variable("population", "km-2", "population density", "", 0.0, 100_000.0),
        Variable("land_fraction", "1", "land area fraction", "land_area_fraction", 0.0, 1.0),
        Variable("domain_mask", "1", "1 where the forecast is trained and scored", "", 0.0, 1.0),
    ),
}

BY_NAME: dict[str, Variable] = {v.name: v for group in GROUPS.values() for v in group}
GROUP_OF: dict[str, str] = {v.name: name for name, group in GROUPS.items() for v in group}
CHANNEL_OF: dict[str, int] = {v.name: i for group in GROUPS.values() for i, v in enumerate(group)}

# Channel orders pinned by the published checkpoint.
MODEL_INPUTS = (
    "u",
    "v",
    "temp",
    "rh",
    "psfc",
    "pm10",
    "so2",
    "no2",
    "co",
    "o3",
    "lat2d",
    "lon2d",
    "pm25",
    "elevation",
    "population",
)
MODEL_TARGETS = ("pm25", "pm10", "so2", "no2", "co", "o3")


def names(group: str) -> list[str]:
    return [v.name for v in GROUPS[group]]


def require_known(requested: list[str]) -> None:
    """Raise DataError, with the nearest spelling, for the first name that no variable has."""
    for name in requested:
        if name not in BY_NAME:
            near = get_close_matches(name, BY_NAME, n=1)
            hint = f" Did you mean '{near[0]}'?" if near else ""
            raise DataError(f"unknown variable '{name}'.{hint} Known: {', '.join(BY_NAME)}.")
