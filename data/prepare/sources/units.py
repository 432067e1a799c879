"""Units of files, turned into those of variables.py; pint knows them (cf-xarray's registry), here stand what people write."""

from __future__ import annotations

import re
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pint
import xarray as xr
from cf_xarray.units import units as REGISTRY

from data import DataError
from data.prepare.sources.source import Named

GAS_CONSTANT = 287.05  # J kg-1 K-1, dry air
KELVIN = 273.15
MOLAR_MASS_OF_AIR = 28.9647  # g mol-1
MOLAR_MASS = {"so2": 64.066, "no2": 46.0055, "co": 28.010, "o3": 47.998, "nh3": 17.031}  # g mol-1
# What a wrong unit most often is, beside ours.
LIKELY = {"ug m-3": ("mg m-3", "g m-3", "kg m-3"), "K": ("degC",), "%": ("1",), "Pa": ("hPa", "kPa"), "m s-1": ("km h-1",)}
SPELLINGS = {"mb": "millibar", "mbar": "millibar", "(0 - 1)": "1", "(0-1)": "1", "0-1": "1", "0 - 1": "1", "fraction": "1"}
SPELLINGS |= {"degrees_celsius": "degC", "degree_celsius": "degC", "c": "degC", "k": "K", "ugm-3": "ug m-3", "pa": "Pa"}
UNREADABLE = "\ufffd"  # what a byte that is not UTF-8 is read as: often a micro sign, or one of degrees
SPELLINGS |= {"v/v": "mol mol-1", "v v-1": "mol mol-1", "vmr": "mol mol-1", "kg/kg": "kg kg-1", "hpa": "hPa"}
CELSIUS = re.compile(r"(deg(ree)?s?|\u00b0|\u00ba)[ _.]*c(elsius)?", re.IGNORECASE)
FAHRENHEIT = re.compile(r"(deg(ree)?s?|\u00b0|\u00ba)[ _.]*f(ahrenheit)?", re.IGNORECASE)
KELVINS = re.compile(r"(deg(ree)?s?|\u00b0|\u00ba)[ _.]*k(elvin)?|kelvins?", re.IGNORECASE)
SHIFTED = re.compile(r"(.+?) *(?:@|from|after) *([-+]?[\d.]+)", re.IGNORECASE)  # of UDUNITS, as K @ 273.15
PARTS = {"ppm": 1e-6, "ppb": 1e-9, "ppt": 1e-12}  # by volume, which is by number of molecules
NOT_A_UNIT = (pint.errors.PintError, ValueError, TypeError, AttributeError, KeyError, ArithmeticError)  # of any text


def conversion(units: str, canonical: str, where: str) -> tuple[float, float]:
    """(factor, offset) from the units a file states to ours.

    Raises:
        DataError: it is no unit, or one of something else.
    """
    try:
        zero, one = (_in_canonical(number, _spelt(units), canonical) for number in (0.0, 1.0))
    except NOT_A_UNIT as error:
        known = ", ".join((canonical, *LIKELY.get(canonical, ())))
        known += ", and ratios by mass or volume (kg kg-1, mol mol-1, ppb)" if canonical == "ug m-3" else ""
        raise DataError(f"{where} is in '{units}', which cannot be turned into {canonical}: usual are {known}.") from error
    return one - zero, zero


def mass_mixing_ratio(units: str, name: str) -> float | None:
    """Factor that turns numbers in such units into kg of the pollutant per kg of air; None where they are no ratio.

    Gases are given per mass of air (CAMS), or per number of molecules (WRF-Chem in ppmv, GEOS-CF in mol mol-1).
    """
    text = _spelt(units)
    parts = re.fullmatch(r"(pp[mbt])[-_ ]?v?", text.lower())
    if parts or re.search(r"mole?\b.*mole?\b|mol", text):
        if name not in MOLAR_MASS:
            return None
        factor = PARTS[parts[1]] if parts else _ratio(re.sub(r"\bmole\b", "mol", text))
        return None if factor is None else factor * MOLAR_MASS[name] / MOLAR_MASS_OF_AIR
    return _ratio(text) if re.search(r"g.*g", text) else None


def concentration(mixing_ratio: np.ndarray, psfc: np.ndarray, temp: np.ndarray) -> np.ndarray:
    """ug m-3, from kg of gas per kg of air at the pressure (Pa) and temperature (K) of the ground, by the gas law."""
    return mixing_ratio * np.float32(1e9) * psfc / (np.float32(GAS_CONSTANT) * temp)


def relative_humidity(dew_point: np.ndarray, temp: np.ndarray) -> np.ndarray:
    """Percent, over water, from K and K: ratio of Magnus saturation pressures (Alduchov and Eskridge 1996)."""

    def exponent(kelvin: np.ndarray) -> np.ndarray:
        celsius = kelvin - np.float32(KELVIN)
        return np.float32(17.625) * celsius / (celsius + np.float32(243.04))

    return np.float32(100.0) * np.exp(exponent(dew_point) - exponent(temp))


def require_known_unit(named: Named, array: xr.DataArray, name: str, canonical: str, path: Path) -> bool:
    """Before the first shard, not at the one that first needs it; whether it is a mixing ratio."""
    units = units_of(named, array.attrs)
    if canonical == "ug m-3" and mass_mixing_ratio(units, name) is not None:
        return True
    conversion(units, canonical, f"{path}: '{array.name}'")
    return False


def units_of(named: Named, attributes: dict[str, Any]) -> str:
    return named.units if named.stated else str(attributes.get("units") or named.units)


def _spelt(units: str) -> str:
    text = units.replace("\0", "").strip()
    if text.startswith(UNREADABLE):  # of Latin-1 in a library that expects UTF-8
        text = text.replace(UNREADABLE + "g", "ug").replace(UNREADABLE + "C", "degC")
    text = re.sub(r"[ ,(]*\bdry( air)?\)?$", "", text, flags=re.IGNORECASE)  # the air's moisture is under 4 % of it
    for pattern, usual in ((CELSIUS, "degC"), (FAHRENHEIT, "degF"), (KELVINS, "K")):
        if pattern.fullmatch(text):
            return usual
    return SPELLINGS.get(text.lower(), text)


@cache
def _in_canonical(number: float, text: str, canonical: str) -> float:
    if UNREADABLE in text:  # pint leaves it out, and takes what is left for the unit
        raise ValueError(text)
    shifted = SHIFTED.fullmatch(text)
    if shifted:
        return _in_canonical(number + float(shifted[2]), shifted[1], canonical)
    for spelling in (text, text.lower(), text.lower().rstrip("s")):
        try:
            unit = REGISTRY.parse_expression(spelling)
            break
        except NOT_A_UNIT:
            continue
    else:
        raise ValueError(text)
    if unit == 1:
        unit = REGISTRY.Quantity(1.0, "dimensionless")
    scaled = REGISTRY.Quantity(number * unit.magnitude, unit.units)
    return float(scaled.to(REGISTRY.parse_units(canonical)).magnitude)


def _ratio(text: str) -> float | None:
    try:
        return _in_canonical(1.0, text, "1")
    except NOT_A_UNIT:
        return None
