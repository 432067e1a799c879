"""Fields of NetCDF-4 files, which are HDF5 files: the chunks that are asked for, unpacked by a faster decompressor.

The NetCDF library takes milliseconds to open a file and spends the rest of its time in zlib. What lies in a chunk is told by
the two filters that it writes (HDF5 File Format Specification, "Filter Pipeline": 1 is deflate, 2 is shuffle); how it keeps
dimensions and variables, by "NetCDF-4 Format" in the NetCDF Users' Guide. Whatever else a file holds is left to the library.
"""

from __future__ import annotations

import io
import math
import os
from collections.abc import Iterator
from itertools import product
from pathlib import Path
from typing import Any

import deflate
import h5py
import numpy as np

MAGIC = b"\x89HDF\r\n\x1a\n"
DEFLATE, SHUFFLE = h5py.h5z.FILTER_DEFLATE, h5py.h5z.FILTER_SHUFFLE
NOT_READ = (OSError, RuntimeError, KeyError, ValueError, TypeError, OverflowError, deflate.DeflateError)
OF_NUMBERS = [np.dtype(code) for code in ("i1", "i2", "i4", "i8", "u1", "u2", "u4", "u8", "f4", "f8")]
BARE = "This is a netCDF dimension but not a netCDF variable"
UNPACKED_HERE = ([SHUFFLE, DEFLATE], [DEFLATE])
READ_BY = ("units", "_FillValue", "missing_value", "scale_factor", "add_offset", "_Unsigned")
NOT_ITS_OWN = "_nc4_non_coord_"  # how NetCDF-4 stores a variable that is called like a dimension but does not count along it


def is_hdf5(path: Path, content: bytes | None) -> bool:
    if content is not None:
        return content.startswith(MAGIC)
    with path.open("rb") as file:
        return file.read(len(MAGIC)) == MAGIC


def opened(path: Path, content: bytes | None) -> h5py.h5f.FileID:
    """The file, or its content where it lies in an archive.

    Raises:
        OSError: it is damaged.
    """
    access = h5py.h5p.create(h5py.h5p.FILE_ACCESS)
    if content is not None:
        access.set_fileobj_driver(h5py.h5fd.fileobj_driver, io.BytesIO(content))  # an image in memory is copied, twice
    return h5py.h5f.open(os.fsencode(path), h5py.h5f.ACC_RDONLY, access)


def variables(file: h5py.h5f.FileID) -> Iterator[tuple[str, h5py.h5d.DatasetID]]:
    """Variables and dimensions at the root of a file, as they are stored, sorted by name."""
    root = h5py.h5g.open(file, b"/")
    for name in sorted(root):
        variable = h5py.h5o.open(root, name)
        if isinstance(variable, h5py.h5d.DatasetID):
            yield name.decode(), variable


def attribute(of: h5py.h5d.DatasetID, name: str) -> Any:
    """As the NetCDF library gives it, if it is text, a number, or an array of several."""
    value = h5py.AttributeManager(h5py.Dataset(of))[name]
    if isinstance(value, h5py.Empty):
        return np.array([], value.dtype) if value.dtype.kind in "iuf" else ""
    if isinstance(value, np.ndarray) and value.size == 1:
        value = value.reshape(-1)[0]
    if isinstance(value, str):  # h5py keeps what is not UTF-8
        value = value.encode("utf-8", "surrogateescape")
    return value.decode("utf-8", "replace") if isinstance(value, bytes) else value


class Fields:
    """The variables of a file, whose bytes are `content`, or those on the disk."""

    def __init__(self, path: Path, content: bytes | None) -> None:
        """
        Raises:
            NOT_READ: h5py cannot make sense of it.
        """
        self._file, self._content = opened(path, content), content
        self._variables = dict(variables(self._file))
        self.dimensions = _dimensions(self._variables)  # of every variable; None where only NetCDF itself can tell
        self._descriptor = os.open(path, os.O_RDONLY) if content is None else None

    def shape(self, name: str) -> tuple[int, ...]:
        return tuple(self._variables[name].shape)

    def attributes(self, name: str) -> dict[str, Any]:
        """What says how the numbers of a variable are to be read."""
        variable = self._variables[name]
        return {key: attribute(variable, key) for key in READ_BY if h5py.h5a.exists(variable, key.encode())}

    def close(self) -> None:
        self._variables.clear()  # each holds the file open
        self._file.close()
        if self._descriptor is not None:
            os.close(self._descriptor)

    def read(self, name: str, wanted: list[tuple[int, int]]) -> np.ndarray | None:
        """Part of a variable, as it is stored.

        Args:
            wanted: first place and the one after the last along each dimension.

        Returns:
            None where it is not for us: not in chunks, with other filters, of other types, or never written.

        Raises:
            NOT_READ: a chunk is damaged.
        """
        if name not in self._variables:
            return None
        variable = self._variables[name]
        how = variable.get_create_plist()
        filters = [how.get_filter(number)[0] for number in range(how.get_nfilters())]
        of_numbers = variable.dtype in OF_NUMBERS and variable.get_type() == h5py.h5t.py_create(variable.dtype)
        reaches = all(last <= size for (_, last), size in zip(wanted, variable.shape, strict=True))  # or NetCDF fills it up
        if filters not in UNPACKED_HERE or not of_numbers or not reaches:
            return None
        lengths = how.get_chunk()
        out = np.empty([last - first for first, last in wanted], variable.dtype)
        corners = [range(first // length * length, last, length) for (first, last), length in zip(wanted, lengths, strict=True)]
        for corner in product(*corners):
            found = variable.get_chunk_info_by_coord(corner)
            if not found.size or found.filter_mask:  # never written, or a filter was left out
                return None
            chunk = _numbers(self._packed(found.byte_offset, found.size), variable.dtype, lengths, SHUFFLE in filters)
            if chunk.shape == out.shape and wanted == [(0, size) for size in lengths]:
                return chunk
            there, here = [], []
            for at, length, (first, last) in zip(corner, lengths, wanted, strict=True):
                begin, end = max(first, at), min(last, at + length)
                there.append(slice(begin - at, end - at))
                here.append(slice(begin - first, end - first))
            out[tuple(here)] = chunk[tuple(there)]
        return out

    def _packed(self, offset: int, size: int) -> bytes | memoryview:
        """A chunk as it is stored. Read by ourselves, as h5py takes longer for it than the unpacking does."""
        if self._content is not None:
            return memoryview(self._content)[offset : offset + size]
        assert self._descriptor is not None
        return os.pread(self._descriptor, size, offset)


def _dimensions(stored: dict[str, h5py.h5d.DatasetID]) -> dict[str, tuple[str, ...]] | None:
    """Which dimensions variables have, as their lengths tell it; to ask for NetCDF's own lists of them is dear.

    None where lengths do not tell: two dimensions are as long, one can grow (its length is then stored nowhere), or the file
    was not written by NetCDF.
    """
    called: dict[int, str] = {}
    bare = set()  # dimensions that no variable is called after
    for name, variable in stored.items():
        shape = variable.shape
        if name.startswith(NOT_ITS_OWN) or not shape or variable.get_space().get_simple_extent_dims(True) != shape:
            return None
        if not h5py.h5ds.is_scale(variable):
            continue
        if len(shape) > 1 or shape[0] in called:
            return None
        called[shape[0]] = name
        if str(attribute(variable, "NAME")).startswith(BARE):
            bare.add(name)
    if not {length for variable in stored.values() for length in variable.shape} <= set(called):
        return None
    own = {name: variable for name, variable in stored.items() if name not in bare}
    return {name: tuple(called[length] for length in variable.shape) for name, variable in own.items()}


def _numbers(packed: bytes | memoryview, dtype: np.dtype, shape: tuple[int, ...], shuffled: bool) -> np.ndarray:
    expected = dtype.itemsize * math.prod(shape)
    content = deflate.zlib_decompress(packed, expected)
    if len(content) != expected:
        raise OSError(f"a chunk unpacks to {len(content)} bytes instead of {expected}")
    if not shuffled or dtype.itemsize == 1:
        return np.frombuffer(content, dtype).reshape(shape)
    # The first bytes of all numbers, then all second ones, and so on.
    planes = np.frombuffer(content, "u1").reshape(dtype.itemsize, -1)
    numbers = planes[-1].astype(f"u{dtype.itemsize}")
    for plane in planes[-2::-1]:
        numbers <<= 8
        numbers |= plane
    return numbers.view(dtype).reshape(shape)
