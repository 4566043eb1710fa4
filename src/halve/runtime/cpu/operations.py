"""Operations that the library runs one after another in one call.

From Python each operation costs a few microseconds, and several times that between
products, which leave nothing of the interpreter in the caches. On several threads each
product by itself wakes them, which takes as long as a product of a small matrix; in one
call they stay together (`csrc/cpu/team.h`).
"""

import ctypes
from collections.abc import Callable, Iterable, Sequence
from enum import IntEnum
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from halve.runtime.cpu.bitmask_linear import BitmaskLinear
from halve.runtime.cpu.dense_linear import DenseLinear
from halve.runtime.cpu.kernels import DTYPES, Codes, Kernels, bitmask_of
from halve.runtime.cpu.operators import most_fused_rows
from halve.runtime.cpu.quantized_linear import QuantizedLinear
from halve.runtime.cpu.quantized_operators import ACTIVATIONS
from halve.runtime.cpu.tiles import FUSED_ROWS


class Kind(IntEnum):
    """What an operation does, as the library numbers it."""

    PACKED = 0
    DENSE = 1
    QUANTIZED = 2
    NORM = 3
    ROTATE = 4
    STORE = 5
    ATTEND = 6
    GATE = 7
    ADD = 8


class Operation(ctypes.Structure):
    """One operation; see `halve_operation`."""

    _fields_ = (
        ("kind", ctypes.c_int32),
        ("dtype", ctypes.c_int32),
        ("rows", ctypes.c_int64),
        ("columns", ctypes.c_int64),
        ("size", ctypes.c_int64),
        ("x", ctypes.c_void_p),
        ("other", ctypes.c_void_p),
        ("bias", ctypes.c_void_p),
        ("y", ctypes.c_void_p),
        ("epsilon", ctypes.c_float),
        ("option", ctypes.c_int32),
    )

    @classmethod
    def of(  # noqa: PLR0913
        cls,
        kind: Kind,
        x: Tensor,
        other: int | None,
        y: Tensor,
        *,
        size: int = 0,
        bias: int | None = None,
        epsilon: float = 0.0,
        option: int = 0,
    ) -> "Operation":
        """Return an operation on x, [..., rows, columns], of the dtype of x.

        All that the pointers lead to must stay alive.
        """
        rows, columns = x.flatten(0, -2).shape
        return cls(
            *(kind, DTYPES[x.dtype], rows, columns, size),
            *(x.data_ptr(), other, bias, y.data_ptr(), epsilon, option),
        )


class Operand(NamedTuple):
    """The matrix of a layer as an operation takes it.

    Attributes:
        kind: Kind of the product.
        matrix: A tensor, or a structure of the library, which points to the layer's
            tensors.
        option: The operation's option.
        most_rows: Above so many rows of input, unpacking is faster.
    """

    kind: Kind
    matrix: Tensor | ctypes.Structure
    option: int = 0
    most_rows: int = FUSED_ROWS

    @property
    def pointer(self) -> int:
        """Address of the matrix."""
        if isinstance(self.matrix, Tensor):
            return self.matrix.data_ptr()
        return ctypes.addressof(self.matrix)


class Product(NamedTuple):
    """A product that `multiply_all` computes: `y = x W.T + bias`.

    Attributes:
        layer: The layer of W; None where it is no layer of its own.
        x: [rows, in_features], contiguous.
        y: [rows, out_features], contiguous, of the dtype of x.
        bias: [out_features], of the dtype of x, or None.
    """

    layer: nn.Module | None
    x: Tensor
    y: Tensor
    bias: Tensor | None


def run_operations(
    library: ctypes.CDLL, operations: Sequence[Operation], position: int = 0
) -> None:
    """Run operations for a token before which there are `position` tokens."""
    array = operations
    if not isinstance(array, ctypes.Array):
        array = (Operation * len(operations))(*operations)
    status = library.halve_run(
        array,
        ctypes.c_int64(len(array)),
        ctypes.c_int64(position),
        torch.get_num_threads(),
    )
    if status:
        raise RuntimeError(f"the library's operations report status {status}")


def multiply_all(kernel: Kernels, products: Iterable[Product]) -> bool:
    """Compute products in one call, if for all of them the library is the fastest.

    Returns:
        Whether they were computed.
    """
    operations, kept = [], []
    for product in products:
        layer, x, y, bias = product
        operand = operand_of(layer, x.dtype)
        if operand is None or len(x) > operand.most_rows or not _fit(*product):
            return False
        kept.append(operand)
        pointer = None if bias is None else bias.data_ptr()
        more = {"size": y.shape[1], "bias": pointer, "option": operand.option}
        operations.append(Operation.of(operand.kind, x, operand.pointer, y, **more))
    run_operations(kernel.library, operations)
    return True


def _fit(layer: Any, x: Tensor, y: Tensor, bias: Tensor | None) -> bool:  # noqa: ANN401
    """Whether the library, which takes pointers, stays within the tensors."""
    return (layer.in_features, layer.out_features) == (x.shape[1], y.shape[1]) and (
        bias is None
        or (bias.dtype == x.dtype and bias.is_contiguous() and len(bias) == y.shape[1])
    )


def operand_of(layer: nn.Module | None, dtype: torch.dtype) -> Operand | None:
    """Return the matrix of a layer for products of a dtype; None if there are none."""
    operands = _OPERANDS.get(type(layer))
    return None if operands is None else operands(layer, dtype)


def _bitmask(layer: BitmaskLinear, dtype: torch.dtype) -> Operand | None:
    mask, offsets, columns = layer.weight_mask, layer.weight_offsets, layer.in_features
    fits = offsets.numel() == len(mask) + 1 and 64 * mask.shape[1] >= columns
    if not fits or layer.weight.dtype != dtype:
        return None
    matrix = bitmask_of(layer.weight, mask, offsets, columns)
    return Operand(Kind.PACKED, matrix, most_rows=most_fused_rows(dtype))


def _quantized(layer: QuantizedLinear, _: torch.dtype) -> Operand:
    matrix = Codes.of(layer.operands, layer.layout)
    return Operand(Kind.QUANTIZED, matrix, ACTIVATIONS[layer.activations])


def _dense(layer: DenseLinear, dtype: torch.dtype) -> Operand | None:
    fits = layer.weight.dtype == dtype and layer.weight.is_contiguous()
    return Operand(Kind.DENSE, layer.weight) if fits else None


_OPERANDS: dict[type[Any], Callable[[Any, torch.dtype], Operand | None]] = {
    BitmaskLinear: _bitmask,
    QuantizedLinear: _quantized,
    DenseLinear: _dense,
}
