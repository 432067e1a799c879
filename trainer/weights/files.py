"""Named tensors out of a weights file of any format.

torch's own reader (`weights_only`) takes plain files. Real Lightning checkpoints also hold
argparse.Namespace, numpy scalars, paths, configurations and classes, which it refuses; of those
data/given/pickles.py takes the tensors.
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

from data.given.pickles import Harmful, read_stream, read_zipped
from trainer.checkpoint.manifest import CheckpointError, unreadable
from trainer.weights.sets import Sets, sets_in

# (what a file begins with, what it is and what to do)
BEGINNINGS: tuple[tuple[bytes, str], ...] = (
    (b"version https://git-lfs", "a git-LFS pointer, not the file: fetch it with `git lfs pull`"),
    (b"<", "a web page or XML, often an error page: look at the link, and fetch the file again"),
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
# What unpickling a damaged or foreign file can raise; torch opens what is called so as safetensors.
BAD_VALUES = (RuntimeError, AssertionError, ValueError, TypeError, LookupError, AttributeError)
BAD_BYTES = (pickle.UnpicklingError, EOFError, struct.error, zipfile.BadZipFile, zlib.error)
BAD_PICKLE = (*BAD_VALUES, *BAD_BYTES, MemoryError, OverflowError, SafetensorError)
BAD_ZIP = (zipfile.BadZipFile, zlib.error, lzma.LZMAError, EOFError, RuntimeError, ValueError)
SHARDED = b"torch.distributed.tensor"


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
        why = f"it is a damaged safetensors file ({error})"
        raise CheckpointError(f"{path} cannot be read: {why}.") from error
    except OSError as error:
        raise unreadable(path, error) from error
    if first[:4] != b"PK\x03\x04" and first[:1] != b"\x80":
        raise CheckpointError(f"{path} holds no weights: it is {_described(first)}.")
    sets = sets_in(load_pickled(path))
    if not sets.found:
        expected = "a state dict, or a checkpoint with one under state_dict, model or module"
        raise CheckpointError(f"{path} holds no named tensors: expected {expected}.")
    return sets


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
    """What torch.save wrote, with inert objects in place of all that is no tensor or plain value.

    Raises:
        CheckpointError: it is damaged, of no known format, or wants to execute something.
    """
    zipped = zipfile.is_zipfile(path)
    if zipped or path.open("rb").read(2) == b"PK":
        _look_into(path)
    try:
        return torch.load(path, map_location="cpu", mmap=zipped, weights_only=True)
    except BAD_PICKLE:  # it holds foreign classes, or is damaged: these tell which
        reader = read_zipped if zipped else read_stream
    try:
        return reader(path)
    except Harmful as error:
        why = f"wants {error} to be executed, and is not opened"
        raise CheckpointError(f"{path} {why}.") from error
    except BAD_PICKLE as error:
        why = f"it is damaged, or no checkpoint of torch ({first_line(error)})"
        raise CheckpointError(f"{path} cannot be read: {why}.") from error


def _look_into(path: Path) -> None:
    """An archive must be whole, which torch itself does not look at, and one of torch's.

    Raises:
        CheckpointError: a member is damaged, or the archive holds something else.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            damaged, names = archive.testzip(), archive.namelist()
            pickled = next((name for name in names if name.endswith("data.pkl")), None)
            content = b"" if damaged or pickled is None else archive.read(pickled)
    except (*BAD_ZIP, NotImplementedError, struct.error) as error:
        why = f"the archive is damaged or cut off ({error})"
        raise CheckpointError(f"{path} cannot be read: {why}. Fetch it again.") from error
    if damaged is not None:
        why = f"'{damaged}' does not have its checksum"
        raise CheckpointError(f"{path} is damaged: {why}. Fetch it again.")
    if any(name.endswith("constants.pkl") for name in names):
        remedy = "load it where it was made, and torch.save its state_dict()"
        raise CheckpointError(f"{path} is a TorchScript program: {remedy}.")
    if pickled is None:
        why = f"without weights of torch ({', '.join(names[:3])})"
        raise CheckpointError(f"{path} is a zip archive {why}: unpack it first.")
    if SHARDED in content:
        raise CheckpointError(
            f"{path} holds shards of tensors (DTensor), not whole ones: where it was made, save "
            "torch.distributed.checkpoint.state_dict.get_model_state_dict(model, options="
            "StateDictOptions(full_state_dict=True))."
        )


def first_line(error: Exception) -> str:
    return f"{type(error).__name__}: {str(error).strip().split(chr(10))[0]}"
