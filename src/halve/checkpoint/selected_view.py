"""A checkpoint of which some tensors, or some slices of tensors, are seen.

Nothing is copied: a tensor is read from the files of the whole checkpoint, under the
name that it has there, and cut when it is read.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from halve.checkpoint.checkpoint import Checkpoint
from halve.checkpoint.tensor_info import TensorInfo


@dataclass(frozen=True)
class Selection:
    """Where a tensor comes from.

    Attributes:
        source: Name of the tensor in the files.
        dimension: The dimension that is cut; None where the whole tensor is seen.
        indices: What is left of that dimension, in order.
    """

    source: str
    dimension: int | None = None
    indices: tuple[int, ...] = ()

    def describe(self, name: str, info: TensorInfo) -> TensorInfo:
        """Return the header of the tensor under its new name."""
        if self.dimension is None:
            return replace(info, name=name)
        shape = list(info.shape)
        shape[self.dimension] = len(self.indices)
        return TensorInfo(name, info.shard, tuple(shape), info.dtype)

    def cut(self, tensor: Tensor) -> Tensor:
        """Return what is seen of the tensor; a copy where it is cut."""
        if self.dimension is None:
            return tensor
        indices = torch.tensor(self.indices, dtype=torch.int64)
        return tensor.index_select(self.dimension, indices)


@dataclass(frozen=True)
class SelectedCheckpoint(Checkpoint):
    """A checkpoint whose tensors are parts of another one.

    Attributes:
        whole: The other one.
        selections: Name -> where the tensor comes from.
    """

    whole: Checkpoint
    selections: dict[str, Selection]

    @classmethod
    def of(
        cls, whole: Checkpoint, selections: Mapping[str, Selection]
    ) -> "SelectedCheckpoint":
        """See some tensors of a checkpoint, in the order of the selections."""
        infos = {
            name: selection.describe(name, whole.tensors[selection.source])
            for name, selection in selections.items()
        }
        return cls(whole.folder, infos, whole, dict(selections))

    @property
    def shards(self) -> list[str]:
        """File names of the whole checkpoint."""
        return self.whole.shards

    def read(self, names: Iterable[str]) -> dict[str, Tensor]:
        """Return tensors by name; see `Checkpoint.read`."""
        wanted = {name: self.selections[name] for name in names}
        sources = {selection.source for selection in wanted.values()}
        found = self.whole.read(sorted(sources))
        # Popped: a whole tensor is freed once it is cut. No two names have one source.
        return {name: one.cut(found.pop(one.source)) for name, one in wanted.items()}
