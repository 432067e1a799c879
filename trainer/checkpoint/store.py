"""Checkpoints on disk: find, verify, keep.

RUN/checkpoints/step-00000200/
  manifest.json          what the run must remember, every file with its sha256, every tensor with its hash (manifest.py)
  weights.safetensors    all parameters in fp32
  optimizer.safetensors  AdamW's state by parameter name (state.py)
RUN/checkpoints/latest   link to the newest, for people; no code depends on it

Commit (saving.py): training waits for a copy in memory only; a thread of every rank writes, syncs and hashes its files below
step-N.partial. When all have finished, at a step boundary, rank 0 writes the manifest, syncs, renames. What has its
final name is whole, at whatever instant a run dies.

Ours is a directory that is called exactly step-NNNNNNNN and whose manifest names that step; nothing
else is read, counted or removed. Every start of a run is named in the manifests that come after it,
so a checkpoint that the run has stepped over is told from one that it has grown out of.
"""

from __future__ import annotations

import errno
import logging
import math
import shutil
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from data.process import locks
from trainer.checkpoint.manifest import (
    MANIFEST,
    CheckpointError,
    Manifest,
    Memory,
    Unreadable,
    read,
    sha256_of,
    step_of,
    unreadable,
)

log = logging.getLogger("trainer")
READING = "reading-"


class Gone(CheckpointError):
    """A checkpoint was removed while it was being opened."""


@dataclass(frozen=True)
class Found:
    """A checkpoint of ours: with its manifest, or with what is wrong with that."""

    path: Path
    step: int
    manifest: Manifest | None
    problem: str = ""


def look(run_dir: Path) -> list[Found]:
    """All checkpoints that are ours, oldest first; files are not opened.

    One that was made after more starts of the run is the newer one, whatever its step.

    Raises:
        Unreadable: the file system refuses the directory now.
    """
    while True:
        listed = _directories(run_dir)
        found = [one for path, step in listed.items() if (one := _found(path, step)) is not None]
        if _directories(run_dir) == listed:  # or a running job added and removed some meanwhile
            break
    starts = {f.path: len(f.manifest.starts) for f in found if f.manifest is not None}
    most = max(starts.values(), default=0)
    return sorted(found, key=lambda f: (starts.get(f.path, most), f.step))


def _found(path: Path, step: int) -> Found | None:
    """A checkpoint of ours; None of a directory that is not one."""
    try:
        manifest = read(path)
    except CheckpointError as error:
        if isinstance(error, Unreadable) or (path / MANIFEST).exists():
            return Found(path, step, None, str(error))
        return None
    if manifest.step == step:
        return Found(path, step, manifest)
    log.info("WARNING: %s is left alone: its manifest is that of step %d", path, manifest.step)
    return None


def newest(run_dir: Path) -> Path | None:
    """The last committed checkpoint, if there is one."""
    found = look(run_dir)
    return found[-1].path if found else None


def descends(newer: Memory, older: Memory) -> bool:
    """Whether a checkpoint has grown out of another one, or the other was stepped over."""
    starts = len(older.starts)
    if newer.starts[:starts] != older.starts:
        return False
    left_at = newer.starts[starts].step if len(newer.starts) > starts else newer.progress.step
    return older.progress.step <= left_at


def put_aside(checkpoint: Path) -> Path:
    """Keep what stands under the name of a checkpoint under another one."""
    aside = f"{checkpoint.name}.aside-{uuid.uuid4().hex[:8]}"
    return checkpoint.rename(checkpoint.with_name(aside))


def verify(checkpoint: Path) -> list[str]:
    """Re-hash every file of a checkpoint; what is wrong, a line each.

    Raises:
        Unreadable: the file system refuses one now.
    """
    try:
        files = manifest(checkpoint).files
    except Unreadable:
        raise
    except CheckpointError as error:
        return [str(error)]
    wrong = []
    for name, expected in files.items():
        try:
            if sha256_of(checkpoint / name) != expected.sha256:
                wrong.append(f"{name} does not have the sha256 that was recorded")
        except OSError as error:
            raise unreadable(checkpoint / name, error) from error
    return wrong


def manifest(checkpoint: Path) -> Manifest:
    """Read a manifest and check that every file it lists is there in full.

    Raises:
        Unreadable: the file system refuses it now.
        CheckpointError: absent, or a file is missing or truncated.
    """
    content = read(checkpoint)
    for name, expected in content.files.items():
        size = size_of(checkpoint / name)
        if size != expected.bytes:
            raise CheckpointError(
                f"{checkpoint / name} has {size} bytes, {expected.bytes} were written: remove {checkpoint} to use an older one."
            )
    return content


def retain(run_dir: Path, keep_last: int, keep_every: int | None, newest_step: int | None = None) -> None:
    """Remove older checkpoints, from manifests alone.

    Kept are the last `keep_last` up to `newest_step`, which was just committed; every step that is
    a multiple of `keep_every`; the one whose own weights were validated with the lowest loss on the
    validation set of today; any that a reader holds open or that cannot be read; and what the
    newest one has not grown out of.
    """
    manifests: dict[Path, Manifest] = {}
    for found in look(run_dir):
        try:
            manifests[found.path] = manifest(found.path)
        except CheckpointError as error:
            log.error("WARNING: %s is left alone: %s", found.path, error)
    last = next((m for m in reversed(manifests.values()) if newest_step in (None, m.step)), None)
    manifests = {path: m for path, m in manifests.items() if last is not None and descends(last, m)}
    kept = set(list(manifests)[-keep_last:])
    if keep_every is not None:
        kept |= {path for path, m in manifests.items() if m.step % keep_every == 0}
    best = best_of(manifests)
    if best is not None:
        kept.add(best)
    for checkpoint in manifests.keys() - kept:
        _remove_unless_read(checkpoint)


def best_of(manifests: dict[Path, Manifest]) -> Path | None:
    """The checkpoint whose own weights have the lowest validation loss, among those scored on the newest one's set."""
    scored = {path: m for path, m in manifests.items() if m.own_val_loss is not None and math.isfinite(m.own_val_loss)}
    if not scored:
        return None
    newest_set = list(scored.values())[-1].progress.validated_on
    comparable = {path: m for path, m in scored.items() if m.progress.validated_on == newest_set}
    return min(comparable, key=lambda path: (comparable[path].own_val_loss, path))


@contextmanager
def reading(checkpoint: Path) -> Iterator[None]:
    """Hold a checkpoint open, so that a running job's retention leaves it alone.

    Raises:
        Gone: it was removed in this moment.
        Unreadable: the file system refuses it now.
    """
    gone = Gone(f"{checkpoint} is not there, or was just removed by its run: take a newer one.")
    checkpoint = checkpoint.resolve()  # `latest` may be another one soon
    try:
        mark = locks.hold(checkpoint / f"{READING}{uuid.uuid4().hex}", vital=False)
    except FileNotFoundError as error:
        if (checkpoint / MANIFEST).exists():
            raise unreadable(checkpoint, OSError(errno.EIO, f"it cannot be marked as being read: {error}")) from error
        raise gone from error
    except OSError as error:
        if error.errno not in (errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOSPC, errno.EDQUOT):
            raise unreadable(checkpoint, error) from error
        log.info("WARNING: %s cannot be marked as being read (%s): a running job may remove it meanwhile", checkpoint, error)
        yield
        return
    with mark:
        if not (checkpoint / MANIFEST).exists():
            raise gone
        yield


def _is_read(checkpoint: Path) -> bool:
    return any(locks.holder(mark) for mark in checkpoint.glob(f"{READING}*") if mark.suffix == "")


def _remove_unless_read(checkpoint: Path) -> None:
    if checkpoint.is_symlink():
        log.info("WARNING: %s is a link that somebody made, and stays", checkpoint)
    elif _is_read(checkpoint):
        log.info("%s is being read and stays for now", checkpoint)
    else:
        # Renamed first: an interrupted removal leaves a partial, never a committed checkpoint with files missing.
        doomed = checkpoint.with_name(checkpoint.name + ".partial")
        shutil.rmtree(doomed, ignore_errors=True)
        checkpoint.rename(doomed)
        if _is_read(doomed):  # somebody came in between
            doomed.rename(checkpoint)
        else:
            shutil.rmtree(doomed)


def size_of(file: Path) -> int | None:
    """Bytes of a file; None where there is none.

    Raises:
        Unreadable: the file system refuses it now.
    """
    try:
        return file.stat().st_size
    except FileNotFoundError:
        return None
    except OSError as error:
        raise unreadable(file, error) from error


def _directories(run_dir: Path) -> dict[Path, int]:
    """Directories that are called like checkpoints of ours, and their steps.

    Raises:
        Unreadable: the file system refuses the directory now, or it is a link to nowhere.
    """
    folder = run_dir / "checkpoints"
    try:
        paths = sorted(path for path in folder.iterdir() if path.is_dir())
        return {path: step for path in paths if (step := step_of(path)) is not None}
    except FileNotFoundError as error:
        if not folder.is_symlink():
            return {}
        raise Unreadable(
            f"{folder} links to {folder.readlink()}, which is not there now: mount it, or bring it "
            "back. To begin anew choose another run_dir."
        ) from error
    except OSError as error:
        raise unreadable(folder, error) from error
