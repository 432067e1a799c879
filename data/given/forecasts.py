"""Forecasts of someone else, as a baseline: ours as CF zarr, or any file that `prepare` reads, at their valid times."""

from __future__ import annotations

from contextlib import ExitStack
from functools import lru_cache
from pathlib import Path

import numpy as np
import torch
import xarray as xr
from torch import Tensor

from data import DataError
from data.batch import Batch
from data.prepare.catalogue.catalogue import SAME_GRID
from data.prepare.grids import regrid
from data.prepare.grids.grid import Grid, same_grid
from data.prepare.inputs.opening import opened
from data.prepare.sources.coordinates import Layout, coordinates, layout
from data.prepare.sources.source import SOURCES, Clock, known_fields
from data.prepare.sources.times import valid_hours
from data.prepare.sources.units import concentration, conversion, mass_mixing_ratio
from data.prepare.stored import decoded, stored_at
from data.store.layout import Store

AIR = {"psfc": "Pa", "temp": "K"}  # what a mixing ratio needs, in which units
KEPT_FIELDS = 64
Pair = tuple[int | None, int]  # time indices in the store of the start of a forecast, and of when it is valid


class Against:
    """Opened forecasts, regridded to the store's grid as they are needed; NaN where there is none."""

    def __init__(self, path: Path, store: Store, targets: list[str], device: torch.device) -> None:
        """
        Raises:
            DataError: the file is no such forecasts, or lacks a pollutant or its units.
        """
        self.path, self.targets, self._store, self._device = path, targets, store, device
        self._until = ExitStack()  # the file stays open as long as this object lives
        self._file: xr.Dataset = self._until.enter_context(opened(path))
        self._layouts: dict[str, Layout] = {}
        self._places: dict[str, dict[Pair, int]] = {}
        self._names = {name: self._spelt(name) for name in targets}
        self._grid = coordinates(self._file, self._names[targets[0]], path).grid
        for name in dict.fromkeys([*self._names.values(), *self._air.values()]):
            self._look_into(name)
        self._regridder = regrid.build(self._grid, Grid(store.lat, store.lon), "bilinear")
        self._field = lru_cache(maxsize=KEPT_FIELDS)(self._read)

    def __call__(self, batch: Batch) -> Tensor:
        """(B, T, H, W) ug m-3, those that started at the same time and are valid at the same time as ours."""
        nothing = np.full((len(self.targets), *self._store.grid), np.nan, "f4")
        fields = []
        for pair in (self.place(*pair) for pair in zip(batch.hours, batch.valid_hours, strict=True)):
            fields.append(nothing if pair is None else self._field(pair))
        return torch.from_numpy(np.stack(fields)).to(self._device)

    def place(self, hour: int, valid: int) -> Pair | None:
        """What the forecast is called that starts at one time index and is valid at another; None where there is none."""
        pairs = self._places[self._names[self.targets[0]]]
        return next((pair for pair in ((int(hour), int(valid)), (None, int(valid))) if pair in pairs), None)

    def covered(self) -> float:
        """Share of the cells of the domain over which there are forecasts."""
        domain = self._store.static["domain_mask"] > 0
        return float(self._regridder.covered[domain].mean())

    def described(self) -> str:
        """What the scores say of it."""
        pairs = self._places[self._names[self.targets[0]]]
        starts, ends = [start for start, _ in pairs if start is not None], [valid for _, valid in pairs]
        times = [str(self._store.times[0] + int(n)) for n in (min(starts or ends), max(starts or ends))]
        leads = sorted({valid - start for start, valid in pairs if start is not None})
        said = ", ".join(map(str, leads)) + " h" if leads else "valid times"
        source = str(self._file.attrs.get("source", ""))
        return f"{self.path.name} ({source + '; ' if source else ''}{times[0]} to {times[1]}, {said})"

    def _look_into(self, name: str) -> None:
        """Where the hours of a variable lie.

        Raises:
            DataError: it is on another grid than the variables before it, or a forecast stands
                twice.
        """
        place = coordinates(self._file, name, self.path)
        hours = valid_hours(self._file, name, self.path, Clock(name_zone=0.0))
        if not same_grid(place.grid, self._grid, SAME_GRID):
            raise DataError(
                f"--against {self.path}: '{name}' is on another grid than "
                f"'{self._names[self.targets[0]]}'. "
                "Interpolate one to the other's first."
            )
        self._layouts[name] = layout(self._file, name, place, hours, None, self.path, name)
        valid = (hours.valid - self._store.times[0].astype("datetime64[h]")).astype(int).tolist()
        starts = [None] * len(valid)
        if hours.leads is not None:
            starts = (np.array(valid) - hours.leads.round().astype(int)).tolist()
        self._places[name] = dict(zip(zip(starts, valid, strict=True), hours.places.tolist(), strict=True))
        if len(self._places[name]) < len(valid):
            raise DataError(f"--against {self.path}: '{name}' has the same forecast twice. Remove one of the two.")

    def _spelt(self, name: str) -> str:
        """What the file calls a pollutant, in units that are known."""
        spellings = [spelling for source in map(known_fields, SOURCES) if name in source for spelling in source[name].spellings]
        found = next((spelling for spelling in [name, *spellings] if spelling in self._file.data_vars), None)
        if found is None:
            raise DataError(f"--against {self.path} has no {name}; it has {', '.join(map(str, self._file.data_vars))}.")
        units = str(self._file[found].attrs.get("units", ""))
        if mass_mixing_ratio(units, name) is None:
            conversion(units, "ug m-3", f"--against {self.path}: '{found}'")
        elif AIR.keys() <= self._air.keys():
            for of in AIR:
                self._to_ours(self._air[of], of)
        else:
            raise DataError(
                f"--against {self.path}: '{found}' is a mixing ratio ({units}), which needs the pressure and temperature of "
                "the ground in the same file, as sp and t2m."
            )
        return found

    def _to_ours(self, found: str, name: str) -> tuple[float, float]:
        units = str(self._file[found].attrs.get("units", ""))
        return conversion(units, AIR.get(name, "ug m-3"), f"--against {self.path}: '{found}'")

    @property
    def _air(self) -> dict[str, str]:
        found: dict[str, str] = {}
        for name in AIR:
            spellings = [spelling for source in map(known_fields, SOURCES) for spelling in source[name].spellings]
            found.update((name, spelling) for spelling in spellings if spelling in self._file.data_vars)
        return found

    def _read(self, pair: Pair) -> np.ndarray:
        """(T, H, W) ug m-3."""
        return np.stack([self._gridded(pair, name, found) for name, found in self._names.items()])

    def _gridded(self, pair: Pair, name: str, found: str) -> np.ndarray:
        values = self._stored(pair, found)
        ratio = mass_mixing_ratio(str(self._file[found].attrs.get("units", "")), name)
        if ratio is None:
            factor, offset = self._to_ours(found, name)
            values = values * np.float32(factor) + np.float32(offset)
        else:
            air = {}
            for of in AIR:
                factor, offset = self._to_ours(self._air[of], of)
                air[of] = self._stored(pair, self._air[of]) * np.float32(factor) + np.float32(offset)
            values = concentration(values * np.float32(ratio), air["psfc"], air["temp"])
        return np.asarray(self._regridder(values)[0])

    def _stored(self, pair: Pair, found: str) -> np.ndarray:
        """(1, H, W) as the file states it, NaN where it is missing or not there."""
        place = self._places[found].get(pair)
        if place is None:
            return np.full((1, *self._grid.shape), np.nan, "f4")
        return decoded(stored_at(self._file, self._layouts[found], np.array([place])))
