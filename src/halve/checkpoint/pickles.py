"""`pytorch_model.bin`: a pickle of names to tensors, with their numbers beside it.

`weights_only` keeps torch from running code. It does not keep it from believing what a
file says of sizes: an archive may be compressed a thousandfold, `bytearray(10**11)` is
among the calls that are allowed, a tensor may repeat one number a billion times, and in
a file older than torch 1.6 room is made for whatever it promises. All of that is looked
for first, in the pickle's opcodes, which are read and not obeyed.
"""

import io
import pickle
import pickletools
import re
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import IO, TypeGuard

import torch
from torch import Tensor

from halve.errors import CheckpointError
from halve.untrusted import truncated

_ARCHIVE = b"PK\3\4"
# What torch wrote before 1.6 starts with: a pickle of its magic number.
_OLD = b"\x80\x02\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19."
# Bytes of a pickle without its numbers, and of an archive's table of contents. A tensor
# takes a quarter of a kilobyte, and some forty opcodes.
_MAX_PICKLE = 2**22
# An empty list takes one, and 64 bytes in memory.
_MAX_OPCODES = 2**20
# Between an old file's magic number and its numbers: the protocol, the system, the
# contents, and the order of the storages.
_OLD_PICKLES = 4
# What the contents of a state dict are made of, of all that `weights_only` can call.
_HARMLESS = re.compile(
    r"collections OrderedDict"
    r"|torch (\w+Storage|Size|u?int\d+|b?float\w+|complex\d+|bool)"
    r"|torch\.storage (Untyped|Typed)Storage"
    r"|torch\._utils _rebuild_(tensor_v[23]|parameter(_with_state)?|sparse_tensor)"
    r"|torch\.nn\.parameter Parameter"
    r"|torch\.serialization _get_layout"
)
# Tied weights are stored once and named twice.
_NAMED_TWICE = 2


def load_pickle(path: Path, device: str) -> dict[str, Tensor]:
    """Return a file's tensors by name; mapped, unless older than torch 1.6.

    Raises:
        CheckpointError: It is damaged, holds anything but tensors, or would take more
            memory than the file has bytes.
    """
    try:
        mapped = _check(path)
        stored = torch.load(path, device, weights_only=True, mmap=mapped)
    except Exception as error:  # bytes read as a program end in any error at all
        raise damaged(path, error) from error
    stored = stored.get("state_dict", stored) if isinstance(stored, dict) else None
    if not _is_state_dict(stored):
        raise damaged(path, TypeError("not a mapping of names to tensors"))
    _check_tensors(path, stored)
    return stored


def damaged(path: Path, error: Exception) -> CheckpointError:
    """Return the error for a file of weights that cannot be read."""
    if isinstance(error, pickle.UnpicklingError):
        # torch's own words tell the reader how to run the code after all.
        return CheckpointError(
            f"{path} is damaged, or holds code beside its tensors, which is not run.",
            "Download the file again, from a source that you trust.",
        )
    reason = truncated(" ".join(str(error).splitlines()[:1])).strip()
    return CheckpointError(
        f"{path} is damaged or not what its name says "
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
    """Refuse tensors that are no plain ones, or together larger than their file."""
    for name, tensor in stored.items():
        if tensor.layout != torch.strided:
            raise CheckpointError(
                f"Tensor {truncated(name)} of {path} is sparse, which Halve does "
                "not read.",
                "Convert the checkpoint to dense tensors first.",
            )
    wanted = sum(t.numel() * t.element_size() for t in stored.values())
    if wanted > _NAMED_TWICE * path.stat().st_size:
        raise damaged(path, ValueError(f"its tensors claim {wanted} bytes"))


def _check(path: Path) -> bool:
    """Look through a file before torch does; return whether it can be mapped."""
    size = path.stat().st_size
    with path.open("rb") as file:
        start = file.read(len(_OLD))
        if start == _OLD:
            for _ in range(_OLD_PICKLES):
                _check_pickle(file, size)
            return False
    if start.startswith(pickle.PROTO):
        raise pickle.UnpicklingError("a bare pickle")
    if not start.startswith(_ARCHIVE):
        raise ValueError("neither an archive nor a pickle of torch")
    with _Bounded(path) as file, zipfile.ZipFile(file) as archive:
        for contents in _pickles(archive):
            _check_pickle(contents, size)
    return True


class _Bounded(io.FileIO):
    """A file of which little is read at once, whatever an archive promises."""

    def read(self, size: int | None = -1, /) -> bytes:
        if size is None or size < 0:
            size = _MAX_PICKLE
        if size > _MAX_PICKLE:
            raise ValueError(f"{size} bytes beside its tensors")
        return super().read(size)


def _pickles(archive: zipfile.ZipFile) -> Iterator[io.BytesIO]:
    """Yield the pickles of an archive that is not compressed and says nothing twice."""
    entries = archive.infolist()
    names = {entry.filename for entry in entries}
    # The first begins the file: else torch might see another archive than we do.
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
    """Refuse a pickle that calls what no tensor needs, or promises too much.

    Args:
        file: Read up to the pickle's end.
        size: Of the whole file; no number may be larger, since it may be a size.
    """
    most = max(size, _MAX_PICKLE)
    for count, (opcode, argument, _) in enumerate(pickletools.genops(file)):
        if opcode.name == "GLOBAL" and not _HARMLESS.fullmatch(str(argument)):
            raise pickle.UnpicklingError(argument)
        if count > _MAX_OPCODES or (isinstance(argument, int) and argument > most):
            raise ValueError("more beside its tensors than any model has")
