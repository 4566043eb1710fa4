"""Quantized format: codes of few bits with group scales, and a mask where that saves.

A weight is (code - zero) * scale. The codes of a row form one string of bits, lowest
bit first, and each row begins at a byte. Without a mask every weight has a code; with
one, only those whose bit is set. docs/format.md specifies the bytes.

The code here is plain torch and runs on any device; it is the reference implementation
that the compiled kernels are tested against.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import ClassVar, Self

import torch
from torch import Tensor
from torch.nn.functional import pad

from halve.errors import CheckpointError
from halve.formats.bits import pack_codes, unpack_codes
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

_MASK, _OFFSETS, _SCALES, _ZEROS, _LAYOUT = (
    *("_mask", "_offsets", "_scales", "_zeros"),
    "_layout",
)
_LAYOUT_NUMBERS = 7
# Number of a dtype in the layout -> the dtype of the dense matrix.
DTYPES = (torch.float32, torch.float16, torch.bfloat16)
# Where zero lies, as the layout says it: at the middle code, at the code that `_zeros`
# gives for each group, or midway between the two middle codes.
SYMMETRIC, ASYMMETRIC, MIDRISE = 0, 1, 2
# A group is a multiple of so many columns, or the whole row; the kernels need that.
GROUP_MULTIPLE = 32
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
        optional = {_MASK: self.mask, _OFFSETS: self.offsets, _ZEROS: self.zeros}
        present = {name: part for name, part in optional.items() if part is not None}
        zero = MIDRISE if self.midrise else SYMMETRIC if _no(self.zeros) else ASYMMETRIC
        layout = torch.tensor(
            [
                *(self.rows, self.columns, int(self.transposed)),
                *(self.bits, self.group_size, DTYPES.index(self.dtype), zero),
            ]
        )
        return {"": self.codes, **present, _SCALES: self.scales, _LAYOUT: layout}

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
        if self.mask is not None and self.offsets is not None:
            sizes = _bytes_of(bits_set(self.mask), self.bits)
            check_offsets(name, self.offsets, sizes, self.codes.numel(), "byte")
            check_padding(name, self.mask, self.columns)
        self._check_fill(name)
        reach = self.scales.double().abs() * 2**self.bits
        finite = reach <= torch.finfo(self.dtype).max  # false for NaN as well
        if not bool((finite & (self.scales != 0)).all()):
            raise CheckpointError(
                f"{name} has scales that are 0, not finite, or too large for "
                f"{describe_dtype(self.dtype)}.",
                REMEDY,
            )

    def check_shapes(self, name: str) -> None:
        """Raise CheckpointError if shapes or dtypes of the parts are inconsistent."""
        consistent = (
            0 < self.columns <= MAX_COLUMNS
            and self.codes.dtype == torch.uint8
            and self._is_part(self.scales, torch.float16, self.groups)
            and (_no(self.mask) == _no(self.offsets))
            and (_no(self.zeros) or not self.midrise)
            and (not self.midrise or self.bits <= _MIDRISE_BITS)
            and self._is_part(self.zeros, torch.uint8, _bytes(self.groups, self.bits))
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
                _bytes(self.columns, self.bits),
            )
        wide = self.offsets.dtype in {torch.uint32, torch.uint64}
        return (
            wide
            and tuple(self.offsets.shape) == (self.rows + 1,)
            and self.codes.dim() == 1
        )

    def _check_fill(self, name: str) -> None:
        """Check that the bits after a row's last code, or zero point, are 0."""
        if self.mask is not None and self.offsets is not None:
            used = bits_set(self.mask) * self.bits
            ends = self.offsets.long()[1:][used > 0] - 1
            used, last = used[used > 0] % 8, self.codes[ends]
        else:
            last = self.codes[:, -1]
            used = torch.full_like(last, self.columns * self.bits % 8).long()
        if self.zeros is not None:
            fill = torch.full_like(self.zeros[:, -1], self.groups * self.bits % 8)
            last = torch.cat([last, self.zeros[:, -1]])
            used = torch.cat([used, fill.long()])
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
        """Return the code of zero, [rows, groups], float32; or [rows, 1]."""
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
        width = _bytes(widest, self.bits)
        present = torch.arange(width, device=part.device) < _bytes_of(counts, self.bits)
        padded = part.new_zeros(len(counts), width).masked_scatter_(present, part)
        codes = unpack_codes(padded, self.bits)
        is_code = torch.arange(codes.shape[1], device=part.device) < counts
        values = torch.zeros_like(zero)
        return values.masked_scatter_(kept, codes[is_code].float() - zero[kept])


class Quantized(Format):
    """Codes of few bits with group scales, with or without a mask."""

    name: ClassVar[str] = "quantized"
    version: ClassVar[int] = 2
    companions: ClassVar[tuple[str, ...]] = (_SCALES, _LAYOUT)
    layout: ClassVar[tuple[str, ...]] = (_LAYOUT,)

    def recognizes(self, name: str, headers: Mapping[str, TensorHeader]) -> bool:
        """Whether there is a layout of seven numbers beside the parameter."""
        layout = headers.get(name + _LAYOUT)
        return (
            layout is not None
            and tuple(layout.shape) == (_LAYOUT_NUMBERS,)
            and layout.dtype == torch.int64
        )

    def suffixes(
        self, name: str, headers: Mapping[str, TensorHeader]
    ) -> tuple[str, ...]:
        """Return the suffixes of the parts; those that are optional only if present."""
        masked = any(name + end in headers for end in (_MASK, _OFFSETS))
        mask = (_MASK, _OFFSETS) if masked else ()
        zeros = (_ZEROS,) if name + _ZEROS in headers else ()
        return ("", *mask, *zeros, _SCALES, _LAYOUT)

    def nbytes(
        self,
        shape: tuple[int, int],
        kept: int,
        dtype: torch.dtype,
        scheme: QuantScheme | None = None,
    ) -> int | None:
        """Return the packed size in bytes; see "Sizes" in docs/format.md.

        With a mask, each row ends at a byte. Half a byte a row is assumed for that.
        """
        rows, columns = shape
        if scheme is None or dtype not in DTYPES or not _fits(scheme, columns):
            return None
        groups = scheme.groups(columns)
        shared = 2 * rows * groups + 8 * _LAYOUT_NUMBERS
        if not scheme.symmetric:
            shared += rows * _bytes(groups, scheme.bits)
        dense = rows * _bytes(columns, scheme.bits)
        mask = 8 * rows * words_of(columns) + 4 * (rows + 1)
        masked = mask + _bytes(kept, scheme.bits) + rows // 2
        may_be_dense = not scheme.midrise or kept == rows * columns
        return shared + (min(dense, masked) if may_be_dense else masked)

    def count_kept(self, weight: Tensor) -> int:
        """Return how many weights are not zero."""
        return int(weight.count_nonzero())

    def pack(
        self,
        weight: Tensor,
        transposed: bool = False,
        quant_params: QuantParams | None = None,
    ) -> QuantizedMatrix | None:
        """Pack a matrix whose values lie on a grid; see `pack`."""
        if quant_params is None or weight.dtype not in DTYPES:
            return None
        return pack(weight, quant_params, transposed)

    def join(self, name: str, tensors: Mapping[str, Tensor]) -> QuantizedMatrix:
        """Return a packed matrix from a file's tensors; only the layout is checked."""
        layout, scales = tensors[name + _LAYOUT], tensors[name + _SCALES]
        readable = layout.dtype == torch.int64 and layout.numel() <= MAX_LAYOUT
        numbers = layout.tolist() if readable else []
        zeros = tensors.get(name + _ZEROS)
        match numbers:
            case [
                rows,
                columns,
                0 | 1 as transposed,
                2 | 3 | 4 | 8 as bits,
                group_size,
                0 | 1 | 2 as dtype,
                0 | 1 | 2 as zero,
            ] if (
                [rows] == list(scales.shape[:1])
                and _is_group_size(group_size, columns)
                and (zero == ASYMMETRIC) == (zeros is not None)
            ):
                return QuantizedMatrix(
                    codes=tensors[name],
                    scales=scales,
                    bits=bits,
                    group_size=group_size,
                    columns=columns,
                    dense_dtype=DTYPES[dtype],
                    zeros=zeros,
                    mask=tensors.get(name + _MASK),
                    offsets=tensors.get(name + _OFFSETS),
                    midrise=zero == MIDRISE,
                    transposed=bool(transposed),
                )
        raise CheckpointError(
            f"The layout of {name} is {str(numbers)[:80]} beside scales of "
            f"{describe(scales)}; rows, columns, transposed, bits, group size, dtype "
            "and kind of zero were expected.",
            REMEDY,
        )


def pack(
    weight: Tensor, quant_params: QuantParams, transposed: bool = False
) -> QuantizedMatrix | None:
    """Pack a matrix, as codes of all weights or of the nonzero ones.

    Args:
        weight: Dense tensor as a checkpoint stores it, of a dtype of `DTYPES`.
        quant_params: Scales and zero points, of [rows, groups].
        transposed: Whether the tensor is [columns, rows].

    Returns:
        The smaller of both; None if the matrix cannot be restored bit for bit, or its
        groups do not fit the format.

    Cost:
        Memory for the packed matrix, and some 30 bytes for each of 2^22 weights.
    """
    weight = weight.T.contiguous() if transposed else weight
    if not _fits(quant_params.grid, weight.shape[1]):
        return None
    packed = _Packing(quant_params, weight).pack()
    return packed and replace(packed, transposed=transposed)


class _Packing:
    """The packing of one matrix, some rows at a time.

    Attributes:
        weight: [rows, columns].
        quant_params: Its grid.
    """

    def __init__(self, quant_params: QuantParams, weight: Tensor) -> None:
        self.quant_params = quant_params
        self.scheme = quant_params.grid
        self.weight = weight

    def pack(self) -> QuantizedMatrix | None:
        """Return the matrix packed, None if its values are not on the grid."""
        chunks = list(row_chunks(*self.weight.shape))
        mask = torch.cat([mask_to_words(self.weight[rows] != 0) for rows in chunks])
        kept = bits_set(mask)
        masked = self._saves(kept)
        pieces: list[Tensor] = []
        for rows in chunks:
            if (codes := self._codes(rows)) is None:
                return None
            pieces.append(self._bytes(rows, codes, masked))
        params, bits = self.quant_params, self.scheme.bits
        zeros = (params.zero + 2 ** (bits - 1)).to(torch.uint8)
        return QuantizedMatrix(
            codes=torch.cat(pieces),
            scales=params.scale.half(),
            bits=bits,
            group_size=self.scheme.group_size,
            columns=self.weight.shape[1],
            dense_dtype=self.weight.dtype,
            zeros=None if self.scheme.symmetric else pack_codes(zeros, bits),
            mask=mask if masked else None,
            offsets=_offsets(_bytes_of(kept, bits)) if masked else None,
            midrise=self.scheme.midrise,
        )

    def _saves(self, kept: Tensor) -> bool:
        """Whether a mask is needed, or makes the matrix smaller."""
        rows, columns = self.weight.shape
        if self.scheme.midrise and int(kept.sum()) < rows * columns:
            return True
        mask = 8 * rows * words_of(columns) + 4 * (rows + 1)
        masked = mask + int(_bytes_of(kept, self.scheme.bits).sum())
        return masked < rows * _bytes(columns, self.scheme.bits)

    def _codes(self, rows: slice) -> Tensor | None:
        """Return unsigned codes, [rows, columns], uint8; None if they lose a bit."""
        params = self.quant_params
        part = QuantParams(self.scheme, params.scale[rows], params.zero[rows])
        weight = self.weight[rows]
        codes = part.quantize(weight.float())
        restored = part.dequantize(codes).to(weight.dtype)
        if self.scheme.midrise:
            restored = restored.where(weight != 0, 0)
        whole = {2: torch.int16, 4: torch.int32}[weight.element_size()]
        if not torch.equal(restored.view(whole), weight.contiguous().view(whole)):
            return None
        return (codes.to(torch.int16) + 2 ** (self.scheme.bits - 1)).to(torch.uint8)

    def _bytes(self, rows: slice, codes: Tensor, masked: bool) -> Tensor:
        """Return codes as bytes: of all weights, or of the nonzero ones, row by row."""
        bits = self.scheme.bits
        if not masked:
            return pack_codes(codes, bits)
        kept = self.weight[rows] != 0
        counts = kept.sum(1, keepdim=True)
        widest = int(counts.max())
        present = torch.arange(widest, device=codes.device) < counts
        aligned = codes.new_zeros(len(codes), widest)
        packed = pack_codes(aligned.masked_scatter_(present, codes[kept]), bits)
        used = torch.arange(packed.shape[1], device=codes.device)
        return packed[used < _bytes_of(counts, bits)]


def describe_dtype(dtype: torch.dtype) -> str:
    """Return the name of a dtype without `torch.`."""
    return str(dtype).removeprefix("torch.")


def _no(part: Tensor | None) -> bool:
    return part is None


def _bytes(codes: int, bits: int) -> int:
    return -(-codes * bits // 8)


def _bytes_of(codes: Tensor, bits: int) -> Tensor:
    return (codes * bits + 7) // 8


def _offsets(sizes: Tensor) -> Tensor:
    """Return where rows of given sizes begin, and where the last ends."""
    ends = pad(sizes.cumsum(0), (1, 0))
    return ends.to(torch.uint32 if int(ends[-1]) < WIDE else torch.uint64)


def _fits(scheme: QuantScheme, columns: int) -> bool:
    return _is_group_size(scheme.group_size, columns)


def _is_group_size(group_size: int, columns: int) -> bool:
    multiple = group_size % GROUP_MULTIPLE == 0 or group_size >= columns
    return group_size > 0 and multiple
