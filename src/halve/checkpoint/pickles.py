"""Read `pytorch_model.bin`: a pickle of tensor names to tensors, with their data.

`weights_only` keeps torch from running code, but not from allocating what a file
claims to contain: an archive may be compressed a thousandfold, `bytearray(10**11)` is
an allowed call, a tensor may repeat one element a billion times, and for a file older
than torch 1.6 memory is allocated before its data is read. All of that is looked for
first, in the opcodes of the pickle, which are parsed but not executed.
"""

import io
import pickle
import pickletools
import re
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any, TypeGuard

import torch
from torch import Tensor

from halve.errors import CheckpointError
from halve.untrusted import truncated

_ARCHIVE = b"PK\3\4"
# The start of a file that torch wrote before 1.6: a pickle of its magic number.
_LEGACY = b"\x80\x02\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19."
# Bytes of a pickle without the tensors' data, and of an archive's directory. A tensor
# takes a quarter of a kilobyte, and some forty opcodes.
_MAX_PICKLE = 2**22
# An empty list takes one opcode, and 64 bytes of memory.
_MAX_OPCODES = 2**20
# In a legacy file, between its magic number and the data: the protocol, the system, the
# contents, and the order of the storages.
_LEGACY_PICKLES = 4
# The globals that a state dict needs, among those that `weights_only` allows.
_ALLOWED_GLOBALS = re.compile(
    r"collections OrderedDict"
    r"|torch (\w+Storage|Size|u?int\d+|b?float\w+|complex\d+|bool)"
    r"|torch\.storage (Untyped|Typed)Storage"
    r"|torch\._utils _rebuild_(tensor_v[23]|parameter(_with_state)?|sparse_tensor)"
    r"|torch\.nn\.parameter Parameter"
    r"|torch\.serialization _get_layout"
)
# Tied weights are stored once and named twice, so tensors may have twice the bytes of
# their file.
_MAX_NAMES_PER_STORAGE = 2


def load_pickle(path: Path, device: str) -> dict[str, Tensor]:
    """Return the tensors of a file, by name.

    The file is memory-mapped, unless it is older than torch 1.6.

    Args:
        path: The file.
        device: Where the tensors go; `meta` for shapes and dtypes only.

    Raises:
        CheckpointError: It is damaged, contains anything but tensors, or claims more
            data than the file has bytes.
    """
    try:
        mapped = _check(path)
        stored = torch.load(path, device, weights_only=True, mmap=mapped)
    except Exception as error:  # malformed pickles raise errors of any type
        raise damaged(path, error) from error
    stored = stored.get("state_dict", stored) if isinstance(stored, dict) else None
    if isinstance(stored, dict) and (entries := _entries_beside(stored)):
        raise CheckpointError(
            f"{path} holds more than the tensors of a model: {entries}.",
            "Save the model's state_dict() alone, or the model with save_pretrained.",
        )
    if not _is_state_dict(stored):
        raise damaged(path, TypeError("not a mapping of names to tensors"))
    _check_tensors(path, stored)
    return stored


def _entries_beside(stored: dict[Any, Any]) -> str:
    """Return the entries of a training checkpoint that are no tensors; "" if none.

    Such as a state dict under another name, a step count, or an optimizer's state. A
    file without any tensor, or with names that are no text, is damaged.
    """
    inner = [value for value in stored.values() if isinstance(value, dict)]
    holds_tensors = any(isinstance(v, Tensor) for v in stored.values()) or any(
        isinstance(v, Tensor) for values in inner for v in values.values()
    )
    others = [n for n, value in stored.items() if not isinstance(value, Tensor)]
    if not holds_tensors or not all(isinstance(name, str) for name in stored):
        return ""
    return truncated(", ".join(map(truncated, others)))


def damaged(path: Path, error: Exception) -> CheckpointError:
    """Return the error for a file of weights that cannot be read."""
    if isinstance(error, pickle.UnpicklingError):
        # torch's own message explains how to run the code nevertheless.
        return CheckpointError(
            f"{path} is damaged, or contains code, which is not run.",
            "Download the file again, from a source that you trust.",
        )
    reason = truncated(" ".join(str(error).splitlines()[:1])).strip()
    return CheckpointError(
        f"{path} is damaged, or not a file of the type that its name says "
        f"({type(error).__name__}: {reason}).",
        "Download the file again.",
    )


def _is_state_dict(stored: object) -> TypeGuard[dict[str, Tensor]]:
    return (
        isinstance(stored, dict)
        and len(stored) > 0
        and all(isinstance(n, str) and isinstance(t, Tensor) for n, t in stored.items())
    )


def _check_tensors(path: Path, stored: dict[str, Tensor]) -> None:
    """Refuse sparse tensors, and tensors that together are larger than their file."""
    for name, tensor in stored.items():
        if tensor.layout != torch.strided:
            raise CheckpointError(
                f"Tensor {truncated(name)} of {path} is stored as a sparse tensor, "
                "which Halve does not read.",
                "Convert the checkpoint to dense tensors first.",
            )
    claimed = sum(t.numel() * t.element_size() for t in stored.values())
    if claimed > _MAX_NAMES_PER_STORAGE * path.stat().st_size:
        raise damaged(path, ValueError(f"its tensors claim {claimed} bytes"))


def _check(path: Path) -> bool:
    """Check a file before torch reads it; return whether it can be memory-mapped."""
    size = path.stat().st_size
    with path.open("rb") as file:
        start = file.read(len(_LEGACY))
        if start == _LEGACY:
            for _ in range(_LEGACY_PICKLES):
                _check_pickle(file, size)
            return False
    if start.startswith(pickle.PROTO):
        raise pickle.UnpicklingError("a bare pickle")
    if not start.startswith(_ARCHIVE):
        raise ValueError("neither a zip archive nor a pickle of torch")
    with _BoundedFile(path) as file, zipfile.ZipFile(file) as archive:
        for contents in _pickles(archive):
            _check_pickle(contents, size)
    return True


class _BoundedFile(io.FileIO):
    """A file that reads at most 4 MiB at once, whatever sizes an archive claims."""

    def read(self, size: int | None = -1, /) -> bytes:
        if size is None or size < 0:
            size = _MAX_PICKLE
        if size > _MAX_PICKLE:
            raise ValueError(f"{size} bytes that are not tensor data")
        return super().read(size)


def _pickles(archive: zipfile.ZipFile) -> Iterator[io.BytesIO]:
    """Yield the pickles of an archive; refuse compression and duplicate names."""
    entries = archive.infolist()
    names = {entry.filename for entry in entries}
    # An entry must start at offset 0. Otherwise bytes precede the archive, and torch's
    # reader might see another archive in them than zipfile does.
    if len(names) < len(entries) or min(e.header_offset for e in entries):
        raise ValueError("an archive within an archive")
    for entry in entries:
        if entry.compress_type != zipfile.ZIP_STORED:
            raise ValueError("a compressed archive")
        if entry.file_size != entry.compress_size:
            raise ValueError("an archive that contradicts itself")
        if entry.filename.endswith(".pkl"):
            with archive.open(entry) as contents:
                yield io.BytesIO(contents.read(_MAX_PICKLE + 1))


def _check_pickle(file: IO[bytes], size: int) -> None:
    """Refuse a pickle with calls that no tensor needs, or that claims too much memory.

    Args:
        file: Positioned at the pickle; read up to its end.
        size: Bytes of the whole file. No integer in the pickle may be larger: any of
            them may be the size of an allocation.
    """
    largest = max(size, _MAX_PICKLE)
    for count, (opcode, argument, _) in enumerate(pickletools.genops(file)):
        if opcode.name == "GLOBAL" and not _ALLOWED_GLOBALS.fullmatch(str(argument)):
            raise pickle.UnpicklingError(argument)
        if count > _MAX_OPCODES or (isinstance(argument, int) and argument > largest):
            raise ValueError("more opcodes, or larger numbers, than any model needs")
