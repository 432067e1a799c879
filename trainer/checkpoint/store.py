"""Checkpoints on disk: commit, find, keep.

RUN/checkpoints/step-00000200/
  manifest.json          what the run must remember, and every file with its size and sha256
  weights.safetensors    all parameters in fp32, loads without DeepSpeed
  deepspeed/             DeepSpeed's own shards: optimizer state, master weights
A checkpoint is written as step-N.partial and renamed when every rank has finished: what has its final name is whole.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor


class CheckpointError(Exception):
    """A checkpoint is absent, damaged or belongs to another run; the message names it and the remedy."""


def save(
    run_dir: Path,
    step: int,
    memory: dict[str, Any],
    weights: dict[str, Tensor],
    save_shards: Callable[[Path], None],
    keep_last: int,
) -> Path:
    """Write and commit one checkpoint; collective.

    Args:
        memory: what `resume` needs, JSON values.
        weights: fp32 parameters, read on rank 0 only.
        save_shards: writes the engine's own files below a directory; called on every rank.
        keep_last: older checkpoints than these are removed, except the one with the best validation loss.

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
    if main:
        files = {str(f.relative_to(partial)): {"bytes": f.stat().st_size, "sha256": _sha256(f)}
                 for f in sorted(partial.rglob("*")) if f.is_file()}  # fmt: skip
        (partial / "manifest.json").write_text(json.dumps({"step": step, "files": files, **memory}, indent=1))
        _fsync_tree(partial)
        if final.exists():
            shutil.rmtree(final)
        partial.rename(final)
        _retain(run_dir, keep_last)
    dist.barrier()
    return final


def newest(run_dir: Path) -> Path | None:
    """The last committed checkpoint, if there is one."""
    found = committed(run_dir)
    return found[-1] if found else None


def committed(run_dir: Path) -> list[Path]:
    """All committed checkpoints, oldest first."""
    return sorted(p.parent for p in (run_dir / "checkpoints").glob("step-*/manifest.json")
                  if not p.parent.name.endswith(".partial"))  # fmt: skip


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
        raise CheckpointError(f"{path} is damaged: {error}. Remove {checkpoint} to resume from an older one.") from error
    for name, expected in content["files"].items():
        file = checkpoint / name
        size = file.stat().st_size if file.exists() else None
        if size != expected["bytes"]:
            raise CheckpointError(f"{file} has {size} bytes, {expected['bytes']} were written: remove {checkpoint} to "
                                  "resume from an older one.")  # fmt: skip
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
    """All parameters in fp32 on the CPU of rank 0 (empty elsewhere); collective, one parameter at a time."""
    from deepspeed.utils import safe_get_full_fp32_param

    weights = {}
    for name, parameter in engine.module.named_parameters():
        full = safe_get_full_fp32_param(parameter)
        value = parameter if full is None else full
        if dist.get_rank() == 0:
            weights[name] = value.detach().to("cpu", torch.float32, copy=True).contiguous()
    if dist.get_rank() == 0:
        persistent = engine.module.state_dict().keys()
        weights |= {name: buffer.cpu() for name, buffer in engine.module.named_buffers() if name in persistent}
    return weights


def _retain(run_dir: Path, keep_last: int) -> None:
    checkpoints = committed(run_dir)
    scored = [(manifest(c)["val_loss"], c) for c in checkpoints if manifest(c).get("val_loss") is not None]
    best = min(scored)[1] if scored else None
    for checkpoint in checkpoints[:-keep_last]:
        if checkpoint != best:
            shutil.rmtree(checkpoint)


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _fsync_tree(folder: Path) -> None:
    for path in [*folder.rglob("*"), folder]:
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
