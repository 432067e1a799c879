"""Hours of our variables on the source's grid, in our units."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from data import DataError, variables
from data.prepare.sources.catalogue import Catalogue
from data.prepare.sources.files import decoded, opened, spelling
from data.prepare.sources.spellings import DEW_POINT
from data.prepare.sources.times import at_places
from data.prepare.sources.units import (
    LIKELY,
    canonical_of,
    concentration,
    conversion,
    mass_mixing_ratio,
    relative_humidity,
    units_of,
)


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
            units = units_of(named, array)
            dims = self.catalogue.dims[name]
            level = [d for d in array.dims if d not in dims and array.sizes[d] > 1]
            array = at_places(array.isel(dict.fromkeys(level, named.level)), dims, places)
            extra = [d for d in array.dims if d not in (dims.time, dims.y, dims.x) and array.sizes[d] == 1]
            values = decoded(array.squeeze(extra).transpose(dims.time, dims.y, dims.x))
        self.bytes_read += values.nbytes
        canonical = canonical_of(name)
        ratio = mass_mixing_ratio(units, name) if canonical == "ug m-3" else None
        if ratio is not None:
            air = (self._at(path, of_air, places, name) for of_air in ("psfc", "temp"))
            return concentration(values * np.float32(ratio), *air)
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
        looks = f"It looks like {' or '.join(self._fitting(name, median)) or 'no unit that is known here'}."
        raise DataError(
            f"'{name}' at {self.first} and after: the median is {median:.4g} {variable.units}, usual is {low:g} .. {high:g}. "
            f"{looks} Correct the `units` attribute of the files, or map them with `generic --map`."
        )

    def _fitting(self, name: str, median: float) -> list[str]:
        """Units in which the files' numbers would be usual ones."""
        variable, taken_for = variables.BY_NAME[name], self.catalogue.fields[name].units
        assert variable.typical is not None
        low, high = variable.typical
        fits = []
        for units in LIKELY[variable.units]:
            factor, offset = conversion(units, variable.units, name)
            if low <= median * factor + offset <= high:
                fits.append(f"{units} (factor {factor:g}{f', then + {offset:g}' if offset else ''})")
        if mass_mixing_ratio(taken_for, name) is None:
            factor, offset = conversion(taken_for, variable.units, name)
            if (factor, offset) != (1.0, 0.0) and low <= (median - offset) / factor <= high:
                fits.append(f"{variable.units} already, not {taken_for}, as in the yearly stores of the source `topoflow`")
        return fits
