"""A decode step as a list of operations that the library runs in one call."""

import ctypes
from typing import Any

import torch
from torch import Tensor, nn

from halve.runtime.cpu.attention import attention_arguments
from halve.runtime.cpu.kernels import Kernels
from halve.runtime.cpu.operations import Kind, Operation, operand_of, run_operations


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
        self._library = kernel.library
        self._operations: list[Operation] = []
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
        operand = operand_of(layer, self.dtype)
        if operand is None:
            raise UnsupportedLayerError(f"{name} is a {type(layer).__name__}")
        linear: Any = layer
        bias = None if linear.bias is None else self._weight(linear.bias)
        y = self.buffer(name, x.shape[0], linear.out_features)
        if linear.in_features != x.shape[1]:
            raise UnsupportedLayerError(f"{name} does not fit the buffers")
        self._keep(linear, operand)
        more = {"size": y.shape[1], "bias": bias, "option": operand.option}
        self._add(operand.kind, x, operand.pointer, y, **more)
        return y

    def norm(self, name: str, weight: Tensor, epsilon: float, x: Tensor) -> Tensor:
        """Add a root-mean-square norm of each row."""
        y = self.buffer(name, *x.shape)
        if weight.numel() != x.shape[1]:
            raise UnsupportedLayerError(f"{name} does not fit the buffers")
        self._add(Kind.NORM, x, self._weight(weight), y, epsilon=epsilon)
        return y

    def rotate(self, x: Tensor, table: Tensor) -> Tensor:
        """Add the rotation of each row, in place.

        Args:
            x: Part of a buffer, contiguous.
            table: [positions, 2, columns], cosines and sines.
        """
        if table.shape[1:] != (2, x.shape[1]):
            raise UnsupportedLayerError("only a part of each head is rotated")
        self._add(Kind.ROTATE, x, self._weight(table), x)
        return x

    def store(self, x: Tensor, room: Tensor) -> None:
        """Add the copy of x, one row a head, to the position of `run`.

        Args:
            x: [batch * heads, width].
            room: [batch, heads, capacity, width], contiguous.
        """
        self._keep(room)
        self._operations.append(
            Operation.of(Kind.STORE, x, None, room, size=room.stride(1))
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
        self._add(Kind.ATTEND, query, ctypes.addressof(arguments), y)
        return y

    def gate(self, x: Tensor, other: Tensor) -> Tensor:
        """Add `x = silu(x) * other`, in place."""
        self._add(Kind.GATE, x, other.data_ptr(), x)
        return x

    def add(self, x: Tensor, other: Tensor) -> Tensor:
        """Add `x = x + other`, in place."""
        self._add(Kind.ADD, x, other.data_ptr(), x)
        return x

    def run(self, position: int) -> None:
        """Run all operations for a token before which there are `position` tokens."""
        if self._array is None:
            self._array = (Operation * len(self._operations))(*self._operations)
        run_operations(self._library, self._array, position)

    def _add(self, kind: Kind, x: Tensor, other: int, y: Tensor, **more: Any) -> None:  # noqa: ANN401
        self._operations.append(Operation.of(kind, x, other, y, **more))

    def _weight(self, weight: Tensor) -> int:
        if weight.dtype != self.dtype or not weight.is_contiguous():
            raise UnsupportedLayerError(f"a parameter is {weight.dtype}")
        self._keep(weight)
        return weight.data_ptr()

    def _keep(self, *objects: object) -> None:
        self._kept.extend(objects)
