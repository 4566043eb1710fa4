"""One safetensors file: its header and tensors, read within bounds.

The safetensors library validates the header. Checked here before it parses one is the
header's size, which alone could take more memory than the file has bytes.

Tensor data are read with `readinto` rather than through the library's mapping: a mapped
page that cannot be read (a bad disk, a file that was truncated) kills the process with
SIGBUS, and mappings of a whole checkpoint count against the memory of the process.
"""

import json
import struct
from collections.abc import Iterator
from contextlib import contextmanager
from io import BufferedReader
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from halve.checkpoint.pickles import damaged
from halve.errors import CheckpointError

# Bytes of a header. Ten thousand tensors take one megabyte, and 20 times that parsed.
_MAX_HEADER = 2**24
_SIZE_BYTES = 8  # a header is preceded by its size, little-endian
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
        begin, spans = _spans(data)
        tensors: dict[str, Tensor] = {}
        for name in names:
            view = file.get_slice(name)
            shape, dtype = view.get_shape(), DTYPES[view.get_dtype()]
            # The device is explicit because transformers loads models within
            # `torch.device("meta")`.
            tensor = torch.empty(shape, dtype=dtype, device="cpu")
            _fill(tensor, data, begin + spans[name])
            tensors[name] = tensor
        return tensors


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


def _spans(data: BufferedReader) -> tuple[int, dict[str, int]]:
    """Return where the data of a file begin, and each tensor's offset within them.

    Must only be called while the library, which validates the offsets, has the file
    open.
    """
    size = int.from_bytes(data.read(_SIZE_BYTES), "little")
    header = json.loads(data.read(size))
    header.pop("__metadata__", None)
    offsets = {name: entry["data_offsets"][0] for name, entry in header.items()}
    return _SIZE_BYTES + size, offsets


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
