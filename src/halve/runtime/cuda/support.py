"""Whether the kernels can run on a device, found out by running them once."""

import warnings
from functools import cache

import torch

from halve._compat.triton import has_triton
from halve.errors import HalveWarning
from halve.runtime.cuda.side_index import word_starts

DTYPES = (torch.bfloat16, torch.float16, torch.float32)
# Relative error of a product of 64 small integers: that of rounding the result.
_TOLERANCE = 1e-2


def runs_kernels(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether products with weights of a dtype on a device run Triton kernels.

    The first call for a GPU and a dtype compiles and runs each kernel on a tiny matrix,
    which takes a few seconds if Triton has not compiled them on this machine before. If
    a kernel cannot be compiled, cannot be launched or is wrong, one HalveWarning says
    so. The first call must not be made while a CUDA graph is captured.
    """
    return device.type == "cuda" and _work(device, dtype)


@cache
def _work(device: torch.device, dtype: torch.dtype) -> bool:
    reason = _obstacle(device, dtype)
    if reason is not None:
        warnings.warn(
            f"Halve's kernels cannot run on {device} ({reason}). Packed matrices are "
            "unpacked there: results are the same, but no memory or time is saved.",
            HalveWarning,
            stacklevel=2,
        )
    return reason is None


def _obstacle(device: torch.device, dtype: torch.dtype) -> str | None:
    if not has_triton(device):
        return "Triton is not installed"
    if dtype not in DTYPES:
        return f"there are none for {str(dtype).removeprefix('torch.')}"
    # Whatever fails in compilers and drivers has the same remedy.
    try:
        return find_fault(device, dtype)
    except Exception as error:  # noqa: BLE001
        return f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"


@torch.inference_mode()
def find_fault(device: torch.device, dtype: torch.dtype) -> str | None:
    """Run each kernel on a matrix of which every other weight is stored.

    Returns:
        None if all results are right, else which one is wrong.
    """
    # Imported here because it imports Triton, which is not installed everywhere.
    from halve.runtime.cuda.bitmask_products import (  # noqa: PLC0415
        Bitmask,
        multiply_packed,
        unpack,
    )

    dense = torch.arange(1, 129, dtype=dtype, device=device).view(2, 64).remainder_(7)
    dense.add_(1)[:, ::2] = 0
    mask = torch.tensor([0xAA] * 16, dtype=torch.uint8, device=device)
    mask = mask.view(torch.uint64).view(2, 1)
    offsets = torch.tensor([0, 32, 64], device=device).to(torch.uint32)
    values = dense[:, 1::2].flatten().contiguous()
    matrix = Bitmask(values, mask, offsets, word_starts(mask), 64, 32)
    x = torch.arange(64, dtype=dtype, device=device).remainder_(5)[None]
    y = x.new_empty(1, 2)
    multiply_packed(x, matrix, None, y)
    if not torch.equal(unpack(matrix), dense):
        return "they unpack a matrix wrongly"
    agrees = torch.allclose(y.double(), x.double() @ dense.double().T, rtol=_TOLERANCE)
    return None if agrees else "they multiply wrongly"
