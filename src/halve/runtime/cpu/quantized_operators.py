"""Products with and lookups in quantized weights as torch operators.

On the CPU they run Halve's kernels, which multiply activations as integers with a scale
for each group of columns. On CUDA they run the kernels of `runtime.cuda`, in which
activations stay what they are. On other devices, and where there are no kernels, they
run the reference implementation: unpack, then multiply.
"""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional

from halve.errors import HalveError
from halve.formats.quantized_matrix import QuantizedMatrix
from halve.runtime.cpu.kernels import Codes, kernels, supports
from halve.runtime.cpu.operators import library
from halve.runtime.cpu.tiles import FUSED_ROWS, linear_by_tiles
from halve.runtime.cuda.support import runs_kernels

# How the kernels hold activations: 16 bits lose less than bfloat16 activations do; 8
# bits are faster, and lose more (docs/architecture.md).
ACTIVATIONS = {"int16": 0, "int8": 1}
DEFAULT = ACTIVATIONS["int16"]

# Parts: codes, scales, codes of zero, mask and offsets, as in a `QuantizedMatrix`; what
# it lacks is None. For kernels on a GPU `word_starts` of `runtime.cuda.side_index` is
# added. Layout: columns, bits, group size, and whether it is midrise.
Parts = Sequence[Tensor | None]
_FILE_PARTS = 5
library.define(
    "quantized_linear(Tensor x, Tensor?[] parts, Tensor? bias, int[] layout, "
    "int activations) -> Tensor"
)
library.define(
    "quantized_lookup(Tensor ids, Tensor?[] parts, int[] layout, ScalarType dtype) "
    "-> Tensor"
)


def activation_mode(name: str) -> int:
    """Return the number of a way to hold activations.

    Raises:
        HalveError: There is no such way.
    """
    if name not in ACTIVATIONS:
        raise HalveError(
            f"{name!r} is no type of activations.",
            f"Choose one of {', '.join(ACTIVATIONS)}.",
        )
    return ACTIVATIONS[name]


def _matrix(parts: Parts, layout: list[int], dtype: torch.dtype) -> QuantizedMatrix:
    codes, scales, zeros, mask, offsets = parts[:_FILE_PARTS]
    assert codes is not None and scales is not None
    columns, bits, group_size, midrise = layout
    return QuantizedMatrix(
        *(codes, scales, bits, group_size, columns, dtype, zeros, mask, offsets),
        midrise=bool(midrise),
    )


def quantized_linear_reference(
    x: Tensor,
    parts: Parts,
    bias: Tensor | None,
    layout: list[int],
    activations: int = DEFAULT,
) -> Tensor:
    """Return `x @ W.T + bias`, by unpacking W in the dtype of x and multiplying.

    Args:
        x: [..., columns].
        parts: The parts of W.
        bias: [rows], of the dtype of x.
        layout: Columns, bits, group size, and whether the grid is midrise.
        activations: Ignored: they are not rounded here.

    Returns:
        [..., rows].
    """
    weight = _matrix(parts, layout, x.dtype).unpack()
    return functional.linear(x, weight, bias)


def _quantized_linear_cpu(
    x: Tensor,
    parts: Parts,
    bias: Tensor | None,
    layout: list[int],
    activations: int,
) -> Tensor:
    kernel = kernels() if supports(x.dtype) else None
    if kernel is None:
        return quantized_linear_reference(x, parts, bias, layout)
    matrix = Codes.of(parts[:_FILE_PARTS], layout)
    rows, columns = matrix.rows, matrix.columns
    _check_operands(x, bias, (rows, columns))
    vectors = x.reshape(-1, columns)
    if vectors.shape[0] <= FUSED_ROWS:
        y = kernel.quantized_linear(vectors.contiguous(), matrix, bias, activations)
    else:
        y = linear_by_tiles(
            *(vectors, rows, bias),
            lambda part, out: kernel.quantized_unpack(matrix, part, out),
        )
    return y.view(*x.shape[:-1], rows)


def _quantized_linear_cuda(
    x: Tensor,
    parts: Parts,
    bias: Tensor | None,
    layout: list[int],
    activations: int,
) -> Tensor:
    if not _has_kernels(x.device, x.dtype, parts):
        return quantized_linear_reference(x, parts, bias, layout)
    # Imported here because it imports Triton, which is not installed everywhere.
    from halve.runtime.cuda import codes_products  # noqa: PLC0415

    matrix = codes_products.Codes.of(parts, layout)
    _check_operands(x, bias, (matrix.rows, matrix.columns))
    return codes_products.multiply(x, matrix, bias)


def _has_kernels(device: torch.device, dtype: torch.dtype, parts: Parts) -> bool:
    """Whether kernels run on a GPU, and the parts are all that they need."""
    return len(parts) > _FILE_PARTS and runs_kernels(device, dtype)


def _check_operands(x: Tensor, bias: Tensor | None, shape: tuple[int, int]) -> None:
    """Raise RuntimeError, as torch does, on operands that do not fit together."""
    rows, columns = shape
    if x.shape[-1] != columns or (
        bias is not None and (bias.shape != (rows,) or bias.dtype != x.dtype)
    ):
        raise RuntimeError(
            f"inputs of {list(x.shape)} {x.dtype} and a bias of "
            f"{None if bias is None else [*bias.shape, bias.dtype]} do not fit weights "
            f"of {[rows, columns]}"
        )


def quantized_lookup_reference(
    ids: Tensor,
    parts: Parts,
    layout: list[int],
    dtype: torch.dtype,
) -> Tensor:
    """Return the rows of W that are named, dequantized.

    Args:
        ids: Indices of rows, of any shape, int64 or int32.
        parts: The parts of W.
        layout: Columns, bits, group size, and whether the grid is midrise.
        dtype: Of the result.

    Returns:
        [..., columns].
    """
    codes, scales, zeros, mask = parts[: _FILE_PARTS - 1]
    assert codes is not None and scales is not None
    if mask is not None:  # rows of different lengths: all are unpacked
        return functional.embedding(ids, _matrix(parts, layout, dtype).unpack())
    flat = ids.flatten()
    some = (codes[flat], scales[flat], None if zeros is None else zeros[flat])
    rows = _matrix((*some, None, None), layout, dtype).unpack()
    return rows.view(*ids.shape, layout[0])


def _quantized_lookup_cpu(
    ids: Tensor,
    parts: Parts,
    layout: list[int],
    dtype: torch.dtype,
) -> Tensor:
    kernel = kernels() if supports(dtype) else None
    if kernel is None:
        return quantized_lookup_reference(ids, parts, layout, dtype)
    matrix = Codes.of(parts[:_FILE_PARTS], layout)
    rows = matrix.rows
    indices = ids.flatten().to(torch.int64).contiguous()
    if indices.numel() and not 0 <= int(indices.min()) <= int(indices.max()) < rows:
        raise IndexError(f"an index is out of range of {rows} rows")
    found = kernel.quantized_lookup(matrix, indices, dtype)
    return found.view(*ids.shape, layout[0])


def _quantized_lookup_cuda(
    ids: Tensor,
    parts: Parts,
    layout: list[int],
    dtype: torch.dtype,
) -> Tensor:
    if not _has_kernels(ids.device, dtype, parts):
        return quantized_lookup_reference(ids, parts, layout, dtype)
    from halve.runtime.cuda import codes_products  # noqa: PLC0415

    return codes_products.lookup(ids, codes_products.Codes.of(parts, layout), dtype)


def _rows(parts: Parts) -> int:
    scales = parts[1]
    assert scales is not None
    return scales.shape[0]


def _quantized_linear_fake(
    x: Tensor,
    parts: Parts,
    bias: Tensor | None,
    layout: list[int],
    activations: int,
) -> Tensor:
    return x.new_empty(*x.shape[:-1], _rows(parts))


def _quantized_lookup_fake(
    ids: Tensor,
    parts: Parts,
    layout: list[int],
    dtype: torch.dtype,
) -> Tensor:
    return ids.new_empty(*ids.shape, layout[0], dtype=dtype)


_KEY = "CompositeExplicitAutograd"
library.impl("quantized_linear", quantized_linear_reference, _KEY)
library.impl("quantized_linear", _quantized_linear_cpu, "CPU")
library.impl("quantized_linear", _quantized_linear_cuda, "CUDA")
library.impl("quantized_lookup", quantized_lookup_reference, _KEY)
library.impl("quantized_lookup", _quantized_lookup_cpu, "CPU")
library.impl("quantized_lookup", _quantized_lookup_cuda, "CUDA")
torch.library.register_fake(
    "halve::quantized_linear", _quantized_linear_fake, lib=library
)
torch.library.register_fake(
    "halve::quantized_lookup", _quantized_lookup_fake, lib=library
)

quantized_linear = torch.ops.halve.quantized_linear.default
quantized_lookup = torch.ops.halve.quantized_lookup.default
