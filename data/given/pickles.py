"""Tensors out of pickles without executing anything in them; no name in one is ever imported.

A foreign name becomes an `Inert`, or, in a file that is to hold nothing but tensors, a refusal.
"""

from __future__ import annotations

import io
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
# A file that names one of these wants to do something, and is not looked at any further.
HARMFUL = {"os", "posix", "nt", "sys", "subprocess", "runpy", "pty", "socket", "ctypes", "importlib"}
HARMFUL |= {"shutil", "webbrowser"}
HARMFUL_BUILTINS = {"eval", "exec", "compile", "__import__", "open", "input", "breakpoint"}
Storage = Callable[[], Tensor]  # reads the flat values of a tensor


class Harmful(Exception):
    """A file names something that executes commands."""


def require_harmless(module: str, name: str) -> None:
    """
    Raises:
        Harmful: it executes commands.
    """
    top = module.split(".")[0]
    builtin = top in ("builtins", "__builtin__") and name in HARMFUL_BUILTINS
    if top in HARMFUL or builtin:
        raise Harmful(f"{module}.{name}")


class Inert:
    """Any foreign class, function or instance: takes everything, does nothing, keeps its state."""

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

    read: Storage
    offset: int
    size: tuple[int, ...]
    stride: tuple[int, ...]


def resolved(value: Tensor | Described) -> Tensor:
    """The tensor itself."""
    if isinstance(value, Tensor):
        return value
    return value.read().as_strided(value.size, value.stride, value.offset)


class _Reader(pickle.Unpickler):
    """Rebuilds containers and describes tensors."""

    def __init__(self, file: IO[bytes], storage: Callable[[torch.dtype, str], Storage] | None) -> None:
        """
        Args:
            storage: finds the values of a tensor; None for a plain pickle, in which a tensor holds
                its own, and which is to hold nothing else.
        """
        super().__init__(file, encoding="utf-8")
        self._storage = storage

    def find_class(self, module: str, name: str) -> Any:
        require_harmless(module, name)
        if (module, name) == ("collections", "OrderedDict"):
            return OrderedDict
        if self._storage is None:
            if (module, name) == ("torch._utils", "_rebuild_tensor_v2"):
                return torch._utils._rebuild_tensor_v2
            if (module, name) == ("torch.storage", "_load_from_bytes"):
                # Without a restriction there, torch would load anything.
                return lambda content: torch.load(io.BytesIO(content), weights_only=True)
            raise pickle.UnpicklingError(f"it asks for {module}.{name}")
        if module == "torch" and name in STORAGES:
            return STORAGES[name]
        if (module, name) == ("torch._utils", "_rebuild_tensor_v2"):
            return lambda storage, offset, size, stride, *_: Described(storage, offset, tuple(size), tuple(stride))
        if module == "torch._utils" and name in ("_rebuild_parameter", "_rebuild_parameter_with_state"):
            return lambda data, *_: data
        return type(name, (Inert,), {})

    def persistent_load(self, pid: Any) -> Storage:
        kind, dtype, key, *_ = pid
        if self._storage is None or kind != "storage" or not isinstance(dtype, torch.dtype):
            raise pickle.UnpicklingError(f"a storage of kind {kind!r}")
        return self._storage(dtype, str(key))


def _flat(content: bytes, dtype: torch.dtype) -> Tensor:
    return torch.frombuffer(bytearray(content), dtype=dtype) if content else torch.empty(0, dtype=dtype)


def read_plain(path: Path) -> Any:
    """A plain pickle of containers and tensors."""
    with path.open("rb") as file:
        return _Reader(file, None).load()


def read_zipped(path: Path) -> Any:
    """What torch.save writes since 1.6: data.pkl, and a member for every storage."""
    archive = zipfile.ZipFile(path)
    pickled = next(name for name in archive.namelist() if name.endswith("data.pkl"))
    folder = pickled.removesuffix("data.pkl")

    def storage(dtype: torch.dtype, key: str) -> Storage:
        return lambda: _flat(archive.read(f"{folder}data/{key}"), dtype)

    with archive.open(pickled) as file:
        return _Reader(file, storage).load()


def read_stream(path: Path) -> Any:
    """What torch.save wrote before 1.6: five pickles, then every storage as its length and values."""
    places: dict[str, tuple[torch.dtype, int, int]] = {}
    dtypes: dict[str, torch.dtype] = {}

    def storage(dtype: torch.dtype, key: str) -> Storage:
        dtypes[key] = dtype

        def read() -> Tensor:
            kind, start, count = places[key]
            with path.open("rb") as again:
                again.seek(start)
                return _flat(again.read(count * kind.itemsize), kind)

        return read

    with path.open("rb") as file:
        for _ in range(3):  # magic number, protocol, sizes of types
            _Reader(file, storage).load()
        content = _Reader(file, storage).load()
        for key in _Reader(file, storage).load():
            (count,) = struct.unpack("<q", file.read(8))
            places[str(key)] = (dtypes[str(key)], file.tell(), count)
            file.seek(count * dtypes[str(key)].itemsize, 1)
    return content
