"""Observations of stations: CNEMC's daily wide files, OpenAQ's CSV, or a long table; cleaned, counted, in ug m-3 and UTC."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pandas as pd

from data import DataError
from data.prepare.sources.units import MOLAR_MASS, PARTS, conversion
from data.store.layout import Store

BEIJING = 8  # h ahead of UTC, of CNEMC's hours
LITRES_OF_A_MOLE = 24.465  # at 298.15 K and 1013.25 hPa, the reference of GB 3095 since 2018
STUCK = 24  # equal values in a row that no instrument measures
CNEMC = {"PM2.5": "pm25", "PM10": "pm10", "SO2": "so2", "NO2": "no2", "O3": "o3", "CO": "co"}  # hourly; CO in mg m-3
NAMES = CNEMC | {name.lower(): own for name, own in CNEMC.items()} | {name: name for name in CNEMC.values()}
# Column of ours -> how tables call it.
COLUMNS = {
    "time": ("time", "datetimeutc", "datetime", "date.utc", "date_utc", "utc"),
    "station": ("station", "location_id", "locationid", "station_id", "location", "code", "id", "监测点编码"),
    "pollutant": ("pollutant", "parameter"),
    "value": ("value",),
    "unit": ("unit", "units"),
    "lat": ("lat", "latitude", "纬度"),
    "lon": ("lon", "longitude", "经度"),
    "flag": ("validity", "flag", "qc", "qc_flag", "quality_flag"),
}
TABLES = ("*.csv", "*.csv.gz", "*.csv.bz2", "*.csv.xz")
ENCODINGS = ("utf-8-sig", "gb18030")  # the second of lists of Chinese stations
ALIKE = 0.5  # of their mean; values of one hour that differ by more contradict each other


@dataclass
class Observations:
    """Hourly values at stations that lie in the domain."""

    values: np.ndarray  # (hours, T, S) float32 ug m-3, NaN where there is none
    first: int  # time index in the store of the first hour
    rows: np.ndarray  # (S,) of the cell that a station lies in
    columns: np.ndarray  # (S,)
    stations: list[str]
    counted: dict[str, int] = field(default_factory=dict)  # what was read, left out and why

    def at(self, hours: np.ndarray) -> np.ndarray:
        """(B, T, S) at time indices of the store."""
        found = np.full((len(hours), *self.values.shape[1:]), np.nan, "f4")
        places = hours - self.first
        inside = (places >= 0) & (places < len(self.values))
        found[inside] = self.values[places[inside]]
        return found


def read(files: list[Path], list_file: Path | None, store: Store, targets: list[str], hours: np.ndarray) -> Observations:
    """
    Args:
        files: tables, or directories of them.
        list_file: CSV of codes, latitudes and longitudes, where the tables do not have them.
        hours: time indices of the store that are to be scored.

    Raises:
        DataError: a file is none of the known kinds, a unit is unknown, or no station or hour is of use.
    """
    paths = [path for given in files for path in (_tables_in(given) if given.is_dir() else [given])]
    if not paths:
        raise DataError(f"--stations {', '.join(map(str, files))} holds no .csv or .csv.gz file.")
    known = None if list_file is None else _places(_table(list_file), list_file)
    parts, places = [], {} if known is None else known
    for path in paths:
        table = _table(path)
        if "type" in table.columns and {"date", "hour"} <= set(table.columns):
            part = _cnemc(table, path)
        else:
            part = _long(table, path)
            if {"lat", "lon"} <= set(part.columns):
                places = {**_places(part, path), **places}
        parts.append(part.reindex(columns=["time", "station", "pollutant", "value", "flag"]))
    values = pd.concat(parts, ignore_index=True)
    counted = {"values": len(values), "files": len(paths)}
    values = values[values["pollutant"].isin(targets)]
    counted["of other pollutants"] = counted["values"] - len(values)
    values = _clean(values, counted)
    return _on_the_grid(values, places, store, targets, hours, counted)


def _tables_in(folder: Path) -> list[Path]:
    return sorted({path for pattern in TABLES for path in folder.rglob(pattern)})


def _table(path: Path) -> pd.DataFrame:
    for encoding in ENCODINGS:
        try:
            return pd.read_csv(path, dtype=str, encoding=encoding)  # as text, or codes would lose their leading zeros
        except UnicodeDecodeError as error:
            problem: Exception = error
        except (OSError, ValueError, EOFError) as error:  # pandas' own errors are ValueErrors
            raise DataError(f"{path} cannot be read as CSV: {str(error)[:200]}.") from error
    raise DataError(f"{path} cannot be read as CSV: {str(problem)[:200]}.") from problem


def _named(table: pd.DataFrame, path: Path, needed: Iterable[str]) -> pd.DataFrame:
    """With our names of columns."""
    lower = {str(column).strip().lower(): column for column in table.columns}
    found = {}
    for own, names in COLUMNS.items():
        spelt = next((name for name in names if name in lower), None)
        if spelt is not None:
            found[lower[spelt]] = own
    absent = [own for own in needed if own not in found.values()]
    if absent:
        raise DataError(
            f"{path} has no column for {', '.join(absent)} (as {', '.join(COLUMNS[absent[0]])}); it has "
            f"{', '.join(map(str, table.columns[:12]))}."
        )
    return table.rename(columns=found)


def _places(table: pd.DataFrame, path: Path) -> dict[str, tuple[float, float]]:
    named = _named(table, path, ("station", "lat", "lon")).drop_duplicates("station")
    rows = zip(named["station"].astype(str), named["lat"], named["lon"], strict=True)
    return {station: (float(lat), float(lon)) for station, lat, lon in rows}


def _cnemc(table: pd.DataFrame, path: Path) -> pd.DataFrame:
    """date,hour,type,1001A,1002A,...: hours of Beijing; ug m-3, of CO mg m-3."""
    table = table[table["type"].isin(list(CNEMC))]
    long = table.melt(["date", "hour", "type"], var_name="station").dropna(subset="value")
    try:
        local = pd.to_datetime(long["date"].astype(str), format="%Y%m%d") + pd.to_timedelta(long["hour"].astype(int), "h")
        value = pd.to_numeric(long["value"])
    except ValueError as error:
        raise DataError(f"{path}: a date, an hour or a value is none: {str(error)[:120]}.") from error
    value = value * np.where(long["type"] == "CO", 1000.0, 1.0)
    pollutant = long["type"].map(CNEMC)
    time = local - pd.Timedelta(BEIJING, "h")
    return pd.DataFrame({"time": time, "station": long["station"].astype(str), "pollutant": pollutant, "value": value})


def _long(table: pd.DataFrame, path: Path) -> pd.DataFrame:
    """A value a row, with its unit; times without a zone are UTC."""
    table = _named(table, path, ("time", "station", "pollutant", "value", "unit"))
    spelt = table["pollutant"].astype(str).str.strip()
    pollutant = spelt.map(NAMES)
    table = table.assign(pollutant=pollutant.fillna(spelt), station=table["station"].astype(str))
    try:
        time = pd.to_datetime(table["time"], utc=True, format="ISO8601").dt.tz_localize(None)
        value = pd.to_numeric(table["value"]).astype("f8")
    except ValueError as error:
        raise DataError(f"{path}: a time or a value is none: {str(error)[:120]}.") from error
    kinds = table[["pollutant", "unit"]].astype(str).agg("|".join, axis=1)
    factors = {}
    for kind in kinds[pollutant.notna()].unique():
        name, unit = kind.split("|", 1)
        factors[kind] = _factor(name, unit, path)
    return table.assign(time=time, value=value * kinds.map(factors), flag=_flags(table, path))


def _flags(table: pd.DataFrame, path: Path) -> pd.Series:
    """What says whether values are valid, as the European agency writes it: below zero they are not; 1 where nothing says."""
    if "flag" not in table.columns:
        return pd.Series(1.0, index=table.index)
    try:
        return pd.to_numeric(table["flag"]).astype("f8").fillna(1.0)
    except ValueError as error:
        raise DataError(
            f"{path}: its flags are no numbers ({str(error)[:80]}): leave out the rows that are not valid, and the column."
        ) from error


def _factor(name: str, unit: str, path: Path) -> float:
    """To ug m-3; parts per million and billion of a gas at 298.15 K and 1013.25 hPa."""
    plain = unit.strip().lower().removesuffix("v")
    if plain in PARTS and name in MOLAR_MASS:
        return PARTS[plain] * 1e9 * MOLAR_MASS[name] / LITRES_OF_A_MOLE
    return conversion(unit, "ug m-3", f"{path}: {name}")[0]


def _clean(values: pd.DataFrame, counted: dict[str, int]) -> pd.DataFrame:
    """Without what is missing, negative, contradicted by another value of the same hour, or stuck."""

    def keep(kept: pd.Series, why: str) -> None:
        nonlocal values
        counted[why] = int((~kept).sum())
        values = values[kept]

    keep(~(values["flag"] < 0), "flagged as not valid")
    values = values.drop(columns="flag")
    keep(np.isfinite(values["value"]), "missing")
    keep(values["value"] >= 0.0, "negative")
    keep(~values.duplicated(), "duplicates")
    alike = values.groupby(["time", "station", "pollutant"])["value"]
    spread = alike.transform("max") - alike.transform("min")
    keep(spread <= ALIKE * alike.transform("mean"), "contradictory")
    # Several values within an hour, or of several instruments, are its mean.
    values = values.assign(time=values["time"].dt.floor("h"))
    found, values = len(values), values.groupby(["time", "station", "pollutant"], as_index=False)["value"].mean()
    counted["averaged within hours"] = found - len(values)
    values = values.sort_values(["pollutant", "station", "time"], ignore_index=True)
    keys = values[["pollutant", "station", "value"]]
    begins = (keys != keys.shift()).any(axis=1) | (values["time"].diff() != pd.Timedelta(1, "h"))
    length = begins.groupby(begins.cumsum()).transform("size")
    keep(length < STUCK, "stuck")
    return values


def _on_the_grid(
    values: pd.DataFrame,
    places: dict[str, tuple[float, float]],
    store: Store,
    targets: list[str],
    hours: np.ndarray,
    counted: dict[str, int],
) -> Observations:
    half = 0.5 * abs(store.lat[1] - store.lat[0]), 0.5 * abs(store.lon[1] - store.lon[0])
    cells: dict[str, tuple[int, int]] = {}
    everyone = sorted(values["station"].unique())
    for station in everyone:
        if station in places:
            lat, lon = places[station]
            row, column = int(np.abs(store.lat - lat).argmin()), int(np.abs(store.lon - lon).argmin())
            near = abs(store.lat[row] - lat) <= half[0] and abs(store.lon[column] - lon) <= half[1]
            if near and store.static["domain_mask"][row, column] > 0:
                cells[station] = row, column
    counted["stations without a place"] = sum(station not in places for station in everyone)
    counted["stations outside the domain"] = len(everyone) - len(cells) - counted["stations without a place"]
    if not cells:
        raise DataError(
            f"none of {len(everyone)} stations ({', '.join(everyone[:3])}, ...) has a place in the domain: give --station-list "
            "with their codes, latitudes and longitudes."
        )
    first, last = int(hours.min()), int(hours.max())
    stations = list(cells)
    place = (values["time"].to_numpy().astype("datetime64[h]") - store.times[0].astype("datetime64[h]")).astype(int)
    used = (place >= first) & (place <= last) & values["station"].isin(stations).to_numpy()
    counted["of other hours or places"] = int((~used).sum())
    counted["used"] = int(used.sum())
    if not used.any():
        span = store.times[[first, last]]
        raise DataError(f"no observation lies in the hours that are scored, {span[0]} to {span[1]} UTC.")
    filled = np.full((last - first + 1, len(targets), len(stations)), np.nan, "f4")
    kept = values[used]
    target = kept["pollutant"].map({name: channel for channel, name in enumerate(targets)}).to_numpy()
    station = kept["station"].map({name: number for number, name in enumerate(stations)}).to_numpy()
    filled[place[used] - first, target, station] = kept["value"].to_numpy()
    rows, columns = (np.array(axis) for axis in zip(*cells.values(), strict=True))
    return Observations(filled, first, rows, columns, stations, counted)
