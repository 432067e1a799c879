"""Tensors out of pickles without executing anything in them: every foreign name becomes an `Inert` that is never imported."""

from __future__ import annotations

import pickle
import struct
import zipfile
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import torch
from torch import Tensor

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


class Harmful(Exception):
    """A file names something that executes commands."""


def require_harmless(module: str, name: str) -> None:
    """
    Raises:
        Harmful: it executes commands.
    """
    top = module.split(".")[0]
    if top in HARMFUL or (top in ("builtins", "__builtin__") and name in HARMFUL_BUILTINS):
        raise Harmful(f"{module}.{name}")


class Inert:
    """Stands for any foreign class, function or instance: takes everything, does nothing, and keeps what it is given."""

    held: dict[Any, Any]  # the attributes of an instance, or the items of a dictionary

    def __new__(cls, *arguments: Any, **keywords: Any) -> Inert:
        made = super().__new__(cls)
        made.held = {}
        return made

    def __init__(self, *arguments: Any, **keywords: Any) -> None: ...

    def __setstate__(self, state: Any) -> None:
        if isinstance(state, dict):
            self.held.update(state)

    def __setitem__(self, key: Any, value: Any) -> None:
        self.held[key] = value

    def append(self, value: Any) -> None: ...

    def extend(self, values: Any) -> None: ...

    def add(self, value: Any) -> None: ...

    def __call__(self, *arguments: Any, **keywords: Any) -> Inert:
        return self


@dataclass
class Described:
    """A tensor that has not been read yet."""

    read: Callable[[], Tensor]  # its storage, flat
    offset: int
    size: tuple[int, ...]
    stride: tuple[int, ...]


def resolved(value: Tensor | Described) -> Tensor:
    return value if isinstance(value, Tensor) else value.read().as_strided(value.size, value.stride, value.offset)


class _TensorReader(pickle.Unpickler):
    """Rebuilds containers and describes tensors; every other name in the file becomes an `Inert` class."""

    def __init__(self, file: IO[bytes], storage: Callable[[torch.dtype, str], Callable[[], Tensor]]) -> None:
        super().__init__(file, encoding="utf-8")
        self._storage = storage

    def find_class(self, module: str, name: str) -> Any:
        require_harmless(module, name)
        if (module, name) == ("collections", "OrderedDict"):
            return OrderedDict
        if module == "torch" and name in STORAGES:
            return STORAGES[name]
        if (module, name) == ("torch._utils", "_rebuild_tensor_v2"):
            return lambda storage, offset, size, stride, *_: Described(storage, offset, tuple(size), tuple(stride))
        if module == "torch._utils" and name in ("_rebuild_parameter", "_rebuild_parameter_with_state"):
            return lambda data, *_: data
        return type(name, (Inert,), {})

    def persistent_load(self, pid: Any) -> Callable[[], Tensor]:
        kind, dtype, key, *_ = pid
        if kind != "storage" or not isinstance(dtype, torch.dtype):
            raise pickle.UnpicklingError(f"a storage of kind {kind!r}")
        return self._storage(dtype, str(key))


def _flat(content: bytes, dtype: torch.dtype) -> Tensor:
    return torch.frombuffer(bytearray(content), dtype=dtype) if content else torch.empty(0, dtype=dtype)


def read_zipped(path: Path) -> Any:
    """What torch.save writes since 1.6: data.pkl, and a member for every storage."""
    archive = zipfile.ZipFile(path)
    pickled = next(name for name in archive.namelist() if name.endswith("data.pkl"))
    folder = pickled.removesuffix("data.pkl")

    def storage(dtype: torch.dtype, key: str) -> Callable[[], Tensor]:
        return lambda: _flat(archive.read(f"{folder}data/{key}"), dtype)

    with archive.open(pickled) as file:
        return _TensorReader(file, storage).load()


def read_stream(path: Path) -> Any:
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
