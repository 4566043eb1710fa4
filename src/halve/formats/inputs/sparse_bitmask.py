"""The sparse formats of compressed-tensors: sparse-bitmask and sparse-24-bitmask.

compressed-tensors wrote them until 0.14 and reads them no longer. A weight `M.weight`
of a module M is stored as

- `M.compressed`: the weights whose bit is set, row by row; [kept], or with 2:4 sparsity
  [rows, columns / 2];
- `M.bitmask`: [rows, ceil(columns / 8)], uint8; bit i of byte j stands for column
  8 j + i;
- `M.shape`: rows and columns, int64, [2] or [2, 1];
- `M.row_offsets`: index of each row's first weight, int64, [rows]; not with 2:4.

The weights may be codes of 8 bits with scales, which are named as those of other
weights, `M.weight_scale`. Some files have M.weight in the place of M in the names.
Source: `compressors/sparse_compressors` of compressed-tensors 0.14.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor
from torch.nn.functional import pad

from halve.errors import CheckpointError
from halve.formats.bitmask import DTYPES
from halve.formats.inputs.scaled import (
    CODES,
    REMEDY,
    ScaledMatrix,
    activation_parts,
    join_scaled,
    scale_parts,
)
from halve.formats.interface import (
    MAX_LAYOUT,
    Found,
    Reader,
    StoredMatrix,
    TensorHeader,
    describe,
)
from halve.formats.mask import (
    MAX_COLUMNS,
    bits_set,
    check_offsets,
    check_padding,
    row_chunks,
    words_to_mask,
)

_VALUES, _MASK, _SHAPE, _OFFSETS = ".compressed", ".bitmask", ".shape", ".row_offsets"
_WEIGHT = ".weight"
_OCTET, _WORD_OCTETS = 8, 8


@dataclass(frozen=True)
class SparseBitmaskMatrix(StoredMatrix):
    """A matrix in one of the sparse formats.

    Attributes:
        values: [kept], or [rows, columns / 2] with 2:4 sparsity.
        mask: [rows, ceil(columns / 8)], uint8.
        rows: Output features.
        columns: Input features.
        offsets: Index of each row's first value, [rows], int64; None with 2:4 sparsity.
        scaled: The dense matrix of codes, on the meta device, with its scales; None if
            the values are weights.
    """

    values: Tensor
    mask: Tensor
    rows: int
    columns: int
    offsets: Tensor | None
    scaled: ScaledMatrix | None = None

    @property
    def shape(self) -> tuple[int, int]:
        """Rows and columns."""
        return self.rows, self.columns

    @property
    def dtype(self) -> torch.dtype:
        """That of the values, or of what scales make of them."""
        return self.values.dtype if self.scaled is None else self.scaled.dtype

    @property
    def label(self) -> str:
        """`sparse-bitmask` or `sparse-24-bitmask`, and what the codes are."""
        kind = "sparse-24-bitmask" if self.offsets is None else "sparse-bitmask"
        return kind if self.scaled is None else f"{kind}, {self.scaled.label}"

    def check_shapes(self, name: str) -> None:
        """Raise CheckpointError if shapes or dtypes of the parts are inconsistent."""
        values, mask = self.values, self.mask
        consistent = (
            0 < self.columns <= MAX_COLUMNS
            and self.rows > 0
            and mask.dtype == torch.uint8
            and values.dtype in (DTYPES if self.scaled is None else CODES)
            and self._values_fit()
        )
        if not consistent:
            raise CheckpointError(
                f"{name} is stored with the shape {[self.rows, self.columns]}, a "
                f"bitmask of {describe(mask)} and values of {describe(values)}, which "
                "are inconsistent.",
                REMEDY,
            )
        if self.scaled is not None:
            self.scaled.check_shapes(name)

    def _values_fit(self) -> bool:
        if self.offsets is None:
            halves = self.columns % 2 == 0
            return halves and self.values.shape == (self.rows, self.columns // 2)
        flat = self.values.dim() == 1 and self.offsets.dtype == torch.int64
        return flat and self.offsets.shape == (self.rows,)

    def check(self, name: str) -> None:
        """Raise CheckpointError if the parts are inconsistent.

        Cost:
            One pass over the mask, and a copy of it. The values are not read.
        """
        self.check_shapes(name)
        words, stored = self._words(), self.values.numel()
        check_offsets(name, self._row_starts(), bits_set(words), stored, "value")
        check_padding(name, words, self.columns)

    def unpack(self) -> Tensor:
        """Return the dense tensor.

        Cost:
            Memory for the dense tensor and a copy of the mask; with scales, for a byte
            of each weight as well.
        """
        values = self.values.flatten()
        # Not all operations know FP8; where its bytes lie is all that matters here.
        octets = values.view(torch.uint8) if self.scaled is not None else values
        dense = octets.new_zeros(self.shape)
        words, starts = self._words(), self._row_starts()
        for part in row_chunks(self.rows, self.columns):
            kept = words_to_mask(words[part], self.columns)
            stored = octets[starts[part.start] : starts[part.stop]]
            dense[part].masked_scatter_(kept, stored)
        if self.scaled is None:
            return dense
        codes = dense.view(values.dtype)
        scaled = self.scaled
        return ScaledMatrix(codes, scaled.scales, scaled.zeros, scaled.block).unpack()

    def _words(self) -> Tensor:
        """Return the mask in words of 64 bits, [rows, words]."""
        padding = -self.mask.shape[1] % _WORD_OCTETS
        return pad(self.mask, (0, padding)).view(torch.uint64)

    def _row_starts(self) -> Tensor:
        """Return the index of each row's first value and of the end, [rows + 1]."""
        if self.offsets is not None:
            return pad(self.offsets, (0, 1), value=self.values.numel())
        kept = self.columns // 2
        return torch.arange(0, self.values.numel() + 1, kept, device=self.mask.device)


@dataclass(frozen=True)
class SparseBitmask(Reader):
    """Finds compressed values that have a bitmask.

    Attributes:
        block: Of codes with scales; see `ScaledMatrix`.
    """

    name: ClassVar[str] = "sparse bitmask"
    block: tuple[int, int] | None = None

    def find(self, stored: str, headers: Mapping[str, TensorHeader]) -> Found | None:
        """Return the matrix whose values a tensor holds; None for any other tensor."""
        prefix = stored.removesuffix(_VALUES)
        if prefix in {stored, ""} or prefix + _MASK not in headers:
            return None
        name = prefix if prefix.endswith(_WEIGHT) else prefix + _WEIGHT
        parts = [stored, prefix + _MASK, prefix + _SHAPE]
        # With 2:4 sparsity values have two dimensions, and rows need no offsets.
        if len(headers[stored].shape) == 1:
            parts.append(prefix + _OFFSETS)
        parts += scale_parts(name, headers)
        unused = activation_parts(name, headers)
        return Found(self, name, tuple(parts), (prefix + _SHAPE,), unused)

    def join(self, name: str, tensors: Mapping[str, Tensor]) -> SparseBitmaskMatrix:
        """Return a matrix from a file's tensors; only the layout is checked."""
        prefix = name if name + _VALUES in tensors else name.removesuffix(_WEIGHT)
        values, mask = tensors[prefix + _VALUES], tensors[prefix + _MASK]
        rows, columns = _shape(name, tensors[prefix + _SHAPE], mask)
        scaled = None
        if values.dtype in CODES and any(n.startswith(f"{name}_") for n in tensors):
            codes = torch.empty(rows, columns, dtype=values.dtype, device="meta")
            scaled = join_scaled(name, codes, tensors, self.block)
        offsets = tensors.get(prefix + _OFFSETS)
        return SparseBitmaskMatrix(values, mask, rows, columns, offsets, scaled)


def _shape(name: str, layout: Tensor, mask: Tensor) -> tuple[int, int]:
    readable = layout.dtype == torch.int64 and layout.numel() <= MAX_LAYOUT
    numbers = layout.flatten().tolist() if readable else []
    match numbers:
        # Rows and columns that the mask has are bounded by the size of the file.
        case [rows, columns] if list(mask.shape) == [rows, -(-columns // _OCTET)]:
            return rows, columns
    raise CheckpointError(
        f"The shape of {name} is given as {str(numbers)[:80]} beside a bitmask of "
        f"{describe(mask)}; rows and columns were expected.",
        REMEDY,
    )
