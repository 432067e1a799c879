"""Checkpoints on disk: commit, verify, find, keep.

RUN/checkpoints/step-00000200/
  manifest.json          what the run must remember, and every file with its size and sha256
  weights.safetensors    all parameters in fp32, loads without DeepSpeed
  deepspeed/             DeepSpeed's own shards: optimizer state, master weights
RUN/checkpoints/latest   link to the newest, for people; no code depends on it

Commit: training waits for a copy in memory only; a thread of every rank writes, syncs and hashes its files below
step-N.partial. When all have finished, at a step boundary, rank 0 writes the manifest, syncs, renames. What has its
final name is whole, at whatever instant a run dies.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import logging
import math
import os
import shutil
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

log = logging.getLogger("trainer")


class CheckpointError(Exception):
    """A checkpoint is absent, damaged or belongs to another run; the message names it and the remedy."""


class Saving:
    """One checkpoint that a thread of every rank is writing while training goes on; nothing is visible before `commit`."""

    def __init__(self, run_dir: Path, step: int, memory: dict[str, Any], states: dict[Path, Any]) -> None:
        """Start writing; collective.

        Args:
            memory: what `resume` needs, JSON values.
            states: this rank's files, by path relative to the checkpoint: tensors by name for .safetensors, else what
                torch.save takes; copies that nothing changes any more.
        """
        self.final = run_dir / "checkpoints" / f"step-{step:08d}"
        self.partial = self.final.with_name(self.final.name + ".partial")
        self.memory = {"step": step, **memory}
        if dist.get_rank() == 0:
            shutil.rmtree(self.partial, ignore_errors=True)
        dist.barrier()
        self.stall = 0.0  # seconds that training waited, and that the thread wrote
        self.write_seconds = 0.0
        writer = ThreadPoolExecutor(1)
        self._files = writer.submit(self._write, states)
        writer.shutdown(wait=False)

    @property
    def writing(self) -> bool:
        return not self._files.done()

    def commit(self) -> Path:
        """Wait for all ranks' files and make the checkpoint visible; collective.

        Returns:
            The committed directory.

        Raises:
            CheckpointError: on every rank, if any rank could not write.
        """
        mine: dict[str, dict[str, Any]] | str
        try:
            mine = self._files.result()
        except (OSError, RuntimeError, SafetensorError) as error:  # what the three writers raise on a full disk
            mine = str(error).splitlines()[0]
        everyone: list[dict[str, dict[str, Any]] | str] = [{} for _ in range(dist.get_world_size())]
        dist.all_gather_object(everyone, mine)
        failed = [f"rank {rank}: {share}" for rank, share in enumerate(everyone) if isinstance(share, str)]
        if failed:
            raise CheckpointError(
                f"{self.final} could not be written ({'; '.join(failed)}). Checkpoints before it are intact: make room, "
                "then start the same command again."
            )
        if dist.get_rank() == 0:
            files = {name: about for share in everyone if isinstance(share, dict) for name, about in share.items()}
            manifest = self.partial / "manifest.json"
            manifest.write_text(json.dumps({**self.memory, "files": dict(sorted(files.items()))}, indent=1))
            _sync(manifest)
            _sync(self.partial)
            if self.final.exists():
                shutil.rmtree(self.final)
            self.partial.rename(self.final)
            _sync(self.final.parent)
            _link_latest(self.final)
        dist.barrier()
        return self.final

    def _write(self, states: dict[Path, Any]) -> dict[str, dict[str, Any]]:
        """Write, sync and hash this rank's files; {name: {"bytes", "sha256"}}."""
        started, described = time.monotonic(), {}
        for name, state in states.items():
            file = self.partial / name
            file.parent.mkdir(parents=True, exist_ok=True)
            if name.suffix == ".safetensors":
                save_file(state, file)
            else:
                torch.save(state, file)
            _sync(file)
            described[str(name)] = {"bytes": file.stat().st_size, "sha256": _sha256(file)}
        self.write_seconds = time.monotonic() - started
        return described


def committed(run_dir: Path) -> list[Path]:
    """All committed checkpoints, oldest first."""
    return sorted(p.parent for p in (run_dir / "checkpoints").glob("step-*/manifest.json") if p.parent.suffix != ".partial")


def newest(run_dir: Path) -> Path | None:
    """The last committed checkpoint, if there is one."""
    found = committed(run_dir)
    return found[-1] if found else None


def newest_valid(run_dir: Path) -> Path | None:
    """The last committed checkpoint whose every file has its recorded hash; damaged ones are reported; collective.

    Raises:
        CheckpointError: on every rank, if there are checkpoints and none is valid.
    """
    chosen: list[Path | str | None] = [None]
    for checkpoint in reversed(committed(run_dir) if dist.get_rank() == 0 else []):
        problems = verify(checkpoint)
        if not problems:
            chosen = [checkpoint]
            break
        log.error("WARNING: %s is damaged and skipped: %s", checkpoint, "; ".join(problems))
        chosen = [f"every checkpoint in {run_dir} is damaged (see above); start anew with another run_dir."]
    dist.broadcast_object_list(chosen, src=0)
    if isinstance(chosen[0], str):
        raise CheckpointError(chosen[0])
    return chosen[0]


def verify(checkpoint: Path) -> list[str]:
    """Re-hash every file; what is wrong, a line each."""
    try:
        listed = manifest(checkpoint)["files"]
    except CheckpointError as error:
        return [str(error)]
    return [f"{name} does not have the sha256 that was recorded" for name, expected in listed.items()
            if _sha256(checkpoint / name) != expected["sha256"]]  # fmt: skip


def manifest(checkpoint: Path) -> dict[str, Any]:
    """Read a manifest and check that every file it lists is there in full.

    Raises:
        CheckpointError: absent, unreadable, or a file is missing or truncated.
    """
    path = checkpoint / "manifest.json"
    if not path.is_file():
        raise CheckpointError(f"no checkpoint at {checkpoint} (it has no manifest.json).")
    try:
        content: dict[str, Any] = json.loads(path.read_text())
    except json.JSONDecodeError as error:
        raise CheckpointError(f"{path} is damaged: {error}. Remove {checkpoint} to use an older one.") from error
    for name, expected in content["files"].items():
        file = checkpoint / name
        size = file.stat().st_size if file.exists() else None
        if size != expected["bytes"]:
            raise CheckpointError(f"{file} has {size} bytes, {expected['bytes']} were written: remove {checkpoint} to "
                                  "use an older one.")  # fmt: skip
    return content


def load_weights(checkpoint: Path) -> dict[str, Tensor]:
    """The fp32 parameters by name.

    Raises:
        CheckpointError: the file is absent or damaged.
    """
    try:
        return load_file(checkpoint / "weights.safetensors")
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"{checkpoint}/weights.safetensors cannot be read: {error}") from error


def gather_weights(engine: Any) -> dict[str, Tensor]:
    """Parameters and persistent buffers in fp32 on the CPU of rank 0 (empty elsewhere); collective."""
    from deepspeed.utils import safe_get_full_fp32_param

    weights = {}
    for name, parameter in engine.module.named_parameters():
        full = safe_get_full_fp32_param(parameter)
        value = parameter if full is None else full
        if dist.get_rank() == 0:
            # A published scalar has the shape (), also where the module holds it as (1,).
            value = value.reshape(()) if value.numel() == 1 else value
            weights[name] = value.detach().to("cpu", torch.float32, copy=True).contiguous()
    if dist.get_rank() == 0:
        persistent = engine.module.state_dict().keys()
        weights |= {
            name: buffer.to("cpu", torch.float32) for name, buffer in engine.module.named_buffers() if name in persistent
        }
    return weights


def retain(run_dir: Path, keep_last: int, keep_every: int | None) -> None:
    """Remove older checkpoints, from manifests alone.

    Kept are the last `keep_last`, every step that is a multiple of `keep_every`, the one whose own weights were validated
    with the lowest `val_loss`, and any that a reader holds open.
    """
    checkpoints = committed(run_dir)
    manifests = {}
    for checkpoint in checkpoints:
        try:
            manifests[checkpoint] = manifest(checkpoint)
        except CheckpointError as error:
            log.error("WARNING: %s is left alone: %s", checkpoint, error)
    checkpoints = list(manifests)
    scored = [(m["val_loss"], c) for c, m in manifests.items() if m["val_step"] == m["step"] and math.isfinite(m["val_loss"])]
    kept = set(checkpoints[-keep_last:]) | ({min(scored)[1]} if scored else set())
    if keep_every is not None:
        kept |= {c for c, m in manifests.items() if m["step"] % keep_every == 0}
    for checkpoint in checkpoints:
        if checkpoint not in kept:
            _remove_unless_read(checkpoint)


@contextmanager
def reading(checkpoint: Path) -> Iterator[None]:
    """Hold a checkpoint open, so that a running job's retention leaves it alone."""
    with (checkpoint / "manifest.json").open("rb") as held:
        fcntl.flock(held, fcntl.LOCK_SH)
        yield


def _remove_unless_read(checkpoint: Path) -> None:
    with (checkpoint / "manifest.json").open("rb") as held:
        try:
            fcntl.flock(held, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            log.info("%s is being read and stays for now", checkpoint)
            return
        # Renamed first: an interrupted removal leaves a partial, never a committed checkpoint with files missing.
        doomed = checkpoint.rename(checkpoint.with_name(checkpoint.name + ".partial"))
    shutil.rmtree(doomed)
    shutil.rmtree(checkpoint.with_name(checkpoint.name + ".universal"), ignore_errors=True)


def _link_latest(checkpoint: Path) -> None:
    link = checkpoint.with_name("latest.partial")
    link.unlink(missing_ok=True)
    link.symlink_to(checkpoint.name)
    os.replace(link, checkpoint.with_name("latest"))


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
