"""The linear layer of the bitmask format."""

from typing import Any

import torch
from torch import Tensor

from halve.formats.bitmask import BitmaskMatrix
from halve.runtime.cpu.operators import packed_linear
from halve.runtime.cpu.packed_linear import PackedLinear, wants_gradient


class BitmaskLinear(PackedLinear):
    """A linear layer that multiplies by a matrix in bitmask format.

    Attributes:
        weight: The stored values, [kept].
        weight_mask: [out_features, words], uint64.
        weight_offsets: [out_features + 1], uint32 or uint64.
        weight_layout: [rows, columns, transposed], int64.
    """

    weight_mask: Tensor
    weight_offsets: Tensor
    weight_layout: Tensor

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

    def forward(self, x: Tensor) -> Tensor:
        """Multiply [..., in_features] to [..., out_features]."""
        if x.dtype != self.weight.dtype and torch.is_autocast_enabled(x.device.type):
            # Autocast would convert the weight. Packed values cannot be converted in
            # each product, so the input is converted instead.
            x = x.to(self.weight.dtype)
        multiply = _Differentiable.apply if wants_gradient(x, self.bias) else _multiply
        return multiply(
            x,
            self.weight,
            self.weight_mask,
            self.weight_offsets,
            self.bias,
            self.in_features,
        )

    def extra_repr(self) -> str:
        """Show shape and fraction of zeros."""
        kept = self.weight.numel() / (self.in_features * self.out_features)
        return f"{super().extra_repr()}, sparsity={1 - kept:.4f}"


def _multiply(*operands: Any) -> Tensor:  # noqa: ANN401
    return packed_linear(*operands)


class _Differentiable(torch.autograd.Function):
    """The packed product with gradients for its input and its bias."""

    @staticmethod
    def forward(ctx: Any, *operands: Any) -> Tensor:  # noqa: ANN401
        _, values, mask, offsets, _, columns = operands
        ctx.save_for_backward(values, mask, offsets)
        ctx.columns = columns
        return packed_linear(*operands)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Any) -> Any:  # noqa: ANN401
        (gradient,) = grad_outputs
        values, mask, offsets = ctx.saved_tensors
        # y = x W.T + b, so dL/dx = dL/dy W, and dL/db is dL/dy summed over all rows.
        weight = BitmaskMatrix(values, mask, offsets, ctx.columns).unpack()
        for_x = gradient @ weight if ctx.needs_input_grad[0] else None
        for_bias = gradient.flatten(0, -2).sum(0) if ctx.needs_input_grad[4] else None
        return for_x, None, None, None, for_bias, None
