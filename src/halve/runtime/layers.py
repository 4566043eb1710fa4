"""Linear layers that run Halve's operators: packed, and those that stayed dense."""

import torch
from torch import Tensor, nn
from torch.nn import functional

from halve.formats import Packed
from halve.runtime.operators import dense_linear, packed_linear

# Up to this many rows Halve's dense kernel is faster than torch's.
_FEW_ROWS = 8


class SparseLinear(nn.Module):
    """`y = x W.T + bias` for a packed W: takes the place of nn.Linear and Conv1D.

    Its tensors bear the names that they have in a file: `weight` holds the kept values.
    It is for inference; no gradient passes through it.

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
        return packed_linear(
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


class DenseLinear(nn.Linear):
    """nn.Linear whose product with a few rows runs Halve's kernel.

    torch's own reaches about two thirds of the memory's bandwidth there.
    """

    def forward(self, input: Tensor) -> Tensor:
        """Multiply [..., in_features] to [..., out_features]."""
        few = 0 < input.numel() <= _FEW_ROWS * self.in_features
        if few and input.device.type == "cpu":
            return dense_linear(input, self.weight, self.bias)
        return functional.linear(input, self.weight, self.bias)


def plain_linear(layer: DenseLinear) -> nn.Linear:
    """Return a layer of torch's own that shares the weights of ours."""
    plain = nn.Linear(1, 1, bias=False)
    plain.__dict__ |= layer.__dict__
    return plain


def use_own_products(model: nn.Module) -> None:
    """Let plain linear layers of a model multiply a few rows with Halve's kernel."""
    for module in model.modules():
        if type(module) is nn.Linear and module.weight.dtype != torch.float64:
            module.__class__ = DenseLinear
