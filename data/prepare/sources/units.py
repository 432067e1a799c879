"""Units of files, turned into those of variables.py."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import xarray as xr

from data import DataError, variables
from data.prepare.sources.spellings import DEW_POINT, MIXING_RATIO, Named

GAS_CONSTANT = 287.05  # J kg-1 K-1, dry air
KELVIN = 273.15
# (factor, offset) to the units of variables.py.
CONVERSIONS: dict[str, dict[str, tuple[float, float]]] = {
    "ug m-3": {"ug m-3": (1.0, 0.0), "mg m-3": (1e3, 0.0), "kg m-3": (1e9, 0.0), "g m-3": (1e6, 0.0)},
    "m s-1": {"m s-1": (1.0, 0.0)},
    "K": {"k": (1.0, 0.0), "degc": (1.0, KELVIN)},
    "%": {"%": (1.0, 0.0), "1": (100.0, 0.0)},
    "Pa": {"pa": (1.0, 0.0), "hpa": (100.0, 0.0), "kpa": (1000.0, 0.0)},
}
SYNONYMS = {
    "percent": "%",
    "c": "degc",
    "celsius": "degc",
    "degree_celsius": "degc",
    "degrees_celsius": "degc",
    "kelvin": "k",
    "mbar": "hpa",
    "millibars": "hpa",
    "fraction": "1",
    "(0-1)": "1",
    "0-1": "1",
    "microgram": "ug",
    "micrograms": "ug",
}
SPELT_OUT = str.maketrans("µμ⁰¹²³⁴⁵⁶⁷⁸⁹⁻", "uu0123456789-")


def is_mixing_ratio(units: str, canonical: str) -> bool:
    """Whether turning the units a file states into ours takes the air's density: gases of CAMS are given per mass of air."""
    return normal(units) == MIXING_RATIO and canonical == "ug m-3"


def concentration(mixing_ratio: np.ndarray, psfc: np.ndarray, temp: np.ndarray) -> np.ndarray:
    """ug m-3, from kg of gas per kg of air at the pressure (Pa) and temperature (K) of the ground, by the gas law."""
    return mixing_ratio * np.float32(1e9) * psfc / (np.float32(GAS_CONSTANT) * temp)


def relative_humidity(dew_point: np.ndarray, temp: np.ndarray) -> np.ndarray:
    """Percent, over water, from K and K: ratio of Magnus saturation pressures (Alduchov and Eskridge 1996)."""

    def exponent(kelvin: np.ndarray) -> np.ndarray:
        celsius = kelvin - np.float32(KELVIN)
        return np.float32(17.625) * celsius / (celsius + np.float32(243.04))

    return np.float32(100.0) * np.exp(exponent(dew_point) - exponent(temp))


def require_known_unit(named: Named, array: xr.DataArray, name: str, path: Path) -> None:
    """Before the first shard, not at the one that first needs it."""
    canonical, units = canonical_of(name), units_of(named, array)
    if not is_mixing_ratio(units, canonical):
        conversion(units, canonical, f"{path}: '{array.name}'")


def units_of(named: Named, array: xr.DataArray) -> str:
    return named.units if named.stated else str(array.attrs.get("units") or named.units)


def canonical_of(name: str) -> str:
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
