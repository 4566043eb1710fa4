"""Packing a matrix whose values lie on a grid, as codes of all or some weights."""

from dataclasses import replace

import torch
from torch import Tensor
from torch.nn.functional import pad

from halve.formats.bits import byte_count, byte_counts, pack_codes
from halve.formats.mask import WIDE, bits_set, mask_to_words, row_chunks, words_of
from halve.formats.quantized_matrix import QuantizedMatrix
from halve.grids import QuantParams, QuantScheme

# A group is a multiple of so many columns, or the whole row; the kernels need that.
GROUP_MULTIPLE = 32


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
        Memory for the packed matrix, and some 30 bytes for each of 2^20 weights.
    """
    weight = weight.T.contiguous() if transposed else weight
    if not fits(quant_params.grid, weight.shape[1]):
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
            pieces.append(self._to_bytes(rows, codes, masked))
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
            offsets=_offsets(byte_counts(kept, bits)) if masked else None,
            midrise=self.scheme.midrise,
        )

    def _saves(self, kept: Tensor) -> bool:
        """Whether a mask is needed, or makes the matrix smaller."""
        rows, columns = self.weight.shape
        if self.scheme.midrise and int(kept.sum()) < rows * columns:
            return True
        mask = 8 * rows * words_of(columns) + 4 * (rows + 1)
        masked = mask + int(byte_counts(kept, self.scheme.bits).sum())
        return masked < rows * byte_count(columns, self.scheme.bits)

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

    def _to_bytes(self, rows: slice, codes: Tensor, masked: bool) -> Tensor:
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
        return packed[used < byte_counts(counts, bits)]


def _offsets(sizes: Tensor) -> Tensor:
    """Return where rows of given sizes begin, and where the last ends."""
    ends = pad(sizes.cumsum(0), (1, 0))
    return ends.to(torch.uint32 if int(ends[-1]) < WIDE else torch.uint64)


def fits(scheme: QuantScheme, columns: int) -> bool:
    """Whether the format can store the groups of a grid."""
    return is_group_size(scheme.group_size, columns)


def is_group_size(group_size: int, columns: int) -> bool:
    """Whether the format has groups of a size in rows of a length."""
    multiple = group_size % GROUP_MULTIPLE == 0 or group_size >= columns
    return group_size > 0 and multiple
