"""Checkpoints on disk: commit, verify, find, keep.

RUN/checkpoints/step-00000200/
  manifest.json          what the run must remember, and every file with its size and sha256
  weights.safetensors    all parameters in fp32, loads without DeepSpeed
  deepspeed/             DeepSpeed's own shards: optimizer state, master weights
RUN/checkpoints/latest   link to the newest, for people; no code depends on it

Commit: everything is written as step-N.partial; when all ranks have finished, each hashes and syncs its share of the
files; rank 0 writes the manifest, syncs, renames. What has its final name is whole, at whatever instant a run dies.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import logging
import math
import os
import shutil
from collections.abc import Callable, Iterator
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


def save(
    run_dir: Path,
    step: int,
    memory: dict[str, Any],
    weights: dict[str, Tensor],
    save_shards: Callable[[Path], None],
) -> Path:
    """Write and commit one checkpoint; collective.

    Args:
        memory: what `resume` needs, JSON values.
        weights: fp32 parameters, read on rank 0 only.
        save_shards: writes the engine's own files below a directory; called on every rank.

    Returns:
        The committed directory.
    """
    final = run_dir / "checkpoints" / f"step-{step:08d}"
    partial = final.with_name(final.name + ".partial")
    main = dist.get_rank() == 0
    if main:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
    dist.barrier()
    save_shards(partial / "deepspeed")
    if main:
        save_file(weights, partial / "weights.safetensors")
    dist.barrier()
    files = _describe_together(partial)
    if main:
        (partial / "manifest.json").write_text(json.dumps({"step": step, "files": files, **memory}, indent=1))
        _sync(partial / "manifest.json")
        _sync(partial)
        if final.exists():
            shutil.rmtree(final)
        partial.rename(final)
        _sync(final.parent)
        _link_latest(final)
    dist.barrier()
    return final


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


def _describe_together(folder: Path) -> dict[str, dict[str, Any]]:
    """Size and sha256 of every file below `folder`, which each rank hashes and syncs a share of; collective."""
    # Rank 0 lists for all: on a shared file system the ranks' own listings may differ for a while.
    listing = [sorted(f for f in folder.rglob("*") if f.is_file()) if dist.get_rank() == 0 else []]
    dist.broadcast_object_list(listing, src=0)
    mine = {}
    for file in listing[0][dist.get_rank() :: dist.get_world_size()]:
        _sync(file)
        mine[str(file.relative_to(folder))] = {"bytes": file.stat().st_size, "sha256": _sha256(file)}
    everyone: list[dict[str, dict[str, Any]]] = [{} for _ in range(dist.get_world_size())]
    dist.all_gather_object(everyone, mine)
    merged = {name: described for share in everyone for name, described in share.items()}
    return dict(sorted(merged.items()))


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
