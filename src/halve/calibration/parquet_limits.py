"""Check a .parquet file for decompression bombs before pyarrow reads it.

pyarrow allocates whatever a page header asks for, and a page may expand a thousandfold.
So the uncompressed sizes of all pages are summed up here first, from the footer and the
page headers. Those are in Thrift's compact protocol, of which this module reads what
they use. (pyarrow can report what a footer holds, but crashes on some.)

Field numbers are those of parquet.thrift (apache/parquet-format).
"""

import mmap
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

# Pages in a file; each has at least one row.
_MAX_PAGES = 2**20
# Bytes of a footer; that of a gigabyte of text has some hundred thousand.
_MAX_FOOTER = 2**21
_MAGIC = b"PAR1"
_TAIL = 4 + len(_MAGIC)
# FileMetaData.row_groups, RowGroup.columns, ColumnChunk.meta_data.
_ROW_GROUPS, _COLUMNS, _METADATA = 4, 1, 3
# ColumnMetaData: path_in_schema, total_compressed_size, data_page_offset,
# dictionary_page_offset.
_PATH, _SIZE, _DATA_PAGE, _DICTIONARY_PAGE = 3, 7, 9, 11
# PageHeader: uncompressed_page_size, compressed_page_size, and the headers of data
# pages of both versions, whose first field is num_values.
_UNCOMPRESSED, _COMPRESSED, _DATA_HEADERS = 2, 3, (5, 8)
_VALUES = 1
# Type codes of the compact protocol. A boolean field has no value: its code is one.
_BOOLEANS = (1, 2)
_BYTE = 3
_INTEGERS = (4, 5, 6)
_DOUBLE = 7
_BINARY = 8
_LIST = 9
_STRUCT = 12
# Bits by which the last byte of a 64-bit varint may be shifted.
_VARINT_BITS = 63
# The size of a list in its first byte that says that the size follows.
_LONG_LIST = 15


def check_pages(path: Path, column: str, limit: int, value_nbytes: int = 0) -> None:
    """Raise ValueError if the pages of a column are too large when decompressed.

    Args:
        path: The .parquet file.
        column: The name of the column.
        limit: The maximum of bytes of all pages together, decompressed.
        value_nbytes: What each value takes once it is read, in bytes: a page of a few
            bytes may hold a million equal ones. All together are limited, too.
    """
    with _parsing(path) as data:
        left, values = limit, limit
        for count, page in enumerate(_pages(data, column.encode())):
            left -= page.nbytes
            values -= page.values * value_nbytes
            if min(left, values) < 0 or count > _MAX_PAGES:
                raise ValueError("its pages are far larger than the file")


def column_paths(path: Path) -> list[tuple[str, ...]]:
    """Return the path of every column, field by field, each once.

    Raises:
        ValueError: The footer is damaged.
    """
    with _parsing(path) as data:
        groups = _footer(data)[_ROW_GROUPS]
        chunks = (chunk[_METADATA] for group in groups for chunk in group[_COLUMNS])
        paths = (tuple(part.decode() for part in chunk[_PATH]) for chunk in chunks)
        return list(dict.fromkeys(path for path in paths if path))


@contextmanager
def _parsing(path: Path) -> Iterator[mmap.mmap]:
    """Map a file, and turn what damaged contents raise into a ValueError."""
    with path.open("rb") as file:
        data = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    with data:
        try:
            yield data
        except (LookupError, TypeError, AttributeError, RecursionError) as error:
            raise ValueError("its footer, or a page, is damaged") from error


@dataclass(frozen=True)
class _Page:
    """A page: its bytes when decompressed, and the values that it says it holds."""

    nbytes: int
    values: int


def _pages(data: mmap.mmap, column: bytes) -> Iterator[_Page]:
    """Yield every page of a column."""
    for group in _footer(data)[_ROW_GROUPS]:
        for metadata in (chunk[_METADATA] for chunk in group[_COLUMNS]):
            if metadata[_PATH][0] == column:
                yield from _pages_of_chunk(data, metadata)


def _footer(data: mmap.mmap) -> dict[int, Any]:
    """Parse the footer, which ends in its length (4 bytes) and the magic number."""
    length = int.from_bytes(data[-_TAIL : -len(_MAGIC)], "little")
    if data[-len(_MAGIC) :] != _MAGIC or length > min(_MAX_FOOTER, len(data) - _TAIL):
        raise ValueError("it has no valid footer")
    return _CompactReader(data, len(data) - _TAIL - length).struct()


def _pages_of_chunk(data: mmap.mmap, metadata: dict[int, Any]) -> Iterator[_Page]:
    offset = metadata[_DATA_PAGE]
    if metadata.get(_DICTIONARY_PAGE, 0) > 0:
        offset = min(offset, metadata[_DICTIONARY_PAGE])
    end = offset + metadata[_SIZE]
    if not 0 <= offset <= end <= len(data):
        raise ValueError("a column is outside of the file")
    while offset < end:
        reader = _CompactReader(data, offset)
        header = reader.struct()
        if min(header[_UNCOMPRESSED], header[_COMPRESSED]) < 0:
            raise ValueError("a page has a negative size")
        values = sum(header[n][_VALUES] for n in _DATA_HEADERS if n in header)
        if values < 0:
            raise ValueError("a page has a negative number of values")
        yield _Page(header[_UNCOMPRESSED], values)
        # The compressed page follows its header; then comes the next header.
        offset = reader.position + header[_COMPRESSED]


class _CompactReader:
    """Read values of Thrift's compact protocol, one after the other.

    Raises IndexError for data that ends early or is longer than a footer may be.
    """

    def __init__(self, data: mmap.mmap, position: int) -> None:
        self.data, self.position = data, position
        self.end = min(position + _MAX_FOOTER, len(data))

    def struct(self) -> dict[int, Any]:
        """Read a structure; return its values by field number."""
        fields: dict[int, Any] = {}
        number = 0
        while head := self._byte():  # a zero byte ends the structure
            # The upper half is the difference to the last field number; if it is zero,
            # the number itself follows. The lower half is the type.
            number = number + (head >> 4) if head >> 4 else _signed(self._varint())
            kind = head & 15
            fields[number] = kind == 1 if kind in _BOOLEANS else self._value(kind)
        return fields

    def _value(self, kind: int) -> Any:  # noqa: ANN401
        if kind in {*_BOOLEANS, _BYTE}:  # within a list, a boolean takes a byte
            return self._byte()
        if kind in _INTEGERS:
            return _signed(self._varint())
        if kind == _STRUCT:
            return self.struct()
        if kind == _LIST:
            return self._list()
        if kind not in {_DOUBLE, _BINARY}:
            raise ValueError("its footer has a value of an unknown type")
        return self._bytes(8 if kind == _DOUBLE else self._varint())

    def _list(self) -> list[Any]:
        head = self._byte()  # the length, if it is short, and the type of its values
        length = head >> 4 if head >> 4 < _LONG_LIST else self._varint()
        return [self._value(head & 15) for _ in range(length)]

    def _bytes(self, length: int) -> bytes:
        start = self.position
        self.position += length
        if self.position > self.end:
            raise IndexError("past the end")
        return self.data[start : self.position]

    def _byte(self) -> int:
        return self._bytes(1)[0]

    def _varint(self) -> int:
        """Read an unsigned integer: seven bits a byte, the lowest first."""
        value = shift = 0
        while (byte := self._byte()) & 0x80:
            value |= (byte & 0x7F) << shift
            shift += 7
            if shift > _VARINT_BITS:
                raise ValueError("a number has too many bytes")
        return value | byte << shift


def _signed(number: int) -> int:
    """Decode zigzag: 0, 1, 2, 3 ... stand for 0, -1, 1, -2 ..."""
    return (number >> 1) ^ -(number & 1)
