"""One safetensors file: its header and tensors, read within bounds.

The safetensors library validates the header. Checked here before it parses one is the
header's size, which alone could take more memory than the file has bytes.

Tensor data are read with `readinto` rather than through the library's mapping: a mapped
page that cannot be read (a bad disk, a file that was truncated) kills the process with
SIGBUS, and mappings of a whole checkpoint count against the memory of the process.
"""

import json
import struct
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from io import BufferedReader
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from halve.checkpoint.pickles import damaged
from halve.errors import CheckpointError

# Bytes of a header. Ten thousand tensors take one megabyte, and 20 times that parsed.
_MAX_HEADER = 2**24
_SIZE_BYTES = 8  # a header is preceded by its size, little-endian
_METADATA = "__metadata__"
_CHUNK = 2**20  # bytes that are copied at a time
DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U64": torch.uint64,
    "U32": torch.uint32,
    "U8": torch.uint8,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "F8_E8M0": torch.float8_e8m0fnu,
    "BOOL": torch.bool,
}


def describe_tensors(path: Path) -> Iterator[tuple[str, tuple[int, ...], str]]:
    """Yield name, shape and dtype code of every tensor in a file, sorted by name.

    Raises:
        CheckpointError: The file is damaged or cannot be read.
    """
    _check_header_size(path)
    with _opened(path) as file:
        for name in sorted(file.keys()):
            view = file.get_slice(name)
            yield name, tuple(view.get_shape()), view.get_dtype()


def read_tensors(path: Path, names: list[str]) -> dict[str, Tensor]:
    """Return tensors by name, in newly allocated memory.

    Raises:
        CheckpointError: The file is damaged or cannot be read.
    """
    with _opened(path) as file, path.open("rb") as data:
        begin, header = _parse_header(data)
        tensors: dict[str, Tensor] = {}
        for name in names:
            view = file.get_slice(name)
            shape, dtype = view.get_shape(), DTYPES[view.get_dtype()]
            # The device is explicit because transformers loads models within
            # `torch.device("meta")`.
            tensor = torch.empty(shape, dtype=dtype, device="cpu")
            _fill(tensor, data, begin + header[name]["data_offsets"][0])
            tensors[name] = tensor
        return tensors


def merge_files(paths: Sequence[Path]) -> Iterator[bytes]:
    """Yield the bytes of one file with all tensors of several, in pieces.

    Takes the memory of a piece, where the library would take that of all tensors.
    Tensors of wide dtypes come first, so that each begins at a multiple of its width.

    Args:
        paths: Files without a name in common, written by Halve.

    Raises:
        CheckpointError: One of them is damaged or cannot be read.
    """
    found = [(path, *each) for path in paths for each in _entries(path)]
    found.sort(key=lambda each: (-DTYPES[each[3]["dtype"]].itemsize, each[2]))
    yield _header([(name, entry) for _, _, name, entry in found])
    for path, begin, _, entry in found:
        first, last = entry["data_offsets"]
        yield from _read_span(path, begin + first, last - first)


def _entries(path: Path) -> list[tuple[int, str, dict[str, Any]]]:
    """Return where the data of a file begin, with name and entry of each tensor."""
    with _opened(path), path.open("rb") as data:
        begin, header = _parse_header(data)
    return [(begin, name, entry) for name, entry in header.items()]


def _header(entries: list[tuple[str, dict[str, Any]]]) -> bytes:
    """Return size and header of a file whose data are those of the entries in turn."""
    header: dict[str, Any] = {_METADATA: {"format": "pt"}}
    end = 0
    for name, entry in entries:
        first, last = entry["data_offsets"]
        begin, end = end, end + last - first
        header[name] = entry | {"data_offsets": [begin, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % _SIZE_BYTES)  # the data begin at a multiple, too
    return struct.pack("<Q", len(text)) + text


def _read_span(path: Path, position: int, size: int) -> Iterator[bytes]:
    with path.open("rb") as data:
        data.seek(position)
        for start in range(0, size, _CHUNK):
            piece = data.read(min(_CHUNK, size - start))
            if not piece:
                raise damaged(path, EOFError("it has become shorter"))
            yield piece


def _check_header_size(path: Path) -> None:
    """Reject an oversized header before the library parses it."""
    try:
        with path.open("rb") as file:
            start = file.read(_SIZE_BYTES)
    except OSError as error:
        raise damaged(path, error) from error
    size = struct.unpack("<Q", start)[0] if len(start) == _SIZE_BYTES else 0
    if size > _MAX_HEADER:
        raise damaged(path, ValueError(f"a header of {size} bytes"))


def _parse_header(data: BufferedReader) -> tuple[int, dict[str, Any]]:
    """Return where the data of a file begin, and name -> entry of each tensor.

    Must only be called while the library, which validates the offsets, has the file
    open.
    """
    size = int.from_bytes(data.read(_SIZE_BYTES), "little")
    header = json.loads(data.read(size))
    header.pop(_METADATA, None)
    return _SIZE_BYTES + size, header


def _fill(tensor: Tensor, data: BufferedReader, position: int) -> None:
    """Read a tensor's bytes into it; as fast as from a mapping."""
    octets = tensor.view(-1).view(torch.uint8).numpy().data
    data.seek(position)
    if data.readinto(octets) != tensor.nbytes:
        raise EOFError("it has become shorter")


@contextmanager
def _opened(path: Path) -> Iterator[safe_open]:
    try:
        with safe_open(path, framework="pt") as file:
            yield file
    except OSError as error:
        raise _unreadable(path, error) from error
    except (SafetensorError, EOFError, ValueError) as error:
        raise damaged(path, error) from error


def _unreadable(path: Path, error: OSError) -> CheckpointError:
    return CheckpointError(
        f"{path} could not be read: {error.strerror or error}.",
        "Check the disk, or restore the file, and run the same command; an interrupted "
        "run resumes.",
    )
