"""Packing and unpacking restores every bit; the bytes are those of docs/format.md."""

import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from halve.errors import CheckpointError
from halve.formats import (
    FORMATS,
    Format,
    PackedMatrix,
    mask,
    packed_size,
    split,
    store,
    would_shrink,
)
from halve.formats.bitmask import DTYPES, pack
from halve.grids import QuantScheme, fit_quant_params
from halve.runtime.cpu.layers import LAYERS
from tests.twins import bitmask as twin

# Bytes of a dtype -> signed integer of the same width.
INTEGERS = {2: torch.int16, 4: torch.int32}
BITMASK: Format = FORMATS["bitmask"]
DOCUMENT = Path(__file__).parents[2] / "docs/format.md"
SHAPES = (
    *((1, 1), (1, 64), (64, 1), (3, 63), (5, 65), (2, 128)),
    *((7, 200), (33, 1000), (0, 5)),
)


def _two_of_four(rows, columns):
    ranks = torch.rand(rows, -(-columns // 4), 4).argsort(dim=-1)
    return (ranks < 2).flatten(1)[:, :columns]


# Pattern -> (rows, columns) -> which weights are stored, booleans [rows, columns].
KEPT = {
    "half": lambda rows, columns: torch.rand(rows, columns) < 0.5,
    "2:4": _two_of_four,
    "none": lambda rows, columns: torch.zeros(rows, columns, dtype=torch.bool),
    "all": lambda rows, columns: torch.ones(rows, columns, dtype=torch.bool),
    "few": lambda rows, columns: torch.rand(rows, columns) < 0.01,
    "every other row": lambda rows, columns: (
        (torch.arange(rows) % 2 == 1).unsqueeze(1).expand(rows, columns)
    ),
}
# Bit patterns: minus zero, infinities, quiet and signalling NaNs with payloads,
# denormals.
ODD = {
    torch.bfloat16: (0x8000, 0x7F80, 0xFF80, 0x7FC1, 0xFF81, 0x0001, 0x8001, 0x0080),
    torch.float16: (0x8000, 0x7C00, 0xFC00, 0x7E01, 0xFC01, 0x0001, 0x8001, 0x0100),
    torch.float32: (
        *(0x80000000, 0x7F800000, 0xFF800000, 0x7FC00001),
        *(0xFF800001, 0x00000001, 0x80000001, 0x00010000),
    ),
}

dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=str)
patterns = pytest.mark.parametrize("pattern", KEPT)
directions = pytest.mark.parametrize("transposed", [False, True])


def _of_bits(bits, dtype):
    """Return the floats of a dtype that have these bits, given as unsigned integers."""
    wide = 8 * dtype.itemsize
    signed = torch.where(bits >= 2 ** (wide - 1), bits - 2**wide, bits)
    return signed.to(INTEGERS[dtype.itemsize]).view(dtype)


def _matrix(shape, pattern, dtype):
    """Return a matrix of random bits, some from `ODD`, with zeros in a pattern."""
    torch.manual_seed(0)
    bits = torch.randint(1, 2 ** (8 * dtype.itemsize), shape)
    odd = torch.tensor(ODD[dtype])[torch.randint(8, shape)]
    bits = torch.where(torch.rand(shape) < 0.3, odd, bits)
    return _of_bits(bits.where(KEPT[pattern](*shape), 0), dtype)


def _stored(matrix, transposed):
    return matrix.T.contiguous() if transposed else matrix


def _bytes(tensor):
    return tensor.contiguous().flatten().view(torch.uint8).numpy().tobytes()


def _same(a, b):
    """Compare bit by bit: minus zero differs from zero, and a NaN equals itself."""
    return (a.dtype, a.shape, _bytes(a)) == (b.dtype, b.shape, _bytes(b))


def _parts(packed: PackedMatrix):
    return {name: _bytes(part) for name, part in split("", packed).items()}


@dtypes
@patterns
@directions
def test_unpacking_gives_back_every_bit(dtype, pattern, transposed):
    for shape in SHAPES:
        matrix = _stored(_matrix(shape, pattern, dtype), transposed)
        packed = pack(matrix, transposed)
        packed.check("w")
        assert packed.shape == matrix.shape
        assert _same(packed.unpack(), matrix)


@settings(deadline=None)
@given(
    st.sampled_from(list(DTYPES)),
    st.integers(1, 4),
    st.integers(1, 70),
    st.booleans(),
    st.data(),
)
def test_any_bits_come_back_and_have_the_bytes_of_the_twin(
    dtype, rows, columns, transposed, data
):
    weights = st.sampled_from([0, 0, 0, *ODD[dtype]]) | st.integers(
        0, 2 ** (8 * dtype.itemsize) - 1
    )
    size = rows * columns
    bits = data.draw(st.lists(weights, min_size=size, max_size=size))
    matrix = _of_bits(torch.tensor(bits).view(rows, columns), dtype)
    packed = pack(matrix, transposed)
    assert _same(packed.unpack(), matrix)
    assert _parts(packed) == twin.pack(matrix, transposed)


@dtypes
@patterns
@directions
def test_the_twin_packs_the_same_bytes(dtype, pattern, transposed):
    for shape in ((1, 1), (3, 63), (5, 65), (64, 1), (0, 5)):
        matrix = _stored(_matrix(shape, pattern, dtype), transposed)
        assert _parts(pack(matrix, transposed)) == twin.pack(matrix, transposed)


@dtypes
@patterns
def test_a_transposed_matrix_has_the_same_parts(dtype, pattern):
    for shape in SHAPES:
        matrix = _matrix(shape, pattern, dtype)
        transposed_copy = pack(matrix.T.contiguous(), transposed=True)
        assert _parts(replace(transposed_copy, transposed=False)) == _parts(
            pack(matrix)
        )


@dtypes
def test_a_view_is_packed_as_its_copy(dtype):
    matrix = _matrix((33, 1000), "half", dtype)[1::2, 3:70]
    assert not matrix.is_contiguous()
    assert _parts(pack(matrix)) == _parts(pack(matrix.contiguous()))


@dtypes
@directions
def test_join_is_the_inverse_of_split(dtype, transposed):
    for shape in SHAPES:
        packed = pack(_stored(_matrix(shape, "half", dtype), transposed), transposed)
        tensors = split("a.weight", packed)
        ends = ("", "_mask", "_offsets", "_layout")
        assert list(tensors) == [f"a.weight{end}" for end in ends]
        joined = BITMASK.join("a.weight", tensors)
        assert _parts(joined) == _parts(packed)
        assert (joined.shape, joined.transposed) == (packed.shape, transposed)


@dtypes
@patterns
def test_bytes_are_those_of_the_tensors(dtype, pattern):
    for rows, columns in SHAPES:
        packed = pack(_matrix((rows, columns), pattern, dtype))
        total = sum(part.nbytes for part in split("w", packed).values())
        assert packed.nbytes == total
        kept = packed.values.numel()
        assert BITMASK.nbytes((rows, columns), kept, dtype) == total


def test_bytes_of_more_than_2_32_values_have_wide_offsets():
    rows, columns = 2**17, 2**16
    bits = rows * columns // 8
    narrow, wide = 2**32 - 1, 2**32
    assert BITMASK.nbytes((rows, columns), narrow, torch.bfloat16) == (
        2 * narrow + bits + 4 * (rows + 1) + 24
    )
    assert BITMASK.nbytes((rows, columns), wide, torch.bfloat16) == (
        2 * wide + bits + 8 * (rows + 1) + 24
    )


@pytest.mark.parametrize("pattern", ["half", "2:4"])
@pytest.mark.parametrize("columns", [1024, 1600, 4096])
def test_half_of_bf16_takes_at_most_56_5_percent(pattern, columns):
    torch.manual_seed(0)
    matrix = torch.ones(64, columns, dtype=torch.bfloat16)
    kept = KEPT[pattern](64, columns)
    excess = max(int(kept.sum()) - kept.numel() // 2, 0)
    kept.view(-1)[kept.flatten().nonzero()[:excess, 0]] = False
    matrix[~kept] = 0
    assert pack(matrix).nbytes <= 0.565 * matrix.nbytes


def test_the_sizes_in_the_document_are_true():
    rows = re.findall(
        r"\| (\d+) x (\d+), (\d+) bits \| ([\d.]+) % \| ([\d.]+) % \| ([\d.]+) % \|",
        DOCUMENT.read_text("utf-8"),
    )
    assert len(rows) == 4
    for outputs, inputs, bits, *percents in rows:
        size = int(outputs) * int(inputs)
        dtype = {"16": torch.bfloat16, "32": torch.float32}[bits]
        for sparsity, percent in zip((0.5, 0.7, 0.9), percents, strict=True):
            kept = size - int(size * sparsity)
            packed = BITMASK.nbytes((int(outputs), int(inputs)), kept, dtype)
            assert packed is not None
            assert f"{100 * packed / (size * dtype.itemsize):.1f}" == percent


@dtypes
@directions
def test_store_packs_exactly_where_that_is_smaller(dtype, transposed):
    rows, columns, item = 64, 1024, dtype.itemsize
    size = rows * columns
    # Each zero saves the bytes of a weight. So many make up for mask and offsets.
    zeros = (BITMASK.nbytes((rows, columns), size, dtype) - size * item) // item
    assert zeros / size == pytest.approx(1 / (8 * item), abs=0.003)
    for count in (0, zeros, zeros + 1, size):
        matrix = torch.ones(size, dtype=dtype)
        matrix[torch.randperm(size)[:count]] = 0
        matrix = _stored(matrix.view(rows, columns), transposed)
        stored = store("w", matrix, transposed)
        smaller = pack(matrix, transposed).nbytes < matrix.nbytes
        assert would_shrink((rows, columns), size - count, dtype) == smaller
        as_rows = matrix.T if transposed else matrix
        assert packed_size(as_rows) == pack(matrix, transposed).nbytes
        assert smaller == (count > zeros)
        assert (len(stored) == 4) == smaller
        assert smaller or stored["w"] is matrix


def test_minus_zero_is_stored():
    matrix = torch.full((64, 64), -0.0, dtype=torch.bfloat16)
    assert pack(matrix).values.numel() == matrix.numel()
    assert list(store("w", matrix)) == ["w"]


@pytest.mark.parametrize("dtype", [torch.float64, torch.int8, torch.bool])
def test_other_dtypes_are_stored_dense(dtype):
    matrix = torch.zeros(64, 64, dtype=dtype)
    assert store("w", matrix) == {"w": matrix}
    assert packed_size(matrix) is None
    assert not would_shrink((64, 64), 0, dtype)


def test_every_format_has_a_name_and_a_layer_class():
    assert FORMATS.keys() == LAYERS.keys()
    assert all(known.name == key for key, known in FORMATS.items())


def test_every_format_lists_its_parts_in_the_order_of_its_suffixes():
    matrix = _matrix((3, 70), "half", torch.bfloat16).sign()
    grid = fit_quant_params(QuantScheme(4), matrix.float())
    for known in FORMATS.values():
        packed = known.pack(matrix, quant_params=grid)
        assert packed is not None
        headers = split("w", packed)
        assert tuple(packed.parts) == known.suffixes("w", headers)
        assert set(known.companions) <= set(packed.parts)
        assert set(known.layout) <= set(known.companions)


@dtypes
def test_chunks_change_nothing(dtype, monkeypatch):
    for shape in SHAPES:
        matrix = _matrix(shape, "half", dtype)
        whole = pack(matrix)
        with monkeypatch.context() as patch:
            patch.setattr(mask, "_CHUNK", 64)
            chunked = pack(matrix)
            chunked.check("w")
            assert _same(chunked.unpack(), matrix)
        assert _parts(chunked) == _parts(whole)


@dtypes
def test_wide_offsets_are_read(dtype):
    matrix = _matrix((5, 65), "half", dtype)
    packed = pack(matrix)
    wide = replace(packed, offsets=packed.offsets.to(torch.uint64))
    wide.check("w")
    assert _same(wide.unpack(), matrix)


def test_zeros_that_are_stored_are_read():
    packed = pack(torch.ones(2, 5, dtype=torch.bfloat16))
    zeros = replace(packed, values=torch.zeros(10, dtype=torch.bfloat16))
    zeros.check("w")
    assert _same(zeros.unpack(), torch.zeros(2, 5, dtype=torch.bfloat16))


@directions
def test_a_matrix_without_columns_stays_dense(transposed):
    matrix = _stored(torch.zeros(5, 0, dtype=torch.bfloat16), transposed)
    assert store("w", matrix, transposed) == {"w": matrix}


GOLDEN = {
    "": "803f 00c0 003f   4040 0080",
    "_mask": "0900000000000000 0100000000000000\n"
    "0000000000000000 0000000000000000\n"
    "0200000000000000 2000000000000000",
    "_offsets": "00000000 03000000 03000000 05000000",
    "_layout": "0300000000000000 4600000000000000 0000000000000000",
}


@pytest.fixture
def example():
    """Return the matrix of the example in docs/format.md."""
    matrix = torch.zeros(3, 70, dtype=torch.bfloat16)
    matrix[0, 0], matrix[0, 3], matrix[0, 64] = 1, -2, 0.5
    matrix[2, 1], matrix[2, 69] = 3, -0.0
    return matrix


def test_the_example_has_exactly_these_bytes(example):
    expected = {end: bytes.fromhex(text) for end, text in GOLDEN.items()}
    assert _parts(pack(example)) == expected
    assert twin.pack(example) == expected
    assert (pack(example).nbytes, example.nbytes) == (98, 420)


def test_the_document_shows_these_bytes():
    example = DOCUMENT.read_text("utf-8").partition("## An example")[2]
    shown = " ".join(example.split())
    for end, text in GOLDEN.items():
        assert f"P{end} " in shown
        assert " ".join(text.split()) in shown


def test_the_examples_bytes_are_read(example):
    numbers = {
        "": torch.bfloat16,
        "_mask": torch.uint64,
        "_offsets": torch.uint32,
        "_layout": torch.int64,
    }
    tensors = {
        "w" + end: torch.frombuffer(bytearray.fromhex(text), dtype=numbers[end])
        for end, text in GOLDEN.items()
    }
    tensors["w_mask"] = tensors["w_mask"].view(3, 2)
    packed = BITMASK.join("w", tensors)
    packed.check("w")
    assert _same(packed.unpack(), example)


def test_an_inconsistent_matrix_is_rejected_by_name(example):
    packed = replace(pack(example), columns=69)
    with pytest.raises(CheckpointError, match=r"a\.weight marks columns past its 69"):
        packed.check("a.weight")
