"""Checkpoints on disk: find, verify, keep.

RUN/checkpoints/step-00000200/
  manifest.json          what the run must remember, every file with its sha256, every tensor with its hash (manifest.py)
  weights.safetensors    all parameters in fp32
  optimizer.safetensors  AdamW's state by parameter name (state.py)
RUN/checkpoints/latest   link to the newest, for people; no code depends on it

Commit (saving.py): training waits for a copy in memory only; a thread of every rank writes, syncs and hashes its files below
step-N.partial. When all have finished, at a step boundary, rank 0 writes the manifest, syncs, renames. What has its
final name is whole, at whatever instant a run dies.

Ours is a directory that is called exactly step-NNNNNNNN and whose manifest names that step; nothing else is read, counted
or removed.
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

from data import locks
from trainer.checkpoint.manifest import MANIFEST, CheckpointError, Manifest, read, sha256_of, step_of

log = logging.getLogger("trainer")
READING = "reading-"


@dataclass(frozen=True)
class Found:
    """A checkpoint of ours: with its manifest, or with what is wrong with that."""

    path: Path
    step: int
    manifest: Manifest | None
    problem: str = ""


def look(run_dir: Path) -> list[Found]:
    """All checkpoints that are ours, oldest first; files are not opened."""
    found = []
    for path in (run_dir / "checkpoints").glob("step-*"):
        step = step_of(path)
        if step is None or not path.is_dir() or not (path / MANIFEST).exists():
            continue
        try:
            manifest = read(path)
        except CheckpointError as error:
            found.append(Found(path, step, None, str(error)))
            continue
        if manifest.step == step:
            found.append(Found(path, step, manifest))
        else:
            log.info("WARNING: %s is left alone: its manifest is that of step %d", path, manifest.step)
    return sorted(found, key=lambda f: f.step)


def committed(run_dir: Path) -> list[Path]:
    """The directories of all checkpoints, oldest first."""
    return [found.path for found in look(run_dir)]


def newest(run_dir: Path) -> Path | None:
    """The last committed checkpoint, if there is one."""
    found = committed(run_dir)
    return found[-1] if found else None


def newest_valid(run_dir: Path) -> Path | None:
    """The last committed checkpoint whose every file has its recorded hash; damaged ones are reported.

    Raises:
        CheckpointError: there are checkpoints and none is valid.
    """
    candidates = look(run_dir)
    for candidate in reversed(candidates):
        problems = verify(candidate.path)
        if not problems:
            return candidate.path
        log.error("WARNING: %s is damaged and skipped: %s", candidate.path, "; ".join(problems))
    if candidates:
        raise CheckpointError(f"every checkpoint in {run_dir} is damaged (see above); start anew with another run_dir.")
    return None


def verify(checkpoint: Path) -> list[str]:
    """Re-hash every file; what is wrong, a line each."""
    try:
        files = manifest(checkpoint).files
    except CheckpointError as error:
        return [str(error)]
    wrong = []
    for name, expected in files.items():
        try:
            if sha256_of(checkpoint / name) != expected.sha256:
                wrong.append(f"{name} does not have the sha256 that was recorded")
        except OSError as error:
            wrong.append(f"{name} cannot be read ({error.strerror})")
    return wrong


def manifest(checkpoint: Path) -> Manifest:
    """Read a manifest and check that every file it lists is there in full.

    Raises:
        CheckpointError: absent, unreadable, or a file is missing or truncated.
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

    Kept are the last `keep_last` up to `newest_step` (which was just committed: what lies after it was stepped over when the
    run resumed, and may be damaged), every step that is a multiple of `keep_every`, the one whose own weights were validated
    with the lowest loss on the validation set of today, and any that a reader holds open or that cannot be read.
    """
    manifests: dict[Path, Manifest] = {}
    for found in look(run_dir):
        try:
            manifests[found.path] = manifest(found.path)
        except CheckpointError as error:
            log.error("WARNING: %s is left alone: %s", found.path, error)
    checkpoints = list(manifests)
    counted = [path for path, m in manifests.items() if newest_step is None or m.step <= newest_step]
    kept = set(counted[-keep_last:])
    if keep_every is not None:
        kept |= {path for path, m in manifests.items() if m.step % keep_every == 0}
    best = best_of(manifests)
    if best is not None:
        kept.add(best)
    for checkpoint in checkpoints:
        if checkpoint not in kept:
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
        CheckpointError: it was removed in this moment.
    """
    try:
        mark = locks.hold(checkpoint / f"{READING}{uuid.uuid4().hex}")
    except OSError as error:
        if error.errno not in (errno.EACCES, errno.EPERM, errno.EROFS):
            raise CheckpointError(f"{checkpoint} cannot be read ({error}).") from error
        log.info("WARNING: %s cannot be marked as being read (%s): a running job may remove it meanwhile", checkpoint, error)
        yield
        return
    with mark:
        if not (checkpoint / MANIFEST).exists():
            raise CheckpointError(f"{checkpoint} was just removed by its run: take a newer one.")
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
    try:
        return file.stat().st_size
    except OSError:
        return None
