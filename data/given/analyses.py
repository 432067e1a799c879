"""Analyses that a person has in memory, as a trained network reads them."""

from __future__ import annotations

import numpy as np
import torch
import xarray as xr
from torch import Tensor

from data import DataError
from data.channels.channels import Read
from data.prepare.sources.units import conversion
from data.store.layout import Store
from data.variables import Variable

OTHER_NAMES = {"latitude": "lat", "longitude": "lon", "valid_time": "time"}


class Analyses:
    """The analyses in our units and on our axis: every hour from the first to the last."""

    def __init__(self, analyses: xr.Dataset, kept: Store) -> None:
        """
        Args:
            kept: grid and variables of the run that is to forecast from them.

        Raises:
            DataError: they lack a coordinate, are on another grid, or not hourly.
        """
        renamed = {a: b for a, b in OTHER_NAMES.items() if a in analyses.dims and b != a}
        analyses = analyses.rename(renamed)
        missing = [dim for dim in ("time", "lat", "lon") if dim not in analyses.coords]
        if missing:
            named = ", ".join(map(str, analyses.coords))
            raise DataError(f"the analyses have no coordinate {', '.join(missing)}; they have {named}.")
        for name, axis in (("lat", kept.lat), ("lon", kept.lon)):
            own = np.asarray(analyses[name], "f8")
            if own.shape == axis.shape and np.allclose(own[::-1], axis, atol=1e-4):
                analyses = analyses.isel({name: slice(None, None, -1)})
            elif own.shape != axis.shape or not np.allclose(own, axis, atol=1e-4):
                said = [f"{a.size} values from {a.min():g} to {a.max():g}" for a in (own, axis)]
                raise DataError(f"{name} has {said[0]}, that of the run {said[1]}. Interpolate the analyses first.")
        times = np.asarray(analyses["time"].values, "datetime64[ns]")
        hourly = times.astype("datetime64[h]")
        if (times != hourly).any() or len(np.unique(hourly)) != len(hourly):
            raise DataError("the times of the analyses must be whole hours, each once.")
        self.axis = np.arange(hourly.min(), hourly.max() + np.timedelta64(1, "h"))
        places = (hourly - self.axis[0]).astype(int).tolist()
        self._place = {place: row for row, place in enumerate(places)}
        self._analyses, self._kept = analyses, kept
        self._scale: dict[str, tuple[float, float]] = {}

    def starts(self, reads: tuple[Read, ...], leads: list[int], every_hour: bool = False) -> list[int]:
        """Places of the hours that have all that a forecast reads.

        Args:
            every_hour: the winds of every hour to the longest lead time, too.

        Raises:
            DataError: there is none.
        """

        def needed(start: int) -> set[int]:
            back = {start - read.back for read in reads if read.back is not None}
            ahead = {start + lead for read in reads if read.back is None for lead in leads}
            return back | ahead | (set(range(start, start + max(leads) + 1)) if every_hour else set())

        possible = [start for start in sorted(self._place) if needed(start) <= self._place.keys()]
        if not possible:
            keys = ", ".join(read.key for read in reads) + (f", and winds of {max(leads)} h" if every_hour else "")
            spanned = f"from {self.axis[0]} to {self.axis[-1]}"
            raise DataError(f"no forecast is possible {spanned}: each needs {keys}.")
        return possible

    def group(self, read: Read, hours: np.ndarray, stored: list[tuple[str, int | None]]) -> Tensor:
        """(B, V, H, W) of a group; variables that the network is not given at this hour are NaN."""
        wanted = {name for name, back in stored if back == read.back}
        members = self._kept.contents.names(read.group)
        values = np.full((len(hours), len(members), *self._kept.grid), np.nan, "f4")
        distinct, row_of = np.unique(hours, return_inverse=True)
        for column, name in enumerate(members):
            if name in wanted:
                planes = np.stack([self.field(name, int(hour)) for hour in distinct])
                values[:, column] = planes[row_of]
        return torch.from_numpy(values)

    def field(self, name: str, hour: int) -> np.ndarray:
        """(H, W) in our units.

        Raises:
            DataError: it is not there, has no units or impossible values.
        """
        if name not in self._analyses:
            named = ", ".join(map(str, self._analyses))
            raise DataError(f"the analyses have no '{name}', which the run is given. They have {named}.")
        array = self._analyses[name].isel(time=self._place[hour]).transpose("lat", "lon")
        factor, offset = self._scale_of(name)
        values = np.asarray(array, "f8") * factor + offset
        variable = self._kept.contents.variable(name)
        outside = (values < variable.valid_min) | (values > variable.valid_max)
        if outside.any():
            raise DataError(
                f"{name} at {self.axis[hour]} is {values[outside][0]:g} {variable.units}: possible "
                f"are {variable.valid_min:g} to {variable.valid_max:g}. Are its units really "
                f"'{self._analyses[name].attrs['units']}'?"
            )
        return values.astype("f4")

    def _scale_of(self, name: str) -> tuple[float, float]:
        if name not in self._scale:
            variable: Variable = self._kept.contents.variable(name)
            units = self._analyses[name].attrs.get("units")
            if units is None:
                remedy = f"set dataset['{name}'].attrs['units'], as '{variable.units}'"
                raise DataError(f"'{name}' has no units: {remedy}.")
            self._scale[name] = conversion(str(units), variable.units, f"'{name}'")
        return self._scale[name]
