"""A stack of matrices of which each is stored packed.

Checkpoints of some mixtures of experts hold the matrices of all experts of a block in
one tensor, [experts, ...]. Each of its slices is a matrix of its own, with zeros and a
grid of its own, and is packed as one: slice 3 of the tensor `P` as the parameter
`P[3].weight`. A module can have a linear layer of that name, so that state dicts are
loaded from files and saved to them unchanged.
"""

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from halve.errors import CheckpointError
from halve.formats.interface import (
    REMEDY,
    Format,
    Found,
    PackedMatrix,
    Reader,
    StoredMatrix,
    TensorHeader,
)

_SLICE = re.compile(r"(?s)(.+)\[(0|[1-9]\d{0,6})\]\.weight")


def slice_module(name: str, index: int) -> str:
    """Return the name of the linear layer that a slice of a tensor is stored as."""
    return f"{name}[{index}]"


def slice_name(name: str, index: int) -> str:
    """Return the name of the parameter that a slice of a tensor is stored as."""
    return f"{slice_module(name, index)}.weight"


@dataclass(frozen=True)
class StackedMatrices(StoredMatrix):
    """A tensor of three dimensions, whose slices are packed matrices.

    Attributes:
        slices: The matrices, along the first dimension.
        formats: Name of the format of each.
    """

    slices: tuple[PackedMatrix, ...]
    formats: tuple[str, ...]

    @property
    def shape(self) -> tuple[int, int, int]:
        """Shape of the dense tensor: slices, and the shape of one as stored dense."""
        return (len(self.slices), *self.slices[0].shape)

    @property
    def dtype(self) -> torch.dtype:
        """Dtype of the dense tensor."""
        return self.slices[0].dtype

    @property
    def label(self) -> str:
        """How the slices are stored, each way once."""
        return " or ".join(sorted({inner.label for inner in self.slices}))

    def check_shapes(self, name: str) -> None:
        """Raise CheckpointError if slices are inconsistent, or differ in shape."""
        first = self.slices[0]
        for index, inner in enumerate(self.slices):
            inner.check_shapes(slice_name(name, index))
            kind = (inner.shape, inner.dtype, inner.transposed)
            if kind != (first.shape, first.dtype, first.transposed):
                raise CheckpointError(
                    f"{slice_name(name, index)} has another shape, dtype or "
                    f"orientation than {slice_name(name, 0)}, which belongs to the "
                    "same tensor.",
                    REMEDY,
                )

    def check(self, name: str) -> None:
        """Raise CheckpointError if the parts are inconsistent in any way."""
        self.check_shapes(name)
        for index, inner in enumerate(self.slices):
            inner.check(slice_name(name, index))

    def unpack(self) -> Tensor:
        """Return the dense tensor; it and one slice are in memory beside the parts."""
        dense = torch.empty(self.shape, dtype=self.dtype)
        for out, inner in zip(dense, self.slices, strict=True):
            out.copy_(inner.unpack())
        return dense


class Stack(Reader):
    """Slices of a tensor, packed one by one in any of Halve's formats.

    Attributes:
        version: Version of docs/format.md that a checkpoint with a stack has.
        formats: Name -> format, for the formats of slices.
    """

    name: ClassVar[str] = "stack"
    version: ClassVar[int] = 2

    def __init__(self, formats: Mapping[str, Format]) -> None:
        self.formats = formats

    def find(self, stored: str, headers: Mapping[str, TensorHeader]) -> Found | None:
        """Return the tensor whose first slice a stored tensor belongs to.

        Raises:
            CheckpointError: It belongs to a slice before which others are missing, or
                a slice is not packed.
        """
        match = _SLICE.fullmatch(stored)
        if match is None:
            return None
        name, index = match[1], int(match[2])
        if index:
            if slice_name(name, index - 1) not in headers:
                raise CheckpointError(
                    f"{stored} is there, but {slice_name(name, index - 1)} is missing, "
                    "which belongs to the same tensor.",
                    "Download the checkpoint again.",
                )
            return None
        found = list(self._slices(name, headers))
        parts = tuple(part for inner in found for part in inner.parts)
        layouts = tuple(part for inner in found for part in inner.layout)
        return Found(self, name, parts, layouts)

    def join(self, name: str, tensors: Mapping[str, Tensor]) -> StackedMatrices:
        """Return the matrices of a file's tensors."""
        joined: list[PackedMatrix] = []
        slices = list(self._slices(name, tensors))
        for found in slices:
            parts = {part: tensors[part] for part in found.parts}
            matrix = found.reader.join(found.name, parts)
            assert isinstance(matrix, PackedMatrix)
            joined.append(matrix)
        return StackedMatrices(tuple(joined), tuple(s.reader.name for s in slices))

    def _slices(
        self, name: str, headers: Mapping[str, TensorHeader]
    ) -> Iterator[Found]:
        index = 0
        while (stored := slice_name(name, index)) in headers:
            matches = (f.find(stored, headers) for f in self.formats.values())
            found = next((match for match in matches if match is not None), None)
            if found is None:
                raise CheckpointError(
                    f"{stored} is a slice of a packed tensor, but is not packed "
                    "itself.",
                    REMEDY,
                )
            yield found
            index += 1
