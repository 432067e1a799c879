"""Looking into every file, by its header: what it holds, at which hours, on which grid; and what does not fit together."""

from __future__ import annotations

from collections.abc import Hashable, Iterable
from pathlib import Path

import numpy as np
import xarray as xr

from data import DataError
from data.prepare.catalogue.catalogue import SAME_GRID, Catalogue
from data.prepare.catalogue.headers import Header, read_header
from data.prepare.grids.grid import Grid, same_grid
from data.prepare.sources.files import grid_of, opened, spelling
from data.prepare.sources.hours import PIECES
from data.prepare.sources.source import Source, files_of
from data.prepare.sources.spellings import DEW_POINT, read_as
from data.prepare.sources.times import Dimensions, dimensions_of, hours_of
from data.prepare.sources.units import require_known_unit
from data.variables import Variable


def make_catalogue(
    sources: tuple[Source, ...], headers: Iterable[Header | None] | None = None, defined: tuple[Variable, ...] = ()
) -> Catalogue:
    """Look into every file's header: which fields, which hours, which grid. Weather may be on another grid than pollutants.

    Args:
        sources: one without files is left out.
        headers: of every file, where they were read already (ahead.py).
        defined: variables that the user has defined.

    Raises:
        DataError: a file cannot be read, the grids of one field differ, a field is in no file, or an hour is in two places.
    """
    found = _Found(sources, read_as(defined))
    for number, header in enumerate(map(read_header, found.files) if headers is None else headers):
        found.look_into(number, header)
    for source in sources:
        found.require_all(source)
    fields = {name: named for source in sources if source.files for name, named in source.fields.items()}
    found.require_air({name for source in sources for name in source.fields})
    columns = {name: found.columns(name) for name in fields}
    hours, file_of, place_of, dims_of = ({name: column[kind] for name, column in columns.items()} for kind in range(4))
    own = found.files, found.grids, found.source_of, found.grid_of, found.dims
    return Catalogue(fields, *own, hours, file_of, place_of, dims_of, sorted(found.by_air))


class _Found:
    """What has been found so far, file by file."""

    def __init__(self, sources: tuple[Source, ...], become: dict[str, Variable]) -> None:
        self.sources, self.become = sources, become
        self.files = files_of(sources)
        self.grids: list[Grid] = []
        self.source_of: list[int] = []  # grid -> number of its source
        self.grid_of: dict[str, int] = {}
        self.dims: list[Dimensions] = []
        self.places: dict[str, list[tuple[np.datetime64, int, int, int]]]  # hour, file, place, dimensions
        self.places = {name: [] for source in sources for name in source.fields}
        self.by_air: set[str] = set()
        self._owner = [number for number, source in enumerate(sources) for _ in source.files]  # of every file
        self._kinds: dict[tuple[int, str], dict[str, Dimensions]] = {}  # source, signature of a header -> field -> dimensions

    def look_into(self, number: int, header: Header | None) -> None:
        """Add a file; one that is made like another, but for its times, is only asked for those."""
        path, owner = self.files[number], self._owner[number]
        clock = self.sources[owner].clock
        kind = self._kinds.get((owner, header.signature)) if header else None
        if header is not None and kind is not None:
            hours = {dims: header.hours(dims, path, clock) for dims in set(kind.values())}
            if all(found is not None for found in hours.values()):
                for name, dims in kind.items():
                    self._add(name, number, dims, hours[dims] or [])
                return
        with opened(path) as dataset:
            kind = self._analysed(dataset, number)
        if header is not None:
            self._kinds[owner, header.signature] = kind

    def _analysed(self, dataset: xr.Dataset, number: int) -> dict[str, Dimensions]:
        """Dimensions of every field that a file has, and its places."""
        path, owner = self.files[number], self._owner[number]
        source = self.sources[owner]
        present = {name: spelt for name, named in source.fields.items() if (spelt := spelling(dataset.data_vars, named))}
        if not present:
            return {}
        grid_along: dict[tuple[str, str], int] = {}
        hours_along: dict[tuple[str, str], list[tuple[np.datetime64, int]]] = {}  # variables may have times of their own
        known: dict[tuple[Hashable, ...], Dimensions] = {}
        kind = {}
        for name, spelt in present.items():
            if require_known_unit(source.fields[name], dataset[spelt], name, self.become[name].units, path):
                self.by_air.add(name)
            axes = dataset[spelt].dims
            known[axes] = known.get(axes) or dimensions_of(dataset, spelt, path)
            dims = kind[name] = known[axes]
            self._require_one_level(dataset[spelt], name, dims, number)
            plane = (dims.y, dims.x)
            if plane not in grid_along:
                grid_along[plane] = self._number_of(grid_of(dataset, spelt, path), owner)
            self._require_same_grid(name, grid_along[plane], path)
            along = (dims.time, dims.period)
            if along not in hours_along:
                hours_along[along] = hours_of(dataset, spelt, path, source.clock)
            self._add(name, number, dims, hours_along[along])
        return kind

    def _add(self, name: str, number: int, dims: Dimensions, hours: list[tuple[np.datetime64, int]]) -> None:
        if dims not in self.dims:
            self.dims.append(dims)
        called = self.dims.index(dims)
        self.places[name] += [(hour, number, place, called) for hour, place in hours]

    def columns(self, name: str) -> tuple[np.ndarray, ...]:
        """Hours in order, and file, place and dimensions of each; no hour is in two places."""
        places = sorted(self.places[name])
        for (hour, first, _, called), (again, second, *_) in zip(places, places[1:], strict=False):
            if hour == again:
                one, other = self.files[first], self.files[second]
                where = f"twice in {one}" if first == second else f"in {one} and in {other}"
                remedy = "remove one of the two"
                if self.dims[called].period:
                    remedy = "these are forecasts of one hour with several lead times, choose which to take, as --lead 3"
                    remedy += " (lead: 3 in a list of sources)"
                raise DataError(f"'{name}' at {hour} is {where}: {remedy}.")
        return tuple(np.array(column) for column in zip(*places, strict=True))

    def require_all(self, source: Source) -> None:
        """Every field of a source is in its files."""
        absent = [name for name in source.fields if not self.places[name]]
        if absent and source.files:
            wanted = "; ".join(f"{name} ({', '.join(source.fields[name].spellings)})" for name in absent)
            raise DataError(
                f"none of the {len(source.files)} files ({source.kind}) holds: {wanted}. Add the files that do, or map "
                "the names that your files use (--map, or `map` of a source), in which `NAME:` leaves a variable out."
            )

    def require_air(self, fields: set[str]) -> None:
        """What is converted with the air's pressure, temperature and dew point has those."""
        absent = [name for name in ("temp", "psfc") if name not in fields]
        if absent and (self.by_air or DEW_POINT in fields):
            raise DataError(f"mixing ratios and dew points are converted with {', '.join(absent)}, which the store leaves out.")
        if DEW_POINT in self.grid_of and self.grid_of[DEW_POINT] != self.grid_of.get("temp"):
            raise DataError("the dew point is on another grid than 'temp': take both from one product, or map `rh`.")

    def _number_of(self, here: Grid, owner: int) -> int:
        for number, grid in enumerate(self.grids):
            if self.source_of[number] == owner and same_grid(grid, here, SAME_GRID):
                return number
        self.grids.append(here)
        self.source_of.append(owner)
        return len(self.grids) - 1

    def _require_same_grid(self, name: str, number: int, path: Path) -> None:
        before = self.grid_of.setdefault(name, number)
        if before != number:
            sizes = [" x ".join(map(str, self.grids[n].shape)) for n in (number, before)]
            raise DataError(
                f"{path} has '{name}' on another grid ({sizes[0]}) than the files before it ({sizes[1]}): every variable "
                "must be on one grid. Leave one kind of files out, or list both as sources (`prepare several`), only "
                f"one of which reads '{name}'."
            )

    def _require_one_level(self, array: xr.DataArray, name: str, dims: Dimensions, number: int) -> None:
        levels = [str(d) for d in array.dims if array.sizes[d] > 1 and d not in (*dims, PIECES)]
        if len(levels) > 1 or (levels and self.sources[self._owner[number]].fields[name].level is None):
            raise DataError(
                f"{self.files[number]}: '{array.name}' has more than one of {', '.join(levels)}: say which in a map, as  "
                f"{name}: {{name: {array.name}, level: 0}}  (`generic --map`)."
            )
