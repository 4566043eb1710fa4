"""Lazy in: what lies in a checkpoint, and its tensors one by one.

Reads safetensors and `pytorch_model.bin`; whole or in shards.
A packed matrix appears as the dense matrix that it is: name, shape, dtype and values.
Headers are validated before anything is allocated: by the libraries, and by us where
what they believe would take more memory than the file has bytes.
Files are opened for each read and closed after it, so that no mapping of the whole
checkpoint counts against the memory of the process.
"""

import json
import struct
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from io import BufferedReader
from math import prod
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from halve.checkpoint.pickles import damaged, load_pickle
from halve.errors import CheckpointError
from halve.formats import COMPANIONS, MAX_LAYOUT, Packed, join
from halve.untrusted import MAX_NAME, is_inside, read_json, truncated

# (index, single file) of each format, the preferred first. Where both are there the
# single file counts, as for transformers, which leaves an old index behind on saving.
_FORMATS = (
    ("model.safetensors.index.json", "model.safetensors"),
    ("pytorch_model.bin.index.json", "pytorch_model.bin"),
)
# Bytes of a header. Ten thousand tensors take a megabyte; parsed, twenty times that.
_MAX_HEADER = 2**24
_MAX_DIMENSIONS = 8
_MAX_ITEMS = 2**48
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
_NAMES = {dtype: name for name, dtype in _DTYPES.items()}


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
        """File names, each once; none for what lies in no file."""
        return list(dict.fromkeys(i.shard for i in self.stored if i.shard))

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
    by_shard: dict[str, list[TensorInfo]] = {}
    for info in infos:
        by_shard.setdefault(info.shard, []).append(info)
    found: dict[str, Tensor] = {}
    for shard, wanted in by_shard.items():
        found |= _read_shard(folder / shard, [info.name for info in wanted])
        for info in wanted:
            _check_found(folder / shard, info, found[info.name])
    return found


def _check_found(path: Path, info: TensorInfo, tensor: Tensor) -> None:
    """Refuse what is not as described: a pickle may give one storage two dtypes."""
    if (tuple(tensor.shape), tensor.dtype) != (info.shape, info.dtype):
        found = f"{info.name} is {tensor.dtype} where {info.dtype} was described"
        raise damaged(path, ValueError(found))


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
    layouts = _read(folder, [p[-1] for p in packed.values() if _is_small(p[-1])])
    hidden = {part.name for parts in packed.values() for part in parts[1:]}
    return {
        name: _dense_view(info, packed[name], layouts) if name in packed else info
        for name, info in tensors.items()
        if name not in hidden
    }


def _is_small(info: TensorInfo) -> bool:
    return prod(info.shape) <= MAX_LAYOUT


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
    known = {part.name: layouts[part.name] for part in parts if part.name in layouts}
    packed = join(info.name, stand_ins | known)
    packed.check_shapes(info.name)
    return replace(info, shape=packed.shape, parts=parts)


def has_no_weights(folder: Path) -> bool:
    """Whether a folder has no weights, of which an index may tell all the same.

    Raises:
        CheckpointError: A damaged index, or one that leads out of the folder.
    """
    for index, single in _FORMATS:
        names = [single]
        if (folder / index).is_file():
            names += _shards_of_index(folder, index)
        if any((folder / name).exists() for name in names):
            return False
    return True


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
        weight_map = read_json(folder / index, folder)["weight_map"]
        items = [(str(name), str(shard)) for name, shard in weight_map.items()]
    except (
        *(OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError),
    ) as error:
        raise CheckpointError(
            f"The index {folder / index} cannot be read "
            f"({type(error).__name__}: {truncated(error)}).",
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


def _check_promise(
    folder: Path,
    shard: str,
    promised: set[str] | None,
    tensors: dict[str, TensorInfo],
) -> None:
    missing = sorted(name for name in promised or () if name not in tensors)
    if missing:
        raise CheckpointError(
            f"The index of {folder} says that {shard} holds "
            f"{truncated(missing[0])}, which is not in it.",
            "Download the checkpoint again.",
        )


def _header(folder: Path, shard: str) -> Iterator[TensorInfo]:
    path = folder / shard
    for name, shape, dtype in _described(path):
        if len(name) > MAX_NAME:
            raise CheckpointError(
                f"{path} holds a tensor whose name has {len(name)} characters; "
                f"{MAX_NAME} at most are believed.",
                "Do not use this checkpoint; it may be hostile.",
            )
        if len(shape) > _MAX_DIMENSIONS or any(n > _MAX_ITEMS for n in shape):
            raise CheckpointError(
                f"Tensor {name} of {path} has the shape {truncated(list(shape))}, "
                "which no weight has.",
                "Do not use this checkpoint; it may be hostile.",
            )
        if dtype not in _DTYPES:
            raise _unreadable(path, name, dtype)
        yield TensorInfo(name, shard, shape, _DTYPES[dtype])


def _described(path: Path) -> Iterator[tuple[str, tuple[int, ...], str]]:
    """Yield name, shape and dtype of every tensor of a file."""
    if path.suffix != ".safetensors":
        for name, tensor in load_pickle(path, "meta").items():
            yield name, tuple(tensor.shape), _NAMES.get(tensor.dtype, str(tensor.dtype))
        return
    _check_header(path)
    with _opened(path) as file:
        for name in sorted(file.keys()):
            part = file.get_slice(name)
            yield name, tuple(part.get_shape()), part.get_dtype()


def _check_header(path: Path) -> None:
    """Refuse a header that is larger than any, before the library parses it."""
    try:
        with path.open("rb") as file:
            start = file.read(8)
    except OSError as error:
        raise damaged(path, error) from error
    size = struct.unpack("<Q", start)[0] if len(start) == 8 else 0  # noqa: PLR2004
    if size > _MAX_HEADER:
        raise damaged(path, ValueError(f"a header of {size} bytes"))


def _unreadable(path: Path, name: str, kind: object) -> CheckpointError:
    return CheckpointError(
        f"Tensor {name} of {path} has the dtype {kind}, which Halve does not read.",
        "Convert the checkpoint to bfloat16 first.",
    )


def _read_shard(path: Path, names: list[str]) -> dict[str, Tensor]:
    """Return some tensors of one file, as stored, in memory of their own."""
    if path.suffix != ".safetensors":
        stored = load_pickle(path, "cpu")
        return {name: stored[name].detach().clone().contiguous() for name in names}
    with _opened(path) as file, path.open("rb") as data:
        begin, spans = _spans(data)
        found: dict[str, Tensor] = {}
        for name in names:
            part = file.get_slice(name)
            # On the CPU by name: transformers loads models on the meta device.
            shape, dtype = part.get_shape(), _DTYPES[part.get_dtype()]
            tensor = torch.empty(shape, dtype=dtype, device="cpu")
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
        raise damaged(path, error) from error


def _unread(path: Path, error: OSError) -> CheckpointError:
    return CheckpointError(
        f"{path} could not be read: {error.strerror or error}.",
        "Check the disk, or put the file there again, and run the same command; a run "
        "that was under way goes on where it stopped.",
    )
