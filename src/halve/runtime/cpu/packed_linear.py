"""The interface of linear layers whose weight stays packed."""

from abc import ABC, abstractmethod

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from halve.formats import PackedMatrix


class PackedLinear(nn.Module, ABC):
    """`y = x W.T + bias` for a packed W; replaces nn.Linear and Conv1D.

    The parts of the matrix have the same names as in a file, so a state dict is loaded
    from it and saved to it unchanged: the part without a suffix is the parameter
    `weight`, and each companion a buffer, such as `weight_mask`. The weight is not
    trainable; gradients pass to the input and the bias.

    Attributes:
        in_features: Columns of W.
        out_features: Rows of W.
        transposed: Whether the dense weight is stored as [in_features, out_features].
        weight: The part without a suffix.
        bias: [out_features], or None.
    """

    weight: nn.Parameter
    bias: nn.Parameter | None

    def __init__(self, packed: PackedMatrix, bias: nn.Parameter | None = None) -> None:
        super().__init__()
        rows, columns = packed.shape[::-1] if packed.transposed else packed.shape
        self.in_features = columns
        self.out_features = rows
        self.transposed = packed.transposed
        self.bias = bias
        parts = packed.parts
        self.weight = nn.Parameter(parts.pop(""), requires_grad=False)
        for suffix, part in parts.items():
            self.register_buffer(f"weight{suffix}", part)

    @property
    @abstractmethod
    def packed(self) -> PackedMatrix:
        """The layer's tensors as a packed matrix."""

    @abstractmethod
    def forward(self, x: Tensor) -> Tensor:
        """Multiply [..., in_features] to [..., out_features]."""

    def dense_weight(self) -> Tensor:
        """Return W, dense, [out_features, in_features]."""
        weight = self.packed.unpack()
        return weight.T.contiguous() if self.transposed else weight

    def to_dense(self) -> nn.Module:
        """Return the nn.Linear or Conv1D that the layer replaced, bias shared."""
        rows, columns = self.out_features, self.in_features
        with torch.device("meta"):
            dense = (
                Conv1D(rows, columns) if self.transposed else nn.Linear(columns, rows)
            )
        dense.weight = nn.Parameter(self.packed.unpack(), requires_grad=False)
        dense.register_parameter("bias", self.bias)
        return dense

    def extra_repr(self) -> str:
        """Show the shape."""
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, "
            f"bias={self.bias is not None}"
        )


def wants_gradient(*tensors: Tensor | None) -> bool:
    """Whether autograd records an operation on these tensors."""
    return torch.is_grad_enabled() and any(
        tensor is not None and tensor.requires_grad for tensor in tensors
    )
