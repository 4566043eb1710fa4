"""The pages of a .parquet, added up before any of them is unpacked.

pyarrow makes room for whatever a page's header promises, and a page may shrink a
thousandfold. What the file's footer says of that is not what pyarrow goes by, so the
headers are read here: Thrift's compact protocol, as far as they need it.
"""

import mmap
from collections.abc import Iterator
from pathlib import Path
from typing import Any

# Of a file; each has a row at least.
_MOST_PAGES = 2**20
_UNCOMPRESSED, _COMPRESSED = 2, 3  # fields of a page's header
# Kinds of values: two truths, which have no bytes, then what follows in this order.
_BYTE, _WHOLE, _DOUBLE, _BINARY, _STRUCT = 3, (4, 5, 6), 7, 8, 12
_VARINT_BITS = 63


def check_pages(path: Path, metadata: Any, column: str, most: int) -> None:  # noqa: ANN401
    """Raise ValueError where a column's pages promise more than some bytes.

    Args:
        path: Of the file.
        metadata: What pyarrow makes of its footer.
        column: Its name.
        most: Bytes of all pages together, unpacked.
    """
    with path.open("rb") as file:
        data = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    with data:
        for count, size in enumerate(_pages(data, metadata, column)):
            most -= size
            if most < 0 or count > _MOST_PAGES:
                raise ValueError("its pages are far larger than the file")


def _pages(data: mmap.mmap, metadata: Any, column: str) -> Iterator[int]:  # noqa: ANN401
    """Yield the unpacked size of every page of a column."""
    for group in map(metadata.row_group, range(metadata.num_row_groups)):
        for chunk in map(group.column, range(group.num_columns)):
            if chunk.path_in_schema.partition(".")[0] == column:
                yield from _pages_of_chunk(data, chunk)


def _pages_of_chunk(data: mmap.mmap, chunk: Any) -> Iterator[int]:  # noqa: ANN401
    begin = chunk.data_page_offset
    if chunk.has_dictionary_page:
        begin = min(begin, chunk.dictionary_page_offset)
    end = begin + chunk.total_compressed_size
    if not 0 <= begin <= end <= len(data):
        raise ValueError("a column lies outside the file")
    while begin < end:
        header = _Header(data, begin)
        sizes = header.sizes()
        if sizes.keys() != {_UNCOMPRESSED, _COMPRESSED} or min(sizes.values()) < 0:
            raise ValueError("a page without a size")
        yield sizes[_UNCOMPRESSED]
        begin = header.at + sizes[_COMPRESSED]


class _Header:
    """A page's header, read from a place on; IndexError at the end of the file."""

    def __init__(self, data: mmap.mmap, at: int) -> None:
        self.data, self.at = data, at

    def sizes(self) -> dict[int, int]:
        """Return the two sizes by their fields; `at` is then behind the header."""
        found: dict[int, int] = {}
        for field, kind in self._fields():
            if field in {_UNCOMPRESSED, _COMPRESSED} and kind in _WHOLE:
                found[field] = _signed(self._number())
            else:
                self._skip(kind)
        return found

    def _byte(self) -> int:
        value = self.data[self.at]
        self.at += 1
        return value

    def _number(self) -> int:
        value = shift = 0
        while (octet := self._byte()) & 0x80:
            value |= (octet & 0x7F) << shift
            shift += 7
            if shift > _VARINT_BITS:
                raise ValueError("a page's header with an endless number")
        return value | octet << shift

    def _fields(self) -> Iterator[tuple[int, int]]:
        """Yield number and kind of each field, whose value must be read next."""
        field = 0
        while head := self._byte():
            field = field + (head >> 4) if head >> 4 else _signed(self._number())
            yield field, head & 15

    def _skip(self, kind: int) -> None:
        if kind == _BYTE:
            self.at += 1
        elif kind in _WHOLE:
            self._number()
        elif kind == _DOUBLE:
            self.at += 8
        elif kind == _BINARY:
            length = self._number()
            self.at += length
        elif kind == _STRUCT:
            for _, inner in self._fields():
                self._skip(inner)
        elif kind > _BYTE:  # lists; no header has one
            raise ValueError("a page's header that is none")


def _signed(number: int) -> int:
    """Undo the zigzag by which small negative numbers stay short."""
    return (number >> 1) ^ -(number & 1)
