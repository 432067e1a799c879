"""What files hold which hour: looked up in every file's header, once."""

from __future__ import annotations

import json
from collections.abc import Hashable, Iterable
from dataclasses import asdict, astuple, dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
import xarray as xr

from data import DataError
from data.prepare.grids.grid import Grid, as_tables, from_tables, same_grid
from data.prepare.sources.files import grid_of, opened, spelling
from data.prepare.sources.headers import Header, read_header
from data.prepare.sources.hours import PIECES
from data.prepare.sources.spellings import DEFAULT_CLOCK, DEW_POINT, Clock, Named, read_as
from data.prepare.sources.times import Dimensions, dimensions_of, hours_of
from data.prepare.sources.units import require_known_unit
from data.variables import Variable, restored

SAME_GRID = 1e-3  # degrees; files of one product differ by rounding


@dataclass(frozen=True)
class Catalogue:
    """What files hold which hour: for every field, the hours, and the file and place of each."""

    fields: dict[str, Named]
    files: list[Path]
    grids: list[Grid]
    grid_of: dict[str, int]  # field -> index into grids
    dims: dict[str, Dimensions]  # field -> names of its dimensions
    hours: dict[str, np.ndarray]  # field -> (n,) ascending datetime64[h]
    file_of: dict[str, np.ndarray]  # field -> (n,) index into files
    place_of: dict[str, np.ndarray]  # field -> (n,) index along the file's time
    clock: Clock = DEFAULT_CLOCK  # how the hours were read
    by_air: bool = False  # whether files state mixing ratios, which take the air's density
    defined: tuple[Variable, ...] = ()  # variables that the user has defined

    @cached_property
    def span(self) -> tuple[np.datetime64, np.datetime64]:
        """First and last hour of any field."""
        return min(h[0] for h in self.hours.values()), max(h[-1] for h in self.hours.values())

    def files_between(self, start: np.datetime64, stop: np.datetime64) -> list[int]:
        """Numbers of the files that hold an hour of [start, stop)."""
        found: set[int] = set()
        for name, hours in self.hours.items():
            first, last = np.searchsorted(hours, start), np.searchsorted(hours, stop)
            found |= {int(number) for number in self.file_of[name][first:last]}
        return sorted(found)

    def equals(self, other: Catalogue) -> bool:
        """Whether the other one describes the same hours in the same files, on the same grid."""
        mine, theirs = self._columns(), other._columns()
        return (
            (self.fields, self.files, self.dims, self.grid_of) == (other.fields, other.files, other.dims, other.grid_of)
            and all(np.array_equal(column, theirs[kind][name]) for kind in mine for name, column in mine[kind].items())
            and all(same_grid(mine, theirs, 0.0) for mine, theirs in zip(self.grids, other.grids, strict=True))
        )

    def save(self, path: Path) -> None:
        """Write an .npz that `load` reads."""
        about = {
            "fields": {name: astuple(named) for name, named in self.fields.items()},
            "files": [str(file) for file in self.files],
            "dims": self.dims,
            "grid_of": self.grid_of,
            "clock": asdict(self.clock),
            "by_air": self.by_air,
            "defined": [asdict(variable) for variable in self.defined],
        }
        tables = {f"{kind}/{name}": column for kind, columns in self._columns().items() for name, column in columns.items()}
        tables |= as_tables(self.grids)
        np.savez(path, about=np.array(json.dumps(about)), **tables)  # type: ignore[arg-type]

    def _columns(self) -> dict[str, dict[str, np.ndarray]]:
        return {"hours": self.hours, "file_of": self.file_of, "place_of": self.place_of}


def load_catalogue(path: Path) -> Catalogue:
    """A catalogue that another process has saved."""
    with np.load(path, allow_pickle=False) as file:
        about = json.loads(str(file["about"]))
        fields = {name: Named(tuple(spellings), *more) for name, (spellings, *more) in about["fields"].items()}
        columns = ({name: file[f"{kind}/{name}"] for name in fields} for kind in ("hours", "file_of", "place_of"))
        dims = {name: Dimensions(*found) for name, found in about["dims"].items()}
        stated = about["clock"]
        lead = None if stated["lead_hours"] is None else tuple(stated["lead_hours"])
        clock = Clock(**{**stated, "lead_hours": lead})
        hours, file_of, place_of = columns
        files, grid_of = [Path(f) for f in about["files"]], about["grid_of"]
        grids = from_tables(file)
        defined = tuple(restored(own) for own in about["defined"])
        return Catalogue(fields, files, grids, grid_of, dims, hours, file_of, place_of, clock, about["by_air"], defined)


def make_catalogue(
    fields: dict[str, Named],
    files: list[Path],
    clock: Clock = DEFAULT_CLOCK,
    headers: Iterable[Header | None] | None = None,
    defined: tuple[Variable, ...] = (),
) -> Catalogue:
    """Look into every file's header: which fields, which hours, which grid. Weather may be on another grid than pollutants.

    Args:
        headers: of every file, where they were read already (ahead.py).

    Raises:
        DataError: a file cannot be read, the grids of one field differ, a field is in no file, or an hour is in two places.
    """
    found = _Found(fields, files, clock, read_as(defined))
    for number, header in enumerate(map(read_header, files) if headers is None else headers):
        found.look_into(number, header)
    absent = [name for name, places in found.places.items() if not places]
    if absent:
        wanted = "; ".join(f"{name} ({', '.join(fields[name].spellings)})" for name in absent)
        raise DataError(
            f"none of the {len(files)} files holds: {wanted}. Add the files that do, or map the names your files "
            "use with --map FILE, in which a line `NAME:` leaves a variable out."
        )
    columns = {name: found.columns(name) for name in fields}
    hours_by_name, file_of, place_of = ({name: column[i] for name, column in columns.items()} for i in range(3))
    found.require_air()
    own = found.grids, found.grid_of, found.dims
    return Catalogue(fields, files, *own, hours_by_name, file_of, place_of, clock, found.by_air, defined)


class _Found:
    """What has been found so far, file by file."""

    def __init__(self, fields: dict[str, Named], files: list[Path], clock: Clock, become: dict[str, Variable]) -> None:
        self.fields, self.files, self.clock, self.become = fields, files, clock, become
        self.grids: list[Grid] = []
        self.grid_of: dict[str, int] = {}
        self.dims: dict[str, Dimensions] = {}
        self.places: dict[str, list[tuple[np.datetime64, int, int]]] = {name: [] for name in fields}  # hour, file, place
        self.by_air = False
        self._kinds: dict[str, dict[str, Dimensions]] = {}  # signature of a header -> field -> its dimensions

    def look_into(self, number: int, header: Header | None) -> None:
        """Add a file; one that is made like another, but for its times, is only asked for those."""
        path = self.files[number]
        kind = self._kinds.get(header.signature) if header else None
        if header is not None and kind is not None:
            hours = {dims: header.hours(dims, path, self.clock) for dims in set(kind.values())}
            if all(found is not None for found in hours.values()):
                for name, dims in kind.items():
                    self.places[name] += [(hour, number, place) for hour, place in hours[dims] or []]
                return
        with opened(path) as dataset:
            kind = self._analysed(dataset, number)
        if header is not None:
            self._kinds[header.signature] = kind

    def _analysed(self, dataset: xr.Dataset, number: int) -> dict[str, Dimensions]:
        """Dimensions of every field that a file has, and its places."""
        path = self.files[number]
        present = {name: spelt for name, named in self.fields.items() if (spelt := spelling(dataset.data_vars, named))}
        if not present:
            return {}
        grid_along: dict[tuple[str, str], int] = {}
        hours_along: dict[tuple[str, str], list[tuple[np.datetime64, int]]] = {}  # variables may have times of their own
        known: dict[tuple[Hashable, ...], Dimensions] = {}
        kind = {}
        for name, spelt in present.items():
            self.by_air |= require_known_unit(self.fields[name], dataset[spelt], name, self.become[name].units, path)
            axes = dataset[spelt].dims
            known[axes] = known.get(axes) or dimensions_of(dataset, spelt, path)
            dims = kind[name] = known[axes]
            self._require_same_dimensions(dataset, name, spelt, dims, path)
            plane = (dims.y, dims.x)
            if plane not in grid_along:
                grid_along[plane] = self._number_of(grid_of(dataset, spelt, path))
            self._require_same_grid(name, grid_along[plane], path)
            along = (dims.time, dims.period)
            if along not in hours_along:
                hours_along[along] = hours_of(dataset, spelt, path, self.clock)
            self.places[name] += [(hour, number, place) for hour, place in hours_along[along]]
        return kind

    def columns(self, name: str) -> tuple[np.ndarray, ...]:
        """Hours in order, and the file and place of each; no hour is in two places."""
        places = sorted(self.places[name])
        for (hour, first, _), (again, second, _) in zip(places, places[1:], strict=False):
            if hour == again:
                one, other = self.files[first], self.files[second]
                where = f"twice in {one}" if first == second else f"in {one} and in {other}"
                remedy = "remove one of the two"
                if self.dims[name].period:
                    remedy = "these are forecasts of one hour with several lead times, choose which to take, as --lead 3"
                raise DataError(f"'{name}' at {hour} is {where}: {remedy}.")
        return tuple(np.array(column) for column in zip(*places, strict=True))

    def require_air(self) -> None:
        """What is converted with the air's pressure, temperature and dew point has those."""
        absent = [name for name in ("temp", "psfc") if name not in self.fields]
        if absent and (self.by_air or DEW_POINT in self.fields):
            raise DataError(f"mixing ratios and dew points are converted with {', '.join(absent)}, which the store leaves out.")
        if DEW_POINT in self.fields and self.grid_of[DEW_POINT] != self.grid_of["temp"]:
            raise DataError("the dew point is on another grid than 'temp': take both from one product, or map `rh`.")

    def _number_of(self, here: Grid) -> int:
        for number, grid in enumerate(self.grids):
            if same_grid(grid, here, SAME_GRID):
                return number
        self.grids.append(here)
        return len(self.grids) - 1

    def _require_same_grid(self, name: str, number: int, path: Path) -> None:
        before = self.grid_of.setdefault(name, number)
        if before != number:
            sizes = [" x ".join(map(str, self.grids[n].shape)) for n in (number, before)]
            raise DataError(
                f"{path} has '{name}' on another grid ({sizes[0]}) than the files before it ({sizes[1]}): every variable "
                "must be on one grid. Leave one of the two kinds of files out, or remove the variable from it."
            )

    def _require_same_dimensions(self, dataset: xr.Dataset, name: str, spelt: str, dims: Dimensions, path: Path) -> None:
        levels = [str(d) for d in dataset[spelt].dims if dataset.sizes[d] > 1 and d not in (*dims, PIECES)]
        if len(levels) > 1 or (levels and self.fields[name].level is None):
            raise DataError(
                f"{path}: '{spelt}' has more than one of {', '.join(levels)}: say which in a map, as  {name}: {{name: {spelt}, "
                "level: 0}  (`generic --map`)."
            )
        if self.dims.setdefault(name, dims) != dims:
            raise DataError(
                f"{path}: dimensions of '{spelt}' are {dims}, in the files before {self.dims[name]}: prepare each kind on its "
                "own."
            )
