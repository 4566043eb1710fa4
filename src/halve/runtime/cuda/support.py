"""Whether the kernels can run on a device, found out by running them once."""

import warnings
from functools import cache

import torch
from torch import Tensor

from halve._compat.triton import has_triton
from halve.errors import HalveWarning
from halve.runtime.cuda.side_index import tile_kept, word_starts

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
    """Run each kernel on a matrix of 2 rows, small numbers, half of them 0.

    Returns:
        None if all results are right, else which one is wrong.
    """
    dense = torch.arange(1, 129, dtype=dtype, device=device).view(2, 64).remainder_(7)
    dense.add_(1)[:, ::2] = 0
    x = torch.arange(64, dtype=dtype, device=device).remainder_(5)[None]
    results = {
        "a matrix of values": _by_bitmask(x, dense),
        "a matrix of codes": _by_codes(x, dense),
    }
    for name, (unpacked, product) in results.items():
        if not torch.equal(unpacked, dense):
            return f"they unpack {name} wrongly"
        wanted = x.double() @ dense.double().T
        if not torch.allclose(product.double(), wanted, rtol=_TOLERANCE):
            return f"they multiply by {name} wrongly"
    return None


def _by_bitmask(x: Tensor, dense: Tensor) -> tuple[Tensor, Tensor]:
    """Return a matrix, packed and unpacked, and the product with the packed one."""
    # Imported here because it imports Triton, which is not installed everywhere.
    from halve.runtime.cuda import bitmask_products  # noqa: PLC0415

    # The odd columns are stored.
    mask = torch.tensor([0xAA] * 16, dtype=torch.uint8, device=x.device)
    mask = mask.view(torch.uint64).view(2, 1)
    offsets = torch.tensor([0, 32, 64], device=x.device).to(torch.uint32)
    values = dense[:, 1::2].flatten().contiguous()
    matrix = bitmask_products.Bitmask(
        values, mask, offsets, word_starts(mask), 64, tile_kept(mask)
    )
    return bitmask_products.unpack(matrix), bitmask_products.multiply(x, matrix)


def _by_codes(x: Tensor, dense: Tensor) -> tuple[Tensor, Tensor]:
    """Do the same with codes of 4 bits, of which 8 means 0."""
    from halve.runtime.cuda import codes_products  # noqa: PLC0415

    codes = (dense + 8).to(torch.uint8)
    codes = codes[:, ::2] | codes[:, 1::2] << 4
    scales = torch.ones(2, 1, dtype=torch.float16, device=x.device)
    parts = (codes, scales, None, None, None, None)
    matrix = codes_products.Codes.of(parts, (64, 4, 64, 0))
    unpacked = torch.empty_like(dense)
    codes_products.unpack_rows(matrix, 0, unpacked)
    return unpacked, codes_products.multiply(x, matrix)
