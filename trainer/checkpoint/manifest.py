"""What a checkpoint says of itself: one typed class, read and written here alone."""

from __future__ import annotations

import errno
import hashlib
import json
import re
from dataclasses import field
from pathlib import Path, PurePosixPath
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError
from pydantic.dataclasses import dataclass

from data import Refusal

FORMAT = 2
MANIFEST = "manifest.json"
STEP_NAME = re.compile(r"step-(\d{8,})")


# What the file system says of a name that is not there, or is something else than a file: damage.
ABSENT = (errno.ENOENT, errno.ENOTDIR, errno.EISDIR, errno.ELOOP, errno.ENAMETOOLONG, errno.EINVAL)


class CheckpointError(Refusal):
    """A checkpoint is absent, damaged or belongs to another run; the message names it and the remedy."""


class Unreadable(CheckpointError):
    """A file cannot be read now (EACCES, EIO, ESTALE, ...), so nobody knows what is in it."""


def unreadable(path: Path, error: OSError) -> CheckpointError:
    """What an error of the file system says: a file is damaged, or nobody can tell now."""
    if error.errno in ABSENT:
        return CheckpointError(f"{path} cannot be read ({error.strerror}).")
    return Unreadable(
        f"{path} cannot be read now ({error.strerror or error}), so nobody can tell whether it is "
        "whole: ask its owner for the right to read it, or try again when the file system answers."
    )


def _inside(name: str) -> str:
    path = PurePosixPath(name)
    if path.is_absolute() or ".." in path.parts or not path.parts:
        raise ValueError(f"'{name}' is not a file inside the checkpoint")
    return name


class FileRecord(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)

    bytes: int = Field(ge=0)
    sha256: str = Field(pattern="^[0-9a-f]{64}$")


@dataclass(config=ConfigDict(extra="forbid"))
class Progress:
    """The whole state of a run beside weights and optimizer; dropout is seeded by position in the stream."""

    step: int = 0
    samples_seen: int = 0
    best_val_loss: float = float("inf")
    validated_on: str = ""  # the validation set that best_val_loss belongs to
    val_loss: float | None = None
    val_step: int = -1  # the step whose weights have val_loss
    bad_steps: int = 0  # skipped ones in a row
    usual_loss: float | None = None  # running mean of the training loss, where spikes are watched for
    stepped_over: list[list[int]] = field(default_factory=list)  # [first, last) stream positions, rolled back over
    roll_backs: int = 0
    wall_seconds: float = 0.0  # while it ran, all starts together
    changes: list[dict[str, Any]] = field(default_factory=list)  # accepted by --allow-change, when

    def set_validated_on(self, validation_set: str) -> None:
        """Name the set that is scored from now on; the best loss on another one is no measure for it."""
        if self.validated_on != validation_set:
            self.validated_on, self.best_val_loss = validation_set, float("inf")
            self.val_loss, self.val_step = None, -1


class Begun(BaseModel):
    """One start of a run; with those before it, it tells a branch of the run from its trunk."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    id: str
    step: int  # of the checkpoint that it continued from, or 0


class Memory(BaseModel):
    """What a run must remember of itself, beside weights and optimizer."""

    model_config = ConfigDict(extra="forbid")

    progress: Progress
    config: dict[str, Any]  # the resolved run
    deepspeed: dict[str, Any]  # the resolved DeepSpeed configuration
    fingerprints: dict[str, str]
    statistics: dict[str, dict[str, float]]
    parameters: dict[str, dict[str, Any]]  # name -> optimizer group and shape
    world_size: int = Field(ge=1)
    zero_stage: int = Field(ge=0, le=3)
    version: str
    run: str = ""  # identity of the run; empty in checkpoints of before there was one
    starts: list[Begun] = []

    @property
    def own_val_loss(self) -> float | None:
        """The validation loss of these very weights, where they were validated."""
        progress = self.progress
        return progress.val_loss if progress.val_step == progress.step else None


class Manifest(Memory):
    """`Memory`, every file of the checkpoint with its hash, and the hash of every tensor in them."""

    format: Literal[2]
    files: dict[Annotated[str, AfterValidator(_inside)], FileRecord] = Field(min_length=1)
    tensors: dict[str, str]

    @property
    def step(self) -> int:
        return self.progress.step


def step_of(checkpoint: Path) -> int | None:
    """The step that a directory's name claims; None where it is not exactly a name of ours."""
    named = STEP_NAME.fullmatch(checkpoint.name)
    return int(named[1]) if named and f"step-{int(named[1]):08d}" == checkpoint.name else None


def read_json(path: Path) -> Any:
    """
    Raises:
        Unreadable: the file system refuses it now.
        CheckpointError: absent, or not JSON.
    """
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise unreadable(path, error) from error
    except (ValueError, RecursionError) as error:  # not UTF-8 and not JSON are ValueErrors
        raise CheckpointError(f"{path} cannot be read ({type(error).__name__}: {error}).") from error


def read(checkpoint: Path) -> Manifest:
    """The manifest of a checkpoint directory, checked as a whole; its files are not looked at.

    Raises:
        CheckpointError: absent, unreadable, or not a manifest of this format.
    """
    path = checkpoint / MANIFEST
    tree = read_json(path)
    if isinstance(tree, dict) and "optimizer_layout" in tree and "format" not in tree:
        raise CheckpointError(
            f"{checkpoint} was written by version {tree.get('version')}, which kept DeepSpeed's "
            "own shards: start a new run from its weights with "
            f"init_from.path={checkpoint}/weights.safetensors."
        )
    try:
        return Manifest.model_validate(tree)
    except ValidationError as error:
        raise misread(str(path), error) from error


def misread(what: str, error: ValidationError) -> CheckpointError:
    """What is wrong with a description: the first of its faults."""
    first = error.errors()[0]
    where = ".".join(map(str, first["loc"])) or "the whole"
    count = error.error_count()
    return CheckpointError(f"{what} is damaged: {where}: {first['msg']} ({count} such).")


def write(manifest: Manifest, path: Path) -> None:
    path.write_text(json.dumps(manifest.model_dump(mode="python"), indent=1), encoding="utf-8")


def sha256_of(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
