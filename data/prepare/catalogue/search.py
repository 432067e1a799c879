"""Looking into files: every one is opened once and asked the same questions, by all workers and ranks.

What they find is kept beside the store until its catalogue is made, so that an interruption costs
little.
"""

from __future__ import annotations

import hashlib
import shutil
from collections import defaultdict
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from pydantic import TypeAdapter, ValidationError
from rich.console import Console
from rich.progress import track

from data import DataError
from data.prepare.catalogue.catalogue import ROW, SAME_GRID, About, Catalogue
from data.prepare.grids.grid import Grid, as_tables, from_tables, same_grid
from data.prepare.inputs.given import on_disk
from data.prepare.inputs.identity import Content, content_of, glance
from data.prepare.inputs.opening import opened
from data.prepare.sources.coordinates import Coordinates, Layout, coordinates, layout, level_of
from data.prepare.sources.source import DEW_POINT, Source, files_of, read_as, spelling
from data.prepare.sources.times import Hours, valid_hours
from data.prepare.sources.units import require_known_unit
from data.process.workers import results
from data.process.written import being_written, write_text
from data.variables import Variable

PIECE = 48  # files that are looked into together: two days of one file an hour
FEW = 2  # pieces that are soon looked into again, and leave nothing behind where they are refused


@dataclass(frozen=True)
class Found:
    """A field of a file."""

    name: str
    layout: Layout
    grid: str  # digest of its grid
    level: float | None
    ratio: bool  # it is a mixing ratio
    leads: bool  # it is of forecasts
    hours: list[int]  # since 1970, UTC
    places: list[int]  # of these hours, in time


@dataclass(frozen=True)
class Piece:
    """What was found in some files that are looked into together."""

    asked: str  # digest of what was looked for, and where
    content: dict[str, Content]
    fields: list[list[Found]]  # of every file
    notes: list[str]


_PIECE = TypeAdapter(Piece)


def look_ahead(
    path: Path, sources: tuple[Source, ...], defined: tuple[Variable, ...], workers: int, part: int = 0, parts: int = 1
) -> None:
    """Look into every `parts`-th piece of the files that a store at `path` is made of, and keep what is found."""
    folder = _folder(path)
    folder.mkdir(parents=True, exist_ok=True)
    pieces = _pieces(sources)
    wanted = [number for number in range(part, len(pieces), parts) if _kept(folder, *pieces[number], number) is None]
    tasks = [(folder, number, *pieces[number], defined) for number in wanted]
    steps, shown = results(_look, tasks, workers), len(tasks) > FEW and part == 0
    for _ in track(steps, "looking into files", total=len(tasks), console=Console(stderr=True), disable=not shown):
        pass


def make_catalogue(path: Path, sources: tuple[Source, ...], defined: tuple[Variable, ...], workers: int = 1) -> Catalogue:
    """The table of all fields of all files. Weather may be on another grid than pollutants.

    Args:
        path: of the store, beside which findings are kept until `forget`.
        sources: one without files is left out.
        defined: variables that the user has defined.

    Raises:
        DataError: a file cannot be read, the grids or levels of one field differ, or an hour is in
            two places.
    """
    try:
        look_ahead(path, sources, defined, workers)
        return _put_together(path, sources)
    except DataError:
        if len(_pieces(sources)) <= FEW:
            forget(path)
        raise


def _put_together(path: Path, sources: tuple[Source, ...]) -> Catalogue:
    table = _Table(sources, _folder(path))
    notes, first = set[str](), 0
    for number, (source, files) in enumerate(_pieces(sources)):
        piece = _kept(table.folder, source, files, number)
        if piece is None:
            raise DataError(f"{files[0]} or a file beside it changed while it was looked into: run the same command again.")
        for file, fields in enumerate(piece.fields, first):
            for found in fields:
                table.add(file, found)
        table.content |= piece.content
        notes |= set(piece.notes)
        first += len(files)
    for note in sorted(notes):
        Console(stderr=True).print(note)
    return table.catalogue()


def forget(path: Path) -> None:
    """Remove what was kept, once the catalogue is."""
    shutil.rmtree(_folder(path), ignore_errors=True)


def _folder(path: Path) -> Path:
    return path.with_name(path.name + ".looked")


def _pieces(sources: tuple[Source, ...]) -> list[tuple[Source, list[Path]]]:
    """Files that are looked into together, each piece of one source, in the order of `files_of`."""
    starts = [(source, start) for source in sources for start in range(0, len(source.files), PIECE)]
    return [(source, source.files[start : start + PIECE]) for source, start in starts]


def _look(folder: Path, number: int, source: Source, files: list[Path], defined: tuple[Variable, ...]) -> None:
    """Look into a piece of files, and keep what is found."""
    content, notes = {str(file): content_of(file) for file in {on_disk(file) for file in files}}, set[str]()
    fields = [_fields_of(file, source, read_as(defined), folder, notes) for file in files]
    piece = Piece(_asked(source, files), content, fields, sorted(notes))
    write_text(folder / f"{number}.json", _PIECE.dump_json(piece).decode())


def _kept(folder: Path, source: Source, files: list[Path], number: int) -> Piece | None:
    """What was found in a piece; None where it was not looked into, or the files look different since."""
    try:
        piece = _PIECE.validate_json((folder / f"{number}.json").read_bytes())
    except (FileNotFoundError, ValidationError):
        return None
    unchanged = all(glance(Path(file)) == content.glance for file, content in piece.content.items())
    return piece if piece.asked == _asked(source, files) and unchanged else None


def _asked(source: Source, files: list[Path]) -> str:
    return hashlib.sha256(repr((replace(source, files=[]), files)).encode()).hexdigest()


def _fields_of(path: Path, source: Source, become: dict[str, Variable], folder: Path, notes: set[str]) -> list[Found]:
    """Every field that a file has: where it lies, its hours and its cells."""
    found = []
    grids: dict[tuple[str, str], str] = {}
    known: dict[Any, tuple[Coordinates, Hours]] = {}  # fields of the same dimensions and cell methods are asked once
    with opened(path) as dataset:
        for name, named in source.fields.items():
            spelt = spelling(dataset.data_vars, named)
            if spelt is None:
                continue
            ratio = require_known_unit(named, dataset[spelt], name, become[name].units, path)
            alike = dataset[spelt].dims, dataset[spelt].attrs.get("cell_methods")
            if alike not in known:
                hours = valid_hours(dataset, spelt, path, source.clock)
                known[alike] = coordinates(dataset, spelt, path), hours
            place, hours = known[alike]
            how = layout(dataset, spelt, place, hours, named.level, path, name)
            plane = (how.y, how.x)
            grids[plane] = grids.get(plane) or _keep_grid(place.grid, folder)
            notes |= {f"{source.kind}: {hours.note}"} if hours.note else set()
            about = grids[plane], level_of(dataset, spelt, how.at), ratio, hours.leads is not None
            found.append(Found(name, how, *about, hours.valid.astype("i8").tolist(), hours.places.tolist()))
    return found


def _keep_grid(grid: Grid, folder: Path) -> str:
    """Keep a grid once, by its content."""
    digest = hashlib.sha256(grid.lat.tobytes() + grid.lon.tobytes()).hexdigest()[:16]
    file = folder / f"grid-{digest}.npz"
    if not file.exists():
        with being_written(file) as partial, partial.open("wb") as opened_file:
            np.savez(opened_file, allow_pickle=False, **as_tables([grid]))
    return digest


class _Table:
    """What was found in all files, put together; says what does not fit."""

    def __init__(self, sources: tuple[Source, ...], folder: Path) -> None:
        self.sources, self.files, self.folder = sources, files_of(sources), folder
        self.content: dict[str, Content] = {}
        self._grids: list[Grid] = []
        self._source_of: list[int] = []
        self._grid_of: dict[str, int] = {}
        self._level_of: dict[str, tuple[float, Path]] = {}
        self._layouts: dict[Layout, int] = {}
        self._rows: dict[str, list[np.ndarray]] = defaultdict(list)
        self._by_air: set[str] = set()
        self._with_leads: set[str] = set()
        self._owner = [number for number, source in enumerate(sources) for _ in source.files]  # of every file
        self._numbers: dict[tuple[int, str], int] = {}

    def add(self, file: int, found: Found) -> None:
        """Add a field of a file.

        Raises:
            DataError: it is on another grid or level than in the files before it.
        """
        name, path, owner = found.name, self.files[file], self._owner[file]
        if (owner, found.grid) not in self._numbers:
            self._numbers[owner, found.grid] = self._number_of(found.grid, owner)
        number = self._numbers[owner, found.grid]
        before = self._grid_of.setdefault(name, number)
        if before != number:
            sizes = [" x ".join(map(str, self._grids[n].shape)) for n in (number, before)]
            raise DataError(
                f"{path} has '{name}' on another grid ({sizes[0]}) than the files before it ({sizes[1]}): every variable must "
                "be on one grid. Leave one kind of files out, or list both as sources (`prepare several`), only one of which "
                f"reads '{name}'."
            )
        then, first = (None, path) if found.level is None else self._level_of.setdefault(name, (found.level, path))
        if found.level != then:
            raise DataError(
                f"{path} has '{name}' on the level {found.level}, and {first} on {then}: they are not one field. Leave one "
                "kind of files out, or say in the map which level is meant, by its value."
            )
        self._by_air |= {name} if found.ratio else set()
        self._with_leads |= {name} if found.leads else set()
        rows = np.empty(len(found.hours), ROW)
        rows["hour"], rows["file"], rows["place"] = np.array(found.hours, "M8[h]"), file, found.places
        rows["layout"] = self._layouts.setdefault(found.layout, len(self._layouts))
        self._rows[name].append(rows)

    def catalogue(self) -> Catalogue:
        """Everything, hours in order.

        Raises:
            DataError: an hour is in two places, or what is converted with others lacks these.
        """
        read = {name: named for source in self.sources for name, named in source.fields.items()}
        self._require_air(set(read))
        rows = {name: self._in_order(name) for name in read if sum(map(len, self._rows[name]))}
        fields = {name: read[name] for name in rows}
        grids, layouts = (self._source_of, self._grid_of), list(self._layouts)
        about = About(fields, self.files, self.content, *grids, layouts, sorted(self._by_air))
        return Catalogue(about, self._grids, rows)

    def _in_order(self, name: str) -> np.ndarray:
        rows = np.sort(np.concatenate(self._rows[name]), order=["hour", "file", "place"])
        (again,) = np.nonzero(rows["hour"][1:] == rows["hour"][:-1])
        if again.size:
            (hour, first, *_), (_, second, *_) = rows[again[0]], rows[again[0] + 1]
            one, other = self.files[first], self.files[second]
            where = f"twice in {one}" if first == second else f"in {one} and in {other}"
            remedy = "remove one of the two"
            if name in self._with_leads:
                remedy = "these are forecasts of one hour with several lead times, choose which to take, as --lead 3"
                remedy += " (lead: 3 in a list of sources)"
            raise DataError(f"'{name}' at {hour} is {where}: {remedy}.")
        return rows

    def _require_air(self, fields: set[str]) -> None:
        """What is converted with the air's pressure, temperature and dew point has those."""
        absent = [name for name in ("temp", "psfc") if name not in fields]
        if absent and (self._by_air or DEW_POINT in fields):
            raise DataError(f"mixing ratios and dew points are converted with {', '.join(absent)}, which the store leaves out.")
        if DEW_POINT in self._grid_of and self._grid_of[DEW_POINT] != self._grid_of.get("temp"):
            raise DataError("the dew point is on another grid than 'temp': take both from one product, or map `rh`.")

    def _number_of(self, digest: str, owner: int) -> int:
        with np.load(self.folder / f"grid-{digest}.npz", allow_pickle=False) as tables:
            (here,) = from_tables(tables)
        for number, grid in enumerate(self._grids):
            if self._source_of[number] == owner and same_grid(grid, here, SAME_GRID):
                return number
        self._grids.append(here)
        self._source_of.append(owner)
        return len(self._grids) - 1


def require_all(catalogue: Catalogue, sources: tuple[Source, ...]) -> None:
    """Every field of a source is in its files.

    Raises:
        DataError: one is in none of them.
    """
    for source in sources:
        absent = [name for name in source.fields if name not in catalogue.rows]
        if absent and source.files:
            wanted = "; ".join(f"{name} ({', '.join(source.fields[name].spellings)})" for name in absent)
            raise DataError(
                f"none of the {len(source.files)} files ({source.kind}) holds: {wanted}. Add the "
                "files that do, or map the names that your files use (--map, or `map` of a "
                "source), in which `NAME:` leaves a variable out."
            )
