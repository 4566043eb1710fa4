"""Read local text files, which are untrusted: within bounds of their size.

A .txt is one text, in parts; each line of a .jsonl and each row of a .parquet is one.
"""

import json
from collections.abc import Callable, Iterator
from itertools import islice
from pathlib import Path
from typing import Any

from halve.calibration.documents import Render, choose_column, read_documents
from halve.calibration.parquet_limits import check_pages, column_paths
from halve.errors import CalibrationError, HalveError
from halve.text_name import SUFFIXES

# Bytes of a text file; calibration needs some megabytes.
_MAX_BYTES = 2**30
# Bytes of a line of .jsonl; parsing it takes up to twenty times as much memory.
_MAX_LINE = 2**24
# Text compresses to a tenth. A .parquet whose contents are larger than these many times
# its size, and than some megabytes, is treated as a decompression bomb.
_MAX_GROWTH = 50
_SMALL = 2**25
_FOOTER_LIMITS: dict[str, Any] = {
    "thrift_string_size_limit": 2**24,
    "thrift_container_size_limit": 2**20,
}
# Characters of a part of a .txt.
_PART = 2**18
# Bytes that a value takes apart from its text: in a list, and as a field of an object.
_POINTER, _OBJECT = 8, 200


def read_file(path: Path, column: str | None, render: Render | None) -> tuple[str, ...]:
    """Return the documents of a file.

    Args:
        path: A file of a type of `READERS`.
        column: The column, or key, to read; None for the first that Halve knows.
        render: Renders conversations; None to refuse them.

    Raises:
        CalibrationError: It cannot be read; the message names the line or row.
    """
    reader = READERS.get(path.suffix)
    if reader is None:
        raise CalibrationError(
            f"{path} is not of a type that Halve reads.",
            f"Use a file that ends in {', '.join(READERS)}, or a folder of them.",
        )
    try:
        _check_size(path)
        return reader(path, column, render)
    except HalveError:
        raise
    except Exception as error:  # pyarrow raises errors of many types
        raise CalibrationError(
            f"{path} cannot be read as {path.suffix} ({type(error).__name__}: "
            f"{str(error)[:200].rstrip('. ')}).",
            "A .jsonl file must have an object with a `text` on each line, a .parquet "
            "file a column `text` of strings, and a .txt file must be UTF-8.",
        ) from error


def text_nbytes(path: Path, column: str) -> int:
    """Return about how many bytes the texts of a file take.

    Args:
        path: The file, of any type.
        column: The column that is read; empty for the first that Halve knows.
    """
    if path.suffix != ".parquet":
        return path.stat().st_size
    from pyarrow import parquet  # noqa: PLC0415  (slow to import, seldom needed)

    try:
        names = dict.fromkeys(leaf[0] for leaf in column_paths(path))
        column = choose_column(names, column or None, str(path))
        with parquet.ParquetFile(path, **_FOOTER_LIMITS) as file:
            groups = (file.metadata.row_group(i) for i in range(file.num_row_groups))
            columns = (g.column(i) for g in groups for i in range(g.num_columns))
            sizes = [
                c.total_uncompressed_size
                for c in columns
                if c.path_in_schema.split(".")[0] == column
            ]
    except Exception:  # noqa: BLE001  (the run will report it)
        return path.stat().st_size
    return sum(sizes)


def _check_size(path: Path) -> None:
    size = path.stat().st_size
    if size > _MAX_BYTES:
        raise ValueError(f"it has {size} bytes; the limit is {_MAX_BYTES}")


def _read_txt(path: Path, column: str | None, render: Render | None) -> tuple[str, ...]:
    if column is not None:
        raise CalibrationError(
            f"{path} has no columns.", "Pass the name of the file alone."
        )
    with path.open(encoding="utf-8-sig") as file:
        return tuple(iter(lambda: file.read(_PART), ""))


def _read_jsonl(
    path: Path, column: str | None, render: Render | None
) -> tuple[str, ...]:
    return tuple(read_documents(_rows_of_lines(path), column, render))


def _rows_of_lines(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield where each line is, and its object; blank lines are left out."""
    with path.open("rb") as file:
        lines = iter(lambda: file.readline(_MAX_LINE + 1), b"")
        for number, line in enumerate(lines, 1):
            if line.strip():
                yield f"line {number} of {path}", _parse_line(number, line)


def _parse_line(number: int, line: bytes) -> dict[str, Any]:
    if len(line) > _MAX_LINE:
        raise ValueError(f"line {number} has more than {_MAX_LINE} bytes")
    try:
        # A byte-order mark may be in front of the first line.
        row = json.loads(line.decode("utf-8-sig" if number == 1 else "utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"line {number}: {str(error)[:160]}") from error
    if not isinstance(row, dict):
        raise TypeError(f"line {number} holds a {type(row).__name__}, not an object")
    return row


def _read_parquet(
    path: Path, column: str | None, render: Render | None
) -> tuple[str, ...]:
    paths = column_paths(path)
    place = f"the rows of {path}"
    column = choose_column(dict.fromkeys(p[0] for p in paths), column, place)
    leaves = [leaf for leaf in paths if leaf[0] == column]
    return tuple(read_documents(_rows_of_parquet(path, leaves), column, render))


def _rows_of_parquet(
    path: Path, leaves: list[tuple[str, ...]]
) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield where each row is, and the value of one column by its name.

    Args:
        path: The file.
        leaves: Paths of all that the column holds: of the column itself, or of the
            fields of its objects.
    """
    from pyarrow import parquet  # noqa: PLC0415  (slow to import, seldom needed)

    column = leaves[0][0]
    budget = max(_SMALL, _MAX_GROWTH * path.stat().st_size)
    nested = leaves != [(column,)]
    check_pages(path, column, budget, _OBJECT if nested else _POINTER)
    # Read as dictionaries: a text that is repeated a million times is stored once.
    texts = [".".join(leaf) for leaf in leaves]
    with parquet.ParquetFile(path, read_dictionary=texts, **_FOOTER_LIMITS) as file:
        batches = file.iter_batches(columns=[column])
        values = (value for batch in batches for value in _values(batch.column(0)))
        for number, value in enumerate(values, 1):
            budget -= _text_size(value) + _POINTER
            if budget < 0:
                raise ValueError("its texts are far larger than the file")
            yield f"row {number} of {path}", {column: value}


def _values(array: Any) -> list[Any]:  # noqa: ANN401
    """Return the values of a pyarrow array; equal texts are one object."""
    from pyarrow import types  # noqa: PLC0415

    if types.is_dictionary(array.type):
        texts = array.dictionary.to_pylist()
        return [i if i is None else texts[i] for i in array.indices.to_pylist()]
    if types.is_list(array.type) or types.is_large_list(array.type):
        inner = iter(_values(array.flatten()))
        lengths = array.value_lengths().to_pylist()
        return [n if n is None else list(islice(inner, n)) for n in lengths]
    if types.is_struct(array.type):
        names = [field.name for field in array.type]
        fields = [_values(field) for field in array.flatten()]
        present = array.is_valid().to_pylist()
        rows = zip(*fields, strict=True)
        return [
            dict(zip(names, row, strict=True)) if is_there else None
            for row, is_there in zip(rows, present, strict=True)
        ]
    return array.to_pylist()


def _text_size(value: object) -> int:
    """Return the characters of all texts in a value of JSON's types."""
    if isinstance(value, str):
        return len(value)
    if isinstance(value, dict):
        return sum(map(_text_size, value.values()))
    return sum(map(_text_size, value)) if isinstance(value, list) else 0


_Reader = Callable[[Path, str | None, Render | None], tuple[str, ...]]
READERS: dict[str, _Reader] = dict(
    zip(SUFFIXES, (_read_txt, _read_jsonl, _read_parquet), strict=True)
)
