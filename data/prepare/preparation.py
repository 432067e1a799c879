"""A store in the making: its plan, its catalogue and its weights, and the shards that are written by them.

A shard is the unit of work: one process reads its hours, regrids, writes and marks it done, and
nobody else touches it. So no process waits for another, any number of processes and any
interruption give the same bytes, and what is done is verified by its hash and not redone. All that
the processes need to know stands in `STORE.parts`.
"""

from __future__ import annotations

import io
import json
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import cache, cached_property
from pathlib import Path
from typing import Any

import numpy as np
import scipy.sparse
import zarr
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from data import DataError
from data.prepare.catalogue.catalogue import Catalogue, load_catalogue
from data.prepare.catalogue.search import forget, make_catalogue
from data.prepare.fields import Reader
from data.prepare.grids.grid import Grid, as_tables, from_tables
from data.prepare.grids.regrid import Regridder
from data.prepare.inputs import identity
from data.prepare.inputs.given import on_disk
from data.prepare.plan import PLAN, Plan, read_plan
from data.prepare.sources.source import read_as, winds_of
from data.process import locks
from data.process.workers import results
from data.process.written import being_written, write_text
from data.store import finishing, layout, opening, writing
from data.store.layout import Store
from data.store.reader import ShardReader
from data.variables import Contents
from data.wind_scan import cache as wind_scan
from data.wind_scan import orders

GRIDS = "grids.npz"  # of the files that a finished store was made of
console = Console(stderr=True)


class Preparation:
    """An unfinished store, for every process that works on it."""

    def __init__(self, path: Path) -> None:
        """Find what was begun at `path`.

        Raises:
            DataError: nothing was, or by another version of this program.
        """
        self.path, self.parts = path, layout.parts_path(path)
        try:
            self.plan: Plan = read_plan(self.parts / PLAN)
        except FileNotFoundError as error:
            raise DataError(
                f"nothing was begun for {path}: run `python -m data prepare ... --stage begin` first, once."
            ) from error
        self.catalogue: Catalogue = load_catalogue(self.parts / "catalogue.npz")
        root = zarr.open_group(layout.partial_path(path), mode="r")
        hours = np.asarray(root["time"])
        self.contents: Contents = layout.contents_of(root)
        self.first: np.datetime64 = layout.EPOCH + hours[0]
        self.hours = len(hours)
        self.shards = range(-(-self.hours // self.plan.shard_hours))

    @cached_property
    def base(self) -> Store | None:
        """The store that hours are appended to."""
        return None if self.plan.base is None else opening.open_store(self.plan.base)

    @cached_property
    def regridders(self) -> list[Regridder]:
        """Weights from each of the catalogue's grids."""
        weights = [scipy.sparse.load_npz(self.parts / f"weights-{number}.npz") for number in range(len(self.catalogue.grids))]
        return [Regridder(each, self.plan.grid) for each in weights]

    @cached_property
    def _blocks(self) -> dict[str, np.ndarray]:
        """Room for a shard of every group, again and again: new memory takes as long to get as to fill."""
        sizes = {group: len(self.contents.groups[group]) for group in self.contents.dynamic}
        return {group: np.empty((self.plan.shard_hours, size, *self.plan.grid), "f4") for group, size in sizes.items()}

    def save(self, catalogue: Catalogue) -> None:
        """Let another catalogue take the place of the one that was made at the beginning."""
        self.catalogue = catalogue
        catalogue.save(self.parts / "catalogue.npz")

    def require_same_hours(self) -> None:
        """Files that changed since they were looked into must hold the same hours; their shards are written again.

        Raises:
            DataError: they do not.
        """
        about = self.catalogue.about
        changed = [file for file, content in about.content.items() if identity.glance(Path(file)) != content.glance]
        if not changed:
            return
        names = ", ".join(changed[:4]) + (" and others" if len(changed) > 4 else "")
        console.print(f"{names} changed since the catalogue was made: comparing")
        now = make_catalogue(self.path, self.plan.sources, self.plan.defined)
        forget(self.path)
        if self.base is not None:
            now = now.on(self.catalogue.grids, about.source_of, about.grid_of)
            after = {name: hours[0] - 1 for name, hours in self.catalogue.hours.items()}
            now = now.between({name: after.get(name, self.catalogue.span[1]) for name in now.rows}, self.catalogue.span[1])
        if not self.catalogue.equals(now):
            raise DataError(
                f"{changed[0]} holds other hours, or another grid or kind of unit, than when it was catalogued: remove "
                f"{layout.partial_path(self.path)} and {self.parts} to start again."
            )
        rest = {file for file, content in about.content.items() if content.rest}
        content = {file: known._replace(rest=file in rest) for file, known in now.about.content.items()}
        self.save(replace(now, about=replace(now.about, content=content)))

    def remaining(self, part: int = 0, parts: int = 1) -> list[int]:
        """Shards part, part + parts, ... that are not done, or no longer what was written."""
        kept = 0 if self.base is None else kept_shards(self.base, self.catalogue)
        return [shard for shard in self.shards[part::parts] if shard >= kept and not self._is_done(shard)]

    def load(self, shards: list[int], workers: int) -> None:
        """Read, regrid and write the given shards with `workers` processes, showing progress.

        Raises:
            DataError: a file, a unit or a value is wrong, the disk is full, or a worker died.
        """
        with _full_disk_named(self.path), _progress() as progress:
            task = progress.add_task(self.path.name, total=len(shards), rate="")
            read = 0
            several = workers > 1 and len(shards) > 1
            tasks = [(self.path, shard) for shard in shards]
            steps = results(write_shard, tasks, workers) if several else map(self.write, shards)
            for bytes_read in steps:
                read += bytes_read
                elapsed = progress.tasks[task].elapsed or 1e-9
                progress.update(task, advance=1, rate=f"{read / elapsed / 1e6:.0f} MB/s of source")

    def write(self, shard: int) -> int:
        """Write one shard; bytes of source read."""
        try:
            held = locks.hold(self.parts / f"lock-{shard}")
        except locks.Busy as busy:
            raise DataError(f"shard {shard} of {self.path} is being written by {busy}: wait for it, or end it.") from busy
        with held:
            return self._write_claimed(shard)

    def _write_claimed(self, shard: int) -> int:
        start = shard * self.plan.shard_hours
        count = min(self.plan.shard_hours, self.hours - start)
        mark = self.parts / f"sources-{shard}.json"
        mark.unlink(missing_ok=True)
        self._require_still(shard)
        blocks = {group: block[:count] for group, block in self._blocks.items()}
        for block in blocks.values():
            block.fill(np.nan)
        if self.base is not None and start < len(self.base.times):
            known = np.arange(start, min(len(self.base.times), start + count))
            for group, block in blocks.items():
                opening.require_whole(self.base, f"{group}/{shard}")
                ShardReader(self.base, group).read(known, out=block[: len(known)])
        groups, plan = self.contents.groups, self.plan
        fields = {member.name: blocks[group][:, i] for group in blocks for i, member in enumerate(groups[group])}
        judged = winds_of(plan.sources), plan.clip, plan.mask_beyond
        source = Reader(self.catalogue, self.regridders, read_as(plan.defined), fields, self.first + start, *judged)
        source.read()
        for group, block in blocks.items():
            writing.write_block(self.path, group, start, block)
        if plan.scan:
            codes = orders.sector_codes(fields["u"], fields["v"], plan.scan.regions, plan.scan.sectors)
            with being_written(self.parts / f"sectors-{shard}.npz") as partial, partial.open("wb") as opened:
                np.savez(opened, codes=codes)
        self._require_still(shard)
        write_text(mark, json.dumps(self._sources(shard)))
        return source.bytes_read

    def _sources(self, shard: int) -> dict[str, str]:
        """The files, and archives, that a shard's hours are read from, with their hashes."""
        start, about = self.first + shard * self.plan.shard_hours, self.catalogue.about
        numbers = self.catalogue.files_between(start, start + self.plan.shard_hours)
        files = sorted({str(on_disk(about.files[number])) for number in numbers})
        return {file: about.content[file].sha256 for file in files}

    def _require_still(self, shard: int) -> None:
        for file in self._sources(shard):
            if identity.glance(Path(file)) != self.catalogue.about.content[file].glance:
                raise DataError(f"{file} changed while it was read. Wait until it is complete, and run the same command again.")

    def _is_done(self, shard: int) -> bool:
        """Whether a shard is still what was written, and its files what was read."""
        try:
            if self.plan.scan:
                self._sectors(shard)
            recorded = json.loads((self.parts / f"sources-{shard}.json").read_text())
        except (FileNotFoundError, EOFError, ValueError, zipfile.BadZipFile):  # killed, or its page never reached the disk
            return False
        whole = all(writing.is_written(self.path, group, shard) for group in self.contents.dynamic)
        return whole and bool(recorded == self._sources(shard))

    def _sectors(self, shard: int) -> np.ndarray:
        """The wind sectors of a shard's hours; the file carries its own checksum."""
        with np.load(self.parts / f"sectors-{shard}.npz", allow_pickle=False) as file:
            return np.asarray(file["codes"])

    def finish(self) -> str:
        """Merge statistics, close the store, and write the wind-scan cache where one was asked for.

        Returns:
            The fingerprint.

        Raises:
            DataError: shards are missing.
        """
        self.require_same_hours()
        left = self.remaining()
        if left:
            raise DataError(
                f"{self.path}: {len(left)} of {len(self.shards)} shards are not written: {left[:8]}. Run the same command "
                "again."
            )
        codes = np.concatenate([self._sectors(shard) for shard in self.shards]) if self.plan.scan else None
        fingerprint = finishing.finalise(self.path, self._attachments())
        build_scan(self.path, self.plan, codes)
        return fingerprint

    def _attachments(self) -> dict[str, bytes]:
        """What a finished store keeps of its making: the plan, what its files were, grids and weights."""
        content, plan, about = self.catalogue.about.content, self.parts / PLAN, self.catalogue.about
        if self.base is not None:
            content = identity.recorded(self.base.path) | content
            plan = self.base.path / PLAN
        grids = io.BytesIO()
        known = np.array(json.dumps({"source_of": about.source_of, "grid_of": about.grid_of}))
        np.savez(grids, about=known, allow_pickle=False, **as_tables(self.catalogue.grids))
        own = {PLAN: plan.read_bytes(), identity.RECORD: identity.as_json(content), GRIDS: grids.getvalue()}
        return own | {file.name: file.read_bytes() for file in self.parts.glob("weights-*.npz")}


@cache
def _opened(path: Path) -> Preparation:
    """What a worker process writes shards of, one after the other."""
    return Preparation(path)


def write_shard(path: Path, shard: int) -> int:
    """Write one shard of a store in the making, in a process that writes several; bytes of source read."""
    return _opened(path).write(shard)


def kept_shards(base: Store, catalogue: Catalogue) -> int:
    """How many shards of a store stay as they are when hours are added: those before the first of these."""
    first_new = int((catalogue.span[0] - base.times[0]).astype("timedelta64[h]").astype(int))
    return min(len(base.times), first_new) // base.shard_hours


def grids_of(store: Store) -> tuple[list[Grid], list[int], dict[str, int]]:
    """The grids of a finished store's files, of which source and which fields each is."""
    with np.load(store.path / GRIDS, allow_pickle=False) as file:
        about = json.loads(str(file["about"]))
        return from_tables(file), about["source_of"], about["grid_of"]


def build_scan(path: Path, plan: Plan, codes: np.ndarray | None) -> None:
    """Build the wind-scan cache that a plan asks for, of a finished store; of sectors that are known, if any are."""
    if plan.scan:
        scan = plan.scan
        store = opening.open_store(path)
        wind_scan.build(store, scan.out, patch=scan.patch, regions=scan.regions, sectors=scan.sectors, codes=codes)


@contextmanager
def _full_disk_named(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise DataError(
            f"{layout.partial_path(path)} cannot be written ({error}). What is done is kept: make room, and run the "
            "same command again."
        ) from error


def _progress() -> Progress:
    columns: list[Any] = [TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TextColumn("shards")]
    columns += [TextColumn("{task.fields[rate]}"), TimeElapsedColumn(), TextColumn("left"), TimeRemainingColumn()]
    return Progress(*columns, console=console)
