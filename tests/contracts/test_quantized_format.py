"""Codes of few bits: what is packed comes back, in the fewest bytes, or not at all."""

import re
from dataclasses import replace
from functools import cache
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch

from halve.errors import CheckpointError
from halve.formats import FORMATS, quantized_packing, split, store
from halve.formats.quantized_matrix import DTYPES, QuantizedMatrix
from halve.grids import (
    BITS,
    QuantParams,
    QuantScheme,
    fit_quant_params,
    recover_quant_params,
)

QUANTIZED = FORMATS["quantized"]
DOCUMENT = Path(__file__).parents[2] / "docs/format.md"
# Odd sizes: one weight, a word and a bit more or less, several groups, short last ones.
SHAPES = ((1, 1), (3, 63), (5, 65), (2, 130), (7, 200))
SPARSITIES = (0.0, 0.2, 0.5, 0.9, 1.0)
SCHEMES = [
    QuantScheme(bits, group_size, symmetric, midrise=midrise)
    for bits, group_size, symmetric, midrise in product(
        BITS, (32, 96, 1000), (True, False), (False, True)
    )
    if not midrise or (symmetric and bits <= 4)
]
over_schemes = pytest.mark.parametrize("scheme", SCHEMES, ids=repr)
dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=str)


@cache  # making them takes most of the time, and no test changes them
def quantized(scheme, shape, sparsity, dtype):
    """Return a random matrix rounded to a grid, with zeros, and the grid."""
    if not scheme.symmetric and scheme.bits == 8 and dtype == torch.bfloat16:
        pytest.skip("no such grid: its values have nine significant bits")
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(shape, generator=generator)
    weight[torch.rand(shape, generator=generator) < sparsity] = 0
    params = fit_quant_params(scheme.exact_in(dtype), weight)
    rounded = params.fake_quantize(weight)
    return rounded.masked_fill_(weight == 0, 0).to(dtype), params


def pack(*arguments) -> Any:
    """Return the matrix packed; None if it cannot be."""
    return quantized_packing.pack(*arguments)


def same(a, b):
    bits = {2: torch.int16, 4: torch.int32}[a.element_size()]
    return a.dtype == b.dtype and torch.equal(a.view(bits), b.view(bits))


@over_schemes
@dtypes
def test_unpacking_gives_back_every_bit(scheme, dtype):
    for shape, sparsity, transposed in product(SHAPES, SPARSITIES, (False, True)):
        weight, params = quantized(scheme, shape, sparsity, dtype)
        stored = weight.T.contiguous() if transposed else weight
        packed = pack(stored, params, transposed)
        packed.check("w")
        assert (packed.shape, packed.dtype) == (tuple(stored.shape), dtype)
        assert same(packed.unpack(), stored)


@over_schemes
def test_join_is_the_inverse_of_split(scheme):
    for shape, sparsity in product(SHAPES, SPARSITIES):
        weight, params = quantized(scheme, shape, sparsity, torch.float32)
        packed = pack(weight, params)
        tensors = split("w", packed)
        assert QUANTIZED.recognizes("w", tensors)
        assert tuple(tensors) == tuple(
            f"w{e}" for e in QUANTIZED.suffixes("w", tensors)
        )
        joined = QUANTIZED.join("w", tensors)
        joined.check("w")
        assert same(joined.unpack(), weight)
        assert joined.label == packed.label


@over_schemes
def test_a_mask_is_written_exactly_where_it_saves_bytes_or_is_needed(scheme):
    for shape, sparsity in product(SHAPES, SPARSITIES):
        weight, params = quantized(scheme, shape, sparsity, torch.float32)
        rows, columns = shape
        counts = (weight != 0).sum(1).tolist()
        dense = rows * -(-columns * scheme.bits // 8)
        masked = sum(-(-n * scheme.bits // 8) for n in counts)
        masked += 8 * rows * -(-columns // 64) + 4 * (rows + 1)
        needed = scheme.midrise and sum(counts) < rows * columns
        packed = pack(weight, params)
        assert (packed.mask is not None) == (needed or masked < dense)
        assert packed.codes.nbytes == (
            dense
            if packed.mask is None
            else masked - packed.mask.nbytes - 4 * (rows + 1)
        )
        size = QUANTIZED.nbytes(shape, sum(counts), torch.float32, scheme)
        assert abs(size - packed.nbytes) <= rows / 2


@over_schemes
@dtypes
def test_the_grid_of_a_quantized_matrix_is_found_again(scheme, dtype):
    for shape, sparsity in product(SHAPES, SPARSITIES):
        weight, params = quantized(scheme, shape, sparsity, dtype)
        found = recover_quant_params(params.grid, weight)
        assert same(pack(weight, found).unpack(), weight)


@over_schemes
def test_no_grid_is_found_where_a_weight_lies_off_it(scheme):
    weight, params = quantized(scheme, (5, 65), 0.2, torch.float32)
    weight = weight.clone()
    weight[2, 3] += 0.01 * params.scale.abs().max()
    assert recover_quant_params(params.grid, weight) is None
    assert pack(weight, params) is None


def test_what_a_code_cannot_express_is_stored_as_a_bitmask():
    """Minus zero, which is a weight, and a weight that is off the grid."""
    weight, params = quantized(QuantScheme(4), (64, 256), 0.6, torch.bfloat16)
    assert "w_scales" in store("w", weight, quant_params=params)
    for value in (-0.0, 0.123):
        changed = weight.clone()
        changed[0, 0] = value
        assert "w_scales" not in (stored := store("w", changed, quant_params=params))
        assert "w_mask" in stored


def test_groups_that_the_kernels_cannot_read_are_not_packed_as_codes():
    for group_size, columns, fits in ((48, 160, False), (48, 48, True), (48, 40, True)):
        weight, params = quantized(
            QuantScheme(4, group_size), (8, columns), 0, torch.float32
        )
        assert (pack(weight, params) is not None) == fits
        size = QUANTIZED.nbytes((8, columns), 8 * columns, weight.dtype, params.grid)
        assert (size is not None) == fits


@over_schemes
def test_the_smallest_way_to_store_a_matrix_is_chosen(scheme):
    for sparsity in SPARSITIES:
        weight, params = quantized(scheme, (64, 256), sparsity, torch.float32)
        sizes = [weight.nbytes]
        sizes += [
            packed.nbytes
            for known in FORMATS.values()
            if (packed := known.pack(weight, quant_params=params)) is not None
        ]
        stored = store("w", weight, quant_params=params)
        assert sum(part.nbytes for part in stored.values()) == min(sizes)


EXAMPLE = {"": "067b 186f", "_scales": "0038 00bc"}


def example():
    weight = torch.tensor([[1, -2, 0, 0.5, 1.5], [4, 1, 0, -3, -2]])
    params = QuantParams(
        QuantScheme(3), torch.tensor([[0.5], [-1.0]]), torch.zeros(2, 1)
    )
    return weight.bfloat16(), params


def test_the_example_has_exactly_these_bytes():
    weight, params = example()
    parts = pack(weight, params).parts
    layout = parts.pop("_layout")
    assert layout.tolist() == [2, 5, 0, 3, 128, 2, 0]
    found = {k: bytes(v.flatten().view(torch.uint8).tolist()) for k, v in parts.items()}
    assert found == {k: bytes.fromhex(v) for k, v in EXAMPLE.items()}


def test_the_document_shows_these_bytes():
    text = " ".join(
        DOCUMENT.read_text("utf-8").partition("An example of codes")[2].split()
    )
    for shown in (
        "067b 186f",
        EXAMPLE["_scales"],
        "codes 6 0 4 5 7",
        "codes 0 3 4 7 6",
    ):
        assert shown in text


def test_the_sizes_in_the_document_are_true():
    row = r"\| int(\d)(, midrise)? \| ([\d.]+) \| ([\d.]+) \| ([\d.]+) \|"
    rows = re.findall(row, DOCUMENT.read_text("utf-8"))
    assert len(rows) == len(BITS)
    side = 4096
    for bits, midrise, *sizes in rows:
        scheme = QuantScheme(int(bits), midrise=bool(midrise))
        for sparsity, size in zip((0, 0.5, 0.6), sizes, strict=True):
            kept = side**2 - int(side**2 * sparsity)
            nbytes = QUANTIZED.nbytes((side, side), kept, torch.bfloat16, scheme)
            assert nbytes is not None
            assert 8 * nbytes / side**2 == pytest.approx(float(size), abs=0.0055)


def _masked():
    weight, params = quantized(QuantScheme(8), (5, 70), 0.6, torch.bfloat16)
    return pack(weight, params)


def _dense():
    weight, params = quantized(
        QuantScheme(3, 32, symmetric=False), (5, 70), 0, torch.bfloat16
    )
    return pack(weight, params)


def _item(tensor, index, value):
    changed = tensor.clone()
    changed.view(-1)[index] = value
    return changed


def _wide(packed, index, value):
    return _item(packed.offsets.to(torch.int64), index, value).to(torch.uint32)


# Name -> (matrix, what is changed, words of the message).
INCONSISTENT = {
    "codes: a column less": (
        _dense,
        lambda m: {"codes": m.codes[:, :-1]},
        "[5, 26] uint8",
    ),
    "codes: of another dtype": (_dense, lambda m: {"codes": m.codes.char()}, "int8"),
    "codes: in one row": (_dense, lambda m: {"codes": m.codes.flatten()}, ""),
    "scales: a group less": (_dense, lambda m: {"scales": m.scales[:, :-1]}, ""),
    "scales: float32": (_dense, lambda m: {"scales": m.scales.float()}, "float32"),
    "scales: 0": (_dense, lambda m: {"scales": _item(m.scales, 3, 0)}, "0, not"),
    "scales: NaN": (
        _dense,
        lambda m: {"scales": _item(m.scales, 3, torch.nan)},
        "not finite",
    ),
    "scales: infinite": (
        _masked,
        lambda m: {"scales": _item(m.scales, 0, -torch.inf)},
        "not finite",
    ),
    "zeros: a byte less": (_dense, lambda m: {"zeros": m.zeros[:, :-1]}, ""),
    "zeros: with midrise": (_dense, lambda m: {"midrise": True}, ""),
    "midrise: of 8 bits": (_masked, lambda m: {"midrise": True}, ""),
    "fill: of codes": (
        _dense,
        lambda m: {"codes": _item(m.codes, m.codes.shape[1] - 1, 255)},
        "after the last code",
    ),
    "fill: of zeros": (
        _dense,
        lambda m: {"zeros": _item(m.zeros, m.zeros.shape[1] - 1, 255)},
        "after the last code",
    ),
    "mask: without offsets": (_masked, lambda m: {"offsets": None}, ""),
    "mask: a word less": (_masked, lambda m: {"mask": m.mask[:, :-1]}, ""),
    "mask: past the last column": (
        _masked,
        lambda m: {"columns": 69, "codes": m.codes},
        "past its 69",
    ),
    "offsets: first is 1": (
        _masked,
        lambda m: {"offsets": _wide(m, 0, 1)},
        "begin at byte 1",
    ),
    "offsets: fall": (_masked, lambda m: {"offsets": _wide(m, 2, 0)}, "by its mask"),
    "codes: a byte less": (_masked, lambda m: {"codes": m.codes[:-1]}, "it has"),
    "columns: none": (_dense, lambda m: {"columns": 0}, ""),
}


@pytest.mark.parametrize("case", INCONSISTENT)
def test_an_inconsistent_matrix_is_rejected_by_name(case):
    make, change, words = INCONSISTENT[case]
    matrix: QuantizedMatrix = make()
    with pytest.raises(CheckpointError) as caught:
        replace(matrix, **change(matrix)).check("a.weight")
    assert "a.weight" in str(caught.value)
    assert words in str(caught.value)


@pytest.mark.parametrize(
    "index, value",
    [
        (0, 6),
        (1, 99),
        (2, 2),
        (3, 5),
        (4, 0),
        (4, 33),
        (4, -32),
        (5, 3),
        (6, 3),
        (6, 0),
    ],
)
def test_a_wrong_layout_is_rejected(index, value):
    tensors = split("w", _dense())
    tensors["w_layout"] = _item(tensors["w_layout"], index, value)
    with pytest.raises(CheckpointError, match="w"):
        QUANTIZED.join("w", tensors).check("w")


def test_fill_bits_of_masked_rows_are_checked():
    weight, params = quantized(QuantScheme(3), (5, 300), 0.9, torch.bfloat16)
    packed = pack(weight, params)
    assert packed.mask is not None
    for row, end in enumerate(packed.offsets.tolist()[1:]):
        if 3 * int((weight[row] != 0).sum()) % 8:
            changed = _item(packed.codes, end - 1, int(packed.codes[end - 1]) | 128)
            with pytest.raises(CheckpointError, match="after the last code"):
                replace(packed, codes=changed).check("w")
