"""Bitmask format: one bit for each weight, and the weights that are not zero.

Each row has a mask of 64-bit words in which bit `i` of word `w` stands for column
`64 w + i`. The values of the set bits follow each other row after row, and offsets say
where each row begins among them. docs/format.md specifies the bytes.

The code here is plain torch and runs on any device; it is the reference implementation
that the compiled kernels are tested against.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import ClassVar, Self

import torch
from torch import Tensor

from halve.errors import CheckpointError
from halve.formats.interface import (
    MAX_LAYOUT,
    REMEDY,
    Format,
    PackedMatrix,
    TensorHeader,
    describe,
)
from halve.formats.mask import (
    MAX_COLUMNS,
    WIDE,
    bits_set,
    check_offsets,
    check_padding,
    mask_to_words,
    row_chunks,
    words_of,
    words_to_mask,
)
from halve.grids import QuantParams, QuantScheme

# Dtype of a weight -> integer of the same width. A weight is dropped only if all of its
# bits are zero, so that minus zero survives packing.
_BITS = {
    torch.bfloat16: torch.int16,
    torch.float16: torch.int16,
    torch.float32: torch.int32,
}
DTYPES = tuple(_BITS)
_MASK, _OFFSETS, _LAYOUT = "_mask", "_offsets", "_layout"
# Of a quantized matrix, which has a mask as well.
_SCALES = "_scales"


@dataclass(frozen=True)
class BitmaskMatrix(PackedMatrix):
    """A matrix in bitmask format.

    Attributes:
        values: Stored weights, [kept], row by row; a dtype of `DTYPES`.
        mask: [rows, words], uint64, where words = ceil(columns / 64).
        offsets: Index of each row's first value, [rows + 1]; uint32, or uint64 if there
            are 2^32 values or more.
        columns: Input features.
        transposed: Whether the dense tensor is stored as [columns, rows].
    """

    values: Tensor
    mask: Tensor
    offsets: Tensor
    columns: int
    transposed: bool = False

    @property
    def rows(self) -> int:
        """Output features."""
        return self.mask.shape[0]

    @property
    def shape(self) -> tuple[int, int]:
        """Shape of the dense tensor as a checkpoint stores it."""
        rows, columns = self.rows, self.columns
        return (columns, rows) if self.transposed else (rows, columns)

    @property
    def label(self) -> str:
        """`bitmask`."""
        return "bitmask"

    @property
    def dtype(self) -> torch.dtype:
        """That of the values."""
        return self.values.dtype

    @property
    def parts(self) -> dict[str, Tensor]:
        """Suffix -> tensor: values, mask, offsets, layout."""
        # What the other parts do not show: [rows, columns, transposed], int64.
        layout = torch.tensor([self.rows, self.columns, int(self.transposed)])
        return {
            "": self.values,
            _MASK: self.mask,
            _OFFSETS: self.offsets,
            _LAYOUT: layout,
        }

    def to(self, dtype: torch.dtype) -> Self:
        """Return the same matrix with its values converted to a dtype."""
        return replace(self, values=self.values.to(dtype))

    def check(self, name: str) -> None:
        """Raise CheckpointError if the parts are inconsistent.

        Args:
            name: Name of the parameter, for the message.

        Cost:
            One pass over the mask. The values are not read.
        """
        self.check_shapes(name)
        sizes = bits_set(self.mask)
        check_offsets(name, self.offsets, sizes, self.values.numel(), "value")
        check_padding(name, self.mask, self.columns)

    def check_shapes(self, name: str) -> None:
        """Raise CheckpointError if shapes or dtypes of the parts are inconsistent."""
        mask, offsets, words = self.mask, self.offsets, words_of(self.columns)
        consistent = (
            0 < self.columns <= MAX_COLUMNS
            and (mask.dtype, mask.dim()) == (torch.uint64, 2)
            and mask.shape[1] == words
            and offsets.dtype in {torch.uint32, torch.uint64}
            and tuple(offsets.shape) == (self.rows + 1,)
            and self.values.dim() == 1
            and self.values.dtype in DTYPES
        )
        if not consistent:
            raise CheckpointError(
                f"{name} is packed with {self.columns} columns, a mask of "
                f"{describe(mask)}, offsets of {describe(offsets)} and values of "
                f"{describe(self.values)}, which are inconsistent.",
                REMEDY,
            )

    def unpack(self) -> Tensor:
        """Return the dense tensor as a checkpoint stores it, bit for bit."""
        dense = self.values.new_zeros(self.rows, self.columns)
        offsets = self.offsets.to(torch.int64)
        for rows in row_chunks(self.rows, self.columns):
            values = self.values[offsets[rows.start] : offsets[rows.stop]]
            kept = words_to_mask(self.mask[rows], self.columns)
            dense[rows].masked_scatter_(kept, values)
        return dense.T.contiguous() if self.transposed else dense


class Bitmask(Format):
    """One bit for each weight, and the weights that are not zero."""

    name: ClassVar[str] = "bitmask"
    version: ClassVar[int] = 1
    companions: ClassVar[tuple[str, ...]] = (_MASK, _OFFSETS, _LAYOUT)
    layout: ClassVar[tuple[str, ...]] = (_LAYOUT,)

    def recognizes(self, name: str, headers: Mapping[str, TensorHeader]) -> bool:
        """Whether there is a mask of uint64 and no scales beside the parameter."""
        mask = headers.get(name + _MASK)
        is_mask = mask is not None and mask.dtype == torch.uint64
        return is_mask and name + _SCALES not in headers

    def count_kept(self, weight: Tensor) -> int:
        """Return how many weights have a bit set; minus zero does."""
        known = weight.dtype in DTYPES
        return int((_has_bits(weight) if known else weight).count_nonzero())

    def nbytes(
        self,
        shape: tuple[int, int],
        kept: int,
        dtype: torch.dtype,
        scheme: QuantScheme | None = None,
    ) -> int | None:
        """Return the packed size in bytes; see "Sizes" in docs/format.md."""
        if dtype not in DTYPES:
            return None
        rows, columns = shape
        values = kept * dtype.itemsize
        mask = 8 * rows * words_of(columns)
        offsets = (8 if kept >= WIDE else 4) * (rows + 1)
        layout = 3 * 8
        return values + mask + offsets + layout

    def pack(
        self,
        weight: Tensor,
        transposed: bool = False,
        quant_params: QuantParams | None = None,
    ) -> BitmaskMatrix | None:
        """Pack a matrix; see `pack`. A grid makes no difference."""
        return pack(weight, transposed) if weight.dtype in DTYPES else None

    def join(self, name: str, tensors: Mapping[str, Tensor]) -> BitmaskMatrix:
        """Return a packed matrix from a file's tensors; only the layout is checked."""
        mask, offsets, layout = (tensors[name + end] for end in self.companions)
        # A list of Python integers takes five times the memory of the tensor.
        readable = layout.dtype == torch.int64 and layout.numel() <= MAX_LAYOUT
        numbers = layout.tolist() if readable else []
        match numbers:
            case [rows, columns, 0 | 1 as transposed] if [rows] == list(mask.shape[:1]):
                values = tensors[name]
                return BitmaskMatrix(values, mask, offsets, columns, bool(transposed))
        raise CheckpointError(
            f"The layout of {name} is {str(numbers)[:80]} beside a mask of "
            f"{describe(mask)}; rows, columns and whether it is transposed were "
            "expected.",
            REMEDY,
        )


def pack(weight: Tensor, transposed: bool = False) -> BitmaskMatrix:
    """Pack a matrix.

    Args:
        weight: Dense tensor as a checkpoint stores it, of a dtype of `DTYPES`.
        transposed: Whether that is [columns, rows], as in GPT-2's Conv1D.

    Cost:
        Memory for the packed matrix, and a few bytes for each of 2^20 weights.
    """
    weight = weight.T.contiguous() if transposed else weight
    rows, columns = weight.shape
    masks, values = [], []
    for part in row_chunks(rows, columns):
        kept = _has_bits(weight[part])
        masks.append(mask_to_words(kept))
        values.append(weight[part][kept])
    mask = torch.cat(masks) if masks else mask_to_words(_has_bits(weight))
    # Row r begins where the values of the rows before it end.
    offsets = torch.nn.functional.pad(bits_set(mask).cumsum(0), (1, 0))
    offsets = offsets.to(torch.uint32 if offsets[-1] < WIDE else torch.uint64)
    stored = torch.cat(values) if values else weight.new_empty(0)
    return BitmaskMatrix(stored, mask, offsets, columns, transposed)


def _has_bits(weight: Tensor) -> Tensor:
    """Return where a matrix of a dtype of `DTYPES` has any bit set, as booleans."""
    return weight.view(_BITS[weight.dtype]) != 0
