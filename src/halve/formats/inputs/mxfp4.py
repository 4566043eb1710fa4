"""MXFP4: numbers of four bits in blocks of 32 with a power of two, as gpt-oss has them.

A parameter `P`, a stack of matrices (one for each expert), is stored transposed, as
`P_blocks` of [stack, columns, groups, 16] bytes and `P_scales` of [stack, columns,
groups]. Each byte holds two E2M1 numbers, the first in the lower half; a scale is an
E8M0 exponent. The dense tensor is [stack, 32 * groups, columns], as gpt-oss's experts
have it: [experts, inputs, outputs]. Source: `convert_moe_packed_tensors` in
transformers' `integrations/mxfp4.py` (5.23); the formats: OCP Microscaling Formats 1.0.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from halve.errors import CheckpointError
from halve.formats.inputs.exponents import as_float32
from halve.formats.interface import Found, Reader, StoredMatrix, TensorHeader, describe
from halve.formats.mask import row_chunks

_BLOCKS, _SCALES = "_blocks", "_scales"
_BYTES = 16  # of a block of 32 numbers
_MAGNITUDES = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
_E2M1 = (*_MAGNITUDES, *(-magnitude for magnitude in _MAGNITUDES))
_DIMENSIONS = 4
# Numbers in a column of a matrix; see `mask.MAX_COLUMNS`.
_MAX_GROUPS = 2**19
_REMEDY = "Download the file again; if it is as published, open an issue."


@dataclass(frozen=True)
class Mxfp4Stack(StoredMatrix):
    """A stack of matrices in MXFP4.

    Attributes:
        blocks: [stack, columns, groups, 16], uint8.
        scales: [stack, columns, groups], uint8.
    """

    blocks: Tensor
    scales: Tensor

    @property
    def shape(self) -> tuple[int, ...]:
        """[stack, 32 * groups, columns]."""
        stack, columns, groups, size = self.blocks.shape
        return stack, 2 * size * groups, columns

    @property
    def dtype(self) -> torch.dtype:
        """Dtype bfloat16, which holds every product exactly."""
        return torch.bfloat16

    @property
    def label(self) -> str:
        """`mxfp4`."""
        return "mxfp4"

    def check(self, name: str) -> None:
        """Raise CheckpointError if shapes or dtypes of the parts are inconsistent."""
        self.check_shapes(name)

    def check_shapes(self, name: str) -> None:
        """Raise CheckpointError if shapes or dtypes of the parts are inconsistent."""
        blocks, scales = self.blocks, self.scales
        consistent = (
            blocks.dtype == scales.dtype == torch.uint8
            and blocks.dim() == _DIMENSIONS
            and blocks.shape[:-1] == scales.shape
            and blocks.shape[-1] == _BYTES
            and 0 not in blocks.shape
            and blocks.shape[2] <= _MAX_GROUPS
        )
        if not consistent:
            raise CheckpointError(
                f"{name} is stored in MXFP4 as blocks of {describe(blocks)} with "
                f"scales of {describe(scales)}, which are inconsistent.",
                _REMEDY,
            )

    def unpack(self) -> Tensor:
        """Return the dense tensor.

        Cost:
            Memory for the dense tensor, and a few bytes for each of 2^20 weights.
        """
        dense = self.blocks.new_empty(self.shape, dtype=self.dtype)
        values = torch.tensor(_E2M1, device=dense.device)
        _, inputs, outputs = self.shape
        for i, blocks in enumerate(self.blocks):
            for part in row_chunks(outputs, inputs):
                codes = torch.stack([blocks[part] & 15, blocks[part] >> 4], dim=-1)
                numbers = values[codes.flatten(-2).int()]
                numbers *= as_float32(self.scales[i, part]).unsqueeze(-1)
                dense[i, :, part] = numbers.flatten(1).T
        return dense


class Mxfp4(Reader):
    """Finds blocks that have scales."""

    name: ClassVar[str] = "mxfp4"

    def find(self, stored: str, headers: Mapping[str, TensorHeader]) -> Found | None:
        """Return the matrices whose blocks a tensor holds; None for any other."""
        name = stored.removesuffix(_BLOCKS)
        if name in {stored, ""} or name + _SCALES not in headers:
            return None
        return Found(self, name, (stored, name + _SCALES))

    def join(self, name: str, tensors: Mapping[str, Tensor]) -> Mxfp4Stack:
        """Return a stack from its tensors.

        Raises:
            CheckpointError: The blocks have no shape of the format.
        """
        blocks, scales = tensors[name + _BLOCKS], tensors[name + _SCALES]
        return Mxfp4Stack(blocks, scales)
