"""One shard: read its hours, regrid, write, mark done; nobody else touches it."""

from __future__ import annotations

import io
import json
import zipfile
from dataclasses import dataclass
from functools import cached_property, lru_cache
from pathlib import Path

import numpy as np
import scipy.sparse
import zarr

from data import DataError
from data.prepare.catalogue.catalogue import Catalogue, load_catalogue
from data.prepare.fields import Reader
from data.prepare.grids.grid import as_tables
from data.prepare.grids.regrid import Regridder
from data.prepare.inputs import identity
from data.prepare.inputs.given import on_disk
from data.prepare.plan import PLAN, Scan, defined_in
from data.prepare.sources.source import sources_in, winds_of
from data.prepare.sources.spellings import read_as
from data.process import locks
from data.process.written import being_written, write_text
from data.store import layout, writing
from data.store.layout import Store
from data.store.opening import open_store, require_whole
from data.store.reader import ShardReader
from data.variables import Contents, Variable
from data.wind_scan import orders

GRIDS = "grids.npz"  # of the files that a finished store was made of


@dataclass(frozen=True)
class _Job:
    """What every process needs to write a shard."""

    contents: Contents
    catalogue: Catalogue
    regridders: list[Regridder]  # one for each grid of the catalogue
    become: dict[str, Variable]  # what fields become
    first: np.datetime64
    hours: int
    shard_hours: int
    scan: Scan | None
    clip: tuple[str, ...]
    mask_beyond: tuple[str, ...]
    winds: str
    base: Store | None  # the store that hours are appended to

    @cached_property
    def blocks(self) -> dict[str, np.ndarray]:
        """Room for a shard of every group, again and again: new memory takes as long to get as to fill."""
        shape = self.regridders[0].shape
        channels = {group: len(self.contents.groups[group]) for group in self.contents.dynamic}
        return {group: np.empty((self.shard_hours, count, *shape), "f4") for group, count in channels.items()}

    @property
    def kept_shards(self) -> int:
        """Shards of the base that stay as they are."""
        return 0 if self.base is None else kept_shards(self.base, self.catalogue)

    def files_of(self, shard: int) -> list[int]:
        """Numbers of the files that a shard's hours are read from."""
        start = self.first + shard * self.shard_hours
        return self.catalogue.files_between(start, start + min(self.shard_hours, self.hours - shard * self.shard_hours))


@lru_cache(maxsize=1)
def job_of(path: Path) -> _Job:
    parts = layout.parts_path(path)
    plan = json.loads((parts / PLAN).read_text())
    found = load_catalogue(parts / "catalogue.npz")
    root = zarr.open_group(layout.partial_path(path), mode="r")
    hours = np.asarray(root["time"])
    stored = [scipy.sparse.load_npz(parts / f"weights-{number}.npz") for number in range(len(found.grids))]
    regridders = [Regridder(weights, tuple(plan["grid"])) for weights in stored]
    stated = plan["scan"]
    scan = stated and Scan(Path(stated["out"]), stated["patch"], tuple(stated["regions"]), stated["sectors"])
    return _Job(
        layout.contents_of(root),
        found,
        regridders,
        read_as(defined_in(plan)),
        layout.EPOCH + hours[0],
        len(hours),
        plan["shard_hours"],
        scan,
        plan["clip"],
        plan["mask_beyond"],
        winds_of(sources_in(plan)),
        open_store(Path(plan["base"])) if "base" in plan else None,
    )


def write_shard(path: Path, shard: int) -> int:
    """Bytes of source read."""
    job = job_of(path)
    try:
        held = locks.hold(layout.parts_path(path) / f"lock-{shard}")
    except locks.Busy as busy:
        raise DataError(f"shard {shard} of {path} is being written by {busy}: wait for it, or end it.") from busy
    with held:
        return _write_claimed(path, job, shard)


def _write_claimed(path: Path, job: _Job, shard: int) -> int:
    start = shard * job.shard_hours
    count = min(job.shard_hours, job.hours - start)
    parts = layout.parts_path(path)
    used = job.files_of(shard)
    files = sorted({on_disk(job.catalogue.files[number]) for number in used})
    content = {str(file): identity.content_of(parts, file) for file in files}
    (parts / f"sources-{shard}.json").unlink(missing_ok=True)
    groups, blocks = job.contents.groups, {group: block[:count] for group, block in job.blocks.items()}
    for block in blocks.values():
        block.fill(np.nan)
    fields = {member.name: blocks[group][:, i] for group in blocks for i, member in enumerate(groups[group])}
    if job.base is not None and start < len(job.base.times):
        known = np.arange(start, min(len(job.base.times), start + count))
        for group, block in blocks.items():
            require_whole(job.base, f"{group}/{shard}")
            ShardReader(job.base, group).read(known, out=block[: len(known)])
    judged = job.clip, job.mask_beyond
    source = Reader(job.catalogue, job.regridders, job.become, fields, job.first + start, job.winds, *judged)
    source.read()
    for group, block in blocks.items():
        writing.write_block(path, group, start, block)
        if group == "weather" and job.scan:
            u, v = (block[:, job.contents.channel(name)] for name in ("u", "v"))
            codes = orders.sector_codes(u, v, job.scan.regions, job.scan.sectors)
            kept = layout.parts_path(path) / f"sectors-{shard}.npz"
            with being_written(kept) as partial, partial.open("wb") as opened:
                np.savez(opened, codes=codes)
    for file in files:
        identity.require_still(parts, file)
    write_text(parts / f"sources-{shard}.json", json.dumps(content))
    return source.bytes_read


def attachments_of(path: Path) -> dict[str, bytes]:
    """What a finished store keeps of its making: the plan, what its files were, grids and weights."""
    job, parts = job_of(path), layout.parts_path(path)
    about = identity.describe(parts, job.catalogue.files)
    plan = (parts / PLAN).read_bytes()
    if job.base is not None:
        about = identity.recorded(job.base.path) | about
        plan = (job.base.path / PLAN).read_bytes()
    grids = io.BytesIO()
    known = {"source_of": job.catalogue.source_of, "grid_of": job.catalogue.grid_of}
    np.savez(grids, about=np.array(json.dumps(known)), **as_tables(job.catalogue.grids))  # type: ignore[arg-type]
    kept = {PLAN: plan, identity.RECORD: json.dumps(about, indent=0).encode(), GRIDS: grids.getvalue()}
    return kept | {file.name: file.read_bytes() for file in parts.glob("weights-*.npz")}


def kept_shards(base: Store, catalogue: Catalogue) -> int:
    """How many shards of a store stay as they are when hours are added: those before the first of these."""
    first_new = int((catalogue.span[0] - base.times[0]).astype("timedelta64[h]").astype(int))
    return min(len(base.times), first_new) // base.shard_hours


def is_done(path: Path, shard: int) -> bool:
    if job_of(path).scan:
        try:
            sectors_of(path, shard)
        except (FileNotFoundError, EOFError, ValueError, zipfile.BadZipFile):
            return False
    return _is_of_its_sources(path, shard) and all(
        writing.is_written(path, group, shard) for group in job_of(path).contents.dynamic
    )


def _is_of_its_sources(path: Path, shard: int) -> bool:
    """Whether the files that a shard was read from still hold what was read."""
    parts = layout.parts_path(path)
    try:
        recorded: dict[str, str] = json.loads((parts / f"sources-{shard}.json").read_text())
    except (FileNotFoundError, ValueError):  # killed before it was done, or before its page reached the disk
        return False
    return all(identity.content_of(parts, Path(file)) == sha256 for file, sha256 in recorded.items())


def sectors_of(path: Path, shard: int) -> np.ndarray:
    """The wind sectors of a shard's hours; the file carries its own checksum."""
    with np.load(layout.parts_path(path) / f"sectors-{shard}.npz", allow_pickle=False) as file:
        return np.asarray(file["codes"])
