"""One reader, many ranks: broadcast of what rank 0 read, and proof that all ranks hold the same."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from data import Refusal
from trainer.checkpoint.manifest import CheckpointError

T = TypeVar("T")


def on_main(work: Callable[[], T]) -> T:
    """Do on rank 0 alone what needs one reader or writer; every rank has its result, or its refusal; collective.

    Without this a rank 0 that fails leaves the others waiting for it. Any other error ends rank 0 with a traceback, and the
    others by their broken connection. Without a process group this process is the only one.

    Raises:
        Refusal: on every rank, what rank 0 was refused; an OSError becomes a CheckpointError.
    """
    if not dist.is_initialized():
        return work()
    outcome: list[Any] = [None, None]  # result, error
    if dist.get_rank() == 0:
        try:
            outcome[0] = work()
        except Refusal as error:
            outcome[1] = error
        except OSError as error:
            outcome[1] = CheckpointError(f"rank 0: {error}")
    dist.broadcast_object_list(outcome, src=0)
    if outcome[1] is not None:
        raise outcome[1]
    result: T = outcome[0]
    return result


def hash_tensors(named: Iterable[tuple[str, Tensor]]) -> dict[str, str]:
    """sha256 of shape and fp32 values, by name."""
    hashes = {}
    for name, tensor in named:
        # Summing over ranks makes 0.0 of -0.0, the same number.
        values = tensor.detach().to("cpu", torch.float32).contiguous() + 0.0
        # A scalar parameter may be held as shape (1,) and stored as ().
        shape = tuple(values.shape) if values.numel() > 1 else ()
        hashes[name] = hashlib.sha256(repr(shape).encode() + values.numpy().tobytes()).hexdigest()
    return hashes


def require_equal(hashes: dict[str, str], reference: dict[str, str], what: str) -> None:
    """Compare hashes over all ranks, and with rank 0's `reference` where it is not empty; collective.

    Raises:
        CheckpointError: on every rank, naming the first differing tensor and the ranks that differ.
    """
    # Only what differs is gathered: hundreds of ranks would otherwise exchange megabytes of equal hashes.
    given: list[Any] = [reference or hashes, bool(reference)]
    dist.broadcast_object_list(given, src=0)
    truth: dict[str, str] = given[0]
    differing = [name for name in sorted(truth.keys() | hashes.keys()) if truth.get(name) != hashes.get(name)]
    everyone: list[list[str]] = [[] for _ in range(dist.get_world_size())]
    dist.all_gather_object(everyone, differing[:8])
    if any(everyone):
        first = min(names[0] for names in everyone if names)
        wrong = [rank for rank, names in enumerate(everyone) if first in names]
        raise CheckpointError(
            f"{what}: tensor '{first}' differs from what rank 0 {'has read' if given[1] else 'holds'} on rank(s) {wrong}. "
            "It was loaded on some ranks only, or after the optimizer had copied it: nothing was trained, start again."
        )
