"""Lazy in: what lies in a checkpoint, and its tensors one by one.

Reads safetensors and, with `weights_only`, `pytorch_model.bin`; whole or in shards.
A packed matrix appears as the dense matrix that it is: name, shape, dtype and values.
Headers are validated by the libraries before anything is allocated; the index by us.
Files are opened for each read and closed after it, so that no mapping of the whole
checkpoint counts against the memory of the process.
"""

import json
import pickle
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from io import BufferedReader
from math import prod
from pathlib import Path
from typing import TypeGuard

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from halve.errors import CheckpointError
from halve.formats import COMPANIONS, Packed, join

# (index, single file) of each format, the preferred first. Where both are there the
# single file counts, as for transformers, which leaves an old index behind on saving.
_FORMATS = (
    ("model.safetensors.index.json", "model.safetensors"),
    ("pytorch_model.bin.index.json", "pytorch_model.bin"),
)
_DTYPES = {
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
    "BOOL": torch.bool,
}


@dataclass(frozen=True)
class TensorInfo:
    """A tensor as its header describes it.

    Attributes:
        name: As in the checkpoint.
        shard: File that holds it, a bare name inside the folder.
        shape: When dense.
        dtype: As stored.
        parts: What it is packed in, itself first; none for a dense tensor.
    """

    name: str
    shard: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    parts: tuple["TensorInfo", ...] = ()

    @property
    def nbytes(self) -> int:
        """Bytes of data when dense."""
        return prod(self.shape) * self.dtype.itemsize

    @property
    def stored_bytes(self) -> int:
        """Bytes of data in the files."""
        return sum(part.nbytes for part in self.parts) or self.nbytes


@dataclass(frozen=True)
class Checkpoint:
    """The tensors of a folder, by name, in the order of their shards.

    Attributes:
        folder: Where the files lie.
        tensors: All of them, packed ones as they are when dense.
    """

    folder: Path
    tensors: dict[str, TensorInfo]

    @classmethod
    def open(cls, folder: Path) -> "Checkpoint":
        """Read the index and all headers; of tensors, only the shapes of packed ones.

        Raises:
            CheckpointError: No weights; a shard that is missing, damaged, outside the
                folder, or not as the index says; or a packed matrix without its parts.
        """
        tensors: dict[str, TensorInfo] = {}
        indexed = _indexed_shards(folder)
        for shard, promised in indexed.items():
            for info in _header(folder, shard):
                if info.name in tensors:
                    other = tensors[info.name].shard
                    raise CheckpointError(
                        f"Tensor {info.name} lies in both {other} and {shard} of "
                        f"{folder}.",
                        "Download the checkpoint again, into an empty folder.",
                    )
                tensors[info.name] = info
            _check_promise(folder, shard, promised, tensors)
        return cls(folder, _folded(folder, tensors))

    @classmethod
    def of_files(cls, paths: Iterable[Path]) -> "Checkpoint":
        """Read the headers of some files of one folder, as `open` does of all."""
        files = list(paths)
        folder = files[0].parent
        infos = (info for path in files for info in _header(folder, path.name))
        return cls(folder, _folded(folder, {info.name: info for info in infos}))

    @property
    def shards(self) -> list[str]:
        """File names, each once."""
        return list(dict.fromkeys(info.shard for info in self.stored))

    @property
    def stored(self) -> list[TensorInfo]:
        """Every tensor in the files, the parts of packed ones each for itself."""
        return [p for info in self.tensors.values() for p in info.parts or (info,)]

    def read(self, names: Iterable[str]) -> dict[str, Tensor]:
        """Return tensors by name, dense, in memory of their own.

        Raises:
            CheckpointError: A shard has become unreadable, or the parts of a packed
                matrix contradict each other.
        """
        infos = [self.tensors[name] for name in names]
        dense = [info for info in infos if not info.parts]
        found = _read(self.folder, dense)
        for info in infos:
            if info.parts:
                found[info.name] = self.read_packed(info.name).unpack()
        return found

    def read_packed(self, name: str) -> Packed:
        """Return a packed matrix, checked, in memory of its own."""
        packed = join(name, _read(self.folder, self.tensors[name].parts))
        packed.check(name)
        return packed


def _read(folder: Path, infos: Iterable[TensorInfo]) -> dict[str, Tensor]:
    by_shard: dict[str, list[str]] = {}
    for info in infos:
        by_shard.setdefault(info.shard, []).append(info.name)
    found: dict[str, Tensor] = {}
    for shard, names in by_shard.items():
        found |= _read_shard(folder / shard, names)
    return found


def _folded(folder: Path, tensors: dict[str, TensorInfo]) -> dict[str, TensorInfo]:
    """Let packed matrices take the place of their parts.

    Raises:
        CheckpointError: A part is missing, or a layout is not one.
    """
    packed = {
        name: tuple(_part(folder, tensors, name + end) for end in ("", *COMPANIONS))
        for name in tensors
        if (mask := tensors.get(name + COMPANIONS[0])) and mask.dtype == torch.uint64
    }
    layouts = _read(folder, [parts[-1] for parts in packed.values()])
    hidden = {part.name for parts in packed.values() for part in parts[1:]}
    return {
        name: _dense_view(info, packed[name], layouts) if name in packed else info
        for name, info in tensors.items()
        if name not in hidden
    }


def _part(folder: Path, tensors: dict[str, TensorInfo], name: str) -> TensorInfo:
    if name not in tensors:
        raise CheckpointError(
            f"{folder} holds a packed matrix whose part {name} is missing.",
            "Download the checkpoint again.",
        )
    return tensors[name]


def _dense_view(
    info: TensorInfo, parts: tuple[TensorInfo, ...], layouts: dict[str, Tensor]
) -> TensorInfo:
    """Return what a packed matrix is when dense, by headers and layout alone."""
    stand_ins = {
        part.name: torch.empty(part.shape, dtype=part.dtype, device="meta")
        for part in parts
    }
    packed = join(info.name, stand_ins | {parts[-1].name: layouts[parts[-1].name]})
    packed.check_shapes(info.name)
    return replace(info, shape=packed.shape, parts=parts)


def _indexed_shards(folder: Path) -> dict[str, set[str] | None]:
    """Return shard -> tensor names promised by the index (None without an index)."""
    for index, single in _FORMATS:
        if (folder / single).is_file():
            _check_inside(folder, single, "the folder")
            return {single: None}
        if (folder / index).is_file():
            return _shards_of_index(folder, index)
    raise CheckpointError(
        f"There are no weights in {folder}: neither model.safetensors nor "
        "pytorch_model.bin, nor an index of either.",
        "Name the folder of a complete checkpoint.",
    )


def _shards_of_index(folder: Path, index: str) -> dict[str, set[str] | None]:
    try:
        weight_map = json.loads((folder / index).read_text("utf-8"))["weight_map"]
        items = [(str(name), str(shard)) for name, shard in weight_map.items()]
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise CheckpointError(
            f"The index {folder / index} cannot be read ({error!r}).",
            "Download the checkpoint again.",
        ) from error
    shards: dict[str, set[str] | None] = {}
    for name, shard in items:
        promised = shards.setdefault(shard, set())
        assert promised is not None
        promised.add(name)
    for shard in shards:
        _check_inside(folder, shard, index)
    return shards


def _check_inside(folder: Path, shard: str, index: str) -> None:
    """Refuse a shard outside the folder, or a link out of it, and one not there."""
    path = folder / shard
    if shard in {"", ".", ".."} or Path(shard).name != shard or "\\" in shard:
        raise CheckpointError(
            f"{index} of {folder} names the file {shard[:200]!r}, which is not a bare "
            "file name inside the folder.",
            "Do not use this checkpoint; it may be hostile.",
        )
    if not _is_file(path):
        raise CheckpointError(
            f"{index} of {folder} names {shard[:200]!r}, which is not there.",
            "Download the missing file.",
        )
    if not is_inside(folder, path):
        raise CheckpointError(
            f"{shard} in {folder} is a link out of the folder.",
            "Copy the file itself into the folder.",
        )


def _is_file(path: Path) -> bool:
    try:
        return path.is_file()
    except OSError:  # a name longer than any file's
        return False


def is_inside(folder: Path, path: Path) -> bool:
    """Whether a file, its links followed, belongs to a checkpoint's folder."""
    return any(path.resolve().is_relative_to(home) for home in _homes(folder))


def _homes(folder: Path) -> Iterator[Path]:
    """Yield the folders whose files belong to a checkpoint.

    The hub's cache links `snapshots/REVISION/FILE` to `blobs/HASH`.
    """
    home = folder.resolve()
    yield home
    if home.parent.name == "snapshots":
        yield home.parent.parent / "blobs"


def _check_promise(
    folder: Path,
    shard: str,
    promised: set[str] | None,
    tensors: dict[str, TensorInfo],
) -> None:
    missing = sorted(name for name in promised or () if name not in tensors)
    if missing:
        raise CheckpointError(
            f"The index of {folder} says that {shard} holds {missing[0]}, which is not "
            "in it.",
            "Download the checkpoint again.",
        )


def _header(folder: Path, shard: str) -> Iterator[TensorInfo]:
    path = folder / shard
    if path.suffix != ".safetensors":
        for name, tensor in _unpickled(path, "meta").items():
            yield TensorInfo(name, shard, tuple(tensor.shape), tensor.dtype)
        return
    with _opened(path) as file:
        for name in sorted(file.keys()):
            part = file.get_slice(name)
            shape, dtype = tuple(part.get_shape()), part.get_dtype()
            if dtype not in _DTYPES:
                raise _unreadable(path, name, dtype)
            yield TensorInfo(name, shard, shape, _DTYPES[dtype])


def _unreadable(path: Path, name: str, kind: object) -> CheckpointError:
    return CheckpointError(
        f"Tensor {name} of {path} has the dtype {kind}, which Halve does not read.",
        "Convert the checkpoint to bfloat16 first.",
    )


def _read_shard(path: Path, names: list[str]) -> dict[str, Tensor]:
    """Return some tensors of one file, as stored, in memory of their own."""
    if path.suffix != ".safetensors":
        stored = _unpickled(path, "cpu")
        return {name: stored[name].detach().clone().contiguous() for name in names}
    with _opened(path) as file, path.open("rb") as data:
        begin, spans = _spans(data)
        found: dict[str, Tensor] = {}
        for name in names:
            part = file.get_slice(name)
            tensor = torch.empty(part.get_shape(), dtype=_DTYPES[part.get_dtype()])
            _fill(tensor, data, begin + spans[name])
            found[name] = tensor
        return found


def _spans(data: BufferedReader) -> tuple[int, dict[str, int]]:
    """Return where a safetensors file's data begin, and each tensor within them.

    Only to be called while the library, which checks all this, holds the file open.
    """
    size = int.from_bytes(data.read(8), "little")
    header = json.loads(data.read(size))
    header.pop("__metadata__", None)
    return 8 + size, {name: entry["data_offsets"][0] for name, entry in header.items()}


def _fill(tensor: Tensor, data: BufferedReader, place: int) -> None:
    """Read a tensor's bytes; as quick as from a mapping, and safe on a bad disk.

    A process that touches a mapped page which cannot be read, or is there no longer,
    dies of SIGBUS; here it meets an error.
    """
    octets = tensor.view(-1).view(torch.uint8).numpy().data
    data.seek(place)
    if data.readinto(octets) != tensor.nbytes:
        raise EOFError("it has become shorter")


@contextmanager
def _opened(path: Path) -> Iterator[safe_open]:
    try:
        with safe_open(path, framework="pt") as file:
            yield file
    except OSError as error:
        raise _unread(path, error) from error
    except (SafetensorError, EOFError, ValueError) as error:
        raise _damaged(path, error) from error


def _unread(path: Path, error: OSError) -> CheckpointError:
    return CheckpointError(
        f"{path} could not be read: {error.strerror or error}.",
        "Check the disk, or put the file there again, and run the same command; a run "
        "that was under way goes on where it stopped.",
    )


def _unpickled(path: Path, device: str) -> dict[str, Tensor]:
    """Load a state dict with `weights_only`; mapped, unless older than torch 1.6."""
    try:
        try:
            stored = torch.load(path, device, weights_only=True, mmap=True)
        except RuntimeError:
            stored = torch.load(path, device, weights_only=True)
    except OSError as error:
        raise _unread(path, error) from error
    except Exception as error:  # bytes read as a program end in any error at all
        raise _damaged(path, error) from error
    stored = stored.get("state_dict", stored) if isinstance(stored, dict) else None
    if not _is_state_dict(stored):
        raise _damaged(path, TypeError("not a mapping of names to tensors"))
    for name, tensor in stored.items():
        if tensor.layout != torch.strided or tensor.dtype not in _DTYPES.values():
            raise _unreadable(path, name, f"{tensor.dtype} ({tensor.layout})")
    return stored


def _is_state_dict(stored: object) -> TypeGuard[dict[str, Tensor]]:
    return (
        isinstance(stored, dict)
        and len(stored) > 0
        and all(isinstance(n, str) and isinstance(t, Tensor) for n, t in stored.items())
    )


def _damaged(path: Path, error: Exception) -> CheckpointError:
    if isinstance(error, pickle.UnpicklingError):
        # torch's own words tell the reader how to run the code after all.
        return CheckpointError(
            f"{path} is damaged, or holds code beside its tensors, which is not run.",
            "Download the file again, from a source that you trust.",
        )
    reason = str(error).strip().splitlines()[0][:200] if str(error).strip() else ""
    return CheckpointError(
        f"{path} is damaged or not what its name says "
        f"({type(error).__name__}: {reason}).",
        "Download the file again.",
    )
