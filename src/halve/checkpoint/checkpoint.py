"""The tensors of a checkpoint by name, read one by one.

Reads safetensors and `pytorch_model.bin`, in one file or in shards. A packed or
quantized matrix appears as the dense matrix that it stands for: name, shape, dtype and
values.

Headers are untrusted and are validated before anything is allocated. Files are opened
for each read and closed after it.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from halve.checkpoint.config_entry import read_entry
from halve.checkpoint.index import indexed_shards
from halve.checkpoint.packed_view import describe_packed, fold_packed, read_packed
from halve.checkpoint.shard import read_header, read_tensors
from halve.checkpoint.tensor_info import TensorInfo
from halve.errors import CheckpointError
from halve.formats import PackedMatrix, StackedMatrices, readers_of
from halve.untrusted import truncated


@dataclass(frozen=True)
class Checkpoint:
    """The tensors of a folder, by name, in the order of its shards.

    Attributes:
        folder: Folder of the files.
        tensors: Name -> header; packed matrices appear once, with their dense shapes.
    """

    folder: Path
    tensors: dict[str, TensorInfo]

    @classmethod
    def open(cls, folder: Path) -> "Checkpoint":
        """Read the index, all headers, and the layouts of packed matrices.

        config.json says whether matrices are quantized by others than Halve, and how.

        Raises:
            CheckpointError: There are no weights; a shard is missing, damaged, outside
                the folder, or not as the index says; or a packed matrix is incomplete.
            UnsupportedModelError: A matrix is quantized in a way that is not read.
        """
        tensors: dict[str, TensorInfo] = {}
        for shard, promised in indexed_shards(folder).items():
            for info in read_header(folder, shard):
                if info.name in tensors:
                    other = tensors[info.name].shard
                    raise CheckpointError(
                        f"Tensor {info.name} is in both {other} and {shard} of "
                        f"{folder}.",
                        "Download the checkpoint again, into an empty folder.",
                    )
                tensors[info.name] = info
            _check_promised(folder, shard, promised, tensors)
        readers = readers_of(read_entry(folder))
        return cls(folder, fold_packed(folder, tensors, readers))

    @classmethod
    def of_files(cls, paths: Iterable[Path]) -> "Checkpoint":
        """Read the headers of some files of one folder, as `open` does of all.

        config.json is not read: the files must be Halve's.
        """
        files = list(paths)
        folder = files[0].parent
        infos = (info for path in files for info in read_header(folder, path.name))
        return cls(folder, fold_packed(folder, {info.name: info for info in infos}))

    @property
    def shards(self) -> list[str]:
        """File names, each once; empty for tensors that are in no file."""
        return list(dict.fromkeys(info.shard for info in self.stored if info.shard))

    @property
    def stored(self) -> list[TensorInfo]:
        """Headers of every tensor in the files, packed matrices part by part."""
        return [part for info in self.tensors.values() for part in info.stored]

    @property
    def is_dense(self) -> bool:
        """Whether every tensor is stored as it is."""
        return not self.formats

    @property
    def is_packed(self) -> bool:
        """Whether any matrix is stored in a format that Halve writes."""
        return any(info.is_packed for info in self.tensors.values())

    @property
    def formats(self) -> set[str]:
        """Names of the formats in which matrices are stored that are not dense."""
        return {info.format for info in self.tensors.values() if info.format}

    def read(self, names: Iterable[str]) -> dict[str, Tensor]:
        """Return tensors by name, dense, in newly allocated memory.

        Raises:
            CheckpointError: A shard has become unreadable, or the parts of a packed
                matrix are inconsistent.
        """
        infos = [self.tensors[name] for name in names]
        tensors = read_tensors(self.folder, [i for i in infos if i.found is None])
        for info in infos:
            if info.found is not None:
                tensors[info.name] = read_packed(self.folder, info).unpack()
        return tensors

    def read_stored(self, name: str) -> dict[str, Tensor]:
        """Return the stored tensors that make up a tensor, as they are in the files."""
        return read_tensors(self.folder, self.tensors[name].stored)

    def describe_packed(self, name: str) -> PackedMatrix:
        """Return a matrix of Halve's formats whose tensors are on the meta device."""
        packed = describe_packed(self.folder, self.tensors[name])
        assert isinstance(packed, PackedMatrix)
        return packed

    def describe_stack(self, name: str) -> StackedMatrices:
        """Return a tensor whose slices are packed; theirs are on the meta device."""
        packed = describe_packed(self.folder, self.tensors[name])
        assert isinstance(packed, StackedMatrices)
        return packed

    def read_packed(self, name: str) -> PackedMatrix:
        """Return a matrix of Halve's formats, checked, in newly allocated memory."""
        packed = read_packed(self.folder, self.tensors[name])
        assert isinstance(packed, PackedMatrix)
        return packed


def _check_promised(
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
