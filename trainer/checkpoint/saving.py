"""Writing a checkpoint: threads of all ranks write, rank 0 gives it its name."""

from __future__ import annotations

import errno
import os
import shutil
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path

import torch.distributed as dist
from safetensors import SafetensorError
from torch import Tensor

from data.process import locks
from trainer.checkpoint import consistency
from trainer.checkpoint.manifest import MANIFEST, CheckpointError, FileRecord, Manifest, Memory, read, sha256_of, step_of, write
from trainer.checkpoint.record import TRAINED, of_run, write_tensors
from trainer.checkpoint.state import WEIGHTS_FILE
from trainer.checkpoint.store import log, put_aside, size_of

REPLACED = ".replaced.partial"
SEEN_WITHIN_S = 30.0


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
        locks.require_held()
        shutil.rmtree(self.partial, ignore_errors=True)
        self.final.parent.mkdir(exist_ok=True)  # below a run directory that must still be there
        self.partial.mkdir()

    def _publish(self, written: list[tuple[dict[str, FileRecord], dict[str, str]]]) -> None:
        files = {name: record for share, _ in written for name, record in share.items()}
        for name, record in files.items():
            size = _awaited_size(self.partial / name, record.bytes)
            if size != record.bytes:
                raise CheckpointError(
                    f"rank 0 sees {size} bytes of {self.partial / name}, another rank wrote {record.bytes}: "
                    "run_dir must be one directory for all hosts."
                )
        tensors = {name: value for _, share in written for name, value in share.items()}
        manifest = Manifest(**dict(self._memory), format=2, files=files, tensors=tensors)
        write(manifest, self.partial / MANIFEST)
        _sync(self.partial / MANIFEST)
        _sync(self.partial)
        locks.require_held()
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
            file.parent.mkdir(exist_ok=True)  # unseen by rank 0, it fails in `commit`, by name
            record = of_run(self._memory, TRAINED) if name == WEIGHTS_FILE else None
            write_tensors(file, content, record)
            _sync(file)
            described[str(name)] = FileRecord(bytes=file.stat().st_size, sha256=sha256_of(file))
            tensors |= consistency.hash_tensors(content.items())
        self.write_seconds = time.monotonic() - started
        return described, tensors


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
    aside = put_aside(final)
    log.info("WARNING: %s was no checkpoint of this run, and is called %s now", final, aside.name)
    return None


def mend(run_dir: Path) -> None:
    """Undo what a kill has left, as the holder of the run: a half replacement, an unfinished save."""
    for left in (run_dir / "checkpoints").glob("step-*.partial"):
        final = left.with_name(left.name.removesuffix(REPLACED).removesuffix(".partial"))
        if step_of(final) is None:
            continue
        if left.name.endswith(REPLACED) and not final.exists():
            left.rename(final)
            log.info("WARNING: %s was being replaced when its run was killed, and has its name back", final)
        else:
            shutil.rmtree(left, ignore_errors=True)


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


def _awaited_size(file: Path, expected: int) -> int | None:
    """Size of a file that another host has just written; its directory may be seen late on a network file system."""
    deadline = time.monotonic() + SEEN_WITHIN_S
    while (size := size_of(file)) != expected and time.monotonic() < deadline:
        time.sleep(0.5)
    return size


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if not (path.is_dir() and error.errno in (errno.EINVAL, errno.EBADF, errno.ENOTSUP)):  # no such thing on some mounts
            raise
    finally:
        os.close(descriptor)
