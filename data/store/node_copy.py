"""A copy of a store on a node's own disk or memory, made once by the node's ranks together and shared by them."""

from __future__ import annotations

import shutil
import socket
from dataclasses import replace
from pathlib import Path

import torch.distributed as dist

from data import DataError
from data.process.written import being_written
from data.store.layout import EMPTY, Store, hash_of, shard_file


def copied(store: Store, folder: Path) -> Store:
    """Fill the node's copy of a store, all its ranks together, and open it; collective.

    Raises:
        DataError: on every rank, if it could not be filled on one.
    """
    hosts: list[str] = [""] * dist.get_world_size()
    dist.all_gather_object(hosts, socket.gethostname())
    here = [rank for rank, host in enumerate(hosts) if host == socket.gethostname()]
    problem = None
    try:
        fill(store, folder, here.index(dist.get_rank()), len(here))
    except (DataError, OSError) as error:
        problem = f"{socket.gethostname()}: {error}"
    problems: list[str | None] = [None] * len(hosts)
    dist.all_gather_object(problems, problem)
    for told in problems:
        if told is not None:
            raise DataError(told)
    return replace(store, path=place(store, folder))


def place(store: Store, folder: Path) -> Path:
    """Where the copy of this content stands; another fingerprint is another copy."""
    return folder / f"{store.path.stem}-{store.fingerprint[:16]}.zarr"


def fill(store: Store, folder: Path, part: int, parts: int) -> None:
    """Copy every `parts`-th file of the store, and check what is there already against the recorded hashes.

    Open the copy after all parts are done: its fingerprint is checked then.

    Raises:
        DataError: there is no room, or a shard differs from its hash after it was copied.
    """
    copy = place(store, folder)
    hashes = {shard_file(name): expected for name, expected in store.shard_hashes().items() if expected != EMPTY}
    others = {f.relative_to(store.path) for f in store.path.rglob("*") if f.is_file()} - set(hashes)
    files = sorted([*hashes, *others])
    mine = [file for file in files[part::parts] if not _is_there(store, copy, file, hashes)]
    folder.mkdir(parents=True, exist_ok=True)
    wanted, free = sum((store.path / file).stat().st_size for file in mine), shutil.disk_usage(folder).free
    if wanted > free:
        raise DataError(
            f"data.cache_dir {folder} has {free / 1e9:.1f} GB free, 1/{parts} of the copy of {store.path} needs "
            f"{wanted / 1e9:.1f} GB. Make room, or unset data.cache_dir."
        )
    for file in mine:
        target = copy / file
        target.parent.mkdir(parents=True, exist_ok=True)
        with being_written(target) as partial:
            shutil.copyfile(store.path / file, partial)
            if file in hashes and hash_of(partial) != hashes[file]:
                raise DataError(
                    f"{store.path / file} is not what was written, or its copy to {folder} failed. "
                    f"Run `python -m data verify {store.path}`."
                )


def _is_there(store: Store, copy: Path, file: Path, hashes: dict[Path, str]) -> bool:
    if not (copy / file).exists():
        return False
    if file in hashes:
        return hash_of(copy / file) == hashes[file]
    return (copy / file).read_bytes() == (store.path / file).read_bytes()
