"""Hours of our variables in our units, on the target's grid.

Every file is opened once. What is impossible is judged on the source's own cells, before anything
is mixed by regridding.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np

from data import DataError
from data.prepare.catalogue.catalogue import Catalogue
from data.prepare.grids.grid import Grid, turned
from data.prepare.grids.regrid import Regridder
from data.prepare.sources.source import DEW_POINT
from data.prepare.sources.units import LIKELY, concentration, conversion, mass_mixing_ratio, relative_humidity, units_of
from data.prepare.stored import Stored, decoded, stored_hours
from data.variables import Variable

AIR = ("temp", "psfc", DEW_POINT)  # what other fields of the same hours are converted with


class Reader:
    """Reads some hours of all variables: every file is opened once, and its fields are regridded as they are read.

    Files that hold what others are converted with (pressure and temperature for mixing ratios, the dew point for humidity)
    are read before them.
    """

    def __init__(
        self,
        catalogue: Catalogue,
        regridders: list[Regridder],
        become: dict[str, Variable],
        fields: dict[str, np.ndarray],
        first: np.datetime64,
        winds: str = "earth",
        clip: tuple[str, ...] = (),
        mask_beyond: tuple[str, ...] = (),
    ) -> None:
        """
        Args:
            regridders: one for each of the catalogue's grids.
            become: what fields become, by name (`read_as`).
            fields: (hours, h, w) float32 of every variable, to be filled by `read`; NaN, or known from before.
            first: hour.
            winds: "earth", or "grid" where u and v lie along the axes of their grid.
            clip, mask_beyond: variables whose impossible values become the nearest possible ones, or missing.
        """
        self.catalogue, self.regridders, self.become = catalogue, regridders, become
        self.first, self.winds, self.clip, self.mask_beyond = first, winds, clip, mask_beyond
        self.count = len(next(iter(fields.values())))
        self.bytes_read = 0
        self._along_grid: dict[str, np.ndarray] = {}  # u and v, (count, H, W) on the source's grid
        self._air: dict[str, np.ndarray] = {}  # (count, H, W) on the source's grid
        self._fields = fields

    def read(self) -> None:
        """Fill the fields in the units of the store; hours that no file has stay as they are.

        Raises:
            DataError: a file is damaged, its unit is unknown, or its values are impossible or fit
                another unit.
        """
        first = [name for name in AIR if name in self.catalogue.rows]
        rest = [name for name in self.catalogue.rows if name not in AIR]
        for names in (first, rest) if self._needs_air() else ([*first, *rest],):
            for number in self.catalogue.files_between(self.first, self.first + np.timedelta64(self.count, "h")):
                self._read_file(number, names)
        if "rh" not in self.catalogue.rows and DEW_POINT in self._air and "temp" in self._air:
            slots = self._slots(DEW_POINT)
            humidity = relative_humidity(self._air[DEW_POINT][slots], self._air["temp"][slots])
            self._keep("rh", slots, self._judged("rh", humidity, slots, "temp", "computed of the dew point"), "temp")
        if self._along_grid:
            both = turned(self._along_grid["u"], self._along_grid["v"], self._grid("u"))
            for name, wind in zip(("u", "v"), both, strict=True):
                slots = self._slots(name)
                self._keep(name, slots, self._judged(name, wind[slots], slots, name, "turned to the east and north"), name)
        for name in self.catalogue.rows:
            own = "rh" if name == DEW_POINT and "rh" not in self.catalogue.rows else name
            if own in self._fields:
                self._require_usual(own, self._slots(name))

    def _needs_air(self) -> bool:
        return bool(self.catalogue.about.by_air) or DEW_POINT in self.catalogue.rows

    def _read_file(self, number: int, names: list[str]) -> None:
        about, path = self.catalogue.about, self.catalogue.about.files[number]
        rows = {name: found[found["file"] == number] for name in names for found in [self._rows(name)]}
        asked = {name: (about.layouts[found["layout"][0]], found["place"]) for name, found in rows.items() if len(found)}
        for name, stored in stored_hours(path, asked):
            slots = (rows[name]["hour"] - self.first).astype(int)
            values, ratio = self._converted(stored, name, path)
            if ratio and not self.catalogue.on_one_grid(name, "temp", "psfc"):
                self._keep_in_air_of_target(name, slots, values)
                continue
            if ratio:
                shape = self._grid(name).shape
                values = concentration(values, *(self._hours(self._air, of, shape)[slots] for of in ("psfc", "temp")))
            turning = name in ("u", "v") and self.winds == "grid"
            if not turning:
                _clear_packing(self.become[name], values)
                values = self._judged(name, values, slots, name, str(path))
            if name in AIR and self._needs_air():
                self._hours(self._air, name, self._grid(name).shape)[slots] = values
            if turning:
                for wind in ("u", "v"):
                    self._hours(self._along_grid, wind, self._grid(name).shape)
                self._along_grid[name][slots] = values
            elif name != DEW_POINT:
                self._keep(name, slots, values, name)

    def _keep(self, name: str, slots: np.ndarray, values: np.ndarray, like: str) -> None:
        """Regrid a field from the grid of another one, and put it in its place."""
        self._fields[name][slots] = self._regridder(like)(values)

    def _judged(self, name: str, values: np.ndarray, slots: np.ndarray, like: str, where: str) -> np.ndarray:
        """Values on the source's cells, impossible ones clipped or masked where that was asked for.

        Raises:
            DataError: one that reaches the target is impossible.
        """
        variable, impossible = self.become[name], self._limited(name, values)
        low, high = variable.valid_min, variable.valid_max
        impossible &= self._regridder(like).used.reshape(impossible.shape[1:])
        if impossible.any():
            wrong, hour = values[impossible], self.first + int(slots[impossible.any((1, 2)).argmax()])
            what = "infinite" if np.isinf(wrong).any() else f"{wrong.min():.6g} .. {wrong.max():.6g}"
            fits = self._fitting(name, float(np.nanmedian(values))) if variable.typical else []
            looks = f" It looks like {' or '.join(fits)}." if fits else ""
            raise DataError(
                f"'{name}' at {hour} is {what} in {len(wrong)} cells ({where}), possible is "
                f"{low:g} .. {high:g} {variable.units}.{looks} Check the unit of the source, or "
                "whether it has a fill value that its files do not "
                f"declare; if such extremes are real, prepare with --clip {name} or --mask-beyond "
                f"{name}."
            )
        return values

    def _limited(self, name: str, values: np.ndarray) -> np.ndarray:
        """Clip or mask impossible values in place, where that was asked for; which ones are left."""
        low, high = self.become[name].valid_min, self.become[name].valid_max
        impossible = np.asarray((values < low) | (values > high))
        if name in self.mask_beyond:
            values[impossible] = np.nan
            impossible[...] = False
        elif name in self.clip:
            np.clip(values, low, high, out=values, where=np.isfinite(values))
            impossible &= np.isinf(values)
        return impossible

    def _keep_in_air_of_target(self, name: str, slots: np.ndarray, ratios: np.ndarray) -> None:
        """Mixing ratios of another grid than the air's, as concentrations in the air over the target; judged there."""
        found = concentration(self._regridder(name)(ratios), *(self._fields[of][slots] for of in ("psfc", "temp")))
        _clear_packing(self.become[name], found)
        self._limited(name, found)  # what is left is judged where the shard is written
        self._fields[name][slots] = found

    def _hours(self, of: dict[str, np.ndarray], name: str, shape: tuple[int, int]) -> np.ndarray:
        """All hours of a field, which are missing until they are read."""
        if name not in of:
            of[name] = np.full((self.count, *shape), np.nan, "f4")
        return of[name]

    def _grid(self, name: str) -> Grid:
        return self.catalogue.grids[self.catalogue.about.grid_of[name]]

    def _regridder(self, name: str) -> Regridder:
        return self.regridders[self.catalogue.about.grid_of[name]]

    def _slots(self, name: str) -> np.ndarray:
        """Our hours that any file holds of a field."""
        return (self._rows(name)["hour"] - self.first).astype(int)

    def _rows(self, name: str) -> np.ndarray:
        """Where a field's hours that are ours lie."""
        return self.catalogue.within(name, self.first, self.first + np.timedelta64(self.count, "h"))

    def _converted(self, stored: Stored, name: str, path: Path) -> tuple[np.ndarray, bool]:
        """(n, H, W) on the source's grid, in our units or as kg per kg of air; and whether it is the latter."""
        units, canonical = units_of(self.catalogue.about.fields[name], stored.attributes), self.become[name].units
        values = decoded(stored)
        self.bytes_read += values.nbytes
        ratio = mass_mixing_ratio(units, name) if canonical == "ug m-3" else None
        if ratio is not None:
            values *= np.float32(ratio)
        else:
            factor, offset = conversion(units, canonical, f"{path}: '{stored.name}'")
            if factor != 1.0:
                values *= np.float32(factor)
            if offset:
                values += np.float32(offset)
        return values, ratio is not None

    def _require_usual(self, name: str, slots: np.ndarray) -> None:
        """Of the hours that were read: those known from before would outvote them."""
        variable = self.become[name]
        sample = self._fields[name][slots[:: max(1, len(slots) // 8)]]
        sample = sample[np.isfinite(sample)]
        if variable.typical is None or sample.size < 100:
            return
        low, high = variable.typical
        median = float(np.median(sample))
        if low <= median <= high:
            return
        looks = f"It looks like {' or '.join(self._fitting(name, median)) or 'no unit that is known here'}."
        raise DataError(
            f"'{name}' at {self.first} and after: the median is {median:.4g} {variable.units}, usual is {low:g} .. {high:g}. "
            f"{looks} Correct the `units` attribute of the files, or map them with `generic --map`."
        )

    def _fitting(self, name: str, median: float) -> list[str]:
        """Units in which the files' numbers would be usual ones."""
        variable, named = self.become[name], self.catalogue.about.fields.get(name)
        taken_for = variable.units if named is None else named.units  # humidity is computed in ours
        assert variable.typical is not None
        low, high = variable.typical
        fits = []
        for units in LIKELY.get(variable.units, ()):
            factor, offset = conversion(units, variable.units, name)
            if low <= median * factor + offset <= high:
                fits.append(f"{units} (factor {factor:g}{f', then + {offset:g}' if offset else ''})")
        if mass_mixing_ratio(taken_for, name) is None:
            factor, offset = conversion(taken_for, variable.units, name)
            if (factor, offset) != (1.0, 0.0) and low <= (median - offset) / factor <= high:
                fits.append(f"{variable.units} already, not {taken_for}, as in the yearly stores of the source `topoflow`")
        return fits


def _clear_packing(variable: Variable, values: np.ndarray) -> None:
    """Numbers just below zero come from packing to 16 bits."""
    if variable.typical is not None and variable.valid_min == 0.0 and not values.min(initial=0.0) >= 0.0:  # or a NaN
        values[(values < 0.0) & (values > -1e-2 * variable.typical[0])] = 0.0
