"""What a file of weights says of itself, in its own header, so that a copy never loses it."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, ValidationError
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from data.process.written import being_written
from trainer.checkpoint.consistency import hash_tensors
from trainer.checkpoint.manifest import CheckpointError, Memory, misread

KEY = "topoflow"  # of the record in a header
TRAINED, MEAN = "as trained", "their running mean"  # the two sets of weights of a run with `ema`


class Record(BaseModel):
    """Description of a set of weights.

    A run with `ema` is scored with the running mean of its weights, so `val_loss` belongs to one of
    its two sets alone.
    """

    model_config = ConfigDict(frozen=True)

    config: dict[str, Any]  # the whole resolved run
    which: str = TRAINED  # or MEAN
    step: int = 0
    val_loss: float | None = None  # of these very weights
    statistics: dict[str, dict[str, float]] = {}
    fingerprints: dict[str, str] = {}
    made_from: str = ""  # path and hash of what was read
    tensors: dict[str, str] = {}  # hash of every tensor, by name
    files: dict[str, str] = {}  # suffix of a file beside an export -> its sha256


def of_run(memory: Memory, which: str) -> Record:
    """The record of one of the two sets of weights that a run has."""
    scored = MEAN if memory.config.get("ema") is not None else TRAINED
    return Record(
        config=memory.config,
        which=which,
        step=memory.progress.step,
        val_loss=memory.own_val_loss if which == scored else None,
        statistics=memory.statistics,
        fingerprints=memory.fingerprints,
        made_from=f"run {memory.run}" if memory.run else "",
    )


def identity_of(tensors: dict[str, Tensor]) -> str:
    """One hash of names, shapes and values, whatever the file that they lie in."""
    hashes = json.dumps(sorted(hash_tensors(tensors.items()).items()))
    return hashlib.sha256(hashes.encode()).hexdigest()


def write_tensors(file: Path, tensors: dict[str, Tensor], record: Record | None = None) -> None:
    """Write a safetensors file with the record and the hashes of its tensors in its header.

    Raises:
        OSError, SafetensorError: it cannot be written.
    """
    header = None
    if record is not None:
        complete = record.model_copy(update={"tensors": hash_tensors(tensors.items())})
        header = {KEY: complete.model_dump_json()}
    file.touch()
    mode = file.stat().st_mode  # as the umask asks; the library makes files for their owner alone
    save_file(tensors, file, header)
    file.chmod(mode)


def write_whole(path: Path, write: Callable[[Path], None]) -> None:
    """Write a file that has its own name only once it is whole.

    Raises:
        CheckpointError: it cannot be written.
    """
    try:
        with being_written(path) as partial:
            write(partial)
    except (OSError, SafetensorError, RuntimeError) as error:  # of the writers, on a full disk
        raise CheckpointError(f"{path} could not be written ({error}).") from error


def read_header(file: Path) -> Record | None:
    """The record in the header of a safetensors file; None where it has none of ours.

    Raises:
        CheckpointError: the record is damaged.
        OSError, SafetensorError: the file cannot be read.
    """
    with safe_open(file, "pt") as opened:
        header = opened.metadata() or {}
    return parse(header[KEY], file) if KEY in header else None


def parse(text: str, file: Path | str) -> Record:
    """
    Raises:
        CheckpointError: it is no record.
    """
    try:
        return Record.model_validate_json(text)
    except ValidationError as error:
        raise misread(f"the record in {file}", error) from error


def require_recorded(tensors: dict[str, Tensor], recorded: dict[str, str], source: str) -> None:
    """Compare tensors with the hashes that were recorded of them.

    Raises:
        CheckpointError: one differs, is missing, or was never recorded.
    """
    found = hash_tensors(tensors.items())
    wrong = sorted({name for name, _ in found.items() ^ recorded.items()})
    if wrong:
        many = f"{len(wrong)} such tensors"
        raise CheckpointError(f"{source} is damaged: '{wrong[0]}' is not what was saved ({many}).")
