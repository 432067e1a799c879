"""Is a classic NetCDF file whole? Its library answers reads past the end of the file with zeros instead of an error.

The header of CDF-1, CDF-2 and CDF-5 files says where every variable lies (NetCDF Users' Guide, appendix B, "File Format
Specifications"); the file must reach as far.
"""

from __future__ import annotations

import struct
from pathlib import Path

from data import DataError

DIMENSION, VARIABLE, ATTRIBUTE = 10, 11, 12
SIZE_OF_TYPE = {1: 1, 2: 1, 3: 2, 4: 4, 5: 4, 6: 8, 7: 1, 8: 2, 9: 4, 10: 8, 11: 8}
HEADERS = (1 << 16, 1 << 20, 64 << 20)  # bytes of a header: most are short, and nobody reads a whole file for it
MOST_LISTED = 1 << 24


def require_whole(path: Path) -> None:
    """Do nothing for a file that is not classic NetCDF, or is whole.

    Raises:
        DataError: the file ends before its own header says, or the header is damaged.
    """
    with path.open("rb") as file:
        first = file.read(4)
        if first[:3] != b"CDF" or first[3:] not in (b"\x01", b"\x02", b"\x05"):
            return
        size = path.stat().st_size
        for length in HEADERS:
            file.seek(0)
            try:
                needed = _Header(file.read(length), size).needed
                break
            except (struct.error, IndexError, KeyError, ValueError, OverflowError) as error:
                if length == HEADERS[-1] or length >= size:
                    raise DataError(
                        f"{path} cannot be read: the header of this classic NetCDF file is damaged or cut off. Fetch it again."
                    ) from error
    if size < needed:
        raise DataError(
            f"{path} is cut off: it has {size} bytes, its header describes {needed}. What is missing would be read "
            "as zeros. Fetch it again."
        )


class _Header:
    """Reads a header from its first to its last byte; `needed` is the size of the whole file."""

    def __init__(self, header: bytes, size: int) -> None:
        self._bytes, self._at = header, 4
        version = header[3]
        self._count = ">q" if version == 5 else ">i"  # of elements, dimensions, names
        self._offset = ">i" if version == 1 else ">q"
        stated = self._number(">Q" if version == 5 else ">I")
        streaming = stated == (2**64 - 1 if version == 5 else 2**32 - 1)
        lengths = [self._dimension() for _ in range(self._list(DIMENSION))]
        self._attributes()
        fixed: list[tuple[int, int]] = []  # first byte and length of every variable
        records: list[tuple[int, int]] = []
        for _ in range(self._list(VARIABLE)):
            self._name()
            dims = [lengths[self._number(self._count)] for _ in range(self._number(self._count))]
            self._attributes()
            width = SIZE_OF_TYPE[self._number(">i")]
            self._number(self._count)  # its size, which is too small a number for large variables
            begin = self._number(self._offset)
            if begin < 0:
                raise ValueError("a variable begins before the file")
            numel = 1
            for length in dims[1:] if dims and dims[0] == 0 else dims:
                numel *= length
            (records if dims and dims[0] == 0 else fixed).append((begin, numel * width))
        ends = [self._at, *(begin + length for begin, length in fixed)]
        if records:
            # One record variable alone is not padded; of several, each fills whole words.
            stride = records[0][1] if len(records) == 1 else sum(-(-length // 4) * 4 for _, length in records)
            count = max(0, (size - records[0][0]) // max(1, stride)) if streaming else stated
            ends += [begin + (count - 1) * stride + length for begin, length in records if count]
        self.needed = max(ends)

    def _number(self, form: str) -> int:
        (value,) = struct.unpack_from(form, self._bytes, self._at)
        self._at += struct.calcsize(form)
        return int(value)

    def _list(self, expected: int) -> int:
        tag, count = self._number(">i"), self._number(self._count)
        if (tag, count) != (0, 0) and tag != expected or not 0 <= count < MOST_LISTED:
            raise ValueError(f"list {tag} of {count}")
        return count

    def _name(self) -> None:
        self._skip(self._number(self._count))

    def _dimension(self) -> int:
        self._name()
        return self._number(self._count)

    def _attributes(self) -> None:
        for _ in range(self._list(ATTRIBUTE)):
            self._name()
            width = SIZE_OF_TYPE[self._number(">i")]
            self._skip(width * self._number(self._count))

    def _skip(self, length: int) -> None:
        """Past bytes that are padded to whole words."""
        if length < 0:
            raise ValueError("a negative length")
        self._at += -(-length // 4) * 4
        if self._at > len(self._bytes):
            raise ValueError("the header is cut off")
