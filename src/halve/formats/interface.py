"""What a packed format implements.

A format stores a matrix in several tensors of a safetensors file. A `Reader` finds them
among the tensors of a checkpoint, and joins them to a `StoredMatrix`, which shows the
dense tensor. That suffices for formats that Halve reads only (`halve.formats.inputs`).

The formats in which Halve stores pruned matrices are `Format`s of `PackedMatrix`: they
have one tensor under the parameter's own name, usually the nonzero values, and
companions whose names append a suffix to it. Everything above this package goes through
these classes; a new format is one module here, a row of `registry.FORMATS`, and a layer
class in `halve.runtime.cpu.layers`.
"""

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
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


class StoredMatrix(ABC):
    """A matrix, or a stack of matrices, in the form in which files hold it.

    Implementations are immutable. Their tensors may be on the meta device, where only
    `shape`, `dtype`, `label` and `check_shapes` can be used.
    """

    @property
    @abstractmethod
    def shape(self) -> tuple[int, ...]:
        """Shape of the dense tensor as a checkpoint stores it."""

    @property
    @abstractmethod
    def dtype(self) -> torch.dtype:
        """Dtype of the dense tensor."""

    @property
    @abstractmethod
    def label(self) -> str:
        """How the matrix is stored, in a word or two for a table."""

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
        """Return the dense tensor as a checkpoint stores it, in new memory.

        Requires that `check` has passed.
        """


class PackedMatrix(StoredMatrix):
    """A matrix in packed form, which layers multiply with as it is.

    On the meta device `parts`, `nbytes` and `to` can be used as well.
    `format.pack(w, t).unpack() == w`, bit for bit.

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


@dataclass(frozen=True)
class Found:
    """A matrix that a reader has found among the tensors of a checkpoint.

    Attributes:
        reader: The reader that joins its parts.
        name: Name of the dense tensor.
        parts: Names of the tensors that make it up, the one it was found by first. Some
            may be missing in the checkpoint.
        layout: Those of `parts` whose data `Reader.join` needs, beside the headers of
            the others, to find the dense shape. Each holds a few integers.
        unused: Names of tensors that describe something else than the dense matrix,
            such as the scale of its inputs, and are left out of the dense checkpoint.
    """

    reader: "Reader"
    name: str
    parts: tuple[str, ...]
    layout: tuple[str, ...] = ()
    unused: tuple[str, ...] = ()


class Reader(ABC):
    """Finds and joins the matrices that are stored in one format.

    Attributes:
        name: Identifies the format in tables and registries; it is not written to any
            file.
    """

    name: ClassVar[str]

    @abstractmethod
    def find(self, stored: str, headers: Mapping[str, TensorHeader]) -> Found | None:
        """Return the matrix whose first part is a stored tensor; None if it is none.

        Args:
            stored: Name of a tensor of the checkpoint.
            headers: Name -> header of every tensor in the checkpoint.
        """

    @abstractmethod
    def join(self, name: str, tensors: Mapping[str, Tensor]) -> StoredMatrix:
        """Return a matrix from a file's tensors.

        Args:
            name: Name of the parameter.
            tensors: Full name -> tensor of every part. Layout tensors of at most
                `MAX_LAYOUT` elements have data; all others may be on the meta device.

        Raises:
            CheckpointError: The layout is not one of this format. Nothing else is
                checked; see `StoredMatrix.check`.
        """


class Format(Reader):
    """A way to store a pruned matrix, which Halve reads, writes and multiplies with.

    Attributes:
        name: Key of `registry.FORMATS` and of the registries of layer classes.
        version: Version of docs/format.md that a checkpoint with such a matrix has.
        companions: Suffixes of the tensors that are always beside the one under the
            parameter's name.
        optional: Suffixes of further tensors that a matrix may have.
        layout: Suffixes of those companions whose data `join` needs, beside the headers
            of the others, to find the dense shape. Each holds a few integers.
    """

    version: ClassVar[int] = 1
    companions: ClassVar[tuple[str, ...]]
    optional: ClassVar[tuple[str, ...]] = ()
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

    def find(self, stored: str, headers: Mapping[str, TensorHeader]) -> Found | None:
        """Return the matrix that is stored under a parameter's own name."""
        if not self.recognizes(stored, headers):
            return None
        parts = tuple(stored + end for end in self.suffixes(stored, headers))
        layout = tuple(stored + end for end in self.layout)
        return Found(self, stored, parts, layout)

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
        """Return a packed matrix from a file's tensors: the inverse of `split`."""


def split(name: str, packed: PackedMatrix) -> dict[str, Tensor]:
    """Return the tensors that a file holds for a parameter, by their full names."""
    return {name + suffix: part for suffix, part in packed.parts.items()}


def describe(tensor: Tensor) -> str:
    """Return shape and dtype of a tensor, for a message."""
    return f"{list(tensor.shape)} {str(tensor.dtype).removeprefix('torch.')}"
