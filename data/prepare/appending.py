"""Later files of the same source -> the same store, longer: what is there stays, and is not read again.

The longer store is built beside the old one, with its whole shards as hard links, and takes its
place at once at the end: runs that read the old one find the same hours in the same files. What
comes out is what preparing all files would give.
"""

from __future__ import annotations

import json
import os
import shutil
import zipfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from data import DataError
from data.prepare.beginning import build_scan, console, require_same_hours, warn_of_lacking
from data.prepare.catalogue.catalogue import Catalogue, load_catalogue
from data.prepare.catalogue.search import forget, make_catalogue
from data.prepare.grids.grid import Grid, from_tables
from data.prepare.inputs import identity
from data.prepare.plan import PLAN, Scan, defined_in
from data.prepare.shards import GRIDS, job_of, kept_shards
from data.prepare.sources.source import Source, files_of, read_sources, sources_in, winds_of, written_down
from data.prepare.sources.spellings import DEW_POINT
from data.prepare.stages import finish, load, remaining
from data.process.written import exchange, write_text
from data.store import layout, opening, writing
from data.store.finishing import MARKS
from data.store.layout import Store
from data.wind_scan.cache import store_of


def append(path: Path, files: list[Path], workers: int, config: Path | None = None) -> Store | None:
    """Add the hours of files that the store was not made of; run it again after an interruption.

    Hours are taken as far as every source of the store reaches; what is later is taken up the next
    time.

    Args:
        files: of the store's only source.
        config: where it has several, the file that lists them.

    Returns:
        The longer store; None where there is nothing to add.

    Raises:
        DataError: a file holds hours that the store has, or other grids, the sources are others, or
            the store was made by an earlier version.
    """
    longer = path.with_name(path.name + ".appended")
    _settle(path, longer)
    store = opening.open_store(path)
    plan = _plan_of(store)
    sources = _as_before(files, config, plan, path)
    identity.require_unchanged(path, files_of(sources))
    known = identity.recorded(path)
    new = tuple(replace(source, files=identity.unknown(source.files, known)) for source in sources)
    if not any(source.files for source in new):
        _lengthen_scan(store, plan)  # where it was killed before that
        return None
    own = {"scan": None, "base": str(path.absolute()), "before": store.fingerprint}
    own = plan | written_down(new) | own
    job_of.cache_clear()  # this process may have prepared another store here
    parts = layout.parts_path(longer)
    begun = (parts / PLAN).exists() and not longer.exists()
    if begun and json.loads((parts / PLAN).read_text()) == own:
        require_same_hours(longer, load_catalogue(parts / "catalogue.npz"))
    elif not _begin(longer, store, own, workers):
        return None
    load(longer, remaining(longer), workers)
    finish(longer)
    _settle(path, longer)
    store = opening.open_store(path)
    _lengthen_scan(store, plan)
    return store


def _as_before(files: list[Path], config: Path | None, plan: dict[str, Any], path: Path) -> tuple[Source, ...]:
    """What is given, read as the store's sources were."""
    before = sources_in(plan)
    if config is None:
        if len(before) > 1:
            raise DataError(f"{path} was made of {len(before)} sources: append with --config FILE, which lists them.")
        return (replace(before[0], files=files),)
    sources = read_sources(config, defined_in(plan))
    if [replace(source, files=[]) for source in sources] != [replace(source, files=[]) for source in before]:
        kinds = " + ".join(source.kind for source in before)
        raise DataError(f"{config} is not what {path} was made of ({kinds}): only the files of a source may be others.")
    return sources


def _settle(path: Path, longer: Path) -> None:
    """Let the longer store, once it is whole, take the place of the old one, which goes; at once, for those who read it."""
    if longer.exists() and not path.exists():  # killed where two directories cannot be exchanged at once
        longer.rename(path)
    doomed = path.with_name(path.name + ".replaced")  # no store once it is half removed
    shutil.rmtree(doomed, ignore_errors=True)
    if longer.exists():
        if opening.open_store(longer).fingerprint not in opening.open_store(path).earlier:
            exchange(path, longer)
        longer.rename(doomed)
        shutil.rmtree(doomed, ignore_errors=True)


def _lengthen_scan(store: Store, plan: dict[str, Any]) -> None:
    """Let the wind scan that was prepared with the store follow it."""
    if not plan["scan"]:
        return
    about = plan["scan"]
    scan = Scan(Path(about["out"]), about["patch"], tuple(about["regions"]), about["sectors"])
    if store_of(scan.out) != store.fingerprint:
        build_scan(store.path, scan, None)


def _plan_of(store: Store) -> dict[str, Any]:
    """What the store was prepared with."""
    try:
        plan: dict[str, Any] = json.loads((store.path / PLAN).read_text())
    except FileNotFoundError as error:
        raise DataError(
            f"{store.path} does not say how it was prepared: it is synthetic, or of a version that could not append. Prepare "
            "all files together again."
        ) from error
    return plan


def _begin(longer: Path, store: Store, plan: dict[str, Any], workers: int) -> bool:
    """Catalogue the new files, and lay everything of the old store beside it that stays; False where nothing is new."""
    parts = layout.parts_path(longer)
    for left in (layout.partial_path(longer), parts, longer):  # of other files, or never put in its place
        shutil.rmtree(left, ignore_errors=True)
    sources = sources_in(plan)
    files = files_of(sources)
    seen = identity.glance(files)
    stored_until = {name: _last_hour(store, name) for name in store.contents.hourly}
    found = make_catalogue(longer, sources, defined_in(plan), workers).on(*_grids(store))
    _require_later(found, store, stored_until)
    last, why = _reached(found, sources, stored_until)
    catalogue = found.between({name: stored_until[_stored(name)] for name in found.hours}, last)
    forget(longer)
    if not catalogue.fields:
        console.print(f"nothing is appended: {why} reaches to {last} only. Append its later files, too.")
        return False
    later = {n for name, hours in found.hours.items() for n in found.file_of[name][hours > last].tolist()}
    rest = {str(identity.on_disk(found.files[number])) for number in later}
    if rest:
        console.print(f"appended as far as {last}, to which {why} reaches; later hours are taken up the next time")
    _warn_of_lacking(catalogue, store, winds_of(sources))
    console.print(f"{len(files)} new files, {' .. '.join(map(str, catalogue.span))}, to {store.times[0]} .. {store.times[-1]}")
    writing.create(
        longer,
        times=np.arange(store.times[0], max(store.times[-1], catalogue.span[1]) + 1),
        lat=store.lat,
        lon=store.lon,
        static=store.static,
        splits={name: ranges[0] for name, ranges in store.splits.items()},
        shard_hours=store.shard_hours,
        provenance=store.provenance,
        contents=store.contents,
        earlier=(*store.earlier, store.fingerprint),
    )
    _keep_shards(longer, store, kept_shards(store, catalogue))
    catalogue.save(parts / "catalogue.npz")
    identity.begin(parts, seen, rest)
    for weights in store.path.glob("weights-*.npz"):
        shutil.copyfile(weights, parts / weights.name)
    write_text(parts / PLAN, json.dumps(plan))
    return True


def _stored(name: str) -> str:
    return "rh" if name == DEW_POINT else name


def _last_hour(store: Store, name: str) -> np.datetime64:
    """The last hour at which a store has any value of a variable."""
    there = store.missing[store.contents.group(name)][:, store.contents.channel(name)] < 1.0
    return store.times[np.flatnonzero(there)[-1]] if there.any() else store.times[0] - 1


def _reached(
    found: Catalogue, sources: tuple[Source, ...], stored_until: dict[str, np.datetime64]
) -> tuple[np.datetime64, str]:
    """As far as every source reaches with its new files, and the source that reaches least far.

    A variable that is in none of a source's new files does not count: it is missing in them, as
    `prepare` has it.
    """
    reached = []
    for source in sources:
        own = [name for name in source.fields if name in found.hours]
        lasts = [max(found.hours[name][-1], stored_until[_stored(name)]) for name in own]
        reached.append((min(lasts) if own else max(stored_until[_stored(name)] for name in source.fields), source.kind))
        absent = [_stored(name) for name in source.fields if own and name not in own]
        if absent:
            console.print(
                f"WARNING: {', '.join(absent)}: in none of the new files of '{source.kind}', and missing in their hours"
            )
    return min(reached)


def _warn_of_lacking(catalogue: Catalogue, store: Store, winds: str) -> None:
    """Say which fields will be missing for want of what they are converted with.

    Raises:
        DataError: that was read before, and is known on the grid of the store alone.
    """
    air = [_last_hour(store, name) for name in ("temp", "psfc") if name in store.contents.names("weather")]
    known = store.times[store.times <= min(air)] if air else store.times[:0]
    for name, hours in catalogue.incomplete(winds, known).items():
        if np.isin(hours, known).any():
            needed = " and ".join(catalogue.converted_with(name, winds))
            raise DataError(
                f"the new files hold '{name}' at {hours[0]}, and the {needed} that it is converted "
                "with were read before. Prepare all files together again."
            )
    warn_of_lacking(catalogue, winds, known)


def _grids(store: Store) -> tuple[list[Grid], list[int], dict[str, int]]:
    """The grids of a store's files, of which source and which fields; those of the first versions had one source."""
    with np.load(store.path / GRIDS, allow_pickle=False) as file:
        grids = from_tables(file)
        if "about" not in file:
            return grids, [0] * len(grids), {}
        about = json.loads(str(file["about"]))
    return grids, about["source_of"], about["grid_of"]


def _require_later(catalogue: Catalogue, store: Store, stored_until: dict[str, np.datetime64]) -> None:
    """Every variable's hours are after those that the store has of it, and in no split, which runs have learned from.

    Files of which earlier hours were taken are no exception to the latter.
    """
    known = {path for path, about in identity.recorded(store.path).items() if about.get("rest")}
    end = max(last for ranges in store.splits.values() for _, last in ranges)
    for name, hours in catalogue.hours.items():
        last = stored_until[_stored(name)]
        for number in np.unique(catalogue.file_of[name][hours <= last]).tolist():
            file = catalogue.files[number]
            if str(identity.on_disk(file)) not in known:
                first = hours[catalogue.file_of[name] == number][0]
                raise DataError(
                    f"{file} holds '{name}' at {first}, and {store.path} has it up to {last}: only "
                    "later hours can be appended. Leave it out, or prepare all files together "
                    "again."
                )
        early = hours[(hours > last) & (hours <= store.times[end - 1])]
        if early.size:
            file = catalogue.files[catalogue.file_of[name][int(np.flatnonzero(hours == early[0])[0])]]
            raise DataError(
                f"{file} holds '{name}' at {early[0]}, where it is missing in {store.path}, inside "
                "its splits, which stay as they are. Leave it out, or prepare all files together "
                "again."
            )


def _keep_shards(longer: Path, store: Store, count: int) -> None:
    """Shards in which nothing is new, and what is known of them; those after them are written anew."""
    hashes = store.shard_hashes()
    with zipfile.ZipFile(store.path / MARKS) as marks:
        for name in hashes:
            group, shard = name.split("/")
            if int(shard) >= count:
                continue
            source, target = store.path / layout.shard_file(name), layout.partial_path(longer) / layout.shard_file(name)
            if source.exists():
                target.parent.mkdir(parents=True, exist_ok=True)
                _link(source, target)
            mark = writing.done_mark(longer, group, int(shard))
            mark.write_bytes(marks.read(mark.name))


def _link(source: Path, target: Path) -> None:
    try:
        os.link(source, target)
    except PermissionError:  # a file system without hard links
        shutil.copyfile(source, target)
