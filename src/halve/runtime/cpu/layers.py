"""Linear layers that run Halve's operators: packed, and those that stayed dense."""

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from halve._compat.torch import change_class, share_state
from halve.formats import Packed
from halve.runtime.cpu.operators import dense_linear, packed_linear

# Up to this many rows Halve's dense kernel is faster than torch's.
_FEW_ROWS = 8


class SparseLinear(nn.Module):
    """`y = x W.T + bias` for a packed W: takes the place of nn.Linear and Conv1D.

    Its tensors bear the names that they have in a file: `weight` holds the kept values.
    Gradients pass to its inputs and its bias; the weights have none.

    Attributes:
        in_features: Inputs.
        out_features: Outputs.
        transposed: Whether the dense weight is stored as [inputs, outputs].
    """

    weight: nn.Parameter
    weight_mask: Tensor
    weight_offsets: Tensor
    weight_layout: Tensor

    def __init__(self, packed: Packed, bias: nn.Parameter | None = None) -> None:
        super().__init__()
        self.in_features = packed.columns
        self.out_features = packed.rows
        self.transposed = packed.transposed
        self.weight = nn.Parameter(packed.values, requires_grad=False)
        self.bias = bias
        self.register_buffer("weight_mask", packed.mask)
        self.register_buffer("weight_offsets", packed.offsets)
        self.register_buffer("weight_layout", packed.layout)

    @property
    def packed(self) -> Packed:
        """Its tensors as a packed matrix."""
        return Packed(
            self.weight.data,
            self.weight_mask,
            self.weight_offsets,
            self.in_features,
            self.transposed,
        )

    def forward(self, x: Tensor) -> Tensor:
        """Multiply [..., in_features] to [..., out_features]."""
        if x.dtype != self.weight.dtype and torch.is_autocast_enabled(x.device.type):
            x = x.to(self.weight.dtype)  # the weights stay as they are
        multiply = _Differentiable.apply if _wants_gradient(x, self.bias) else _multiply
        return multiply(
            x,
            self.weight,
            self.weight_mask,
            self.weight_offsets,
            self.bias,
            self.in_features,
        )

    def extra_repr(self) -> str:
        """Show shape and share of zeros."""
        kept = self.weight.numel() / (self.in_features * self.out_features)
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, "
            f"bias={self.bias is not None}, sparsity={1 - kept:.4f}"
        )


def _multiply(*operands: Any) -> Tensor:  # noqa: ANN401
    return packed_linear(*operands)


def _wants_gradient(*tensors: Tensor | None) -> bool:
    return torch.is_grad_enabled() and any(
        tensor is not None and tensor.requires_grad for tensor in tensors
    )


class _Differentiable(torch.autograd.Function):
    """The packed product with gradients for its inputs and its bias."""

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
        weight = Packed(values, mask, offsets, ctx.columns).unpack()
        for_x = gradient @ weight if ctx.needs_input_grad[0] else None
        for_bias = gradient.flatten(0, -2).sum(0) if ctx.needs_input_grad[4] else None
        return for_x, None, None, None, for_bias, None


class DenseLinear(nn.Linear):
    """nn.Linear whose product with a few rows runs Halve's kernel.

    torch's own reaches about two thirds of the memory's bandwidth there.
    """

    def forward(self, input: Tensor) -> Tensor:
        """Multiply [..., in_features] to [..., out_features]."""
        few = 0 < input.numel() <= _FEW_ROWS * self.in_features
        if few and input.device.type == "cpu" and not self._needs_torch(input):
            return dense_linear(input, self.weight, self.bias)
        return functional.linear(input, self.weight, self.bias)

    def _needs_torch(self, x: Tensor) -> bool:
        """Whether gradients or conversions are wanted, which our kernel has not."""
        gradient = _wants_gradient(x, self.weight, self.bias)
        return gradient or torch.is_autocast_enabled("cpu")


def plain_linear(layer: DenseLinear) -> nn.Linear:
    """Return a layer of torch's own that shares the weights of ours."""
    plain = nn.Linear(1, 1, bias=False)
    share_state(plain, layer)
    return plain


def use_own_products(model: nn.Module) -> None:
    """Let plain linear layers of a model multiply a few rows with Halve's kernel."""
    for module in model.modules():
        if type(module) is nn.Linear and module.weight.dtype != torch.float64:
            change_class(module, DenseLinear)
