"""Bindings of the compiled kernels, by ctypes.

The library has a plain C interface and does not depend on torch or Python. It is loaded
after torch, so that both share torch's OpenMP runtime and its thread pool: a second
copy was measured to cost a quarter of the speed.
"""

import ctypes
import os
import warnings
from functools import cache
from importlib.resources import as_file, files
from pathlib import Path

import torch
from torch import Tensor

from halve.errors import HalveError, HalveWarning

# Environment variable that selects a kernel of the library, or `torch` to use none.
VARIABLE = "HALVE_KERNEL"
TORCH = "torch"
_ABI = 1
_NAMES = ("libhalve_kernels.so", "libhalve_kernels.dylib")
_DTYPES = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2}
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
        matrix = _matrix(values, mask, offsets, columns)
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
                _DTYPES[weight.dtype],
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
        matrix = _matrix(values, mask, offsets, out.shape[1])
        _check(
            self.library.halve_unpack(
                ctypes.byref(matrix),
                rows.start,
                rows.stop,
                out.data_ptr(),
                torch.get_num_threads(),
            )
        )

    def read(self, memory: Tensor) -> None:
        """Read every byte of a tensor once, to measure the memory bandwidth."""
        self.library.halve_read(
            memory.data_ptr(), memory.nbytes, torch.get_num_threads()
        )


def supports(dtype: torch.dtype) -> bool:
    """Whether the kernels take weights of a dtype."""
    return dtype in _DTYPES


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
    library.halve_read.argtypes = (pointer, size, number)
    library.halve_read.restype = ctypes.c_uint64
    return library


def _matrix(values: Tensor, mask: Tensor, offsets: Tensor, columns: int) -> _Matrix:
    return _Matrix(
        values.data_ptr(),
        values.numel(),
        mask.data_ptr(),
        offsets.data_ptr(),
        offsets.dtype == torch.uint64,
        _DTYPES[values.dtype],
        mask.shape[0],
        columns,
    )


def _check(status: int) -> None:
    if status:
        raise RuntimeError(f"the kernel reports {_STATUS.get(status, status)}")
