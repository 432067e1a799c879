"""What files hold which hour of which field, and where, as a table that all processes read."""

from __future__ import annotations

import json
from dataclasses import astuple, dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from data import DataError
from data.prepare.grids.grid import Grid, as_tables, from_tables, same_grid
from data.prepare.sources.coordinates import Layout
from data.prepare.sources.spellings import DEW_POINT, Named

VERSION = 3
COLUMNS = ("hours", "file_of", "place_of", "layout_of")
SAME_GRID = 1e-3  # degrees; files of one product differ by rounding


@dataclass(frozen=True)
class Catalogue:
    """What files hold which hour: for every field, the hours, and the file and place of each."""

    fields: dict[str, Named]
    files: list[Path]
    grids: list[Grid]  # every source has its own
    source_of: list[int]  # grid -> number of its source
    grid_of: dict[str, int]  # field -> index into grids
    layouts: list[Layout]  # how files lay out fields
    hours: dict[str, np.ndarray]  # field -> (n,) ascending datetime64[h]
    file_of: dict[str, np.ndarray]  # field -> (n,) index into files
    place_of: dict[str, np.ndarray]  # field -> (n,) place in time in the file
    layout_of: dict[str, np.ndarray]  # field -> (n,) index into layouts
    by_air: list[str]  # fields that files state as mixing ratios, which take the air's density

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
        plain = ("fields", "files", "layouts", "grid_of", "source_of", "by_air")
        return (
            all(getattr(self, name) == getattr(other, name) for name in plain)
            and len(self.grids) == len(other.grids)
            and all(np.array_equal(column, theirs[kind][name]) for kind in mine for name, column in mine[kind].items())
            and all(same_grid(mine, theirs, 0.0) for mine, theirs in zip(self.grids, other.grids, strict=True))
        )

    def converted_with(self, name: str, winds: str) -> tuple[str, ...]:
        """Other fields that one is converted with, hour by hour."""
        if name in self.by_air:
            return "psfc", "temp"
        if name == DEW_POINT:
            return ("temp",)
        return {"u": ("v",), "v": ("u",)}.get(name, ()) if winds == "grid" else ()

    def incomplete(self, winds: str, with_air: np.ndarray) -> dict[str, np.ndarray]:
        """Fields, and their hours at which there is not what they are converted with.

        Args:
            winds: "earth", or "grid" where u and v are turned together.
            with_air: hours whose air over the target is known already; mixing ratios of another grid are converted there.
        """
        lacking = {}
        for name in self.fields:
            needed = self.converted_with(name, winds)
            own = [np.isin(self.hours[name], self.hours.get(of, with_air[:0])) for of in needed]
            there = np.logical_and.reduce(own) if own else np.ones(len(self.hours[name]), bool)
            if name in self.by_air and not self.on_one_grid(name, *needed):
                there |= np.isin(self.hours[name], with_air)
            if not there.all():
                lacking[name] = self.hours[name][~there]
        return lacking

    def on_one_grid(self, *names: str) -> bool:
        return len({self.grid_of.get(name) for name in names}) == 1

    def between(self, after: dict[str, np.datetime64], last: np.datetime64) -> Catalogue:
        """The same of the hours behind a field's own last one, up to a common one."""
        kept = {name: (hours > after[name]) & (hours <= last) for name, hours in self.hours.items()}
        fields = {name: named for name, named in self.fields.items() if kept[name].any()}
        columns: dict[str, Any] = {
            kind: {name: values[name][kept[name]] for name in fields} for kind, values in self._columns().items()
        }
        return replace(self, fields=fields, **columns)

    def on(self, grids: list[Grid], source_of: list[int], grid_of: dict[str, int]) -> Catalogue:
        """The same with the numbers that grids had in a store, all of them.

        Raises:
            DataError: a field is on another grid than there.
        """
        numbers = {}
        for name, number in self.grid_of.items():
            here, source = self.grids[number], self.source_of[number]
            may = [grid_of[name]] if name in grid_of else [n for n, owner in enumerate(source_of) if owner == source]
            there = [n for n in may if same_grid(here, grids[n], SAME_GRID)]
            if not there:
                sizes = [" x ".join(map(str, grid.shape)) for grid in (here, *(grids[n] for n in may))]
                raise DataError(
                    f"{self.files[self.file_of[name][0]]} and the files beside it are on another grid ({sizes[0]}, '{name}') "
                    f"than those that the store was made of ({' and '.join(sizes[1:])}): prepare a store of their own."
                )
            numbers[name] = there[0]
        return replace(self, grids=grids, source_of=source_of, grid_of=grid_of | numbers)

    def save(self, path: Path) -> None:
        """Write an .npz that `load_catalogue` reads."""
        about = {
            "version": VERSION,
            "fields": {name: astuple(named) for name, named in self.fields.items()},
            "files": [str(file) for file in self.files],
            "layouts": self.layouts,
            "source_of": self.source_of,
            "grid_of": self.grid_of,
            "by_air": self.by_air,
        }
        tables = {f"{kind}/{name}": column for kind, columns in self._columns().items() for name, column in columns.items()}
        tables |= as_tables(self.grids)
        np.savez(path, about=np.array(json.dumps(about)), **tables)  # type: ignore[arg-type]

    def _columns(self) -> dict[str, dict[str, np.ndarray]]:
        return {kind: getattr(self, kind) for kind in COLUMNS}


def load_catalogue(path: Path) -> Catalogue:
    """A catalogue that another process has saved.

    Raises:
        DataError: another version of this program has.
    """
    with np.load(path, allow_pickle=False) as file:
        about = json.loads(str(file["about"]))
        if about.get("version") != VERSION:
            raise DataError(f"{path.parent} was begun by another version: remove it, and what was begun beside it.")
        fields = {name: Named(tuple(spellings), *more) for name, (spellings, *more) in about["fields"].items()}
        hours, file_of, place_of, layout_of = ({name: file[f"{kind}/{name}"] for name in fields} for kind in COLUMNS)
        layouts = [restored(*found) for found in about["layouts"]]
        found = [Path(name) for name in about["files"]], from_tables(file), about["source_of"], about["grid_of"], layouts
        return Catalogue(fields, *found, hours, file_of, place_of, layout_of, about["by_air"])


def restored(name: str, y: str, x: str, times: list[str], at: list[list[Any]]) -> Layout:
    """A layout that was written as JSON."""
    return Layout(name, y, x, tuple(times), tuple((dim, where) for dim, where in at))
