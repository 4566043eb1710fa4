"""A matrix as codes of few bits with group scales, and a mask where that saves.

A weight is (code - zero) * scale. The codes of a row form one string of bits, lowest
bit first, and each row begins at a byte. Without a mask every weight has a code; with
one, only those whose bit is set. docs/format.md specifies the bytes.

The code here is plain torch and runs on any device; it is the reference implementation
that the compiled kernels are tested against.
"""

from dataclasses import dataclass, replace
from typing import Self

import torch
from torch import Tensor

from halve.errors import CheckpointError
from halve.formats.bits import byte_count, byte_counts, unpack_codes
from halve.formats.interface import REMEDY, PackedMatrix, describe
from halve.formats.mask import (
    MAX_COLUMNS,
    bits_set,
    check_offsets,
    check_padding,
    row_chunks,
    words_of,
    words_to_mask,
)

MASK, OFFSETS, SCALES, ZEROS, LAYOUT = (
    *("_mask", "_offsets", "_scales", "_zeros"),
    "_layout",
)
# Number of a dtype in the layout -> the dtype of the dense matrix.
DTYPES = (torch.float32, torch.float16, torch.bfloat16)
# Where zero lies, as the layout says it: at the middle code, at the code that `_zeros`
# gives for each group, or midway between the two middle codes.
SYMMETRIC, ASYMMETRIC, MIDRISE = 0, 1, 2
_MIDRISE_BITS = 4


@dataclass(frozen=True)
class QuantizedMatrix(PackedMatrix):
    """A matrix in quantized format.

    Attributes:
        codes: Unsigned codes as bits, uint8: [rows, ceil(columns * bits / 8)] without a
            mask, [bytes] with one.
        scales: [rows, groups], float16.
        bits: Of a code: 2, 3, 4 or 8.
        group_size: Columns that share a scale.
        columns: Input features.
        dense_dtype: Dtype of the dense matrix.
        zeros: Codes of zero as bits, [rows, ceil(groups * bits / 8)], uint8; None where
            the grid is symmetric.
        mask: [rows, words], uint64, where words = ceil(columns / 64); None where every
            weight has a code.
        offsets: Byte where each row begins, [rows + 1], uint32 or uint64; None without
            a mask.
        midrise: Whether zero lies midway between the two middle codes.
        transposed: Whether the dense tensor is stored as [columns, rows].
    """

    codes: Tensor
    scales: Tensor
    bits: int
    group_size: int
    columns: int
    dense_dtype: torch.dtype
    zeros: Tensor | None = None
    mask: Tensor | None = None
    offsets: Tensor | None = None
    midrise: bool = False
    transposed: bool = False

    @property
    def rows(self) -> int:
        """Output features."""
        return self.scales.shape[0]

    @property
    def groups(self) -> int:
        """Number of groups in a row."""
        return -(-self.columns // self.group_size)

    @property
    def shape(self) -> tuple[int, int]:
        """Shape of the dense tensor as a checkpoint stores it."""
        rows, columns = self.rows, self.columns
        return (columns, rows) if self.transposed else (rows, columns)

    @property
    def dtype(self) -> torch.dtype:
        """Dtype of the dense tensor."""
        return self.dense_dtype

    @property
    def label(self) -> str:
        """Bits, midrise or not, group size, and whether there is a mask."""
        name = f"int{self.bits}" + "m" * self.midrise
        return f"{name} g{self.group_size}" + ", masked" * (self.mask is not None)

    @property
    def parts(self) -> dict[str, Tensor]:
        """Suffix -> tensor: codes, mask, offsets, scales, zeros, layout."""
        optional = {MASK: self.mask, OFFSETS: self.offsets, ZEROS: self.zeros}
        present = {name: part for name, part in optional.items() if part is not None}
        zero = SYMMETRIC if self.zeros is None else ASYMMETRIC
        zero = MIDRISE if self.midrise else zero
        # No file holds float64, but a model may be converted to it when it is loaded.
        wide = self.dtype == torch.float64
        dtype = DTYPES.index(torch.float32 if wide else self.dtype)
        layout = torch.tensor(
            [
                *(self.rows, self.columns, int(self.transposed)),
                *(self.bits, self.group_size, dtype, zero),
            ]
        )
        return {"": self.codes, **present, SCALES: self.scales, LAYOUT: layout}

    def to(self, dtype: torch.dtype) -> Self:
        """Return the same matrix, to be unpacked in another dtype."""
        return replace(self, dense_dtype=dtype)

    def check(self, name: str) -> None:
        """Raise CheckpointError if the parts are inconsistent.

        Args:
            name: Name of the parameter, for the message.

        Cost:
            One pass over mask and scales, and over the last byte of each row of codes.
        """
        self.check_shapes(name)
        if self.mask is None or self.offsets is None:
            last = self.codes[:, -1]
            codes = torch.full(last.shape, self.columns, device=last.device)
        else:
            codes = bits_set(self.mask)
            sizes = byte_counts(codes, self.bits)
            check_offsets(name, self.offsets, sizes, self.codes.numel(), "byte")
            check_padding(name, self.mask, self.columns)
            ends = self.offsets.long()[1:][codes > 0]
            codes, last = codes[codes > 0], self.codes[ends - 1]
        self._check_fill(name, last, codes)
        if self.zeros is not None:
            last = self.zeros[:, -1]
            groups = torch.full(last.shape, self.groups, device=last.device)
            self._check_fill(name, last, groups)
        reach = self.scales.double().abs() * 2**self.bits
        finite = reach <= torch.finfo(self.dtype).max  # false for NaN as well
        if not bool((finite & (self.scales != 0)).all()):
            raise CheckpointError(
                f"{name} has scales that are 0, not finite, or too large for "
                f"{str(self.dtype).removeprefix('torch.')}.",
                REMEDY,
            )

    def check_shapes(self, name: str) -> None:
        """Raise CheckpointError if shapes or dtypes of the parts are inconsistent."""
        consistent = (
            0 < self.columns <= MAX_COLUMNS
            and self.codes.dtype == torch.uint8
            and self._is_part(self.scales, torch.float16, self.groups)
            and ((self.mask is None) == (self.offsets is None))
            and ((self.zeros is None) or not self.midrise)
            and (not self.midrise or self.bits <= _MIDRISE_BITS)
            and self._is_part(
                self.zeros, torch.uint8, byte_count(self.groups, self.bits)
            )
            and self._is_part(self.mask, torch.uint64, words_of(self.columns))
            and self._are_codes()
        )
        if not consistent:
            parts = {key or "codes": describe(p) for key, p in self.parts.items()}
            raise CheckpointError(
                f"{name} is packed with {self.rows} rows of {self.columns} columns in "
                f"{self.bits} bits and groups of {self.group_size}, and with tensors "
                f"of {parts}, which are inconsistent.",
                REMEDY,
            )

    def _is_part(self, part: Tensor | None, dtype: torch.dtype, width: int) -> bool:
        shape = (self.rows, width)
        return part is None or (part.dtype == dtype and tuple(part.shape) == shape)

    def _are_codes(self) -> bool:
        if self.offsets is None:
            return tuple(self.codes.shape) == (
                self.rows,
                byte_count(self.columns, self.bits),
            )
        wide = self.offsets.dtype in {torch.uint32, torch.uint64}
        return (
            wide
            and tuple(self.offsets.shape) == (self.rows + 1,)
            and self.codes.dim() == 1
        )

    def _check_fill(self, name: str, last: Tensor, codes: Tensor) -> None:
        """Check that the bits after the last code of each row are 0.

        Args:
            name: Name of the parameter, for the message.
            last: Last byte of each row, uint8.
            codes: Number of codes in each of these rows, int64.
        """
        if last.is_meta:  # offloaded: what lies on the disk is read in each pass
            return
        used = codes * self.bits % 8
        if bool(((last.long() >> used != 0) & (used != 0)).any()):
            raise CheckpointError(
                f"The bits after the last code of a row of {name} are not 0.", REMEDY
            )

    def unpack(self) -> Tensor:
        """Return the dense tensor as a checkpoint stores it, bit for bit."""
        scales = self.scales.float()
        dense = scales.new_empty(self.rows, self.columns, dtype=self.dtype)
        for rows in row_chunks(self.rows, self.columns):
            zero = self._zero(rows)[:, self._group_of(dense.device)]
            scale = scales[rows][:, self._group_of(dense.device)]
            if self.mask is None:
                codes = unpack_codes(self.codes[rows], self.bits)[:, : self.columns]
                values = codes.float().sub_(zero)
            else:
                values = self._expand(rows, zero)
            # + 0 turns the -0 of a negative scale into 0.
            dense[rows] = values.mul_(scale).add_(0.0).to(self.dtype)
        return dense.T.contiguous() if self.transposed else dense

    def _zero(self, rows: slice) -> Tensor:
        """Return the code of zero, [rows, groups], float32."""
        middle = 2 ** (self.bits - 1)
        if self.zeros is not None:
            return unpack_codes(self.zeros[rows], self.bits)[:, : self.groups].float()
        value = middle - 0.5 if self.midrise else float(middle)
        return self.scales.new_full(
            (rows.stop - rows.start, self.groups), value, dtype=torch.float32
        )

    def _group_of(self, device: torch.device) -> Tensor:
        return torch.arange(self.columns, device=device) // self.group_size

    def _expand(self, rows: slice, zero: Tensor) -> Tensor:
        """Return code - zero of some rows, [rows, columns], 0 where the mask is 0."""
        assert self.mask is not None and self.offsets is not None
        kept = words_to_mask(self.mask[rows], self.columns)
        counts = kept.sum(1, keepdim=True)
        begins = self.offsets.long()
        part = self.codes[begins[rows.start] : begins[rows.stop]]
        widest = int(counts.max()) if len(counts) else 0
        width = byte_count(widest, self.bits)
        present = torch.arange(width, device=part.device) < byte_counts(
            counts, self.bits
        )
        padded = part.new_zeros(len(counts), width).masked_scatter_(present, part)
        codes = unpack_codes(padded, self.bits)
        is_code = torch.arange(codes.shape[1], device=part.device) < counts
        values = torch.zeros_like(zero)
        return values.masked_scatter_(kept, codes[is_code].float() - zero[kept])
