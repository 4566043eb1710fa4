"""What a packed format implements.

A format stores a pruned matrix in several tensors of a safetensors file: one under the
parameter's own name, usually the nonzero values, and companions whose names append a
suffix to it. Everything above this package goes through `Format` and `PackedMatrix`;
a new format is one module here, a row of `registry.FORMATS`, and a layer class in
`halve.runtime.cpu.layers`.
"""

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import ClassVar, Protocol, Self

import torch
from torch import Tensor

from halve.grids import QuantParams, QuantScheme

# Largest number of elements of a layout tensor that is read while a checkpoint is
# opened. A layout holds a few integers; a larger one is not read but rejected.
MAX_LAYOUT = 1024
# What to do about a matrix whose parts are inconsistent.
REMEDY = "Pack the model again from its dense checkpoint, or download the file again."


class TensorHeader(Protocol):
    """Shape and dtype of a stored tensor, as the header of its file gives them."""

    @property
    def shape(self) -> tuple[int, ...]:
        """Dimensions as stored."""
        ...

    @property
    def dtype(self) -> torch.dtype:
        """Element type as stored."""
        ...


class PackedMatrix(ABC):
    """A matrix in packed form.

    Implementations are immutable. Their tensors may be on the meta device, where only
    `shape`, `dtype`, `label`, `parts`, `nbytes`, `to` and `check_shapes` can be used.

    Attributes:
        transposed: Whether the dense tensor is stored as [columns, rows], as in GPT-2's
            Conv1D, where rows are outputs and columns are inputs.
    """

    transposed: bool

    @property
    @abstractmethod
    def shape(self) -> tuple[int, int]:
        """Shape of the dense tensor as a checkpoint stores it."""

    @property
    @abstractmethod
    def dtype(self) -> torch.dtype:
        """Dtype of the dense tensor."""

    @property
    @abstractmethod
    def label(self) -> str:
        """How the matrix is stored, in a word or two for a table."""

    @property
    @abstractmethod
    def parts(self) -> dict[str, Tensor]:
        """Suffix -> tensor, in the order in which a file lists them.

        The first suffix is the empty string: the tensor under the parameter's own name.
        """

    @property
    def nbytes(self) -> int:
        """Size of all parts in bytes."""
        return sum(part.nbytes for part in self.parts.values())

    @abstractmethod
    def to(self, dtype: torch.dtype) -> Self:
        """Return the same matrix, of another dense dtype."""

    @abstractmethod
    def check_shapes(self, name: str) -> None:
        """Raise CheckpointError if shapes or dtypes of the parts are inconsistent.

        Reads no data except that of the layout.

        Args:
            name: Name of the parameter, for the message.
        """

    @abstractmethod
    def check(self, name: str) -> None:
        """Raise CheckpointError if the parts are inconsistent in any way.

        Includes `check_shapes`. After it, no reader of the parts leaves their bounds,
        whatever the file contains.

        Args:
            name: Name of the parameter, for the message.
        """

    @abstractmethod
    def unpack(self) -> Tensor:
        """Return the dense tensor as a checkpoint stores it, bit for bit.

        Requires that `check` has passed. `format.pack(w, t).unpack() == w`.
        """


class Format(ABC):
    """A way to store a pruned matrix.

    Attributes:
        name: Identifies the format in the registries of this package and of the layer
            classes; it is not written to any file.
        version: Version of docs/format.md that a checkpoint with such a matrix has.
        companions: Suffixes of the tensors that are always beside the one under the
            parameter's name.
        layout: Suffixes of those companions whose data `join` needs, beside the headers
            of the others, to find the dense shape. Each holds a few integers.
    """

    name: ClassVar[str]
    version: ClassVar[int] = 1
    companions: ClassVar[tuple[str, ...]]
    layout: ClassVar[tuple[str, ...]]

    @abstractmethod
    def recognizes(self, name: str, headers: Mapping[str, TensorHeader]) -> bool:
        """Whether the headers of a checkpoint show a parameter stored in this format.

        At most one format recognizes a parameter. Companions may still be missing or of
        a wrong shape: those are errors of a matrix in this format.

        Args:
            name: Name of the parameter.
            headers: Name -> header of every tensor in the checkpoint.
        """

    def suffixes(
        self, name: str, headers: Mapping[str, TensorHeader]
    ) -> tuple[str, ...]:
        """Return the suffixes of all parts that a matrix of this format must have.

        Args:
            name: Name of a parameter that `recognizes` accepts.
            headers: Name -> header of every tensor in the checkpoint. Where parts are
                optional, those that are present decide.
        """
        return ("", *self.companions)

    @abstractmethod
    def count_kept(self, weight: Tensor) -> int:
        """Return how many weights of a matrix are stored; minus zero may be one."""

    @abstractmethod
    def nbytes(
        self,
        shape: tuple[int, int],
        kept: int,
        dtype: torch.dtype,
        scheme: QuantScheme | None = None,
    ) -> int | None:
        """Return the packed size of a matrix in bytes, without packing it.

        Args:
            shape: Output and input features.
            kept: Number of weights that are stored, as `count_kept` gives it.
            dtype: Dtype of the weights.
            scheme: Grid on which they lie, None if they are not quantized.

        Returns:
            None if the format has no such matrices.
        """

    @abstractmethod
    def pack(
        self,
        weight: Tensor,
        transposed: bool = False,
        quant_params: QuantParams | None = None,
    ) -> PackedMatrix | None:
        """Pack a matrix that is not empty.

        Args:
            weight: Dense tensor as a checkpoint stores it.
            transposed: Whether that is [columns, rows].
            quant_params: Grid on which its values lie, of [rows, groups], if any.

        Returns:
            None if the format cannot restore it bit for bit.
        """

    @abstractmethod
    def join(self, name: str, tensors: Mapping[str, Tensor]) -> PackedMatrix:
        """Return a packed matrix from a file's tensors: the inverse of `split`.

        Args:
            name: Name of the parameter.
            tensors: Full name -> tensor of every part. Layout tensors of at most
                `MAX_LAYOUT` elements have data; all others may be on the meta device.

        Raises:
            CheckpointError: The layout is not one of this format. Nothing else is
                checked; see `PackedMatrix.check`.
        """


def split(name: str, packed: PackedMatrix) -> dict[str, Tensor]:
    """Return the tensors that a file holds for a parameter, by their full names."""
    return {name + suffix: part for suffix, part in packed.parts.items()}


def describe(tensor: Tensor) -> str:
    """Return shape and dtype of a tensor, for a message."""
    return f"{list(tensor.shape)} {str(tensor.dtype).removeprefix('torch.')}"
