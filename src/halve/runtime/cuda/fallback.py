"""Packed models on CUDA: unpacked, or in torch's 2:4 layout if that is faster.

Halve has no GPU kernels yet. Packing saves bytes on the disk and on the way to the GPU,
but not in GPU memory; a packed model is never slower than the dense one.
"""

import time
import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from halve.errors import HalveWarning
from halve.patterns import NM
from halve.runtime.cpu.replace_modules import packed_modules

_TWO_OF_FOUR = NM(2, 4)
# Rows of input that are timed, a decoded token and a prompt. 2:4 is used only if it is
# faster for both.
_ROWS = (1, 512)
_REPEATS = 20
# Shape and dtype of a weight; each kind is timed once.
_Kind = tuple[tuple[int, ...], torch.dtype]


def unpack_on_cuda(model: Any) -> None:  # noqa: ANN401
    """Replace packed layers on a GPU by dense or semi-structured ones.

    Warns once, with the number of each.
    """
    layers = [
        (path, layer) for path, layer in packed_modules(model) if layer.weight.is_cuda
    ]
    faster: dict[_Kind, bool] = {}
    for path, packed in layers:
        dense = packed.to_dense()
        if isinstance(dense, nn.Linear) and _is_two_of_four(dense.weight):
            _use_semi_structured(dense, faster)
        model.set_submodule(path, dense)
    if layers:
        model.tie_weights()
        shapes = sum(faster.values())
        warnings.warn(
            f"{len(layers)} packed matrices were unpacked: Halve has no GPU kernels; "
            f"torch's 2:4 layout was faster for {shapes} of the {len(faster)} shapes "
            "that allow it.",
            HalveWarning,
            stacklevel=2,
        )


def _use_semi_structured(dense: nn.Linear, faster: dict[_Kind, bool]) -> None:
    """Store a 2:4 weight in torch's layout if products are faster with it.

    Args:
        dense: A layer on a GPU.
        faster: Whether they are, for each kind that has been timed; extended here.
    """
    kind = (tuple(dense.weight.shape), dense.weight.dtype)
    structured = _semi_structured(dense.weight)
    if kind not in faster:
        faster[kind] = structured is not None and _is_faster(dense, structured)
    if faster[kind] and structured is not None:
        dense.weight = nn.Parameter(structured, requires_grad=False)


def _is_two_of_four(weight: Tensor) -> bool:
    columns = weight.shape[1]
    return columns % 4 == 0 and _TWO_OF_FOUR.shortfall(weight) is None


def _semi_structured(weight: Tensor) -> Tensor | None:
    """Return a weight in torch's 2:4 layout, None if torch does not support it."""
    try:
        return torch.sparse.to_sparse_semi_structured(weight)
    except (RuntimeError, ValueError, NotImplementedError):
        return None


def _is_faster(dense: nn.Linear, structured: Tensor) -> bool:
    return all(
        _seconds(x, structured, dense.bias) < _seconds(x, dense.weight, dense.bias)
        for x in (dense.weight.new_ones(rows, dense.in_features) for rows in _ROWS)
    )


@torch.no_grad()
def _seconds(x: Tensor, weight: Tensor, bias: Tensor | None) -> float:
    multiply: Callable[[], Tensor] = lambda: functional.linear(x, weight, bias)  # noqa: E731
    multiply()
    torch.cuda.synchronize(x.device)
    started = time.perf_counter()
    for _ in range(_REPEATS):
        multiply()
    torch.cuda.synchronize(x.device)
    return time.perf_counter() - started
