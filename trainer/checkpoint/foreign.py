"""Tensors out of a weights file of any format, without executing anything in it.

torch's own reader (`weights_only`) takes plain files. Real Lightning checkpoints also hold argparse.Namespace, numpy
scalars, paths, configurations and classes, which it refuses; of those `_TensorReader` takes the tensors, and everything
foreign becomes an `_Inert` that is never imported or called.
"""

from __future__ import annotations

import lzma
import pickle
import struct
import zipfile
import zlib
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from trainer.checkpoint.manifest import CheckpointError

STATE_KEYS = ("state_dict", "model_state_dict", "model", "module", "net", "network", "weights", "params")
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
STORAGES = {
    "FloatStorage": torch.float32,
    "DoubleStorage": torch.float64,
    "HalfStorage": torch.float16,
    "BFloat16Storage": torch.bfloat16,
    "LongStorage": torch.int64,
    "IntStorage": torch.int32,
    "ShortStorage": torch.int16,
    "CharStorage": torch.int8,
    "ByteStorage": torch.uint8,
    "BoolStorage": torch.bool,
}
# Nothing of these is ever imported here; a file that names them wants to do something, and is not looked at any further.
HARMFUL = {"os", "posix", "nt", "sys", "subprocess", "runpy", "pty", "socket", "ctypes", "importlib", "shutil", "webbrowser"}
HARMFUL_BUILTINS = {"eval", "exec", "compile", "__import__", "open", "input", "breakpoint"}
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
)


@dataclass
class Foreign:
    """Tensors by the file's names, and which of its state dicts they are."""

    tensors: dict[str, Tensor]
    taken: str = ""  # keys on the way to them, as "state_dict"
    also: list[str] = field(default_factory=list)  # other state dicts in the file


def read_file(path: Path) -> Foreign:
    """The named tensors of a safetensors file or of what torch.save wrote.

    Raises:
        CheckpointError: of no known format, damaged, or it wants to execute something.
    """
    try:
        with path.open("rb") as file:
            first = file.read(512)
        if _is_safetensors(first):
            return Foreign(load_file(path))
        content = _load_pickled(path) if first[:4] == b"PK\x03\x04" or first[:1] == b"\x80" else None
    except SafetensorError as error:
        raise CheckpointError(f"{path} cannot be read: it is a damaged safetensors file ({error}).") from error
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read ({error}).") from error
    if content is None:
        raise CheckpointError(f"{path} holds no weights: it is {_described(first)}.")
    try:
        return _choose(path, content)
    except BAD_PICKLE as error:
        raise CheckpointError(f"{path} is damaged: a tensor cannot be read ({_first_line(error)}). Fetch it again.") from error


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


def _load_pickled(path: Path) -> Any:
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
        reader = _read_zipped if zipped else _read_stream  # it holds foreign classes, or is damaged: these tell which
    try:
        return reader(path)
    except _Harmful as error:
        raise CheckpointError(f"{path} wants {error} to be executed, and is not opened.") from error
    except BAD_PICKLE as error:
        raise CheckpointError(
            f"{path} cannot be read: it is damaged, or no checkpoint of torch ({_first_line(error)})."
        ) from error


def _first_line(error: Exception) -> str:
    return f"{type(error).__name__}: {str(error).strip().split(chr(10))[0]}"


def _choose(path: Path, content: Any) -> Foreign:
    """The state dict of a checkpoint: under one of STATE_KEYS, nested once more at most, or the whole."""
    found: dict[str, dict[str, Tensor | _Described]] = {}

    def search(tree: Any, where: str, depth: int) -> None:
        if not isinstance(tree, dict):
            return
        tensors = {k: v for k, v in tree.items() if isinstance(k, str) and isinstance(v, (Tensor, _Described))}
        if tensors:
            found[where] = tensors
        elif depth < 3:
            for key, value in tree.items():
                search(value, f"{where}.{key}".lstrip("."), depth + 1)

    if isinstance(content, dict):
        for key, value in content.items():
            if key in STATE_KEYS or "ema" in str(key).lower():
                search(value, str(key), 1)
        if not found or all("ema" in where.lower() for where in found):
            search(content, "", 0)
    if not found:
        raise CheckpointError(
            f"{path} holds no named tensors: expected a state dict, or a checkpoint with one under {', '.join(STATE_KEYS[:4])}."
        )
    order = sorted(found, key=lambda w: ("ema" in w.lower(), *(w.split(".")[0] != key for key in STATE_KEYS), -len(found[w])))
    taken, *also = order
    tensors = {name: _resolved(value) for name, value in found[taken].items()}
    return Foreign(tensors, taken, also)


class _Harmful(Exception):
    """A file names something that executes commands."""


class _Inert:
    """Stands for any foreign class, function or instance: takes everything, does nothing."""

    def __new__(cls, *arguments: Any, **keywords: Any) -> _Inert:
        return super().__new__(cls)

    def __init__(self, *arguments: Any, **keywords: Any) -> None: ...

    def __setstate__(self, state: Any) -> None: ...

    def __setitem__(self, key: Any, value: Any) -> None: ...

    def append(self, value: Any) -> None: ...

    def extend(self, values: Any) -> None: ...

    def add(self, value: Any) -> None: ...

    def __call__(self, *arguments: Any, **keywords: Any) -> _Inert:
        return self


@dataclass
class _Described:
    """A tensor that has not been read yet."""

    read: Callable[[], Tensor]  # its storage, flat
    offset: int
    size: tuple[int, ...]
    stride: tuple[int, ...]


def _resolved(value: Tensor | _Described) -> Tensor:
    return value if isinstance(value, Tensor) else value.read().as_strided(value.size, value.stride, value.offset)


class _TensorReader(pickle.Unpickler):
    """Rebuilds containers and describes tensors; every other name in the file becomes an `_Inert` class."""

    def __init__(self, file: IO[bytes], storage: Callable[[torch.dtype, str], Callable[[], Tensor]]) -> None:
        super().__init__(file, encoding="utf-8")
        self._storage = storage

    def find_class(self, module: str, name: str) -> Any:
        top = module.split(".")[0]
        if top in HARMFUL or (top in ("builtins", "__builtin__") and name in HARMFUL_BUILTINS):
            raise _Harmful(f"{module}.{name}")
        if (module, name) == ("collections", "OrderedDict"):
            return OrderedDict
        if module == "torch" and name in STORAGES:
            return STORAGES[name]
        if (module, name) == ("torch._utils", "_rebuild_tensor_v2"):
            return lambda storage, offset, size, stride, *_: _Described(storage, offset, tuple(size), tuple(stride))
        if module == "torch._utils" and name in ("_rebuild_parameter", "_rebuild_parameter_with_state"):
            return lambda data, *_: data
        return type(name, (_Inert,), {})

    def persistent_load(self, pid: Any) -> Callable[[], Tensor]:
        kind, dtype, key, *_ = pid
        if kind != "storage" or not isinstance(dtype, torch.dtype):
            raise pickle.UnpicklingError(f"a storage of kind {kind!r}")
        return self._storage(dtype, str(key))


def _flat(content: bytes, dtype: torch.dtype) -> Tensor:
    return torch.frombuffer(bytearray(content), dtype=dtype) if content else torch.empty(0, dtype=dtype)


def _read_zipped(path: Path) -> Any:
    """What torch.save writes since 1.6: data.pkl, and a member for every storage."""
    archive = zipfile.ZipFile(path)
    pickled = next(name for name in archive.namelist() if name.endswith("data.pkl"))
    folder = pickled.removesuffix("data.pkl")

    def storage(dtype: torch.dtype, key: str) -> Callable[[], Tensor]:
        return lambda: _flat(archive.read(f"{folder}data/{key}"), dtype)

    with archive.open(pickled) as file:
        return _TensorReader(file, storage).load()


def _read_stream(path: Path) -> Any:
    """What torch.save wrote before 1.6: five pickles in a row, then every storage as its length and values."""
    places: dict[str, tuple[torch.dtype, int, int]] = {}
    dtypes: dict[str, torch.dtype] = {}

    def storage(dtype: torch.dtype, key: str) -> Callable[[], Tensor]:
        dtypes[key] = dtype

        def read() -> Tensor:
            kind, start, count = places[key]
            with path.open("rb") as again:
                again.seek(start)
                return _flat(again.read(count * kind.itemsize), kind)

        return read

    with path.open("rb") as file:
        for _ in range(3):  # magic number, protocol, sizes of types
            _TensorReader(file, storage).load()
        content = _TensorReader(file, storage).load()
        for key in _TensorReader(file, storage).load():
            (count,) = struct.unpack("<q", file.read(8))
            places[str(key)] = (dtypes[str(key)], file.tell(), count)
            file.seek(count * dtypes[str(key)].itemsize, 1)
    return content
