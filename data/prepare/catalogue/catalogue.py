"""What files hold which hour of which field, and where, as a table that all processes read."""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from pydantic import TypeAdapter

from data import DataError
from data.prepare.grids.grid import Grid, as_tables, from_tables, same_grid
from data.prepare.inputs.identity import Content
from data.prepare.sources.coordinates import Layout
from data.prepare.sources.source import DEW_POINT, Named

VERSION = 4
ROW = np.dtype([("hour", "M8[h]"), ("file", "i8"), ("place", "i8"), ("layout", "i8")])
SAME_GRID = 1e-3  # degrees; files of one product differ by rounding


@dataclass(frozen=True)
class About:
    """What the rows of a catalogue refer to."""

    fields: dict[str, Named]  # that any file has
    files: list[Path]
    content: dict[str, Content]  # of every file and archive, when it was looked into
    source_of: list[int]  # grid -> number of its source
    grid_of: dict[str, int]  # field -> number of its grid
    layouts: list[Layout]  # how files lay out fields
    by_air: list[str]  # fields that files state as mixing ratios, which take the air's density
    version: int = VERSION


_ABOUT = TypeAdapter(About)


@dataclass(frozen=True)
class Catalogue:
    """What files hold which hour: of every field its hours, and the file and place of each."""

    about: About
    grids: list[Grid]  # every source has its own
    rows: dict[str, np.ndarray]  # field -> (n,) of ROW, hours ascending: which file, where in it, and how

    @cached_property
    def hours(self) -> dict[str, np.ndarray]:
        """Ascending hours of every field, (n,) datetime64[h]."""
        return {name: rows["hour"] for name, rows in self.rows.items()}

    @cached_property
    def span(self) -> tuple[np.datetime64, np.datetime64]:
        """First and last hour of any field."""
        return min(h[0] for h in self.hours.values()), max(h[-1] for h in self.hours.values())

    def within(self, name: str, start: np.datetime64, stop: np.datetime64) -> np.ndarray:
        """The rows of a field in [start, stop)."""
        return self.rows[name][slice(*np.searchsorted(self.hours[name], [start, stop]))]

    def files_between(self, start: np.datetime64, stop: np.datetime64) -> list[int]:
        """Numbers of the files that hold an hour of [start, stop)."""
        found = [self.within(name, start, stop)["file"] for name in self.rows]
        return [int(number) for number in np.unique(np.concatenate(found))]

    def equals(self, other: Catalogue) -> bool:
        """Whether the other one describes the same hours in files of the same names, on the same grids."""
        return (
            replace(self.about, content={}) == replace(other.about, content={})
            and len(self.grids) == len(other.grids)
            and all(np.array_equal(rows, other.rows[name]) for name, rows in self.rows.items())
            and all(same_grid(mine, theirs, 0.0) for mine, theirs in zip(self.grids, other.grids, strict=True))
        )

    def converted_with(self, name: str, winds: str) -> tuple[str, ...]:
        """Other fields that one is converted with, hour by hour."""
        if name in self.about.by_air:
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
        for name, hours in self.hours.items():
            there = np.ones(len(hours), bool)
            needed = self.converted_with(name, winds)
            for other in needed:
                there &= np.isin(hours, self.hours.get(other, with_air[:0]))
            if name in self.about.by_air and not self.on_one_grid(name, *needed):
                there |= np.isin(hours, with_air)
            if not there.all():
                lacking[name] = hours[~there]
        return lacking

    def on_one_grid(self, *names: str) -> bool:
        return len({self.about.grid_of.get(name) for name in names}) == 1

    def between(self, after: dict[str, np.datetime64], last: np.datetime64) -> Catalogue:
        """The same of the hours behind a field's own last one, up to a common one."""
        rows = {name: rows[(rows["hour"] > after[name]) & (rows["hour"] <= last)] for name, rows in self.rows.items()}
        rows = {name: left for name, left in rows.items() if len(left)}
        return replace(self, about=replace(self.about, fields={name: self.about.fields[name] for name in rows}), rows=rows)

    def on(self, grids: list[Grid], source_of: list[int], grid_of: dict[str, int]) -> Catalogue:
        """The same with the numbers that grids had in a store, all of them.

        Raises:
            DataError: a field is on another grid than there.
        """
        numbers = {}
        for name, number in self.about.grid_of.items():
            here, source = self.grids[number], self.about.source_of[number]
            may = [grid_of[name]] if name in grid_of else [n for n, owner in enumerate(source_of) if owner == source]
            there = [n for n in may if same_grid(here, grids[n], SAME_GRID)]
            if not there:
                sizes = [" x ".join(map(str, grid.shape)) for grid in (here, *(grids[n] for n in may))]
                raise DataError(
                    f"{self.about.files[self.rows[name]['file'][0]]} and the files beside it are on another grid "
                    f"({sizes[0]}, '{name}') than those that the store was made of ({' and '.join(sizes[1:])}): prepare a "
                    "store of their own."
                )
            numbers[name] = there[0]
        return replace(self, about=replace(self.about, source_of=source_of, grid_of=grid_of | numbers), grids=grids)

    def save(self, path: Path) -> None:
        """Write an .npz that `load_catalogue` reads."""
        about = np.array(_ABOUT.dump_json(self.about).decode())
        tables: dict[str, Any] = {f"rows/{name}": rows for name, rows in self.rows.items()}
        np.savez(path, about=about, allow_pickle=False, **tables, **as_tables(self.grids))


def load_catalogue(path: Path) -> Catalogue:
    """A catalogue that another process has saved.

    Raises:
        DataError: another version of this program has.
    """
    with np.load(path, allow_pickle=False) as file:
        stated = json.loads(str(file["about"]))
        if stated.get("version") != VERSION:
            raise DataError(f"{path.parent} was begun by another version: remove it, and what was begun beside it.")
        about = _ABOUT.validate_python(stated)
        return Catalogue(about, from_tables(file), {name: file[f"rows/{name}"] for name in about.fields})
