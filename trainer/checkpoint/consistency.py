"""One reader, many ranks: broadcast of what rank 0 read, and proof that all ranks hold the same."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from trainer.checkpoint.store import CheckpointError

BUCKET_BYTES = 32 << 20


def broadcast_from_main(tensors: Iterable[Tensor], bucket_bytes: int = BUCKET_BYTES) -> None:
    """Copy rank 0's values into the same tensors of every rank, in place; collective.

    Tensors travel together in buckets, so the extra memory of a rank is one bucket (or one tensor, if that is larger).
    """
    for bucket in _buckets(tensors, bucket_bytes):
        flat = torch.cat([t.detach().reshape(-1) for t in bucket])
        dist.broadcast(flat, src=0)
        for tensor, values in zip(bucket, flat.split([t.numel() for t in bucket]), strict=True):
            tensor.detach().copy_(values.view_as(tensor))


def hash_tensors(named: Iterable[tuple[str, Tensor]]) -> dict[str, str]:
    """sha256 of shape and fp32 values, by name."""
    hashes = {}
    for name, tensor in named:
        values = tensor.detach().to("cpu", torch.float32).contiguous()
        # A scalar parameter may be held as shape (1,) and stored as ().
        shape = tuple(values.shape) if values.numel() > 1 else ()
        hashes[name] = hashlib.sha256(repr(shape).encode() + values.numpy().tobytes()).hexdigest()
    return hashes


def hash_masters(engine: Any) -> dict[str, str]:
    """Hashes of what the optimizer will update, gathered one parameter at a time under ZeRO; collective."""
    from deepspeed.utils import safe_get_full_fp32_param

    def full() -> Iterator[tuple[str, Tensor]]:
        for name, parameter in engine.module.named_parameters():
            master = safe_get_full_fp32_param(parameter)
            yield name, parameter if master is None else master

    return hash_tensors(full())


def hash_held(engine: Any) -> dict[str, str]:
    """Hashes of the parameters and buffers that this rank holds whole: what its next forward pass would use."""
    held = [(name, p) for name, p in engine.module.named_parameters() if not hasattr(p, "ds_id")]
    return hash_tensors([*held, *engine.module.named_buffers()])


def require_loaded(engine: Any, reference: dict[str, str]) -> None:
    """Compare what every rank would compute with and what its optimizer would update; collective.

    Args:
        reference: hashes of the file's tensors, read on rank 0; empty where nothing was imported.

    Raises:
        CheckpointError: on every rank, naming the first differing tensor and the ranks.
    """
    require_equal(hash_held(engine), {}, "weights before step 1")
    require_equal(hash_masters(engine), reference, "optimizer's fp32 weights before step 1")


def set_masters(engine: Any, values: dict[str, Tensor]) -> None:
    """Give the optimizer's fp32 masters their full precision; collective.

    Under bf16 DeepSpeed makes the masters from weights that it has rounded already.
    """
    from deepspeed.utils import safe_set_full_fp32_param

    if engine.bfloat16_enabled():
        named = dict(engine.module.named_parameters())
        for name, value in values.items():
            safe_set_full_fp32_param(named[name], value)


def require_equal(hashes: dict[str, str], reference: dict[str, str], what: str) -> None:
    """Compare hashes over all ranks, and with rank 0's `reference` where it is not empty; collective.

    Raises:
        CheckpointError: on every rank, naming the first differing tensor and the ranks that differ.
    """
    everyone: list[dict[str, str]] = [{} for _ in range(dist.get_world_size())]
    dist.all_gather_object(everyone, hashes)
    given = [reference]
    dist.broadcast_object_list(given, src=0)
    truth = given[0] or everyone[0]
    source = "the file" if given[0] else "rank 0"
    for name in sorted(truth.keys() | hashes.keys()):
        wrong = [rank for rank, theirs in enumerate(everyone) if theirs.get(name) != truth.get(name)]
        if wrong:
            raise CheckpointError(
                f"{what}: tensor '{name}' differs from {source} on rank(s) {wrong}. Weights were loaded on some ranks only, "
                "or after the optimizer copied them: nothing was trained, start again."
            )


def _buckets(tensors: Iterable[Tensor], bucket_bytes: int) -> Iterator[list[Tensor]]:
    bucket: list[Tensor] = []
    size = 0
    for tensor in tensors:
        nbytes = tensor.numel() * tensor.element_size()
        if bucket and (size + nbytes > bucket_bytes or tensor.dtype != bucket[0].dtype):
            yield bucket
            bucket, size = [], 0
        bucket.append(tensor)
        size += nbytes
    if bucket:
        yield bucket
