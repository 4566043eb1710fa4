"""A decode step as a list of operations that the library runs in one call.

From Python each operation costs a few microseconds, and several times that between
products, which leave nothing of the interpreter in the caches. In one call they cost
nothing that could be measured.
"""

import ctypes
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from halve.runtime.cpu.attention import attention_arguments
from halve.runtime.cpu.bitmask_linear import BitmaskLinear
from halve.runtime.cpu.dense_linear import DenseLinear
from halve.runtime.cpu.kernels import DTYPES, Codes, Kernels, bitmask_of
from halve.runtime.cpu.quantized_linear import QuantizedLinear
from halve.runtime.cpu.quantized_operators import ACTIVATIONS

_PACKED, _DENSE, _QUANTIZED, _NORM, _ROTATE, _STORE, _ATTEND, _GATE, _ADD = range(9)


class _Operation(ctypes.Structure):
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


class UnsupportedLayerError(Exception):
    """A layer has no operation; the message says which."""


class Step:
    """Operations on buffers, [rows, columns], and on weights that must not move.

    Methods add an operation and return the buffer with its result. Buffers have names,
    and operations that name the same one share it.

    Attributes:
        dtype: Dtype of all buffers.
    """

    def __init__(self, kernel: Kernels, dtype: torch.dtype) -> None:
        self.dtype = dtype
        self._run = kernel.library.halve_run
        self._operations: list[_Operation] = []
        self._array: Any = None
        self._results: dict[str, Tensor] = {}
        # What the operations point to.
        self._kept: list[Any] = []

    def buffer(self, name: str, rows: int, columns: int) -> Tensor:
        """Return the buffer of a name, whose shape must be the same every time."""
        if name not in self._results:
            self._results[name] = torch.empty(rows, columns, dtype=self.dtype)
        found = self._results[name]
        if found.shape != (rows, columns):
            raise UnsupportedLayerError(f"blocks differ in the size of {name}")
        return found

    def linear(self, name: str, layer: nn.Module, x: Tensor) -> Tensor:
        """Add the product of a layer, [rows, out_features].

        Raises:
            UnsupportedLayerError: The library has no product for it, or its shape or
                dtype does not fit.
        """
        operands = _OPERANDS.get(type(layer))
        if operands is None:
            raise UnsupportedLayerError(f"{name} is a {type(layer).__name__}")
        linear: Any = layer
        bias = None if linear.bias is None else self._weight(linear.bias)
        y = self.buffer(name, x.shape[0], linear.out_features)
        kind, other, option = operands(linear, self.dtype)
        if other is None or linear.in_features != x.shape[1]:
            raise UnsupportedLayerError(f"{name} does not fit the buffers")
        self._keep(linear, other)
        pointer = other.data_ptr() if isinstance(other, Tensor) else _address(other)
        self._add(kind, x, pointer, y, size=y.shape[1], bias=bias, option=option)
        return y

    def norm(self, name: str, weight: Tensor, epsilon: float, x: Tensor) -> Tensor:
        """Add a root-mean-square norm of each row."""
        y = self.buffer(name, *x.shape)
        if weight.numel() != x.shape[1]:
            raise UnsupportedLayerError(f"{name} does not fit the buffers")
        self._add(_NORM, x, self._weight(weight), y, epsilon=epsilon)
        return y

    def rotate(self, x: Tensor, table: Tensor) -> Tensor:
        """Add the rotation of each row, in place.

        Args:
            x: Part of a buffer, contiguous.
            table: [positions, 2, columns], cosines and sines.
        """
        if table.shape[1:] != (2, x.shape[1]):
            raise UnsupportedLayerError("only a part of each head is rotated")
        self._add(_ROTATE, x, self._weight(table), x)
        return x

    def store(self, x: Tensor, room: Tensor) -> None:
        """Add the copy of x, one row a head, to the position of `run`.

        Args:
            x: [batch * heads, width].
            room: [batch, heads, capacity, width], contiguous.
        """
        self._keep(room)
        self._operations.append(
            self._operation(_STORE, x, None, room, size=room.stride(1))
        )

    def attend(
        self, name: str, query: Tensor, rooms: tuple[Tensor, Tensor], scale: float
    ) -> Tensor:
        """Add attention to all positions up to that of `run`.

        Args:
            name: Name of the result, [batch, heads * width].
            query: [batch, heads, 1, width], a view of a buffer.
            rooms: Keys and values, as in `store`.
            scale: Factor of the scores.
        """
        batch, heads, _, width = query.shape
        y = self.buffer(name, batch, heads * width)
        arguments = attention_arguments(query, *rooms, scale)
        self._keep(arguments, *rooms)
        self._add(_ATTEND, query, _address(arguments), y)
        return y

    def gate(self, x: Tensor, other: Tensor) -> Tensor:
        """Add `x = silu(x) * other`, in place."""
        self._add(_GATE, x, other.data_ptr(), x)
        return x

    def add(self, x: Tensor, other: Tensor) -> Tensor:
        """Add `x = x + other`, in place."""
        self._add(_ADD, x, other.data_ptr(), x)
        return x

    def run(self, position: int) -> None:
        """Run all operations for a token before which there are `position` tokens."""
        if self._array is None:
            self._array = (_Operation * len(self._operations))(*self._operations)
        status = self._run(
            self._array,
            ctypes.c_int64(len(self._array)),
            ctypes.c_int64(position),
            torch.get_num_threads(),
        )
        if status:
            raise RuntimeError(f"the decode step reports status {status}")

    def _add(self, kind: int, x: Tensor, other: int, y: Tensor, **more: Any) -> None:  # noqa: ANN401
        self._operations.append(self._operation(kind, x, other, y, **more))

    def _operation(  # noqa: PLR0913
        self,
        kind: int,
        x: Tensor,
        other: int | None,
        y: Tensor,
        *,
        size: int = 0,
        bias: int | None = None,
        epsilon: float = 0.0,
        option: int = 0,
    ) -> _Operation:
        rows, columns = x.flatten(0, -2).shape
        return _Operation(
            *(kind, DTYPES[self.dtype], rows, columns, size),
            *(x.data_ptr(), other, bias, y.data_ptr(), epsilon, option),
        )

    def _weight(self, weight: Tensor) -> int:
        if weight.dtype != self.dtype or not weight.is_contiguous():
            raise UnsupportedLayerError(f"a parameter is {weight.dtype}")
        self._keep(weight)
        return weight.data_ptr()

    def _keep(self, *objects: object) -> None:
        self._kept.extend(objects)


def _address(structure: ctypes.Structure) -> int:
    return ctypes.addressof(structure)


def _bitmask(layer: BitmaskLinear, dtype: torch.dtype) -> tuple[int, Any, int]:
    matrix = bitmask_of(
        layer.weight, layer.weight_mask, layer.weight_offsets, layer.in_features
    )
    return _PACKED, matrix if layer.weight.dtype == dtype else None, 0


def _quantized(layer: QuantizedLinear, _: torch.dtype) -> tuple[int, Any, int]:
    return (
        _QUANTIZED,
        Codes.of(layer.operands, layer.layout),
        ACTIVATIONS[layer.activations],
    )


def _dense(layer: DenseLinear, dtype: torch.dtype) -> tuple[int, Any, int]:
    fits = layer.weight.dtype == dtype and layer.weight.is_contiguous()
    return _DENSE, layer.weight if fits else None, 0


# Layer -> kind of operation, the matrix (None: it does not fit the dtype), and option.
_OPERANDS: dict[type[nn.Module], Callable[..., tuple[int, Any, int]]] = {
    BitmaskLinear: _bitmask,
    QuantizedLinear: _quantized,
    DenseLinear: _dense,
}
