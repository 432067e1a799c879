"""What files hold which hour, as a table that all processes read."""

from __future__ import annotations

import json
from dataclasses import astuple, dataclass
from functools import cached_property
from pathlib import Path

import numpy as np

from data.prepare.grids.grid import Grid, as_tables, from_tables, same_grid
from data.prepare.sources.spellings import Named
from data.prepare.sources.times import Dimensions


@dataclass(frozen=True)
class Catalogue:
    """What files hold which hour: for every field, the hours, and the file and place of each."""

    fields: dict[str, Named]
    files: list[Path]
    grids: list[Grid]  # every source has its own
    source_of: list[int]  # grid -> number of its source
    grid_of: dict[str, int]  # field -> index into grids
    dims: dict[str, Dimensions]  # field -> names of its dimensions
    hours: dict[str, np.ndarray]  # field -> (n,) ascending datetime64[h]
    file_of: dict[str, np.ndarray]  # field -> (n,) index into files
    place_of: dict[str, np.ndarray]  # field -> (n,) index along the file's time
    by_air: bool = False  # whether files state mixing ratios, which take the air's density

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
        plain = ("fields", "files", "dims", "grid_of", "source_of")
        return (
            all(getattr(self, name) == getattr(other, name) for name in plain)
            and all(np.array_equal(column, theirs[kind][name]) for kind in mine for name, column in mine[kind].items())
            and all(same_grid(mine, theirs, 0.0) for mine, theirs in zip(self.grids, other.grids, strict=True))
        )

    def save(self, path: Path) -> None:
        """Write an .npz that `load` reads."""
        about = {
            "fields": {name: astuple(named) for name, named in self.fields.items()},
            "files": [str(file) for file in self.files],
            "dims": self.dims,
            "source_of": self.source_of,
            "grid_of": self.grid_of,
            "by_air": self.by_air,
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
        hours, file_of, place_of = columns
        files, grids = [Path(name) for name in about["files"]], from_tables(file)
        found = files, grids, about["source_of"], about["grid_of"], dims, hours, file_of, place_of
        return Catalogue(fields, *found, about["by_air"])
