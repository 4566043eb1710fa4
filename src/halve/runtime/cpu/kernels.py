"""Bindings of the compiled kernels, by ctypes.

The library has a plain C interface and does not depend on torch or Python. It is loaded
after torch, so that both share torch's OpenMP runtime and its thread pool: a second
copy was measured to cost a quarter of the speed.
"""

import ctypes
import os
import warnings
from collections.abc import Sequence
from functools import cache
from importlib.resources import as_file, files
from pathlib import Path

import torch
from torch import Tensor

from halve.errors import HalveError, HalveWarning

# Environment variable that selects a kernel of the library, or `torch` to use none.
VARIABLE = "HALVE_KERNEL"
TORCH = "torch"
_ABI = 2
_NAMES = ("libhalve_kernels.so", "libhalve_kernels.dylib")
DTYPES = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2}
_STATUS = {
    1: "inconsistent arguments",
    2: "out of memory",
    3: "unknown kernel",
    4: "a kernel that this CPU cannot run",
}


class _Matrix(ctypes.Structure):
    _fields_ = (
        ("values", ctypes.c_void_p),
        ("kept", ctypes.c_int64),
        ("mask", ctypes.c_void_p),
        ("offsets", ctypes.c_void_p),
        ("wide_offsets", ctypes.c_int32),
        ("dtype", ctypes.c_int32),
        ("rows", ctypes.c_int64),
        ("columns", ctypes.c_int64),
    )


class Codes(ctypes.Structure):
    """A matrix of integer codes, as the library takes it; see `halve_quantized`."""

    _fields_ = (
        ("codes", ctypes.c_void_p),
        ("code_bytes", ctypes.c_int64),
        ("mask", ctypes.c_void_p),
        ("offsets", ctypes.c_void_p),
        ("scales", ctypes.c_void_p),
        ("zeros", ctypes.c_void_p),
        ("wide_offsets", ctypes.c_int32),
        ("bits", ctypes.c_int32),
        ("midrise", ctypes.c_int32),
        ("group", ctypes.c_int64),
        ("rows", ctypes.c_int64),
        ("columns", ctypes.c_int64),
    )

    @classmethod
    def of(cls, parts: Sequence[Tensor | None], layout: list[int]) -> "Codes":
        """Return the matrix of some tensors, which must stay alive.

        Args:
            parts: Codes, scales, codes of zero, mask and offsets, as in a
                `QuantizedMatrix`; what it lacks is None.
            layout: Columns, bits, group size, and whether the grid is midrise.

        Raises:
            RuntimeError: Their sizes contradict each other. The library, which takes
                pointers, would read past their ends.
        """
        codes, scales, zeros, mask, offsets = parts
        assert codes is not None and scales is not None
        columns, bits, group, midrise = layout
        rows, groups = scales.shape[0], -(-columns // group)
        fit = (
            scales.numel() == rows * groups
            and (zeros is None or zeros.numel() == rows * -(-groups * bits // 8))
            and (mask is None or mask.numel() == rows * -(-columns // 64))
            and (mask is None) == (offsets is None)
            and (offsets is None or offsets.numel() == rows + 1)
        )
        if not fit:
            raise RuntimeError(
                f"the parts of a quantized matrix of {rows} rows and {columns} columns "
                "do not fit together"
            )
        return cls(
            codes.data_ptr(),
            codes.numel(),
            _pointer(mask),
            _pointer(offsets),
            scales.data_ptr(),
            _pointer(zeros),
            offsets is not None and offsets.dtype == torch.uint64,
            *(bits, midrise, group, rows, columns),
        )


class Kernels:
    """The library, with one of its kernels selected.

    All methods take contiguous CPU tensors of consistent shapes and dtypes. The
    contents of mask and offsets need not be valid: no kernel reads or writes outside
    the tensors, whatever they contain.
    """

    def __init__(self, library: ctypes.CDLL) -> None:
        self.library = library

    @property
    def name(self) -> str:
        """Name of the selected kernel, such as `avx512bf16` or `avx2`."""
        return self.library.halve_selected().decode()

    @property
    def available(self) -> list[str]:
        """Names of the kernels that this CPU can run, the fastest first."""
        return self.library.halve_available().decode().split(",")

    def select(self, name: str) -> None:
        """Select a kernel; an empty name selects the fastest.

        Raises:
            HalveError: The library has no such kernel, or this CPU cannot run it.
        """
        if self.library.halve_select(name.encode()):
            names = ", ".join([*self.available, TORCH])
            raise HalveError(
                f"There is no kernel {name!r} for this CPU.",
                f"Set {VARIABLE} to one of {names}, or unset it for the fastest.",
            )

    def packed_linear(
        self,
        x: Tensor,
        values: Tensor,
        mask: Tensor,
        offsets: Tensor,
        bias: Tensor | None,
        columns: int,
    ) -> Tensor:
        """Return `x @ W.T + bias`, [batch, rows], for a packed W."""
        y = x.new_empty(x.shape[0], mask.shape[0])
        matrix = bitmask_of(values, mask, offsets, columns)
        _check(
            self.library.halve_packed_linear(
                ctypes.byref(matrix),
                x.data_ptr(),
                x.shape[0],
                None if bias is None else bias.data_ptr(),
                y.data_ptr(),
                torch.get_num_threads(),
            )
        )
        return y

    def dense_linear(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """Return `x @ weight.T + bias`, [batch, rows]."""
        y = x.new_empty(x.shape[0], weight.shape[0])
        _check(
            self.library.halve_dense_linear(
                weight.data_ptr(),
                DTYPES[weight.dtype],
                *weight.shape,
                x.data_ptr(),
                x.shape[0],
                None if bias is None else bias.data_ptr(),
                y.data_ptr(),
                torch.get_num_threads(),
            )
        )
        return y

    def unpack(
        self, values: Tensor, mask: Tensor, offsets: Tensor, rows: slice, out: Tensor
    ) -> None:
        """Unpack some rows of a packed matrix into `out`, [rows, columns]."""
        matrix = bitmask_of(values, mask, offsets, out.shape[1])
        _check(
            self.library.halve_unpack(
                ctypes.byref(matrix),
                rows.start,
                rows.stop,
                out.data_ptr(),
                torch.get_num_threads(),
            )
        )

    def quantized_linear(
        self, x: Tensor, matrix: Codes, bias: Tensor | None, activations: int
    ) -> Tensor:
        """Return `x @ W.T + bias`, [batch, rows], of the dtype of x."""
        y = x.new_empty(x.shape[0], matrix.rows)
        _check(
            self.library.halve_quantized_linear(
                ctypes.byref(matrix),
                DTYPES[x.dtype],
                x.data_ptr(),
                x.shape[0],
                _pointer(bias),
                y.data_ptr(),
                activations,
                torch.get_num_threads(),
            )
        )
        return y

    def quantized_unpack(self, matrix: Codes, rows: slice, out: Tensor) -> None:
        """Unpack some rows of a matrix of codes into `out`, [rows, columns]."""
        _check(
            self.library.halve_quantized_unpack(
                ctypes.byref(matrix),
                *(rows.start, rows.stop, DTYPES[out.dtype], out.data_ptr()),
                torch.get_num_threads(),
            )
        )

    def quantized_lookup(
        self, matrix: Codes, indices: Tensor, dtype: torch.dtype
    ) -> Tensor:
        """Return rows of a matrix of codes, [count, columns]; indices are int64."""
        out = torch.empty(indices.numel(), matrix.columns, dtype=dtype)
        _check(
            self.library.halve_quantized_lookup(
                ctypes.byref(matrix),
                *(indices.data_ptr(), indices.numel(), DTYPES[dtype], out.data_ptr()),
                torch.get_num_threads(),
            )
        )
        return out

    def read(self, memory: Tensor) -> None:
        """Read every byte of a tensor once, to measure the memory bandwidth."""
        self.library.halve_read(
            memory.data_ptr(), memory.nbytes, torch.get_num_threads()
        )


def supports(dtype: torch.dtype) -> bool:
    """Whether the kernels take weights of a dtype."""
    return dtype in DTYPES


@cache
def kernels() -> Kernels | None:
    """Return the kernels, or None, with one warning, if there are none.

    Raises:
        HalveError: `HALVE_KERNEL` names a kernel that cannot be used.
    """
    name = os.environ.get(VARIABLE, "")
    if name == TORCH:
        return _without(f"{VARIABLE} is {TORCH}")
    path = _library_path()
    if path is None:
        return _without("Halve was built without a C++ compiler")
    try:
        loaded = Kernels(_load(path))
    except (OSError, AttributeError) as error:
        return _without(f"{path.name} cannot be loaded: {error}")
    loaded.select(name)
    return loaded


def _without(reason: str) -> None:
    warnings.warn(
        f"Packed matrices run without Halve's kernels ({reason}). Results are correct, "
        "but much slower than dense.",
        HalveWarning,
        stacklevel=2,
    )


def _library_path() -> Path | None:
    for name in _NAMES:
        resource = files("halve") / name
        if resource.is_file():
            with as_file(resource) as path:
                return path
    return None


def _load(path: Path) -> ctypes.CDLL:
    library = ctypes.CDLL(str(path))
    if library.halve_abi() != _ABI:
        raise OSError(f"its ABI version is {library.halve_abi()}, not {_ABI}")
    library.halve_selected.restype = library.halve_available.restype = ctypes.c_char_p
    pointer, size, number = ctypes.c_void_p, ctypes.c_int64, ctypes.c_int32
    library.halve_packed_linear.argtypes = (
        *(ctypes.POINTER(_Matrix), pointer, size, pointer, pointer, number),
    )
    library.halve_unpack.argtypes = (
        *(ctypes.POINTER(_Matrix), size, size, pointer, number),
    )
    library.halve_dense_linear.argtypes = (
        *(pointer, number, size, size, pointer, size, pointer, pointer, number),
    )
    codes = ctypes.POINTER(Codes)
    library.halve_quantized_linear.argtypes = (
        *(codes, number, pointer, size, pointer, pointer, number, number),
    )
    library.halve_quantized_unpack.argtypes = (
        *(codes, size, size, number, pointer, number),
    )
    library.halve_quantized_lookup.argtypes = (
        *(codes, pointer, size, number, pointer, number),
    )
    library.halve_read.argtypes = (pointer, size, number)
    library.halve_read.restype = ctypes.c_uint64
    return library


def bitmask_of(
    values: Tensor, mask: Tensor, offsets: Tensor, columns: int
) -> ctypes.Structure:
    """Return a bitmask matrix as the library takes it; the tensors must stay alive."""
    return _Matrix(
        values.data_ptr(),
        values.numel(),
        mask.data_ptr(),
        offsets.data_ptr(),
        offsets.dtype == torch.uint64,
        DTYPES[values.dtype],
        mask.shape[0],
        columns,
    )


def _pointer(tensor: Tensor | None) -> int | None:
    return None if tensor is None else tensor.data_ptr()


def _check(status: int) -> None:
    if status:
        raise RuntimeError(f"the kernel reports {_STATUS.get(status, status)}")
