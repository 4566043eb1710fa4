"""Bitmask format: one bit for each weight, and the weights that are not zero.

Each row has a mask of 64-bit words in which bit `i` of word `w` stands for column
`64 w + i`. The values of the set bits follow each other row after row, and offsets say
where each row begins among them. docs/format.md specifies the bytes.

The code here is plain torch and runs on any device; it is the reference implementation
that the compiled kernels are tested against.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import ClassVar, Self

import torch
from torch import Tensor

from halve.errors import CheckpointError
from halve.formats.interface import MAX_LAYOUT, Format, PackedMatrix, TensorHeader

# Dtype of a weight -> integer of the same width. A weight is dropped only if all of its
# bits are zero, so that minus zero survives packing.
_BITS = {
    torch.bfloat16: torch.int16,
    torch.float16: torch.int16,
    torch.float32: torch.int32,
}
DTYPES = tuple(_BITS)
_MASK, _OFFSETS, _LAYOUT = "_mask", "_offsets", "_layout"
_WORD = 64
# From this many values on, offsets no longer fit into 32 bits.
_WIDE = 2**32
# Weights processed at once. Bounds the memory of bits that are expanded to bytes.
_CHUNK = 2**24
# At least one row is processed at once, so this bounds the length of a row. The widest
# matrices of known models have 2^16 columns.
_MAX_COLUMNS = 2**24
_REMEDY = "Pack the model again from its dense checkpoint, or download the file again."


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
        offsets = self.offsets.to(torch.int64)
        if int(offsets[0]) != 0 or int(offsets[-1]) != self.values.numel():
            raise CheckpointError(
                f"The rows of {name} begin at value {int(offsets[0])} and end at "
                f"{int(offsets[-1])}, but it has {self.values.numel()} values.",
                _REMEDY,
            )
        for rows in self._chunks():
            counts = _bits_set(self.mask[rows])
            # A negative difference, of offsets that fall, equals no count either.
            expected = offsets[1:][rows] - offsets[:-1][rows]
            if bool((wrong := counts != expected).any()):
                row = int(wrong.nonzero()[0])
                raise CheckpointError(
                    f"Row {rows.start + row} of {name} has {int(expected[row])} values "
                    f"by its offsets and {int(counts[row])} by its mask.",
                    _REMEDY,
                )
        self._check_padding(name)

    def check_shapes(self, name: str) -> None:
        """Raise CheckpointError if shapes or dtypes of the parts are inconsistent."""
        mask, offsets, words = self.mask, self.offsets, _words(self.columns)
        consistent = (
            0 < self.columns <= _MAX_COLUMNS
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
                f"{_describe(mask)}, offsets of {_describe(offsets)} and values of "
                f"{_describe(self.values)}, which are inconsistent.",
                _REMEDY,
            )

    def _check_padding(self, name: str) -> None:
        tail = self.columns % _WORD
        if tail and bool((self.mask[:, -1].view(torch.int64) >> tail).any()):
            raise CheckpointError(
                f"The mask of {name} marks columns past its {self.columns}.", _REMEDY
            )

    def unpack(self) -> Tensor:
        """Return the dense tensor as a checkpoint stores it, bit for bit."""
        dense = self.values.new_zeros(self.rows, self.columns)
        offsets = self.offsets.to(torch.int64)
        for rows in self._chunks():
            values = self.values[offsets[rows.start] : offsets[rows.stop]]
            dense[rows].masked_scatter_(self._kept(rows), values)
        return dense.T.contiguous() if self.transposed else dense

    def _kept(self, rows: slice) -> Tensor:
        """Return some rows of the mask as booleans, [rows, columns]."""
        octets = self.mask[rows].view(torch.uint8).unsqueeze(-1)
        bits = octets.bitwise_and(_powers(octets.device)) != 0
        return bits.flatten(1)[:, : self.columns]

    def _chunks(self) -> Iterator[slice]:
        return _chunks(self.rows, self.columns)


class Bitmask(Format):
    """One bit for each weight, and the weights that are not zero."""

    name: ClassVar[str] = "bitmask"
    companions: ClassVar[tuple[str, ...]] = (_MASK, _OFFSETS, _LAYOUT)
    layout: ClassVar[tuple[str, ...]] = (_LAYOUT,)

    def recognizes(self, name: str, headers: Mapping[str, TensorHeader]) -> bool:
        """Whether there is a mask of uint64 beside the parameter."""
        mask = headers.get(name + _MASK)
        return mask is not None and mask.dtype == torch.uint64

    def supports(self, dtype: torch.dtype) -> bool:
        """Whether matrices of a dtype can be packed."""
        return dtype in DTYPES

    def count_kept(self, weight: Tensor) -> int:
        """Return how many weights have a bit set; minus zero does."""
        return int(_has_bits(weight).sum())

    def nbytes(self, rows: int, columns: int, kept: int, dtype: torch.dtype) -> int:
        """Return the packed size in bytes; see "Sizes" in docs/format.md."""
        values = kept * dtype.itemsize
        mask = 8 * rows * _words(columns)
        offsets = (8 if kept >= _WIDE else 4) * (rows + 1)
        layout = 3 * 8
        return values + mask + offsets + layout

    def pack(self, weight: Tensor, transposed: bool = False) -> BitmaskMatrix:
        """Pack a matrix; see `pack`."""
        return pack(weight, transposed)

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
            f"{_describe(mask)}; rows, columns and whether it is transposed were "
            "expected.",
            _REMEDY,
        )


def pack(weight: Tensor, transposed: bool = False) -> BitmaskMatrix:
    """Pack a matrix.

    Args:
        weight: Dense tensor as a checkpoint stores it, of a dtype of `DTYPES`.
        transposed: Whether that is [columns, rows], as in GPT-2's Conv1D.

    Cost:
        Memory for the packed matrix, and a few bytes for each of 2^24 weights.
    """
    weight = weight.T.contiguous() if transposed else weight
    rows, columns = weight.shape
    mask = weight.new_empty(rows, 8 * _words(columns), dtype=torch.uint8)
    counts = weight.new_zeros(rows + 1, dtype=torch.int64)
    values = []
    for part in _chunks(rows, columns):
        kept = _has_bits(weight[part])
        mask[part] = _octets(kept)
        counts[1:][part] = kept.sum(dim=1)
        values.append(weight[part][kept])
    # Row r begins where the values of the rows before it end.
    offsets = counts.cumsum(0)
    offsets = offsets.to(torch.uint32 if offsets[-1] < _WIDE else torch.uint64)
    stored = torch.cat(values) if values else weight.new_empty(0)
    return BitmaskMatrix(stored, mask.view(torch.uint64), offsets, columns, transposed)


def _has_bits(weight: Tensor) -> Tensor:
    """Return where a matrix of a dtype of `DTYPES` has any bit set, as booleans."""
    return weight.view(_BITS[weight.dtype]) != 0


def _describe(tensor: Tensor) -> str:
    return f"{list(tensor.shape)} {str(tensor.dtype).removeprefix('torch.')}"


def _words(columns: int) -> int:
    return -(-columns // _WORD)


def _chunks(rows: int, columns: int) -> Iterator[slice]:
    """Yield slices of rows of about `_CHUNK` weights, and of at least one row."""
    size = max(_CHUNK // max(columns, 1), 1)
    for start in range(0, rows, size):
        yield slice(start, min(start + size, rows))


def _powers(device: torch.device) -> Tensor:
    return 2 ** torch.arange(8, device=device, dtype=torch.uint8)


def _octets(kept: Tensor) -> Tensor:
    """Return booleans [rows, columns] as bits, [rows, 8 * words], uint8.

    The lowest bit of an octet is its first column. Little-endian words of eight octets
    then have column `64 w + i` in bit `i`.
    """
    rows, columns = kept.shape
    padded = torch.nn.functional.pad(
        kept.to(torch.uint8), (0, _words(columns) * _WORD - columns)
    )
    bits = padded.view(rows, -1, 8) * _powers(kept.device)
    return bits.sum(dim=-1, dtype=torch.uint8)


def _bits_set(mask: Tensor) -> Tensor:
    """Count the bits of each row of [rows, words], int64.

    The usual population count, octet by octet: sums of two bits in fields of two, then
    of four in fields of four, then of all eight.
    """
    octets = mask.view(torch.uint8)
    pairs = octets - (octets >> 1 & 0x55)
    fours = (pairs & 0x33) + (pairs >> 2 & 0x33)
    return (fours + (fours >> 4) & 0x0F).sum(dim=1, dtype=torch.int64)
