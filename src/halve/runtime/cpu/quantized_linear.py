"""Linear layer and embedding of the quantized format."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from halve.errors import HalveError
from halve.formats.quantized_matrix import QuantizedMatrix
from halve.runtime.cpu.packed_linear import (
    IndexedMask,
    PackedEmbedding,
    PackedLinear,
    wants_gradient,
)
from halve.runtime.cpu.quantized_operators import (
    ACTIVATIONS,
    DEFAULT,
    activation_mode,
    quantized_linear,
    quantized_lookup,
)
from halve.runtime.cuda.support import runs_kernels


class _QuantizedWeight(IndexedMask):
    """The parts of a quantized matrix as tensors of a module.

    Attributes:
        weight: Codes, uint8.
        weight_scales: [rows, groups], float16; converting the module leaves them so.
        weight_zeros: Codes of zero as bits, uint8, or None.
        weight_mask: [rows, words], uint64, or None.
        weight_offsets: [rows + 1], or None.
        weight_starts: See `IndexedMask`.
        weight_layout: Seven numbers, int64.
        layout: Columns, bits, group size, and whether the grid is midrise.
        dtype: Dtype of the dense weight.
    """

    weight: nn.Parameter
    weight_scales: Tensor
    weight_zeros: Tensor | None
    weight_mask: Tensor | None
    weight_offsets: Tensor | None
    layout: list[int]
    dtype: torch.dtype

    def adopt(self, packed: QuantizedMatrix) -> None:
        """Take over what the parts do not show."""
        self.layout = [
            *(packed.columns, packed.bits, packed.group_size),
            int(packed.midrise),
        ]
        self.dtype = packed.dtype
        self.transposed = packed.transposed
        for name in ("weight_zeros", "weight_mask", "weight_offsets"):
            if not hasattr(self, name):
                self.register_buffer(name, None)
        self.expect_index()
        # Whether kernels for GPUs run on the tensors, as `prepare_device` found.
        self._on_gpu = False

    @property
    def packed(self) -> QuantizedMatrix:
        """The module's tensors as a packed matrix."""
        columns, bits, group_size, midrise = self.layout
        return QuantizedMatrix(
            self.weight.data,
            self.weight_scales,
            *(bits, group_size, columns, self.dtype),
            *(self.weight_zeros, self.weight_mask, self.weight_offsets),
            midrise=bool(midrise),
            transposed=self.transposed,
        )

    @property
    def operands(self) -> list[Tensor | None]:
        """The parts in the order of the operators."""
        return [
            *(self.weight, self.weight_scales, self.weight_zeros),
            *(self.weight_mask, self.weight_offsets),
        ]

    @property
    def device_operands(self) -> list[Tensor | None]:
        """The parts for the kernels of the weight's device, which are prepared.

        On a GPU whose kernels run the side index is added, or None without a mask.
        """
        if not torch.compiler.is_compiling():
            self.prepare_device()
        return [*self.operands, self.weight_starts] if self._on_gpu else self.operands

    def prepare_device(self) -> None:
        """Make what the kernels of the weight's device need, if it is missing or old.

        Called wherever the module may have arrived on another device, and before each
        product: accelerate replaces tensors of a module one by one.
        """
        on_gpu = runs_kernels(self.weight.device, self.dtype)
        if on_gpu != self._on_gpu:
            self._on_gpu = on_gpu
        if not on_gpu:
            self.drop_index()
        elif self.weight_mask is not None:
            self.index_mask(self.weight_mask)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:  # noqa: ANN401
        """Move the module, and convert everything but the scales.

        Rounding scales would change every weight, and gain nothing.
        """
        scales = self.weight_scales
        self.drop_index()
        super()._apply(fn, recurse)
        self.dtype = fn(torch.empty(0, dtype=self.dtype)).dtype
        self.weight_scales = scales.to(self.weight_scales.device)
        self.prepare_device()
        return self


class QuantizedLinear(_QuantizedWeight, PackedLinear):
    """A linear layer that multiplies by a matrix in quantized format.

    Attributes:
        activations: How the CPU's kernels hold activations, a key of `ACTIVATIONS`. On
            a GPU inputs stay what they are, and products are added in float32.
    """

    def __init__(
        self, packed: QuantizedMatrix, bias: nn.Parameter | None = None
    ) -> None:
        super().__init__(packed, bias)
        self.adopt(packed)
        self._mode = DEFAULT

    @property
    def activations(self) -> str:
        """How the kernels hold activations: `int16` or `int8`."""
        return next(name for name, mode in ACTIVATIONS.items() if mode == self._mode)

    @activations.setter
    def activations(self, name: str) -> None:
        self._mode = activation_mode(name)

    def multiply(self, x: Tensor, bias: Tensor | None) -> Tensor:
        """Multiply, in the dtype of x, and add a bias."""
        if bias is not None and bias.dtype != x.dtype:
            bias = bias.to(x.dtype)
        if wants_gradient(x, bias):
            return _Differentiable.apply(x, bias, self)
        return quantized_linear(x, self.device_operands, bias, self.layout, self._mode)

    def extra_repr(self) -> str:
        """Show shape, bits and group size."""
        return f"{super().extra_repr()}, {self.packed.label}"


class _Differentiable(torch.autograd.Function):
    """The quantized product with gradients for its input and its bias."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, bias: Tensor | None, layer: Any) -> Tensor:  # noqa: ANN401
        ctx.layer = layer
        return quantized_linear(
            x, layer.device_operands, bias, layer.layout, layer._mode
        )

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Any) -> Any:  # noqa: ANN401
        (gradient,) = grad_outputs
        # y = x W.T + b, so dL/dx = dL/dy W, and dL/db is dL/dy summed over all rows.
        wanted = ctx.needs_input_grad
        for_x = gradient @ ctx.layer.dense_weight().to(gradient.dtype)
        for_bias = gradient.flatten(0, -2).sum(0) if wanted[1] else None
        return for_x if wanted[0] else None, for_bias, None


def set_activations(model: nn.Module, name: str) -> None:
    """Let all quantized layers of a model hold activations in one way.

    Args:
        model: Any model.
        name: `int16` or `int8`.

    Raises:
        HalveError: There is no such way, or the model has no packed codes, with which
            8-bit activations would change nothing.
    """
    layers = [m for m in model.modules() if isinstance(m, QuantizedLinear)]
    if activation_mode(name) != DEFAULT and not layers:
        raise HalveError(
            f"Activations of {name} are for packed codes, and the model has none.",
            "Quantize and pack it (--quantize int4 --pack), or omit activations.",
        )
    for layer in layers:
        layer.activations = name


class QuantizedEmbedding(_QuantizedWeight, PackedEmbedding):
    """An embedding that looks up rows of a matrix in quantized format."""

    def __init__(self, packed: QuantizedMatrix) -> None:
        super().__init__(packed)
        self.adopt(packed)

    def forward(self, input: Tensor) -> Tensor:
        """Return the rows of token ids [...], [..., embedding_dim].

        On a GPU, where an index cannot be checked without waiting for it, a row that
        does not exist is NaN.
        """
        return quantized_lookup(input, self.device_operands, self.layout, self.dtype)
