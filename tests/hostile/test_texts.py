"""Text files that would take far more memory than their size, or break a parser."""

import json
import os

import pyarrow
import pytest
from pyarrow import parquet

from halve.calibration import load_corpus
from halve.calibration.parquet_limits import check_pages
from tests.fuzz.judge import judge

MEGABYTE = 2**20


def written(**options):
    """Return a function that writes a .parquet with one long text, 300 times."""

    def write(path):
        texts = ["a" * MEGABYTE] * 300
        parquet.write_table(pyarrow.table({"text": texts}), path, **options)

    return write


def lying(path):
    """Write pages of 300 MiB whose footer claims a kilobyte."""
    written(compression="zstd", use_dictionary=False)(path)
    with parquet.ParquetFile(path) as file:
        chunk = file.metadata.row_group(0).column(0)
    size = _number(chunk.total_uncompressed_size)
    contents = path.read_bytes()
    assert size in contents
    path.write_bytes(contents.replace(size, _number(1000, len(size))))


def _number(value, length=0):
    """Return a number in Thrift's encoding, padded to `length` bytes."""
    value, octets = value << 1, []
    while value > 0x7F:
        octets.append(value & 0x7F | 0x80)
        value >>= 7
    octets.append(value)
    while len(octets) < length:
        octets[-1] |= 0x80
        octets.append(0)
    return bytes(octets)


def line(*parts):
    """Return a function that writes (bytes, repetitions) pairs."""
    return lambda path: path.write_bytes(b"".join(part * n for part, n in parts))


def sparse(path):
    path.touch()
    os.truncate(path, 2**31)


START, END = (b'{"text": "a", "b": [', 1), (b"[]]}\n", 1)
BOMBS = {
    "compressed pages": ("a.parquet", written(compression="zstd")),
    "long compressed pages": (
        "a.parquet",
        written(compression="zstd", use_dictionary=False),
    ),
    "a footer that lies": ("a.parquet", lying),
    "one text, repeated": ("a.parquet", written(use_dictionary=True)),
    "a line too long": (
        "a.jsonl",
        line((b'{"text": "', 1), (b"a", 2**24), (b'"}\n', 1)),
    ),
    "an endless line": ("a.jsonl", line((b"a", 2**28))),
    "millions of lists": ("a.jsonl", line(START, (b"[],", 2**24), END)),
    "nested too deeply": ("a.jsonl", line((b'{"a":', 10**6))),
    "a number too long": ("a.jsonl", line((b"1", 10**6))),
    "a pipe": ("a.jsonl", os.mkfifo),
    "endless zeros": ("a.txt", lambda path: path.symlink_to("/dev/zero")),
    "too large": ("a.txt", sparse),
}


@pytest.mark.parametrize("row", BOMBS)
def test_decompression_bombs_are_refused_within_bounds(row, tmp_path):
    name, write = BOMBS[row]
    path = tmp_path / name
    write(path)
    verdict = judge(lambda: load_corpus(str(path), "calibration"), 2 * MEGABYTE)
    assert verdict.outcome == "refused", verdict
    assert name in verdict.detail
    assert len(verdict.detail) < 1000


READABLE = {
    "unpaired surrogates": ('{"text": "a\\ud800b"}\n', "a?b"),
    "paired surrogates": ('{"text": "\\ud83d\\ude00"}\n', "\U0001f600"),
    "line separators inside a line": (
        '{"text": "a\u2028b\x85c\x0c"}\n'.replace("\x0c", ""),
        "a\u2028b\x85c",
    ),
    "Windows line ends": ('{"text": "a"}\r\n', "a"),
}


@pytest.mark.parametrize("row", READABLE)
def test_odd_lines_are_read(row, tmp_path):
    text, expected = READABLE[row]
    path = tmp_path / "a.jsonl"
    path.write_bytes(text.encode())
    assert load_corpus(str(path), "calibration").documents == (expected,)


OPTIONS = {
    "plain": {},
    "zstd": {"compression": "zstd"},
    "no dictionary": {"use_dictionary": False},
    "pages of version 2": {"data_page_version": "2.0"},
    "many groups": {"row_group_size": 100},
    "checksums": {"write_page_checksum": True},
    "an index of pages": {"write_page_index": True},
    "small pages": {"data_page_size": 1000, "use_dictionary": False},
}


@pytest.mark.parametrize("row", OPTIONS)
def test_page_sizes_are_added_up(row, tmp_path):
    """For a valid file, the sizes of the pages add up to the size in the footer.

    The footer also counts the page headers: less than a hundred bytes for each.
    """
    texts = [f"text {n} " * 50 for n in range(1000)]
    path = tmp_path / "a.parquet"
    parquet.write_table(
        pyarrow.table({"n": range(1000), "text": texts}), path, **OPTIONS[row]
    )
    assert load_corpus(str(path), "calibration").documents == tuple(texts)
    with parquet.ParquetFile(path) as file:
        footer = file.metadata
        groups = range(footer.num_row_groups)
        total = sum(
            footer.row_group(g).column(1).total_uncompressed_size for g in groups
        )
        check_pages(path, "text", total)
        with pytest.raises(ValueError, match="larger"):
            check_pages(path, "text", int(0.9 * total))


def test_texts_of_all_lengths(tmp_path):
    texts = ["", "a", "b" * 100_000, json.dumps({"c": "d"}), "é\U0001f600"]
    path = tmp_path / "a.jsonl"
    path.write_text("\n\n".join(json.dumps({"text": text}) for text in texts))
    assert load_corpus(str(path), "calibration").documents == tuple(texts)
