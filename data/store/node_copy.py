"""A copy of a store on a node's own disk or memory, made once by the node's ranks together and shared by them."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

from data import DataError
from data.store.layout import EMPTY, Store, hash_of, shard_file


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
        being_written = target.with_name(f"{target.name}.{os.getpid()}.partial")
        shutil.copyfile(store.path / file, being_written)
        if file in hashes and hash_of(being_written) != hashes[file]:
            being_written.unlink()
            raise DataError(
                f"{store.path / file} is not what was written, or its copy to {folder} failed. Run "
                f"`python -m data verify {store.path}`."
            )
        being_written.rename(target)


def _is_there(store: Store, copy: Path, file: Path, hashes: dict[Path, str]) -> bool:
    if not (copy / file).exists():
        return False
    if file in hashes:
        return hash_of(copy / file) == hashes[file]
    return (copy / file).read_bytes() == (store.path / file).read_bytes()
