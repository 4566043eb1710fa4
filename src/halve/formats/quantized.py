"""Quantized format: codes of few bits with group scales, and a mask where that saves.

A weight is (code - zero) * scale. The codes of a row form one string of bits, lowest
bit first, and each row begins at a byte. Without a mask every weight has a code; with
one, only those whose bit is set. docs/format.md specifies the bytes.

`quantized_matrix` reads such a matrix, and `quantized_packing` makes one.
"""

from collections.abc import Mapping
from typing import ClassVar

import torch
from torch import Tensor

from halve.errors import CheckpointError
from halve.formats.bits import byte_count
from halve.formats.interface import (
    MAX_LAYOUT,
    REMEDY,
    Format,
    TensorHeader,
    describe,
)
from halve.formats.mask import words_of
from halve.formats.quantized_matrix import (
    ASYMMETRIC,
    DTYPES,
    LAYOUT,
    MASK,
    MIDRISE,
    OFFSETS,
    SCALES,
    ZEROS,
    QuantizedMatrix,
)
from halve.formats.quantized_packing import fits, is_group_size, pack
from halve.grids import QuantParams, QuantScheme

_LAYOUT_NUMBERS = 7


class Quantized(Format):
    """Codes of few bits with group scales, with or without a mask."""

    name: ClassVar[str] = "quantized"
    version: ClassVar[int] = 2
    companions: ClassVar[tuple[str, ...]] = (SCALES, LAYOUT)
    optional: ClassVar[tuple[str, ...]] = (MASK, OFFSETS, ZEROS)
    layout: ClassVar[tuple[str, ...]] = (LAYOUT,)

    def recognizes(self, name: str, headers: Mapping[str, TensorHeader]) -> bool:
        """Whether there is a layout of seven numbers beside the parameter."""
        layout = headers.get(name + LAYOUT)
        return (
            layout is not None
            and tuple(layout.shape) == (_LAYOUT_NUMBERS,)
            and layout.dtype == torch.int64
        )

    def suffixes(
        self, name: str, headers: Mapping[str, TensorHeader]
    ) -> tuple[str, ...]:
        """Return the suffixes of the parts; those that are optional only if present."""
        masked = any(name + end in headers for end in (MASK, OFFSETS))
        mask = (MASK, OFFSETS) if masked else ()
        zeros = (ZEROS,) if name + ZEROS in headers else ()
        return ("", *mask, *zeros, SCALES, LAYOUT)

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
        if scheme is None or dtype not in DTYPES or not fits(scheme, columns):
            return None
        groups = scheme.groups(columns)
        shared = 2 * rows * groups + 8 * _LAYOUT_NUMBERS
        if not scheme.symmetric:
            shared += rows * byte_count(groups, scheme.bits)
        dense = rows * byte_count(columns, scheme.bits)
        mask = 8 * rows * words_of(columns) + 4 * (rows + 1)
        masked = mask + byte_count(kept, scheme.bits) + rows // 2
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
        layout, scales = tensors[name + LAYOUT], tensors[name + SCALES]
        readable = layout.dtype == torch.int64 and layout.numel() <= MAX_LAYOUT
        numbers = layout.tolist() if readable else []
        zeros = tensors.get(name + ZEROS)
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
                and is_group_size(group_size, columns)
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
                    mask=tensors.get(name + MASK),
                    offsets=tensors.get(name + OFFSETS),
                    midrise=zero == MIDRISE,
                    transposed=bool(transposed),
                )
        raise CheckpointError(
            f"The layout of {name} is {str(numbers)[:80]} beside scales of "
            f"{describe(scales)}; rows, columns, transposed, bits, group size, dtype "
            "and kind of zero were expected.",
            REMEDY,
        )
