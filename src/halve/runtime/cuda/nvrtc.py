"""CUDA C++ compiled at run time by NVRTC, and launched through the driver.

NVRTC comes with CUDA builds of torch, so that neither a CUDA toolkit nor a compiler is
needed. Both libraries are plain C; a launch takes the current stream of torch, and a
CUDA graph captures it as it does any other.
"""

import ctypes
from collections.abc import Sequence
from functools import cache
from importlib.metadata import distributions
from pathlib import Path

import torch
from torch import Tensor

from halve.errors import HalveError

# CUfunction_attribute: the dynamic shared memory that a block may have.
_MAX_SHARED_MEMORY = 8

# An argument of a kernel: a pointer, None for a null pointer, or an int of 32 bits.
Argument = Tensor | None | int


class NvrtcError(HalveError):
    """CUDA C++ cannot be compiled or loaded on this machine."""


class Kernel:
    """A function of a loaded module."""

    def __init__(self, function: ctypes.c_void_p) -> None:
        self._function = function

    def launch(
        self,
        grid: tuple[int, int],
        threads: int,
        arguments: Sequence[Argument],
        shared_memory: int = 0,
    ) -> None:
        """Launch the kernel on the current stream of the current device.

        Args:
            grid: Blocks along x and y.
            threads: Threads in a block.
            arguments: In the order of the kernel's parameters.
            shared_memory: Bytes of dynamic shared memory of a block.
        """
        values = [c_value(argument) for argument in arguments]
        pointers = (ctypes.c_void_p * len(values))(
            *(ctypes.addressof(value) for value in values)
        )
        stream = ctypes.c_void_p(torch.cuda.current_stream().cuda_stream)
        _check_driver(
            _driver().cuLaunchKernel(
                *(self._function, *grid, 1, threads, 1, 1),
                *(shared_memory, stream, pointers, None),
            )
        )


def c_value(argument: Argument) -> ctypes.c_void_p | ctypes.c_int:
    """Return an argument as C takes it."""
    if isinstance(argument, int):
        return ctypes.c_int(argument)
    return ctypes.c_void_p(None if argument is None else argument.data_ptr())


def load_kernel(cubin: bytes, name: str, most_shared_memory: int = 0) -> Kernel:
    """Load a kernel of compiled code on the current device.

    Args:
        cubin: What `compile_source` returned for this device's architecture.
        name: The kernel's name, declared `extern "C"`.
        most_shared_memory: Bytes of dynamic shared memory that a block may have.

    Raises:
        NvrtcError: The driver does not take it.
    """
    driver, module, function = _driver(), ctypes.c_void_p(), ctypes.c_void_p()
    torch.cuda.current_stream()  # initializes CUDA
    _check_driver(driver.cuModuleLoadData(ctypes.byref(module), cubin))
    _check_driver(
        driver.cuModuleGetFunction(ctypes.byref(function), module, name.encode())
    )
    _check_driver(
        driver.cuFuncSetAttribute(function, _MAX_SHARED_MEMORY, most_shared_memory)
    )
    return Kernel(function)


def compile_source(source: str, architecture: str, options: Sequence[str]) -> bytes:
    """Compile CUDA C++ to machine code; needs no GPU.

    Args:
        source: The code of one translation unit, without includes.
        architecture: Such as `sm_90`.
        options: Further options of NVRTC, such as `-DNAME=1`.

    Raises:
        NvrtcError: NVRTC is not installed, or refuses the code.
    """
    nvrtc, program = _nvrtc(), ctypes.c_void_p()
    flags = [f"--gpu-architecture={architecture}", "--std=c++17", *options]
    words = (ctypes.c_char_p * len(flags))(*(flag.encode() for flag in flags))
    _check(
        nvrtc.nvrtcCreateProgram(
            ctypes.byref(program), source.encode(), b"halve.cu", 0, None, None
        )
    )
    try:
        if nvrtc.nvrtcCompileProgram(program, len(flags), words):
            raise NvrtcError(
                f"NVRTC does not compile a kernel: {_log(program)[:500]}",
                "Report this with the versions of torch and of the driver.",
            )
        return _output(program, "CUBIN")
    finally:
        nvrtc.nvrtcDestroyProgram(ctypes.byref(program))


def _output(program: ctypes.c_void_p, kind: str) -> bytes:
    """Return the machine code or the log of a program."""
    size, nvrtc = ctypes.c_size_t(), _nvrtc()
    _check(getattr(nvrtc, f"nvrtcGet{kind}Size")(program, ctypes.byref(size)))
    output = ctypes.create_string_buffer(size.value)
    _check(getattr(nvrtc, f"nvrtcGet{kind}")(program, output))
    return output.raw


def _log(program: ctypes.c_void_p) -> str:
    return " ".join(_output(program, "ProgramLog").decode(errors="replace").split())


def _check(code: int) -> None:
    if code:
        raise NvrtcError(
            f"NVRTC failed with error {code}.", "Check the installation of torch."
        )


def _check_driver(code: int) -> None:
    if code:
        raise NvrtcError(
            f"The CUDA driver refused a kernel with error {code}.",
            "Check that the driver is recent enough for torch's CUDA version.",
        )


@cache
def _driver() -> ctypes.CDLL:
    return _library(["libcuda.so.1"])


@cache
def _nvrtc() -> ctypes.CDLL:
    major = (torch.version.cuda or "13").partition(".")[0]
    return _library([f"libnvrtc.so.{major}", *_installed_nvrtc()])


def _installed_nvrtc() -> list[str]:
    """Return the paths of NVRTC in Python packages, on which torch depends."""
    found: list[str] = []
    for distribution in distributions():
        name = distribution.metadata["Name"] or ""
        if name.startswith("nvidia-cuda-nvrtc"):
            files = distribution.files or []
            paths = [Path(str(distribution.locate_file(file))) for file in files]
            found += [str(p) for p in paths if p.name.startswith("libnvrtc.so")]
    return found


def _library(names: Sequence[str]) -> ctypes.CDLL:
    """Load the first library that is there."""
    reasons = []
    for name in names:
        try:
            return ctypes.CDLL(name)
        except OSError as error:
            reasons.append(str(error))
    raise NvrtcError(
        f"{names[0]} cannot be loaded ({'; '.join(reasons)[:300]}).",
        "Install a CUDA build of torch and NVIDIA's driver.",
    )
