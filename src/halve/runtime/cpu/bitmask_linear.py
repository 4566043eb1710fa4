"""The linear layer of the bitmask format."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from halve._compat.torch import parameter_slots
from halve.formats.bitmask import BitmaskMatrix
from halve.runtime.cpu.operators import (
    packed_linear,
    packed_linear_indexed,
    unpack_indexed,
)
from halve.runtime.cpu.packed_linear import (
    IndexedMask,
    PackedLinear,
    wants_gradient,
)
from halve.runtime.cuda.side_index import has_slack, with_slack
from halve.runtime.cuda.support import runs_kernels

# Values, mask, offsets, and starts or None.
Parts = tuple[Tensor, Tensor, Tensor, Tensor | None]


class BitmaskLinear(IndexedMask, PackedLinear):
    """A linear layer that multiplies by a matrix in bitmask format.

    Attributes:
        weight: The stored values, [kept]; on a GPU followed in their storage by a few
            numbers that kernels may read.
        weight_mask: [out_features, words], uint64.
        weight_offsets: [out_features + 1], uint32 or uint64.
        weight_layout: [rows, columns, transposed], int64.
        weight_starts: See `IndexedMask`.
    """

    weight_mask: Tensor
    weight_offsets: Tensor
    weight_layout: Tensor

    def __init__(self, packed: BitmaskMatrix, bias: nn.Parameter | None = None) -> None:
        super().__init__(packed, bias)
        self.expect_index()

    @property
    def packed(self) -> BitmaskMatrix:
        """The layer's tensors as a packed matrix."""
        return BitmaskMatrix(
            self.weight.data,
            self.weight_mask,
            self.weight_offsets,
            self.in_features,
            self.transposed,
        )

    def multiply(self, x: Tensor, bias: Tensor | None) -> Tensor:
        """Multiply [..., in_features] to [..., out_features], and add a bias."""
        if x.dtype != self.weight.dtype and torch.is_autocast_enabled(x.device.type):
            # Autocast would convert the weight. Packed values cannot be converted in
            # each product, so the input is converted instead.
            x = x.to(self.weight.dtype)
        if not torch.compiler.is_compiling():
            self.prepare_device()
        sizes = self.in_features, self.tile_kept
        if wants_gradient(x, bias):
            return _Differentiable.apply(x, bias, sizes, *self._parts)
        return _multiply(x, self._parts, bias, *sizes)

    def prepare_device(self) -> None:
        """Make what the kernels of the weight's device need, if it is missing or old.

        Called wherever the layer may have arrived on another device, and before each
        product: accelerate replaces tensors of a layer one by one.
        """
        weight = self.weight
        if not runs_kernels(weight.device, weight.dtype):
            self.drop_index()
            return
        if not has_slack(weight):
            # As in `index_mask`, not an inference tensor.
            with torch.inference_mode(False):
                values = with_slack(weight.detach())
                slots = parameter_slots(self)
                slots["weight"] = nn.Parameter(values, requires_grad=False)
        self.index_mask(self.weight_mask)

    def dense_weight(self) -> Tensor:
        """Return W, dense, [out_features, in_features]."""
        self.prepare_device()
        return _unpack(self._parts, self.in_features, self.tile_kept)

    @property
    def _parts(self) -> Parts:
        """Values, mask, offsets and starts, in the order of the operators."""
        return self.weight, self.weight_mask, self.weight_offsets, self.weight_starts

    def extra_repr(self) -> str:
        """Show shape and fraction of zeros."""
        kept = self.weight.numel() / (self.in_features * self.out_features)
        return f"{super().extra_repr()}, sparsity={1 - kept:.4f}"

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:  # noqa: ANN401
        """Move or convert the layer; what belongs to its old device is dropped."""
        self.drop_index()
        super()._apply(fn, recurse)
        self.prepare_device()
        return self


def _multiply(
    x: Tensor, parts: Parts, bias: Tensor | None, columns: int, tile_kept: int
) -> Tensor:
    values, mask, offsets, starts = parts
    if starts is None:
        return packed_linear(x, values, mask, offsets, bias, columns)
    return packed_linear_indexed(x, parts, bias, columns, tile_kept)


def _unpack(parts: Parts, columns: int, tile_kept: int) -> Tensor:
    """Return W, dense, [rows, columns]."""
    values, mask, offsets, starts = parts
    if starts is None:
        return BitmaskMatrix(values, mask, offsets, columns).unpack()
    return unpack_indexed(parts, columns, tile_kept)


class _Differentiable(torch.autograd.Function):
    """The packed product with gradients for its input and its bias."""

    @staticmethod
    def forward(
        ctx: Any,  # noqa: ANN401
        x: Tensor,
        bias: Tensor | None,
        sizes: tuple[int, int],
        *parts: Any,  # noqa: ANN401
    ) -> Tensor:
        ctx.save_for_backward(*parts)
        ctx.sizes = sizes
        return _multiply(x, parts, bias, *sizes)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Any) -> Any:  # noqa: ANN401
        (gradient,) = grad_outputs
        # y = x W.T + b, so dL/dx = dL/dy W, and dL/db is dL/dy summed over all rows.
        wanted, weight = ctx.needs_input_grad, _unpack(ctx.saved_tensors, *ctx.sizes)
        for_x = gradient @ weight if wanted[0] else None
        for_bias = gradient.flatten(0, -2).sum(0) if wanted[1] else None
        return for_x, for_bias, None, *[None] * len(ctx.saved_tensors)
