"""Looking into files: every one is opened once and asked the same questions, by all workers and ranks.

What they find is kept beside the store until its catalogue is made, so that an interruption costs
little.
"""

from __future__ import annotations

import hashlib
import json
import multiprocessing
import shutil
from collections import defaultdict
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.progress import track

from data import DataError
from data.prepare.catalogue.catalogue import SAME_GRID, Catalogue, restored
from data.prepare.grids.grid import Grid, as_tables, from_tables, same_grid
from data.prepare.inputs import identity
from data.prepare.inputs.opening import opened
from data.prepare.sources.coordinates import Coordinates, Layout, coordinates, layout, level_of
from data.prepare.sources.source import Source, files_of
from data.prepare.sources.spellings import DEW_POINT, read_as, spelling
from data.prepare.sources.times import Hours, valid_hours
from data.prepare.sources.units import require_known_unit
from data.process.written import being_written, write_text
from data.variables import Variable

PIECE = 48  # files that are looked into together: two days of one file an hour
FEW = 2  # pieces that are soon looked into again, and leave nothing behind where they are refused


def look_ahead(
    path: Path, sources: tuple[Source, ...], defined: tuple[Variable, ...], workers: int, part: int = 0, parts: int = 1
) -> None:
    """Look into every `parts`-th piece of the files that a store at `path` is made of, and keep what is found."""
    folder = _folder(path)
    folder.mkdir(parents=True, exist_ok=True)
    pieces = _pieces(sources)
    wanted = [number for number in range(part, len(pieces), parts) if _kept(folder, *pieces[number], number) is None]
    tasks = [(folder, number, *pieces[number], defined) for number in wanted]
    if workers == 1 or len(tasks) < 2:
        steps: Iterator[None] = map(_look, tasks)
    else:
        # Spawned: libraries that were opened before a fork hang after it.
        pool = ProcessPoolExecutor(min(workers, len(tasks)), mp_context=multiprocessing.get_context("spawn"))
        steps = _ended(pool, tasks)
    shown = len(tasks) > FEW and part == 0
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
    table = _Table(sources)
    folder, first, notes = _folder(path), 0, set()
    for number, (source, files) in enumerate(_pieces(sources)):
        kept = _kept(folder, source, files, number)
        if kept is None:
            raise DataError(f"{files[0]} or a file beside it changed while it was looked into: run the same command again.")
        for place, fields in enumerate(kept["fields"]):
            for field in fields:
                table.add(first + place, folder, **field)
        notes |= set(kept["notes"])
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


def _ended(pool: ProcessPoolExecutor, tasks: list[Any]) -> Iterator[None]:
    with pool:
        try:
            yield from pool.map(_look, tasks)
        finally:
            pool.shutdown(cancel_futures=True)


def _look(task: tuple[Path, int, Source, list[Path], tuple[Variable, ...]]) -> None:
    """Look into a piece of files, and keep what is found."""
    folder, number, source, files, defined = task
    seen, notes = identity.glance(files), set[str]()
    fields = [_fields_of(file, source, read_as(defined), folder, notes) for file in files]
    kept = {"asked": _asked(source, files), "seen": seen, "fields": fields, "notes": sorted(notes)}
    write_text(folder / f"{number}.json", json.dumps(kept))


def _kept(folder: Path, source: Source, files: list[Path], number: int) -> dict[str, Any] | None:
    """What was found in a piece; None where it was not looked into, or the files look different since."""
    try:
        kept: dict[str, Any] = json.loads((folder / f"{number}.json").read_text())
    except (FileNotFoundError, ValueError):
        return None
    return kept if kept["asked"] == _asked(source, files) and kept["seen"] == identity.glance(files) else None


def _asked(source: Source, files: list[Path]) -> str:
    return hashlib.sha256(repr((replace(source, files=[]), files)).encode()).hexdigest()


def _fields_of(path: Path, source: Source, become: dict[str, Variable], folder: Path, notes: set[str]) -> list[dict[str, Any]]:
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
            places = {"hours": hours.valid.astype("i8").tolist(), "places": hours.places.tolist()}
            about = {"level": level_of(dataset, spelt, how.at), "ratio": ratio, "leads": hours.leads is not None}
            found.append({"name": name, "layout": how, "grid": grids[plane], **about, **places})
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

    def __init__(self, sources: tuple[Source, ...]) -> None:
        self.sources, self.files = sources, files_of(sources)
        self.grids: list[Grid] = []
        self.source_of: list[int] = []
        self.grid_of: dict[str, int] = {}
        self.level_of: dict[str, tuple[float, Path]] = {}
        self.layouts: dict[Layout, int] = {}
        self.places: dict[str, list[tuple[int, int, int, int, bool]]] = defaultdict(list)
        self.by_air: set[str] = set()
        self._owner = [number for number, source in enumerate(sources) for _ in source.files]  # of every file
        self._numbers: dict[tuple[int, str], int] = {}

    def add(
        self,
        file: int,
        folder: Path,
        name: str,
        layout: list[Any],
        grid: str,
        level: float | None,
        ratio: bool,
        leads: bool,
        hours: list[int],
        places: list[int],
    ) -> None:
        """Add a field of a file.

        Raises:
            DataError: it is on another grid or level than in the files before it.
        """
        path, owner = self.files[file], self._owner[file]
        if (owner, grid) not in self._numbers:
            self._numbers[owner, grid] = self._number_of(folder / f"grid-{grid}.npz", owner)
        number = self._numbers[owner, grid]
        before = self.grid_of.setdefault(name, number)
        if before != number:
            sizes = [" x ".join(map(str, self.grids[n].shape)) for n in (number, before)]
            raise DataError(
                f"{path} has '{name}' on another grid ({sizes[0]}) than the files before it "
                f"({sizes[1]}): every variable "
                "must be on one grid. Leave one kind of files out, or list both as sources "
                "(`prepare several`), only "
                f"one of which reads '{name}'."
            )
        then, first = self.level_of.setdefault(name, (level, path)) if level is not None else (None, path)
        if level != then:
            raise DataError(
                f"{path} has '{name}' on the level {level}, and {first} on {then}: they are not "
                "one field. Leave one kind of files out, or say in the map which level is meant, "
                "by its value."
            )
        self.by_air |= {name} if ratio else set()
        how = self.layouts.setdefault(restored(*layout), len(self.layouts))
        self.places[name] += [(hour, file, place, how, leads) for hour, place in zip(hours, places, strict=True)]

    def catalogue(self) -> Catalogue:
        """Everything, hours in order.

        Raises:
            DataError: an hour is in two places, or what is converted with others lacks these.
        """
        fields = {name: named for source in self.sources for name, named in source.fields.items() if self.places.get(name)}
        self._require_air({name for source in self.sources for name in source.fields})
        columns = {name: self._columns(name) for name in fields}
        own = self.files, self.grids, self.source_of, self.grid_of, list(self.layouts)
        hours, files, places, layouts = ({n: column[kind] for n, column in columns.items()} for kind in range(4))
        return Catalogue(fields, *own, hours, files, places, layouts, sorted(self.by_air))

    def _columns(self, name: str) -> tuple[np.ndarray, ...]:
        found = sorted(self.places[name])
        for (hour, first, *_, leads), (again, second, *_) in pairwise(found):
            if hour == again:
                one, other = self.files[first], self.files[second]
                where = f"twice in {one}" if first == second else f"in {one} and in {other}"
                remedy = "remove one of the two"
                if leads:
                    remedy = "these are forecasts of one hour with several lead times, choose which to take, as --lead 3"
                    remedy += " (lead: 3 in a list of sources)"
                raise DataError(f"'{name}' at {np.datetime64(hour, 'h')} is {where}: {remedy}.")
        hours, files, places, layouts = (np.array(column) for column in zip(*(f[:4] for f in found), strict=True))
        return hours.astype("datetime64[h]"), files, places, layouts

    def _require_air(self, fields: set[str]) -> None:
        """What is converted with the air's pressure, temperature and dew point has those."""
        absent = [name for name in ("temp", "psfc") if name not in fields]
        if absent and (self.by_air or DEW_POINT in fields):
            raise DataError(f"mixing ratios and dew points are converted with {', '.join(absent)}, which the store leaves out.")
        if DEW_POINT in self.grid_of and self.grid_of[DEW_POINT] != self.grid_of.get("temp"):
            raise DataError("the dew point is on another grid than 'temp': take both from one product, or map `rh`.")

    def _number_of(self, file: Path, owner: int) -> int:
        with np.load(file, allow_pickle=False) as tables:
            (here,) = from_tables(tables)
        for number, grid in enumerate(self.grids):
            if self.source_of[number] == owner and same_grid(grid, here, SAME_GRID):
                return number
        self.grids.append(here)
        self.source_of.append(owner)
        return len(self.grids) - 1


def require_all(catalogue: Catalogue, sources: tuple[Source, ...]) -> None:
    """Every field of a source is in its files.

    Raises:
        DataError: one is in none of them.
    """
    for source in sources:
        absent = [name for name in source.fields if name not in catalogue.fields]
        if absent and source.files:
            wanted = "; ".join(f"{name} ({', '.join(source.fields[name].spellings)})" for name in absent)
            raise DataError(
                f"none of the {len(source.files)} files ({source.kind}) holds: {wanted}. Add the "
                "files that do, or map the names that your files use (--map, or `map` of a "
                "source), in which `NAME:` leaves a variable out."
            )
