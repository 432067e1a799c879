"""The variables that are known, with names, units, groups, possible and usual ranges; and which of them a store holds.

A store holds some of those known here, and others that its user has defined. The channel orders of PUBLISHED and
MODEL_INPUTS are those of the published checkpoint.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from difflib import get_close_matches
from typing import Any

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
    group: str = "weather"  # one array a group: fields that are always read together share a chunk

    @property
    def is_logarithmic(self) -> bool:
        """Of what spans orders of magnitude, logarithms are measured too."""
        return self.group in ("chemistry", "emissions")


def _pollutant(name: str, long_name: str, standard_name: str, valid_max: float, typical: tuple[float, float]) -> Variable:
    standard_name = f"mass_concentration_of_{standard_name}_in_air"
    return Variable(name, "ug m-3", long_name, standard_name, 0.0, valid_max, typical, "chemistry")


def _static(name: str, units: str, long_name: str, standard_name: str, low: float, high: float) -> Variable:
    return Variable(name, units, long_name, standard_name, low, high, None, "static")


def _emission(species: str, long_name: str, standard_name: str) -> Variable:
    standard_name = f"tendency_of_atmosphere_mass_content_of_{standard_name}_due_to_emission"
    return Variable(f"e_{species}", "ug m-2 s-1", f"emission of {long_name}", standard_name, 0.0, 1e5, None, "emissions")


KNOWN: tuple[Variable, ...] = (
    Variable("u", "m s-1", "eastward wind", "eastward_wind", -120.0, 120.0),
    Variable("v", "m s-1", "northward wind", "northward_wind", -120.0, 120.0),
    Variable("temp", "K", "air temperature", "air_temperature", 180.0, 340.0, (220.0, 320.0)),
    Variable("rh", "%", "relative humidity", "relative_humidity", 0.0, 110.0, (3.0, 100.0)),
    Variable("psfc", "Pa", "surface pressure", "surface_air_pressure", 40_000.0, 110_000.0, (50_000.0, 105_000.0)),
    _pollutant("pm25", "fine particulate matter", "pm2p5_ambient_aerosol_particles", 5_000.0, (0.5, 800.0)),
    _pollutant("pm10", "particulate matter under 10 um", "pm10_ambient_aerosol_particles", 20_000.0, (0.5, 2_000.0)),
    _pollutant("so2", "sulphur dioxide", "sulfur_dioxide", 5_000.0, (0.02, 500.0)),
    _pollutant("no2", "nitrogen dioxide", "nitrogen_dioxide", 2_000.0, (0.02, 400.0)),
    _pollutant("co", "carbon monoxide", "carbon_monoxide", 50_000.0, (15.0, 8_000.0)),
    _pollutant("o3", "ozone", "ozone", 1_500.0, (2.0, 400.0)),
    _static("lat2d", "degrees_north", "latitude", "latitude", -90.0, 90.0),
    _static("lon2d", "degrees_east", "longitude", "longitude", -180.0, 360.0),
    _static("elevation", "m", "surface altitude", "surface_altitude", -500.0, 9_000.0),
    _static("population", "km-2", "population density", "", 0.0, 100_000.0),
    _static("land_fraction", "1", "land area fraction", "land_area_fraction", 0.0, 1.0),
    _static("domain_mask", "1", "1 where the forecast is trained and scored", "", 0.0, 1.0),
    # Beyond the published ones: a store holds them where its user maps them.
    _pollutant("nh3", "ammonia", "ammonia", 5_000.0, (0.01, 300.0)),
    Variable("pblh", "m", "boundary layer height", "atmosphere_boundary_layer_thickness", 0.0, 8e3, (20.0, 3e3), "surface"),
    Variable("rain", "mm", "rain and snow of the hour", "lwe_thickness_of_precipitation_amount", 0.0, 500.0, None, "surface"),
    Variable("sw_down", "W m-2", "solar radiation", "surface_downwelling_shortwave_flux_in_air", 0.0, 1_500.0, None, "surface"),
    Variable("cloud", "1", "total cloud cover", "cloud_area_fraction", 0.0, 1.0, None, "surface"),
    _emission("nox", "nitrogen oxides", "nox_expressed_as_nitrogen_monoxide"),
    _emission("so2", "sulphur dioxide", "sulfur_dioxide"),
    _emission("nh3", "ammonia", "ammonia"),
    _emission("co", "carbon monoxide", "carbon_monoxide"),
    _emission("pm", "particulate matter", "pm10_ambient_aerosol_particles"),
)
BY_NAME: dict[str, Variable] = {variable.name: variable for variable in KNOWN}
ALWAYS = ("u", "v")  # in every store: the wind scan reads them


@dataclass(frozen=True)
class Contents:
    """The variables of a store: group -> its variables, in the order of their channels; `static` has no time."""

    groups: dict[str, tuple[Variable, ...]]

    @property
    def dynamic(self) -> tuple[str, ...]:
        """Groups with time."""
        return tuple(group for group in self.groups if group != "static")

    @property
    def hourly(self) -> list[str]:
        """Names of all variables with time."""
        return [name for group in self.dynamic for name in self.names(group)]

    def names(self, group: str) -> list[str]:
        return [variable.name for variable in self.groups[group]]

    def variable(self, name: str) -> Variable:
        return next(variable for members in self.groups.values() for variable in members if variable.name == name)

    def group(self, name: str) -> str:
        return self.variable(name).group

    def channel(self, name: str) -> int:
        """Place of a variable in its group."""
        return self.names(self.group(name)).index(name)

    def require(self, wanted: Iterable[str], where: str) -> None:
        """Raise DataError, with the nearest spelling, for the first name that is not held."""
        held = [variable.name for members in self.groups.values() for variable in members]
        for name in wanted:
            if name not in held:
                near = get_close_matches(name, held, n=1)
                hint = f" Did you mean '{near[0]}'?" if near else ""
                raise DataError(f"{where}: unknown variable '{name}'.{hint} It has {', '.join(held)}.")


def contents(members: Iterable[Variable]) -> Contents:
    """Variables by group; weather, chemistry and static come first."""
    groups: dict[str, tuple[Variable, ...]] = {"weather": (), "chemistry": (), "static": ()}
    for variable in members:
        groups[variable.group] = (*groups.get(variable.group, ()), variable)
    return Contents(groups)


# Channel orders pinned by the published checkpoint.
PUBLISHED = contents(KNOWN[: 5 + 6 + 6])
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


def restored(about: dict[str, Any]) -> Variable:
    """A variable from what `asdict` and JSON made of it."""
    return Variable(**{**about, "typical": about["typical"] and tuple(about["typical"])})
