"""Named tensors out of a weights file of any format.

torch's own reader (`weights_only`) takes plain files. Real Lightning checkpoints also hold argparse.Namespace, numpy
scalars, paths, configurations and classes, which it refuses; of those pickles.py takes the tensors.
"""

from __future__ import annotations

import lzma
import pickle
import struct
import zipfile
import zlib
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file

from trainer.checkpoint.manifest import CheckpointError, unreadable
from trainer.weights.pickles import Harmful, read_stream, read_zipped
from trainer.weights.sets import Sets, sets_in

# (what a file begins with, what it is and what to do)
BEGINNINGS: tuple[tuple[bytes, str], ...] = (
    (b"version https://git-lfs", "a git-LFS pointer, not the file itself: fetch it with `git lfs pull`"),
    (b"<", "a web page or XML, often an error page of a download: fetch the file again, and look at the link"),
    (b"\x89HDF\r\n", "HDF5 (Keras, NetCDF), not weights of torch"),
    (b"\x1f\x8b", "compressed by gzip: unpack it first"),
    (b"BZh", "compressed by bzip2: unpack it first"),
    (b"\xfd7zXZ", "compressed by xz: unpack it first"),
    (b"\x28\xb5\x2f\xfd", "compressed by zstd: unpack it first"),
    (b"CDF", "NetCDF, not weights"),
    (b"\x93NUMPY", "a single numpy array, not named tensors"),
    (b"GGUF", "GGUF, quantised for another program: take the original weights"),
    (b"{", "JSON: weights lie beside it, as .safetensors or .ckpt"),
)
# What unpickling a damaged or foreign file can raise.
BAD_PICKLE = (
    pickle.UnpicklingError,
    RuntimeError,
    EOFError,
    AssertionError,
    ValueError,
    TypeError,
    KeyError,
    AttributeError,
    IndexError,
    struct.error,
    MemoryError,
    OverflowError,
    zipfile.BadZipFile,
    zlib.error,
    SafetensorError,  # torch itself opens what is called so with that library
)


def read_file(path: Path) -> Sets:
    """The sets of weights in a safetensors file, or in what torch.save wrote.

    Raises:
        Unreadable: the file system refuses it now.
        CheckpointError: of no known format, damaged, or it wants to execute something.
    """
    try:
        with path.open("rb") as file:
            first = file.read(512)
        if _is_safetensors(first):
            return sets_in({"": load_file(path)})
    except SafetensorError as error:
        raise CheckpointError(f"{path} cannot be read: it is a damaged safetensors file ({error}).") from error
    except OSError as error:
        raise unreadable(path, error) from error
    if first[:4] != b"PK\x03\x04" and first[:1] != b"\x80":
        raise CheckpointError(f"{path} holds no weights: it is {_described(first)}.")
    sets = sets_in(load_pickled(path))
    if not sets.found:
        raise CheckpointError(
            f"{path} holds no named tensors: expected a state dict, or a checkpoint with one under state_dict, model or module."
        )
    return sets


def require_checksums(path: Path) -> None:
    """Every member of a zip archive must have its checksum, which torch itself does not look at.

    Raises:
        CheckpointError: a member is damaged, or the archive is cut off.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            damaged = archive.testzip()
    except (
        zipfile.BadZipFile,
        zlib.error,
        lzma.LZMAError,
        EOFError,
        NotImplementedError,
        RuntimeError,
        ValueError,
        struct.error,
    ) as error:
        raise CheckpointError(f"{path} cannot be read: the archive is damaged or cut off ({error}). Fetch it again.") from error
    if damaged is not None:
        raise CheckpointError(f"{path} is damaged: '{damaged}' does not have its checksum. Fetch it again.")


def _is_safetensors(first: bytes) -> bool:
    return len(first) > 9 and first[8:9] == b"{" and int.from_bytes(first[:8], "little") < 1 << 32


def _described(first: bytes) -> str:
    if not first:
        return "empty: the copy or download failed"
    for beginning, what in BEGINNINGS:
        if first.lstrip().startswith(beginning):
            return what
    try:
        return f"text, beginning with '{first.decode().strip().splitlines()[0][:60]}'"
    except (UnicodeDecodeError, IndexError):
        return f"of a format that is not known here (it begins with {first[:8].hex(' ')})"


def load_pickled(path: Path) -> Any:
    """What torch.save wrote, with inert objects in place of everything that is no tensor and no plain value.

    Raises:
        CheckpointError: it is damaged, or wants to execute something.
    """
    zipped = zipfile.is_zipfile(path)
    if zipped or path.open("rb").read(2) == b"PK":
        require_checksums(path)
        with zipfile.ZipFile(path) as archive:
            names = archive.namelist()
        if any(name.endswith("constants.pkl") for name in names):
            raise CheckpointError(
                f"{path} is a TorchScript program: load it where it was made, and torch.save its state_dict()."
            )
        if not any(name.endswith("data.pkl") for name in names):
            raise CheckpointError(
                f"{path} is a zip archive without weights of torch ({', '.join(names[:3])}): unpack it first."
            )
    try:
        return torch.load(path, map_location="cpu", mmap=zipped, weights_only=True)
    except BAD_PICKLE:
        reader = read_zipped if zipped else read_stream  # it holds foreign classes, or is damaged: these tell which
    try:
        return reader(path)
    except Harmful as error:
        raise CheckpointError(f"{path} wants {error} to be executed, and is not opened.") from error
    except BAD_PICKLE as error:
        raise CheckpointError(
            f"{path} cannot be read: it is damaged, or no checkpoint of torch ({first_line(error)})."
        ) from error


def first_line(error: Exception) -> str:
    return f"{type(error).__name__}: {str(error).strip().split(chr(10))[0]}"
