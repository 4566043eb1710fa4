"""Packed models on CUDA: dense again, or 2:4 in torch's own layout if that is faster.

There is no kernel of Halve's for GPUs yet. A packed model saves its bytes on the disk
and on the way to the GPU, and not in the GPU's memory; it is never slower than dense.
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
from halve.runtime.cpu.replace_modules import dense_layer, sparse_layers

_TWO_OF_FOUR = NM(2, 4)
# A decoded token and a prompt: 2:4 must not be slower at either to be chosen.
_ROWS = (1, 512)
_REPEATS = 20


def unpack_on_cuda(model: nn.Module) -> None:
    """Replace packed layers that lie on a GPU by dense or semi-structured ones.

    Warns once, with counts of both.
    """
    layers = [found for found in sparse_layers(model) if found[1].weight.is_cuda]
    faster: dict[Any, bool] = {}
    for name, sparse in layers:
        dense = dense_layer(sparse)
        if isinstance(dense, nn.Linear) and _is_two_of_four(dense.weight):
            key = (tuple(dense.weight.shape), dense.weight.dtype)
            structured = _semi_structured(dense.weight)
            if key not in faster:
                faster[key] = structured is not None and _is_faster(dense, structured)
            if faster[key] and structured is not None:
                dense.weight = nn.Parameter(structured, requires_grad=False)
        model.set_submodule(name, dense)
    if layers:
        shapes = sum(faster.values())
        warnings.warn(
            f"{len(layers)} packed matrices were unpacked for the GPU, which Halve has "
            f"no kernels for; 2:4 in torch's layout was faster for {shapes} of "
            f"{len(faster)} shapes that allow it.",
            HalveWarning,
            stacklevel=2,
        )


def _is_two_of_four(weight: Tensor) -> bool:
    columns = weight.shape[1]
    return columns % 4 == 0 and _TWO_OF_FOUR.shortfall(weight) is None


def _semi_structured(weight: Tensor) -> Tensor | None:
    """Return a weight in torch's 2:4 layout, None where torch refuses it."""
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
