"""Later files of the same source -> the same store, longer: what is there stays, and is not read again.

The longer store is built beside the old one, with its whole shards as hard links, and takes its
place at once at the end: runs that read the old one find the same hours in the same files. What
comes out is what preparing all files would give.
"""

from __future__ import annotations

import os
import shutil
import zipfile
from dataclasses import replace
from pathlib import Path

import numpy as np

from data import DataError
from data.prepare.beginning import begun_with, warn_of_lacking
from data.prepare.catalogue.catalogue import Catalogue
from data.prepare.catalogue.search import forget, make_catalogue
from data.prepare.inputs import identity
from data.prepare.plan import PLAN, Plan, read_plan
from data.prepare.preparation import Preparation, build_scan, console, grids_of, kept_shards
from data.prepare.sources.source import Source, files_of, read_sources, stored_as, winds_of
from data.process.written import exchange
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
    ours = replace(plan, sources=new, scan=None, base=path.absolute(), before=store.fingerprint)
    begun = _begun(longer, ours) or _begin(longer, store, ours, workers) if files_of(new) else None
    if begun:
        begun.load(begun.remaining(), workers)
        begun.finish()
        _settle(path, longer)
        store = opening.open_store(path)
    if plan.scan and store_of(plan.scan.out) != store.fingerprint:  # also where it was killed before that
        build_scan(path, plan, None)
    return store if begun else None


def _begun(longer: Path, plan: Plan) -> Preparation | None:
    """What an append of the same files has begun and not finished; None where there is no such thing."""
    if longer.exists() or not (layout.parts_path(longer) / PLAN).exists():
        return None
    begun = Preparation(longer)
    if begun.plan != plan:
        return None
    begun.require_same_hours()
    return begun


def _as_before(files: list[Path], config: Path | None, plan: Plan, path: Path) -> tuple[Source, ...]:
    """What is given, read as the store's sources were."""
    before = plan.sources
    if config is None:
        if len(before) > 1:
            raise DataError(f"{path} was made of {len(before)} sources: append with --config FILE, which lists them.")
        return (replace(before[0], files=files),)
    sources = read_sources(config, plan.defined)
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


def _plan_of(store: Store) -> Plan:
    """What the store was prepared with."""
    try:
        return read_plan(store.path / PLAN)
    except FileNotFoundError as error:
        raise DataError(
            f"{store.path} does not say how it was prepared: it is synthetic, or of a version that could not append. Prepare "
            "all files together again."
        ) from error


def _begin(longer: Path, store: Store, plan: Plan, workers: int) -> Preparation | None:
    """Catalogue the new files, and lay everything of the old store beside it that stays; None where nothing is new."""
    for left in (layout.partial_path(longer), layout.parts_path(longer), longer):  # of other files, or never put in its place
        shutil.rmtree(left, ignore_errors=True)
    stored_until = {name: _last_hour(store, name) for name in store.contents.hourly}
    found = make_catalogue(longer, plan.sources, plan.defined, workers).on(*grids_of(store))
    _require_later(found, store, stored_until)
    last, why = _reached(found, plan.sources, stored_until)
    catalogue = found.between({name: stored_until[stored_as(name)] for name in found.rows}, last)
    if not catalogue.rows:
        forget(longer)
        console.print(f"nothing is appended: {why} reaches to {last} only. Append its later files, too.")
        return None
    later = {number for rows in found.rows.values() for number in rows["file"][rows["hour"] > last].tolist()}
    rest = {str(identity.on_disk(plan.files[number])) for number in later}
    if rest:
        console.print(f"appended as far as {last}, to which {why} reaches; later hours are taken up the next time")
    content = {file: about._replace(rest=file in rest) for file, about in catalogue.about.content.items()}
    catalogue = replace(catalogue, about=replace(catalogue.about, content=content))
    _warn_of_lacking(catalogue, store, winds_of(plan.sources))
    span = " .. ".join(map(str, catalogue.span))
    console.print(f"{len(plan.files)} new files, {span}, to {store.times[0]} .. {store.times[-1]}")
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
    for weights in store.path.glob("weights-*.npz"):
        shutil.copyfile(weights, layout.parts_path(longer) / weights.name)
    return begun_with(longer, plan, catalogue)


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
        lasts = [max(found.hours[name][-1], stored_until[stored_as(name)]) for name in own]
        reached.append((min(lasts) if own else max(stored_until[stored_as(name)] for name in source.fields), source.kind))
        absent = [stored_as(name) for name in source.fields if own and name not in own]
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


def _require_later(found: Catalogue, store: Store, stored_until: dict[str, np.datetime64]) -> None:
    """Every variable's hours are after those that the store has of it, and in no split, which runs have learned from.

    Files of which earlier hours were taken are no exception to the latter.
    """
    known = {path for path, about in identity.recorded(store.path).items() if about.rest}
    end = store.times[max(last for ranges in store.splits.values() for _, last in ranges) - 1]
    files = found.about.files
    for name, rows in found.rows.items():
        last = stored_until[stored_as(name)]
        for row in rows[rows["hour"] <= last]:
            if str(identity.on_disk(files[row["file"]])) not in known:
                raise DataError(
                    f"{files[row['file']]} holds '{name}' at {row['hour']}, and {store.path} has it up to {last}: only later "
                    "hours can be appended. Leave it out, or prepare all files together again."
                )
        early = rows[(rows["hour"] > last) & (rows["hour"] <= end)]
        if early.size:
            raise DataError(
                f"{files[early[0]['file']]} holds '{name}' at {early[0]['hour']}, where it is missing in {store.path}, inside "
                "its splits, which stay as they are. Leave it out, or prepare all files together again."
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
