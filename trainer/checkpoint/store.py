"""Checkpoints on disk: commit, verify, find, keep.

RUN/checkpoints/step-00000200/
  manifest.json          what the run must remember, every file with its sha256, every tensor with its hash (manifest.py)
  weights.safetensors    all parameters in fp32
  optimizer.safetensors  AdamW's state by parameter name (state.py)
RUN/checkpoints/latest   link to the newest, for people; no code depends on it

Commit: training waits for a copy in memory only; a thread of every rank writes, syncs and hashes its files below
step-N.partial. When all have finished, at a step boundary, rank 0 writes the manifest, syncs, renames. What has its
final name is whole, at whatever instant a run dies.

Ours is a directory that is called exactly step-NNNNNNNN and whose manifest names that step; nothing else is read, counted
or removed.
"""

from __future__ import annotations

import errno
import hashlib
import logging
import math
import os
import shutil
import time
import uuid
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import torch.distributed as dist
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from data import locks
from trainer.checkpoint import consistency
from trainer.checkpoint.manifest import MANIFEST, CheckpointError, FileRecord, Manifest, Memory, read, step_of, write
from trainer.checkpoint.state import WEIGHTS_FILE, Named

log = logging.getLogger("trainer")
READING = "reading-"
REPLACED = ".replaced.partial"
SEEN_WITHIN_S = 30.0


@dataclass(frozen=True)
class Found:
    """A checkpoint of ours: with its manifest, or with what is wrong with that."""

    path: Path
    step: int
    manifest: Manifest | None
    problem: str = ""


class Saving:
    """One checkpoint that a thread of every rank is writing while training goes on; nothing is visible before `commit`."""

    def __init__(self, run_dir: Path, memory: Memory, files: dict[Path, dict[str, Tensor]]) -> None:
        """Start writing; collective.

        Args:
            files: what this rank writes, tensors by name; copies that nothing changes any more.
        """
        self.step = memory.progress.step
        self.final = run_dir / "checkpoints" / f"step-{self.step:08d}"
        self.partial = self.final.with_name(self.final.name + ".partial")
        self._memory = memory
        consistency.on_main(self._begin)
        self.stall = 0.0  # seconds that training waited, and that the thread wrote
        self.write_seconds = 0.0
        writer = ThreadPoolExecutor(1)
        self._written = writer.submit(self._write, files)
        writer.shutdown(wait=False)

    @property
    def writing(self) -> bool:
        return not self._written.done()

    def commit(self) -> Path:
        """Wait for all ranks' files and make the checkpoint visible; collective.

        Returns:
            The committed directory.

        Raises:
            CheckpointError: on every rank, if any rank could not write, or rank 0 does not see what another has written.
        """
        mine: tuple[dict[str, FileRecord], dict[str, str]] | str
        try:
            mine = self._written.result()
        except (OSError, SafetensorError) as error:  # what the writers raise on a full disk
            mine = str(error).splitlines()[0]
        everyone: list[tuple[dict[str, FileRecord], dict[str, str]] | str] = [""] * dist.get_world_size()
        dist.all_gather_object(everyone, mine)
        failed = [f"rank {rank}: {share}" for rank, share in enumerate(everyone) if isinstance(share, str)]
        if failed:
            raise CheckpointError(
                f"{self.final} could not be written ({'; '.join(failed)}). Checkpoints before it are intact: make room, "
                "then start the same command again."
            )
        written = [share for share in everyone if not isinstance(share, str)]
        consistency.on_main(lambda: self._publish(written))
        return self.final

    def _begin(self) -> None:
        shutil.rmtree(self.partial, ignore_errors=True)
        self.partial.mkdir(parents=True)

    def _publish(self, written: list[tuple[dict[str, FileRecord], dict[str, str]]]) -> None:
        files = {name: record for share, _ in written for name, record in share.items()}
        for name, record in files.items():
            size = _awaited_size(self.partial / name, record.bytes)
            if size != record.bytes:
                raise CheckpointError(f"rank 0 sees {size} bytes of {self.partial / name}, another rank wrote {record.bytes}: "
                                      "run_dir must be one directory for all hosts.")  # fmt: skip
        tensors = {name: value for _, share in written for name, value in share.items()}
        manifest = Manifest(**dict(self._memory), format=2, files=files, tensors=tensors)
        write(manifest, self.partial / MANIFEST)
        _sync(self.partial / MANIFEST)
        _sync(self.partial)
        replaced = _move_aside(self.final) if self.final.exists() or self.final.is_symlink() else None
        self.partial.rename(self.final)
        _sync(self.final.parent)
        if replaced is not None:
            shutil.rmtree(replaced)
        _link_latest(self.final)

    def _write(self, files: dict[Path, dict[str, Tensor]]) -> tuple[dict[str, FileRecord], dict[str, str]]:
        """Write, sync and hash this rank's files and the tensors in them."""
        started = time.monotonic()
        described: dict[str, FileRecord] = {}
        tensors: dict[str, str] = {}
        for name, content in files.items():
            file = self.partial / name
            file.parent.mkdir(parents=True, exist_ok=True)  # a node that does not see rank 0's fails in `commit`, by name
            save_file(content, file)
            _sync(file)
            described[str(name)] = FileRecord(bytes=file.stat().st_size, sha256=_sha256(file))
            tensors |= consistency.hash_tensors(content.items())
        self.write_seconds = time.monotonic() - started
        return described, tensors


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
            if _sha256(checkpoint / name) != expected.sha256:
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
        size = _size(checkpoint / name)
        if size != expected.bytes:
            raise CheckpointError(f"{checkpoint / name} has {size} bytes, {expected.bytes} were written: remove {checkpoint} "
                                  "to use an older one.")  # fmt: skip
    return content


def load_weights(checkpoint: Path) -> dict[str, Tensor]:
    """The fp32 parameters by name.

    Raises:
        CheckpointError: the file is absent or damaged.
    """
    return _load(checkpoint / WEIGHTS_FILE)


def load(checkpoint: Path) -> Named:
    """Weights and optimizer state of a checkpoint, in memory.

    Raises:
        CheckpointError: a file is absent or damaged.
    """
    moments: dict[str, Tensor] = {}
    for name in manifest(checkpoint).files:
        if Path(name) != WEIGHTS_FILE:
            moments |= _load(checkpoint / name)
    return Named(load_weights(checkpoint), moments)


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


def _move_aside(final: Path) -> Path | None:
    """Before a commit of the same step, give its name free.

    Returns:
        Where our own older checkpoint of that step lies, to be removed once the new one has its name; None for what is not
        ours, which stays under another name.
    """
    ours = final.is_dir() and not final.is_symlink() and (final / MANIFEST).exists()
    if ours:
        with suppress(CheckpointError):  # ours, and damaged: this is what is being written again
            ours = read(final).step == step_of(final)
    if ours:
        aside = final.with_name(final.name + REPLACED)
        shutil.rmtree(aside, ignore_errors=True)
        return final.rename(aside)
    aside = final.rename(final.with_name(f"{final.name}.aside-{uuid.uuid4().hex[:8]}"))
    log.info("WARNING: %s was no checkpoint of this run, and is called %s now", final, aside.name)
    return None


def mend(run_dir: Path) -> None:
    """Give a checkpoint its name back whose replacement was killed between two renames; for who holds the run directory."""
    for aside in (run_dir / "checkpoints").glob(f"step-*{REPLACED}"):
        final = aside.with_name(aside.name.removesuffix(REPLACED))
        if step_of(final) is not None and not final.exists():
            aside.rename(final)
            log.info("WARNING: %s was being replaced when its run was killed, and has its name back", final)


def _link_latest(checkpoint: Path) -> None:
    link, latest = checkpoint.with_name("latest.partial"), checkpoint.with_name("latest")
    try:
        link.unlink(missing_ok=True)
        link.symlink_to(checkpoint.name)
        os.replace(link, latest)
    except OSError as error:  # a file system without links, or `latest` was copied as a directory
        link.unlink(missing_ok=True)
        _warn_once(
            f"{latest} does not show the newest checkpoint ({error.strerror}); it is for people only, runs do without it"
        )


def _warn_once(text: str, said: set[str] = set()) -> None:  # noqa: B006 - what has been said is remembered on purpose
    if text not in said:
        said.add(text)
        log.info("WARNING: %s", text)


def _load(file: Path) -> dict[str, Tensor]:
    try:
        return load_file(file)
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"{file} cannot be read: {error}") from error


def _size(file: Path) -> int | None:
    try:
        return file.stat().st_size
    except OSError:
        return None


def _awaited_size(file: Path, expected: int) -> int | None:
    """Size of a file that another host has just written; its directory may be seen late on a network file system."""
    deadline = time.monotonic() + SEEN_WITHIN_S
    while (size := _size(file)) != expected and time.monotonic() < deadline:
        time.sleep(0.5)
    return size


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if not (path.is_dir() and error.errno in (errno.EINVAL, errno.EBADF, errno.ENOTSUP)):  # no such thing on some mounts
            raise
    finally:
        os.close(descriptor)
