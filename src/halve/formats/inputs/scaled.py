"""Codes of eight bits with scales: FP8 releases, and what compressed-tensors writes.

A weight is (code - zero) * scale. Codes are FP8 numbers or signed integers of 8 bits. A
scale belongs to a tile of a matrix: to a block of 128 x 128 (DeepSeek-V3, MiniMax-M2),
to a row, to a group of columns, or to the whole matrix. Scales lie beside the weight
under its name with `_scale_inv` or `_scale`; in both cases they are multiplied.

Products are computed in float32 and rounded once, as transformers does
(`Fp8Dequantize` in `integrations/finegrained_fp8.py`, 5.23). compressed-tensors 0.19
multiplies in the dtype of the scales (`_dequantize` in
`quantization/lifecycle/forward_helpers.py`), which gives the same bits: a code has at
most 8 significant bits, so that its product with a scale of 16 bits is exact in
float32.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from halve.errors import CheckpointError, UnsupportedModelError
from halve.formats.inputs.exponents import as_float32
from halve.formats.interface import Found, Reader, StoredMatrix, TensorHeader, describe
from halve.formats.mask import MAX_COLUMNS, row_chunks

FP8 = (torch.float8_e4m3fn, torch.float8_e5m2)
CODES = (*FP8, torch.int8)
_EXPONENTS = (torch.uint8, torch.float8_e8m0fnu)
_HALF = (torch.bfloat16, torch.float16)
_SCALES = ("_scale_inv", "_scale")
_ZEROS = "_zero_point"
_ORDER = "_g_idx"
_MATRIX = 2  # dimensions
# What activation quantization leaves beside a weight: names within its module.
_OF_INPUTS = (
    "input_scale",
    "input_zero_point",
    "input_global_scale",
    "output_scale",
    "output_zero_point",
    "activation_scale",
)
# Scales of a quantized key-value cache, beside the projections or within them.
_OF_CACHE = ("q_scale", "k_scale", "v_scale", "k_zero_point", "v_zero_point")
REMEDY = "Download the file again; if it is as published, open an issue."


@dataclass(frozen=True)
class ScaledMatrix(StoredMatrix):
    """Matrices of 8-bit codes with scales.

    Attributes:
        codes: [..., rows, columns], of a dtype of `CODES`.
        scales: [..., tiles down, tiles across], of a floating dtype or E8M0 exponents
            (float8_e8m0fnu, or their bytes as uint8); or one number.
        zeros: Zero points, of the shape of the scales; None if they are all 0.
        block: Rows and columns of a tile according to the config, which counts only
            where the number of scales agrees; None if it gives none.
    """

    codes: Tensor
    scales: Tensor
    zeros: Tensor | None = None
    block: tuple[int, int] | None = None

    @property
    def shape(self) -> tuple[int, ...]:
        """That of the codes."""
        return tuple(self.codes.shape)

    @property
    def dtype(self) -> torch.dtype:
        """That of the scales if it has 16 bits, bfloat16 otherwise."""
        return self.scales.dtype if self.scales.dtype in _HALF else torch.bfloat16

    @property
    def label(self) -> str:
        """Kind of the codes, and rows and columns of a tile: `fp8, 128 x 128`."""
        kind = "int8" if self.codes.dtype == torch.int8 else "fp8"
        rows, columns = self.tile or (0, 0)
        return f"{kind}, {rows} x {columns}"

    @property
    def grid(self) -> tuple[int, ...]:
        """Numbers of tiles down and across."""
        return (1, 1) if self.scales.numel() == 1 else tuple(self.scales.shape[-2:])

    @property
    def tile(self) -> tuple[int, int] | None:
        """Rows and columns that share a scale; None if the scales do not fit.

        Where the config gives no block that fits, only rows, groups of columns and the
        whole matrix can have scales of their own: from the number of blocks alone, the
        size of those that do not divide the matrix could only be guessed. The last
        tiles of a block may be partial, as of the 576 rows of DeepSeek-V3.
        """
        if min(self.codes.dim(), len(self.grid)) < _MATRIX:
            return None
        (rows, columns), (down, across) = self.codes.shape[-2:], self.grid
        if 0 in {rows, columns, down, across}:
            return None
        if self.block is not None and self.grid == _counts((rows, columns), self.block):
            return min(self.block[0], rows), min(self.block[1], columns)
        groups = down == rows and columns % across == 0
        if self.grid != (1, 1) and not groups:
            return None
        return rows // down, columns // across

    def check(self, name: str) -> None:
        """Raise CheckpointError if shapes or dtypes of the parts are inconsistent."""
        self.check_shapes(name)

    def check_shapes(self, name: str) -> None:
        """Raise CheckpointError if shapes or dtypes of the parts are inconsistent."""
        if self._fits():
            return
        zeros = "" if self.zeros is None else f", zero points of {describe(self.zeros)}"
        block = f" in blocks of {list(self.block)}" if self.block else ""
        raise CheckpointError(
            f"{name} is stored as codes of {describe(self.codes)} with scales of "
            f"{describe(self.scales)}{zeros}{block}, which are inconsistent.",
            REMEDY,
        )

    def _fits(self) -> bool:
        codes, scales, zeros = self.codes, self.scales, self.zeros
        of_codes = codes.dtype in CODES
        exponents = scales.dtype in _EXPONENTS and codes.dtype in FP8
        of_scales = scales.dtype in {*_HALF, torch.float32} or exponents
        one = scales.numel() == 1 and scales.dim() <= codes.dim()
        stacked = scales.shape[:-2] == codes.shape[:-2] and scales.dim() == codes.dim()
        of_zeros = zeros is None or (
            zeros.shape == scales.shape and zeros.dtype in {torch.int8, codes.dtype}
        )
        shapes = self.tile is not None and codes.shape[-1] <= MAX_COLUMNS
        return of_codes and of_scales and of_zeros and shapes and (one or stacked)

    def unpack(self) -> Tensor:
        """Return the dense tensor.

        Cost:
            Memory for the dense tensor, and a few bytes for each of 2^20 weights.
        """
        rows, columns = self.codes.shape[-2:]
        codes = self.codes.view(-1, rows, columns)
        scales = self._for_each(as_float32(self.scales), len(codes))
        zeros = self._zeros(len(codes))
        dense = codes.new_empty(codes.shape, dtype=self.dtype)
        for i, matrix in enumerate(codes):
            for part in row_chunks(rows, columns):
                numbers = matrix[part].float()
                if zeros is not None:
                    numbers -= self._spread(zeros[i], part)
                dense[i, part] = numbers * self._spread(scales[i], part)
        return dense.view(self.shape)

    def _zeros(self, matrices: int) -> Tensor | None:
        if self.zeros is None:
            return None
        return self._for_each(self.zeros.float(), matrices)

    def _for_each(self, numbers: Tensor, matrices: int) -> Tensor:
        """Return scales or zero points as [matrices, tiles down, tiles across]."""
        return numbers.reshape(-1, *self.grid).expand(matrices, -1, -1)

    def _spread(self, numbers: Tensor, rows: slice) -> Tensor:
        """Return the number of each weight in some rows of a matrix."""
        assert self.tile is not None
        down, across = self.tile
        index = torch.arange(rows.start, rows.stop, device=numbers.device) // down
        spread = numbers[index].repeat_interleave(across, dim=1)
        return spread[:, : self.codes.shape[-1]]


def _counts(shape: tuple[int, int], block: tuple[int, int]) -> tuple[int, int]:
    """Return the numbers of blocks down and across, partial ones included."""
    return -(-shape[0] // block[0]), -(-shape[1] // block[1])


@dataclass(frozen=True)
class Scaled(Reader):
    """Finds weights of 8-bit codes by the scales beside them.

    Attributes:
        block: See `ScaledMatrix`.
    """

    name: ClassVar[str] = "scaled codes"
    block: tuple[int, int] | None = None

    def find(self, stored: str, headers: Mapping[str, TensorHeader]) -> Found | None:
        """Return the matrix of codes that have scales; None for any other tensor.

        Raises:
            UnsupportedModelError: Its columns are quantized in an order of their own.
        """
        parts = scale_parts(stored, headers)
        if headers[stored].dtype not in CODES or not parts:
            return None
        unused = activation_parts(stored, headers)
        return Found(self, stored, (stored, *parts), unused=unused)

    def join(self, name: str, tensors: Mapping[str, Tensor]) -> ScaledMatrix:
        """Return a matrix from its tensors; nothing is checked."""
        return join_scaled(name, tensors[name], tensors, self.block)


def scale_parts(name: str, headers: Mapping[str, TensorHeader]) -> tuple[str, ...]:
    """Return the names of scales and zero points of a weight; none if it has no scales.

    Raises:
        UnsupportedModelError: Its columns are quantized in an order of their own.
    """
    scales = next((name + end for end in _SCALES if name + end in headers), None)
    if scales is None:
        return ()
    if name + _ORDER in headers:
        raise UnsupportedModelError(
            f"{name} is quantized in groups of columns in an order of their own "
            f"({name + _ORDER}), which Halve does not read.",
            "Use the checkpoint that it was made from.",
        )
    return tuple(n for n in (scales, name + _ZEROS) if n in headers)


def join_scaled(
    name: str,
    codes: Tensor,
    tensors: Mapping[str, Tensor],
    block: tuple[int, int] | None,
) -> ScaledMatrix:
    """Return a matrix from its codes and the tensors that `scale_parts` names."""
    scales = next(tensors[name + end] for end in _SCALES if name + end in tensors)
    return ScaledMatrix(codes, scales, tensors.get(name + _ZEROS), block)


def activation_parts(
    weight: str, headers: Mapping[str, TensorHeader]
) -> tuple[str, ...]:
    """Return the names of tensors beside a weight that describe activations."""
    module = weight.rpartition(".")[0]
    owner = module.rpartition(".")[0]
    names = [f"{module}.{leaf}" for leaf in (*_OF_INPUTS, *_OF_CACHE)]
    names += [f"{owner}.{leaf}" for leaf in _OF_CACHE]
    return tuple(name for name in names if name in headers)
