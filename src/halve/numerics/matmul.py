"""Fast float32 matrix products on the CPU.

torch computes float32 products by MKL, which uses its AVX2 code on AMD processors:
about half of what oneDNN reaches on the same cores (docs/log.md, "oneDNN for float32").
oneDNN is part of the same torch build, behind the operator to which torch.compile
lowers linear layers. Where that operator does not apply, torch's own product is used;
both give the same values up to the order of summation.
"""

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional
from torch.overrides import TorchFunctionMode

from halve._compat.torch import multiplies_bfloat16, onednn_linear

# The dtypes of weights that are stored as they are and converted to float32, without
# loss, for each product; and how many weights are converted at once.
HALF_DTYPES = (torch.float16, torch.bfloat16)
MAX_CONVERTED = 2**26

_torch_linear = functional.linear


def widening_nbytes(elements: int) -> int:
    """Return the bytes of a narrow matrix that `linear` widens to float32 at a time."""
    return 4 * min(elements, MAX_CONVERTED)


def _onednn_takes(*operands: Tensor) -> bool:
    return torch.backends.mkldnn.is_available() and all(
        x.device.type == "cpu" and x.dtype == torch.float32 and x.numel() > 0
        for x in operands
    )


def _promoted(first: Tensor, second: Tensor) -> tuple[Tensor, Tensor]:
    """Convert two operands to the wider of their dtypes."""
    wider = torch.promote_types(first.dtype, second.dtype)
    return first.to(wider), second.to(wider)


def linear(inputs: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """Compute `inputs @ weight.T + bias`.

    An operand of 16 bits is converted for the product alone if the other has more; a
    large weight is converted and multiplied some rows at a time.

    Args:
        inputs: [..., columns].
        weight: [rows, columns].
        bias: [rows], or None.

    Returns:
        [..., rows], in the wider dtype of `inputs` and `weight`.
    """
    converts = weight.dtype in HALF_DTYPES and inputs.dtype not in HALF_DTYPES
    # With gradients, autograd would keep the converted strips in memory anyway.
    if converts and weight.numel() > MAX_CONVERTED and not torch.is_grad_enabled():
        return _linear_in_strips(inputs, weight, bias)
    inputs, weight = _promoted(inputs, weight)
    if not _onednn_takes(inputs, weight):
        return _torch_linear(inputs, weight, bias)
    if torch.is_grad_enabled() and any(
        x is not None and x.requires_grad for x in (inputs, weight, bias)
    ):
        return _Differentiable.apply(inputs, weight, bias)
    # Strided operands would take oneDNN's reference kernel, hundreds of times slower.
    return onednn_linear(inputs.contiguous(), weight.contiguous(), bias)


def _linear_in_strips(inputs: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """Compute `linear` by strips of rows of at most MAX_CONVERTED weights each."""
    rows, columns = weight.shape
    outputs = inputs.new_empty(*inputs.shape[:-1], rows)
    height = max(MAX_CONVERTED // columns, 1)
    for start in range(0, rows, height):
        # Rows of the weight are columns of the output: Y[:, s] = X W[s].T + b[s].
        strip = slice(start, start + height)
        part = None if bias is None else bias[strip]
        outputs[..., strip] = linear(inputs, weight[strip].to(inputs.dtype), part)
    return outputs


class _Differentiable(torch.autograd.Function):
    """`linear` with gradients, which oneDNN's operator does not have.

    Mixed precision: where the processor multiplies bfloat16, the factors and the result
    of all three products are rounded to it, and everything else is float32. Refining
    takes two thirds of the time so (docs/log.md, "bfloat16 in training passes").
    """

    @staticmethod
    def forward(
        ctx: Any,  # noqa: ANN401  (torch's signature)
        inputs: Tensor,
        weight: Tensor,
        bias: Tensor | None,
    ) -> Tensor:
        """Compute the product, and save both operands for the backward pass."""
        ctx.save_for_backward(inputs, weight)
        outputs = _training_product(inputs, weight.T)
        return outputs if bias is None else outputs + bias

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:  # noqa: ANN401
        """Return the gradients of inputs, weight and bias, as far as they are needed.

        For Y = X W.T + b and G = dL/dY: dL/dX = G W, dL/dW = G.T X, dL/db = G.T 1.
        """
        inputs, weight = ctx.saved_tensors
        needed, (gradient,) = ctx.needs_input_grad, gradients
        # G as [tokens, rows]: the leading dimensions are summed over.
        flat = gradient.flatten(0, -2)
        return (
            _training_product(gradient, weight) if needed[0] else None,
            _training_product(flat.T, inputs.flatten(0, -2)) if needed[1] else None,
            flat.sum(dim=0) if needed[2] else None,
        )


def mixed_linear(inputs: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """Compute `inputs @ weight.T + bias` without gradients, as precisely as with them.

    For passes whose results only training sees: in bfloat16 where that is fast.
    """
    if inputs.device.type != "cpu" or not multiplies_bfloat16():
        return linear(inputs, weight, bias)
    outputs = _training_product(inputs, weight.T)
    return outputs if bias is None else outputs + bias


def _training_product(left: Tensor, right: Tensor) -> Tensor:
    """Compute `left @ right` in bfloat16 if that is fast, else in float32."""
    if multiplies_bfloat16():
        return (left.to(torch.bfloat16) @ right.to(torch.bfloat16)).float()
    return onednn_linear(left.contiguous(), right.T.contiguous(), None)


_Linear = Callable[[Tensor, Tensor, Tensor | None], Tensor]


def _addmm(
    multiply: _Linear,
    bias: Tensor,
    left: Tensor,
    right: Tensor,
    **scales: Any,  # noqa: ANN401
) -> Tensor:
    """Replace torch.addmm, by which transformers' Conv1D multiplies.

    Conv1D computes b + X W with W stored as [columns, rows].
    """
    if scales or bias.dim() != 1:
        return torch.addmm(bias, *_promoted(left, right), **scales)
    return multiply(left, right.T, bias)


def _keeps_scores(query: Tensor) -> bool:
    """Whether torch's attention with fewer key heads than heads keeps all its scores.

    Its fused kernels for CUDA take either float32 or such heads, but not both.
    """
    return query.device.type == "cuda" and query.dtype == torch.float32


def _attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *args: Any,  # noqa: ANN401
    **kwargs: Any,  # noqa: ANN401
) -> Tensor:
    """Replace torch's attention by that of repeated key heads, which is fused.

    Args:
        query: [batch, heads, length, width].
        key: [batch, key heads, length, width]; key heads divide heads.
        value: As `key`.
        args: As torch's function takes them.
        kwargs: As torch's function takes them.
    """
    if kwargs.get("enable_gqa") and _keeps_scores(query):
        times = query.shape[-3] // key.shape[-3]
        key, value = (x.repeat_interleave(times, dim=-3) for x in (key, value))
        kwargs["enable_gqa"] = False
    return functional.scaled_dot_product_attention(query, key, value, *args, **kwargs)


def _replacements(multiply: _Linear) -> dict[Callable[..., Any], Callable[..., Any]]:
    return {
        _torch_linear: multiply,
        torch.addmm: partial(_addmm, multiply),
        functional.scaled_dot_product_attention: _attention,
    }


_FULL, _MIXED = _replacements(linear), _replacements(mixed_linear)


class FastMatmul(TorchFunctionMode):
    """Compute the products of any model by the fastest float32 code in this context.

    Linear layers are computed by `linear`, and attention by a fused kernel.
    """

    def __init__(self, *, mixed: bool = False) -> None:
        """Choose the precision.

        Args:
            mixed: Whether linear layers are computed by `mixed_linear`.
        """
        super().__init__()
        self._replacements = _MIXED if mixed else _FULL

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Any,  # noqa: ANN401  (torch's signature)
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:  # noqa: ANN401
        """Replace the functions by which models multiply; call others as usual."""
        replacement = self._replacements.get(func, func)
        return replacement(*args, **(kwargs or {}))
