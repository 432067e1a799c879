"""Forecasts of someone else, as a baseline: ours as CF zarr, or any CF NetCDF or zarr, as CAMS's, at their valid times."""

from __future__ import annotations

from functools import lru_cache
from pathlib import Path

import numpy as np
import torch
import xarray as xr
from torch import Tensor

from data import DataError
from data.batch import Batch
from data.prepare.sources.spellings import SOURCES, known_fields
from data.prepare.sources.units import concentration, conversion, mass_mixing_ratio
from data.store.layout import DAMAGE, Store

LEADS = ("prediction_timedelta", "step", "lead_time", "forecast_period", "leadtime")
STARTS = ("time", "forecast_reference_time", "reference_time", "init_time")
VALID = ("valid_time", "time")
AXES = {"latitude": "lat", "longitude": "lon"}
AIR = {"psfc": "Pa", "temp": "K"}  # what a mixing ratio needs, in which units
KEPT_FIELDS = 64


class Against:
    """Opened forecasts, interpolated onto the store's grid as they are needed; NaN where there is none."""

    def __init__(self, path: Path, store: Store, targets: list[str], device: torch.device) -> None:
        """
        Raises:
            DataError: the file is no such forecasts, or lacks a pollutant or its units.
        """
        self.path, self.targets, self._store, self._device = path, targets, store, device
        try:
            # The whole of it, of which fields are read one by one; times and lead times decoded.
            opened = (
                xr.open_zarr(path, decode_timedelta=True) if path.is_dir() else xr.open_dataset(path, decode_timedelta=True)
            )
        except DAMAGE as error:
            raise DataError(f"--against {path} cannot be read as NetCDF or zarr: {str(error)[:200]}.") from error
        self._file = opened.rename({a: b for a, b in AXES.items() if a in opened.dims})
        self._lead = next((name for name in LEADS if name in self._file.dims), None)
        self._time = next((name for name in (STARTS if self._lead else VALID) if name in self._file.dims), None)
        if self._time is None or not {"lat", "lon"} <= set(self._file.dims):
            raise DataError(
                f"--against {path} has the dimensions {', '.join(map(str, self._file.dims))}: needed are time, lat and lon, "
                f"and a lead time ({', '.join(LEADS)}) unless its times are those at which forecasts are valid."
            )
        self._names = {name: self._spelt(name) for name in targets}
        self._same_grid = all(
            self._file[name].shape == axis.shape and np.allclose(self._file[name], axis, atol=1e-4)
            for name, axis in (("lat", store.lat), ("lon", store.lon))
        )
        hours = np.asarray(self._file[self._time].values, "datetime64[h]")
        self._rows = {int(hour): row for row, hour in enumerate((hours - store.times[0].astype("datetime64[h]")).astype(int))}
        self._columns = self._lead_columns()
        self._field = lru_cache(maxsize=KEPT_FIELDS)(self._read)

    def __call__(self, batch: Batch) -> Tensor:
        """(B, T, H, W) ug m-3, those that started at the same time and are valid at the same time as ours."""
        nothing = np.full((len(self.targets), *self._store.grid), np.nan, "f4")
        fields = []
        for place in (self.place(*pair) for pair in zip(batch.hours, batch.valid_hours, strict=True)):
            fields.append(nothing if place is None else self._field(*place))
        return torch.from_numpy(np.stack(fields)).to(self._device)

    def place(self, hour: int, valid: int) -> tuple[int, int] | None:
        """Where the forecast stands that starts at one time index and is valid at another."""
        row = self._rows.get(int(hour if self._lead else valid))
        column = self._columns.get(int(valid - hour)) if self._lead else 0
        return None if row is None or column is None else (row, column)

    def described(self) -> str:
        """What the scores say of it."""
        start, end = (str(self._file[self._time].values[place])[:13] for place in (0, -1))
        leads = ", ".join(map(str, self._columns)) + " h" if self._lead else "valid times"
        source = str(self._file.attrs.get("source", ""))
        return f"{self.path.name} ({source + '; ' if source else ''}{start} to {end}, {leads})"

    def _lead_columns(self) -> dict[int, int]:
        if self._lead is None:
            return {}
        leads = np.asarray(self._file[self._lead].values)
        hours = leads.astype("timedelta64[h]").astype(int) if leads.dtype.kind == "m" else leads.astype(int)
        return {int(hour): column for column, hour in enumerate(hours)}

    def _spelt(self, name: str) -> str:
        """What the file calls a pollutant, in units that are known."""
        spellings = [spelling for source in map(known_fields, SOURCES) if name in source for spelling in source[name].spellings]
        found = next((spelling for spelling in [name, *spellings] if spelling in self._file), None)
        if found is None:
            raise DataError(f"--against {self.path} has no {name}; it has {', '.join(map(str, self._file.data_vars))}.")
        units = str(self._file[found].attrs.get("units", ""))
        if mass_mixing_ratio(units, name) is None:
            conversion(units, "ug m-3", f"--against {self.path}: '{found}'")
        elif AIR.keys() <= self._air.keys():
            for of in AIR:
                self._to_ours(self._file[self._air[of]], of)
        else:
            raise DataError(
                f"--against {self.path}: '{found}' is a mixing ratio ({units}), which needs the pressure and temperature of "
                "the ground in the same file, as sp and t2m."
            )
        return found

    def _of_the_air(self, at: xr.Dataset, name: str) -> np.ndarray:
        field = at[self._air[name]].transpose("lat", "lon")
        factor, offset = self._to_ours(field, name)
        return np.asarray(field, "f8") * factor + offset

    def _to_ours(self, field: xr.DataArray, name: str) -> tuple[float, float]:
        return conversion(str(field.attrs.get("units", "")), AIR[name], f"--against {self.path}: '{field.name}'")

    @property
    def _air(self) -> dict[str, str]:
        found: dict[str, str] = {}
        for name in AIR:
            spellings = [spelling for source in map(known_fields, SOURCES) for spelling in source[name].spellings]
            found.update((name, spelling) for spelling in spellings if spelling in self._file)
        return found

    def _read(self, row: int, column: int) -> np.ndarray:
        """(T, H, W) ug m-3."""
        selected = {str(self._time): row} | ({str(self._lead): column} if self._lead else {})
        at = self._file.isel(selected).squeeze(drop=True)
        return np.stack([self._gridded(at, name, found) for name, found in self._names.items()]).astype("f4")

    def _gridded(self, at: xr.Dataset, name: str, found: str) -> np.ndarray:
        field = at[found].transpose("lat", "lon")
        units, values = str(field.attrs["units"]), np.asarray(field, "f8")
        ratio = mass_mixing_ratio(units, name)
        if ratio is not None:
            values = concentration(values * ratio, *(self._of_the_air(at, of) for of in AIR))
        else:
            factor, offset = conversion(units, "ug m-3", found)
            values = values * factor + offset
        if self._same_grid:
            return values
        whole = xr.DataArray(values, dims=("lat", "lon"), coords={"lat": field["lat"], "lon": field["lon"]})
        return np.asarray(whole.sortby(["lat", "lon"]).interp(lat=self._store.lat, lon=self._store.lon))
