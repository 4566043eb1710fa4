"""Dense linear layers that run Halve's kernel on small batches."""

import torch
from torch import Tensor, nn
from torch.nn import functional

from halve._compat.torch import change_class, share_state
from halve.runtime.cpu.operators import dense_linear
from halve.runtime.cpu.packed_linear import wants_gradient

# Up to this many rows of input Halve's dense kernel is faster than torch's.
_MAX_ROWS = 8


class DenseLinear(nn.Linear):
    """nn.Linear whose product with a few rows runs Halve's kernel.

    torch's own reaches about two thirds of the memory bandwidth there.
    """

    def forward(self, input: Tensor) -> Tensor:
        """Multiply [..., in_features] to [..., out_features]."""
        few = 0 < input.numel() <= _MAX_ROWS * self.in_features
        if few and input.device.type == "cpu" and not self._needs_torch(input):
            return dense_linear(input, self.weight, self.bias)
        return functional.linear(input, self.weight, self.bias)

    def _needs_torch(self, x: Tensor) -> bool:
        """Whether gradients or autocast are on, which the kernel does not support."""
        gradient = wants_gradient(x, self.weight, self.bias)
        return gradient or torch.is_autocast_enabled("cpu")


def plain_linear(layer: nn.Linear) -> nn.Linear:
    """Return an nn.Linear that shares the weights of a layer."""
    plain = nn.Linear(1, 1, bias=False)
    share_state(plain, layer)
    return plain


def use_dense_kernel(model: nn.Module) -> None:
    """Turn the plain nn.Linear layers of a model into `DenseLinear`, in place."""
    for module in model.modules():
        if type(module) is nn.Linear and module.weight.dtype != torch.float64:
            change_class(module, DenseLinear)
