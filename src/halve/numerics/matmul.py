"""Fast float32 matrix products on the CPU.

torch sends float32 products to MKL, which on AMD processors runs its AVX2 code: about
half of what oneDNN reaches on the same cores (docs/log.md, "oneDNN for float32").
oneDNN lies in the same torch build, behind the operator that the compiler uses for
linear layers. Everything here falls back to torch's own product where that operator
does not apply, and gives the same values up to the order of summation.
"""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional
from torch.overrides import TorchFunctionMode

# What may wait as it is stored, to be widened without loss for each product, and how
# many numbers of it are widened at once.
NARROW = (torch.float16, torch.bfloat16)
WIDENED = 2**26

_torch_linear = functional.linear


def widening_nbytes(elements: int) -> int:
    """Return the bytes of a narrow matrix that `linear` widens to float32 at a time."""
    return 4 * min(elements, WIDENED)


def _onednn_takes(*operands: Tensor) -> bool:
    return torch.backends.mkldnn.is_available() and all(
        x.device.type == "cpu" and x.dtype == torch.float32 and x.numel() > 0
        for x in operands
    )


def _alike(first: Tensor, second: Tensor) -> tuple[Tensor, Tensor]:
    wider = torch.promote_types(first.dtype, second.dtype)
    return first.to(wider), second.to(wider)


def linear(inputs: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """Return `inputs @ weight.T + bias`.

    Args:
        inputs: [..., columns].
        weight: [rows, columns].
        bias: [rows].

    Returns:
        [..., rows]. Where an operand has fewer bits than the other, it is widened for
        the product alone; a large matrix some rows at a time.
    """
    widens = weight.dtype in NARROW and inputs.dtype not in NARROW
    # With derivatives the whole of it would be kept anyhow.
    if widens and weight.numel() > WIDENED and not torch.is_grad_enabled():
        return _by_strips(inputs, weight, bias)
    inputs, weight = _alike(inputs, weight)
    if not _onednn_takes(inputs, weight):
        return _torch_linear(inputs, weight, bias)
    if torch.is_grad_enabled() and any(
        x is not None and x.requires_grad for x in (inputs, weight, bias)
    ):
        return _Differentiable.apply(inputs, weight, bias)
    # oneDNN falls to a reference kernel, hundreds of times slower, on strided operands.
    return torch.ops.mkldnn._linear_pointwise(
        inputs.contiguous(), weight.contiguous(), bias, "none", [], ""
    )


def _by_strips(inputs: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """Do as `linear` does with a matrix too large to be widened at once."""
    rows, columns = weight.shape
    outputs = inputs.new_empty(*inputs.shape[:-1], rows)
    height = max(WIDENED // columns, 1)
    for start in range(0, rows, height):
        own = slice(start, start + height)
        part = None if bias is None else bias[own]
        outputs[..., own] = linear(inputs, weight[own].to(inputs.dtype), part)
    return outputs


class _Differentiable(torch.autograd.Function):
    """`linear` with its derivatives, which the operator of oneDNN lacks."""

    @staticmethod
    def forward(
        ctx: Any,  # noqa: ANN401  (torch's own signature)
        inputs: Tensor,
        weight: Tensor,
        bias: Tensor | None,
    ) -> Tensor:
        """Return the product, and keep both operands."""
        ctx.save_for_backward(inputs, weight)
        return linear(inputs, weight, bias)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:  # noqa: ANN401
        """Return the gradients of inputs, weight and bias, where they are wanted."""
        inputs, weight = ctx.saved_tensors
        wanted, (gradient,) = ctx.needs_input_grad, gradients
        flat = gradient.flatten(0, -2)
        return (
            linear(gradient, weight.T) if wanted[0] else None,
            linear(flat.T, inputs.flatten(0, -2).T) if wanted[1] else None,
            flat.sum(dim=0) if wanted[2] else None,
        )


def _addmm(bias: Tensor, left: Tensor, right: Tensor, **scales: Any) -> Tensor:  # noqa: ANN401
    """Take over the call by which transformers' Conv1D multiplies."""
    if scales or bias.dim() != 1:
        return torch.addmm(bias, *_alike(left, right), **scales)
    return linear(left, right.T, bias)


class FastMatmul(TorchFunctionMode):
    """Within this context every model's linear layers go through `linear`."""

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Any,  # noqa: ANN401  (torch's own signature)
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:  # noqa: ANN401
        """Replace the two products of language models; leave the rest alone."""
        replacement = _REPLACEMENTS.get(func, func)
        return replacement(*args, **(kwargs or {}))


_REPLACEMENTS: dict[Callable[..., Any], Callable[..., Any]] = {
    _torch_linear: linear,
    torch.addmm: _addmm,
}
