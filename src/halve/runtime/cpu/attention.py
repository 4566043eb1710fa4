"""Attention of one new token by Halve's kernel, for transformers' attention interface.

torch's attention on a CPU is made for many queries at once. With one query in bfloat16
and as many key heads as heads it takes five times as long as this kernel, and longer
than all else that a token costs beside its products (docs/log.md).
"""

import ctypes
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from halve.runtime.cpu.kernels import DTYPES, Kernels, kernels, supports

# Name of the attention function, as in `attn_implementation`.
ATTENTION = "halve"
# The function that it replaces, and calls for everything but one new token.
PLAIN = "sdpa"

# Arguments with which some families ask `sdpa` for more than softmax(q K^T) V.
_EXTRAS = ("softcap", "position_bias", "s_aux", "cache", "output_attentions")
_Strides = ctypes.c_int64 * 3


class _Attention(ctypes.Structure):
    _fields_ = (
        ("query", ctypes.c_void_p),
        ("keys", ctypes.c_void_p),
        ("values", ctypes.c_void_p),
        ("dtype", ctypes.c_int32),
        ("scale", ctypes.c_float),
        ("batch", ctypes.c_int64),
        ("heads", ctypes.c_int64),
        ("key_heads", ctypes.c_int64),
        ("length", ctypes.c_int64),
        ("width", ctypes.c_int64),
        ("key_strides", _Strides),
        ("value_strides", _Strides),
    )


def attend(
    kernel: Kernels, query: Tensor, keys: Tensor, values: Tensor, scale: float
) -> Tensor:
    """Return `softmax(scale query K^T) V` of one new token, without a mask.

    Args:
        kernel: The loaded kernels.
        query: [batch, heads, 1, width], on the CPU.
        keys: [batch, key heads, length, width], of the dtype of the query; key heads
            divide heads. The last dimension is contiguous.
        values: As `keys`.
        scale: Factor of the scores.

    Returns:
        [batch, 1, heads, width].
    """
    batch, heads, _, width = query.shape
    query = query.contiguous()
    out = query.new_empty(batch, 1, heads, width)
    arguments = attention_arguments(query, keys, values, scale)
    status = kernel.library.halve_attend(
        ctypes.byref(arguments),
        ctypes.c_void_p(out.data_ptr()),
        torch.get_num_threads(),
    )
    if status:
        raise RuntimeError(f"the attention kernel reports status {status}")
    return out


def attention_arguments(
    query: Tensor, keys: Tensor, values: Tensor, scale: float
) -> ctypes.Structure:
    """Return the arguments of the library, which point to the tensors of `attend`."""
    return _Attention(
        *(query.data_ptr(), keys.data_ptr(), values.data_ptr()),
        *(DTYPES[query.dtype], scale),
        *(query.shape[0], query.shape[1], *keys.shape[1:]),
        keys.stride()[:3],
        values.stride()[:3],
    )


def _forward(  # noqa: PLR0913, PLR0917  (the interface)
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    **extras: Any,  # noqa: ANN401
) -> tuple[Tensor, Any]:
    """Compute attention as transformers' `sdpa` does, one new token by the kernel."""
    kernel = _kernel_for(query, key, value)
    if kernel is None or attention_mask is not None or dropout or _asks_more(extras):
        return ALL_ATTENTION_FUNCTIONS[PLAIN](
            *(module, query, key, value, attention_mask),
            dropout=dropout,
            scaling=scaling,
            **extras,
        )
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    return attend(kernel, query, key, value, scale), None


def _kernel_for(query: Tensor, key: Tensor, value: Tensor) -> Kernels | None:
    if query.shape[2] != 1 or query.device.type != "cpu" or _is_recorded(query, key):
        return None
    fits = key.shape == value.shape and key.shape[::3] == query.shape[::3]
    dense = query.dtype == key.dtype == value.dtype and supports(query.dtype)
    rows = key.stride(3) == value.stride(3) == 1 and query.shape[1] % key.shape[1] == 0
    return kernels() if fits and dense and rows else None


def _is_recorded(query: Tensor, key: Tensor) -> bool:
    """Whether autograd or the compiler records what is computed."""
    gradient = torch.is_grad_enabled() and (query.requires_grad or key.requires_grad)
    return gradient or torch.compiler.is_compiling()


def _asks_more(extras: dict[str, Any]) -> bool:
    return any(extras.get(name) is not None for name in _EXTRAS)


AttentionInterface.register(ATTENTION, _forward)
# Masks are made, or left out, as they are for `sdpa`.
AttentionMaskInterface.register(ATTENTION, AttentionMaskInterface()[PLAIN])
