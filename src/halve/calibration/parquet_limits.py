"""The pages of a .parquet, added up before any of them is unpacked.

pyarrow makes room for whatever a page's header promises, and a page may shrink a
thousandfold. So footer and headers are read here first: Thrift's compact protocol, as
far as they need it. (pyarrow would tell what is in a footer, but some footers end the
process when it is asked.)
"""

import mmap
from collections.abc import Iterator
from pathlib import Path
from typing import Any

# Of a file; each has a row at least.
_MAX_PAGES = 2**20
# Bytes of a footer; that of a gigabyte of text takes some hundred thousand.
_MAX_FOOTER = 2**21
_MAGIC = b"PAR1"
_TAIL = 4 + len(_MAGIC)
# Fields, by number: of the footer, of a group of rows, of a column in it, of what is
# told of that, and of a page's header.
_GROUPS, _COLUMNS, _TOLD = 4, 1, 3
_PATH, _SIZE, _DATA_PAGE, _DICTIONARY_PAGE = 3, 7, 9, 11
_UNCOMPRESSED, _COMPRESSED = 2, 3
# Kinds of values.
_TRUTHS, _BYTE, _WHOLE, _DOUBLE, _BINARY, _LIST, _STRUCT = (
    (1, 2),
    3,
    (4, 5, 6),
    7,
    8,
    9,
    12,
)
_VARINT_BITS = 63
_LONG_LIST = 15


def check_pages(path: Path, column: str, most: int) -> None:
    """Raise ValueError where a column's pages promise more than some bytes.

    Args:
        path: Of the file.
        column: Its name.
        most: Bytes of all pages together, unpacked.
    """
    with path.open("rb") as file:
        data = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    with data:
        try:
            for count, size in enumerate(_pages(data, column.encode())):
                most -= size
                if most < 0 or count > _MAX_PAGES:
                    raise ValueError("its pages are far larger than the file")
        except (LookupError, TypeError, RecursionError) as error:
            raise ValueError("its footer, or a page, is damaged") from error


def _pages(data: mmap.mmap, column: bytes) -> Iterator[int]:
    """Yield the unpacked size of every page of a column."""
    for group in _footer(data)[_GROUPS]:
        for told in (chunk[_TOLD] for chunk in group[_COLUMNS]):
            if told[_PATH][0] == column:
                yield from _pages_of_chunk(data, told)


def _footer(data: mmap.mmap) -> dict[int, Any]:
    length = int.from_bytes(data[-_TAIL : -len(_MAGIC)], "little")
    if data[-len(_MAGIC) :] != _MAGIC or length > min(_MAX_FOOTER, len(data) - _TAIL):
        raise ValueError("it has no footer that is believed")
    return _Reader(data, len(data) - _TAIL - length).struct()


def _pages_of_chunk(data: mmap.mmap, told: dict[int, Any]) -> Iterator[int]:
    begin = told[_DATA_PAGE]
    if told.get(_DICTIONARY_PAGE, 0) > 0:
        begin = min(begin, told[_DICTIONARY_PAGE])
    end = begin + told[_SIZE]
    if not 0 <= begin <= end <= len(data):
        raise ValueError("a column lies outside the file")
    while begin < end:
        reader = _Reader(data, begin)
        header = reader.struct()
        if min(header[_UNCOMPRESSED], header[_COMPRESSED]) < 0:
            raise ValueError("a page of a negative size")
        yield header[_UNCOMPRESSED]
        begin = reader.at + header[_COMPRESSED]


class _Reader:
    """Thrift's values, one after the other; IndexError past what a footer may take."""

    def __init__(self, data: mmap.mmap, at: int) -> None:
        self.data, self.at = data, at
        self.end = min(at + _MAX_FOOTER, len(data))

    def struct(self) -> dict[int, Any]:
        """Return the values of a structure by the numbers of their fields."""
        found: dict[int, Any] = {}
        field = 0
        while head := self._byte():
            field = field + (head >> 4) if head >> 4 else _signed(self._number())
            kind = head & 15
            found[field] = kind == 1 if kind in _TRUTHS else self._value(kind)
        return found

    def _value(self, kind: int) -> Any:  # noqa: ANN401
        if kind in {*_TRUTHS, _BYTE}:
            return self._byte()
        if kind in _WHOLE:
            return _signed(self._number())
        if kind == _STRUCT:
            return self.struct()
        if kind == _LIST:
            return self._list()
        if kind not in {_DOUBLE, _BINARY}:
            raise ValueError("its footer holds what none holds")
        return self._octets(8 if kind == _DOUBLE else self._number())

    def _list(self) -> list[Any]:
        head = self._byte()
        length = head >> 4 if head >> 4 < _LONG_LIST else self._number()
        return [self._value(head & 15) for _ in range(length)]

    def _octets(self, length: int) -> bytes:
        begin = self.at
        self.at += length
        if self.at > self.end:
            raise IndexError("past the end")
        return self.data[begin : self.at]

    def _byte(self) -> int:
        return self._octets(1)[0]

    def _number(self) -> int:
        value = shift = 0
        while (octet := self._byte()) & 0x80:
            value |= (octet & 0x7F) << shift
            shift += 7
            if shift > _VARINT_BITS:
                raise ValueError("a number without end")
        return value | octet << shift


def _signed(number: int) -> int:
    """Undo the zigzag by which small negative numbers stay short."""
    return (number >> 1) ^ -(number & 1)
