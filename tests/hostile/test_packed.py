"""Invalid packed matrices are rejected by name, wherever they are read.

A new case is one row: its name, what corrupts a valid packed Llama, and what the
message must mention.
"""

import json
import struct
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

import halve
from halve.checkpoint import Checkpoint
from halve.errors import CheckpointError, HalveError, UnsupportedModelError
from halve.formats import split
from halve.formats.bitmask import DTYPES, pack
from tests.hostile import spoilers as by

# Of 48 x 48, so that each word of the mask has 16 bits past the columns; the other is
# of 24 x 48.
Q = by.QUERY
K = Q.replace("q_proj", "k_proj")
MASK, OFFSETS, LAYOUT = f"{Q}_mask", f"{Q}_offsets", f"{Q}_layout"
SIZES = {
    "hidden_size": 48,
    "intermediate_size": 96,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 64,
}


@pytest.fixture(scope="session")
def packed(pico, tmp_path_factory) -> Path:
    """Return a packed model in a single file."""
    folder = tmp_path_factory.mktemp("packed") / "out"
    model = pico("llama", dtype=torch.bfloat16, **SIZES)
    halve.prune(model, folder, solver="magnitude", packed=True, device="cpu")
    assert (folder / by.WEIGHTS).is_file()
    return folder


@pytest.fixture
def spoilt(packed, tmp_path):
    """Return a function that corrupts a copy of the valid model."""

    def make(spoil: by.Spoiler) -> Path:
        folder = tmp_path / "spoilt"
        folder.mkdir()
        for path in packed.iterdir():
            (folder / path.name).write_bytes(path.read_bytes())
        spoil(folder)
        return folder

    return make


def part(name, change):
    """Replace a part by a function of its numbers, which are passed as int64."""

    def changed(old):
        return change(old.to(torch.int64)).to(old.dtype)

    return by.tensor(name, changed)


def item(name, place, value):
    """Set one number of a part."""

    def change(numbers):
        numbers.view(-1)[place] = value
        return numbers

    return part(name, change)


def flipped(row, *bits):
    """Flip bits of a row of the mask."""

    def change(mask):
        for bit in bits:
            mask[row] ^= torch.tensor(1) << bit
        return mask

    return by.tensor(MASK, lambda m: change(m.view(torch.int64)).view(torch.uint64))


def moved_past(row, past):
    """Move a bit of the mask past the columns; their number does not change."""

    def change(mask):
        mask[row] &= mask[row] - 1
        mask[row] |= torch.tensor(1) << past
        return mask

    return by.tensor(MASK, lambda m: change(m.view(torch.int64)).view(torch.uint64))


def layout(*numbers, name=LAYOUT):
    return by.tensor(name, lambda old: torch.tensor(numbers, dtype=torch.int64))


def swapped(first, second):
    def change(numbers):
        numbers[[first, second]] = numbers[[second, first]]
        return numbers

    return part(OFFSETS, change)


def wide_offset(place, value):
    """Make the offsets uint64 and set one, given as an int64 of the same bits."""

    def change(old):
        offsets = old.to(torch.int64)
        offsets[place] = value
        return offsets.view(torch.uint64)

    return by.tensor(OFFSETS, change)


def recast(name, dtype):
    return by.tensor(name, lambda old: old.to(dtype))


INCONSISTENT = (Q, "are inconsistent")
PLACES = (Q, "begin at value", "end at")
# Found in headers and layouts.
FOUND_ON_OPENING = {
    "no offsets": (by.tensor(OFFSETS, lambda t: None), (OFFSETS, "missing")),
    "no layout": (by.tensor(LAYOUT, lambda t: None), (LAYOUT, "missing")),
    "layout: a row less": (layout(47, 48, 0), (Q, "[47, 48, 0]", "[48, 1]")),
    "layout: a row more": (layout(49, 48, 0), (Q, "[49, 48, 0]", "[48, 1]")),
    "layout: negative rows": (layout(-48, 48, 0), (Q, "[-48, 48, 0]")),
    "layout: huge rows": (layout(2**62, 48, 0), (Q, f"[{2**62}, 48, 0]")),
    "layout: a word more": (
        layout(48, 65, 0),
        (*INCONSISTENT, "65 columns", "[48, 1]"),
    ),
    "layout: no columns": (layout(48, 0, 0), (*INCONSISTENT, "0 columns")),
    "layout: negative columns": (layout(48, -48, 0), (*INCONSISTENT, "-48 columns")),
    "layout: huge columns": (layout(48, 2**62, 0), (*INCONSISTENT, f"{2**62} columns")),
    "layout: largest columns": (layout(48, 2**63 - 1, 0), INCONSISTENT),
    "layout: third is 2": (layout(48, 48, 2), (Q, "[48, 48, 2]", "transposed")),
    "layout: third is -1": (layout(48, 48, -1), (Q, "[48, 48, -1]")),
    "layout: two numbers": (layout(48, 48), (Q, "[48, 48]", "transposed")),
    "layout: four numbers": (layout(48, 48, 0, 128), (Q, "[48, 48, 0, 128]")),
    "layout: empty": (layout(), (Q, "[]", "transposed")),
    "layout: many": (layout(*range(500)), (Q, "[0, 1, 2")),
    "layout: upright": (by.tensor(LAYOUT, lambda t: t.view(3, 1)), (Q, "[[48]")),
    "layout: a number": (by.tensor(LAYOUT, lambda t: t[0]), (Q, "transposed")),
    "layout: int32": (recast(LAYOUT, torch.int32), (Q, "layout")),
    "layout: float": (recast(LAYOUT, torch.float32), (Q, "layout")),
    "mask: too wide": (
        by.tensor(MASK, lambda m: torch.cat([m, m], dim=1)),
        (*INCONSISTENT, "[48, 2] uint64"),
    ),
    "mask: too narrow": (
        by.tensor(MASK, lambda m: m[:, :0]),
        (*INCONSISTENT, "[48, 0]"),
    ),
    "mask: too few rows": (by.tensor(MASK, lambda m: m[:47]), (Q, "[47, 1] uint64")),
    "mask: no rows": (by.tensor(MASK, lambda m: m[:0]), (Q, "[0, 1] uint64")),
    "mask: flat": (by.tensor(MASK, lambda m: m[:, 0]), (*INCONSISTENT, "[48] uint64")),
    "mask: a number": (by.tensor(MASK, lambda m: m[0, 0]), (Q, "[] uint64")),
    "mask: three dimensions": (
        by.tensor(MASK, lambda m: m.unsqueeze(2)),
        (*INCONSISTENT, "[48, 1, 1] uint64"),
    ),
    "offsets: int32": (recast(OFFSETS, torch.int32), (*INCONSISTENT, "[49] int32")),
    "offsets: int64": (recast(OFFSETS, torch.int64), (*INCONSISTENT, "[49] int64")),
    "offsets: float": (recast(OFFSETS, torch.float32), (*INCONSISTENT, "[49] float32")),
    "offsets: one less": (
        part(OFFSETS, lambda o: o[:-1]),
        (*INCONSISTENT, "[48] uint32"),
    ),
    "offsets: one more": (
        part(OFFSETS, lambda o: torch.cat([o, o[-1:]])),
        (*INCONSISTENT, "[50] uint32"),
    ),
    "offsets: upright": (
        part(OFFSETS, lambda o: o.view(49, 1)),
        (*INCONSISTENT, "[49, 1]"),
    ),
    "values: upright": (
        by.tensor(Q, lambda v: v.view(-1, 1)),
        (*INCONSISTENT, "1] bfloat16"),
    ),
    "values: a number": (by.tensor(Q, lambda v: v[0]), (*INCONSISTENT, "[] bfloat16")),
    "values: int16": (
        by.tensor(Q, lambda v: v.view(torch.int16)),
        (*INCONSISTENT, "int16"),
    ),
    "values: float64": (recast(Q, torch.float64), (*INCONSISTENT, "float64")),
    "values: dense": (
        by.tensor(Q, lambda v: torch.ones(48, 48, dtype=v.dtype)),
        (*INCONSISTENT, "[48, 48] bfloat16"),
    ),
    "cut off by a byte": (by.truncate(-1), (by.WEIGHTS, "damaged")),
    "cut in half": (by.truncate(5000), (by.WEIGHTS, "damaged")),
    "header: mask as more": (
        by.header(lambda h: h[MASK].update(shape=[48, 2])),
        (by.WEIGHTS, "damaged"),
    ),
    "header: endless mask": (
        by.header(lambda h: h[MASK].update(shape=[2**40, 2**40])),
        (by.WEIGHTS, "damaged"),
    ),
}
# Found by one pass over the mask.
FOUND_ON_READING = {
    "mask: a bit flipped": (flipped(5, 7), (f"Row 5 of {Q}", "offsets", "mask")),
    "mask: first bit flipped": (flipped(0, 0), (f"Row 0 of {Q}", "by its mask")),
    "mask: last bit flipped": (flipped(47, 47), (f"Row 47 of {Q}", "by its mask")),
    "mask: a bit more past the columns": (flipped(3, 60), (f"Row 3 of {Q}",)),
    "mask: a bit moved past the columns": (
        moved_past(3, 48),
        (Q, "marks columns past its 48"),
    ),
    "mask: a bit moved to the end": (
        moved_past(47, 63),
        (Q, "marks columns past its 48"),
    ),
    "mask: rows in another order": (
        by.tensor(MASK, lambda m: m.view(torch.int64).flip(0).view(torch.uint64)),
        (f"of {Q} has", "by its mask"),
    ),
    "mask: empty": (by.tensor(MASK, torch.zeros_like), (f"Row 0 of {Q}", "and 0 by")),
    "offsets: first is 1": (item(OFFSETS, 0, 1), (*PLACES, "begin at value 1 ")),
    "offsets: last is too small": (
        part(OFFSETS, lambda o: torch.cat([o[:-1], o[-1:] - 1])),
        PLACES,
    ),
    "offsets: last is too large": (item(OFFSETS, -1, 2**32 - 1), PLACES),
    "offsets: swapped": (swapped(20, 21), (f"Row 19 of {Q}", "by its offsets")),
    "offsets: swapped ends": (swapped(0, 48), PLACES),
    "offsets: falling": (item(OFFSETS, 7, 0), (f"Row 6 of {Q}", "by its offsets")),
    "offsets: out of bounds": (item(OFFSETS, 9, 2**32 - 1), (f"Row 8 of {Q}",)),
    "offsets: below zero": (wide_offset(9, -(2**63)), (f"Row 8 of {Q}",)),
    "offsets: all ones": (wide_offset(9, -1), (f"Row 8 of {Q}",)),
    "offsets: ends below zero": (wide_offset(-1, -1), PLACES),
    "offsets: all zero": (by.tensor(OFFSETS, torch.zeros_like), (*PLACES, "end at 0,")),
    "values: one less": (by.tensor(Q, lambda v: v[:-1]), (*PLACES, "values")),
    "values: one more": (by.tensor(Q, lambda v: torch.cat([v, v[:1]])), PLACES),
    "values: none": (by.tensor(Q, lambda v: v[:0]), (*PLACES, "it has 0 values")),
}
# The parts are consistent, or are not recognized as parts; the config differs.
FOUND_BY_THE_MODEL = {
    "no values": (by.tensor(Q, lambda t: None), (Q, "no tensor")),
    "no mask": (by.tensor(MASK, lambda t: None), (Q, "[48, 48]")),
    "mask: int64": (recast(MASK, torch.int64), (Q, "[48, 48]")),
    "mask: uint8": (
        by.tensor(MASK, lambda m: m.view(torch.uint8)),
        (Q, "[48, 48]"),
    ),
    "layout: more columns": (layout(48, 64, 0), (Q, "[48, 64]", "[48, 48]")),
    "layout: transposed": (
        layout(24, 48, 1, name=f"{K}_layout"),
        (K, "[48, 24]", "[24, 48]"),
    ),
}
INVALID = FOUND_ON_OPENING | FOUND_ON_READING | FOUND_BY_THE_MODEL


def entry(**changes):
    good = {"quant_method": "halve", "version": 1, "requires_halve": "0.1"}
    changed = {k: v for k, v in (good | changes).items() if v is not None}
    return by.config(quantization_config=changed)


CONFIGS = {
    "version 3": (
        entry(version=3, requires_halve="0.3"),
        ("version 3", "reads versions up to 2", "Halve 0.3 or newer"),
    ),
    "version 3, without a release": (
        entry(version=3, requires_halve=None),
        ("version 3", "a newer Halve"),
    ),
    "version 0": (entry(version=0), ("version 0", "reads versions up to 2")),
    "negative version": (entry(version=-1), ("version -1",)),
    "huge version": (entry(version=10**30), ("version 1000", "reads versions up to 2")),
    "endless version": (entry(version=10**4000), ("version", "reads versions up to 2")),
    "no version": (entry(version=None), ("version None", "reads versions up to 2")),
    "version is text": (entry(version="1"), ("version 1", "reads versions up to 2")),
    "version is a list": (entry(version=[1]), ("version [1]",)),
    "a need with escapes": (
        entry(version=3, requires_halve="\x1b[2J\n\n"),
        ("Halve \\x1b[2J or newer",),
    ),
    "an endless need": (entry(version=3, requires_halve="9" * 5000), ("Halve 999",)),
    "a need that is a list": (entry(version=3, requires_halve=[[]]), ("Halve [[]]",)),
    "another method": (entry(quant_method="gptq"), ("quantized", "gptq")),
    "no method": (entry(quant_method=None), ("quantized", "method not given")),
    "method is a list": (entry(quant_method=["halve"]), ("quantized", "['halve']")),
    "method in capitals": (entry(quant_method="Halve"), ("quantized", "Halve")),
    "entry is text": (by.config(quantization_config="halve"), ("quantized",)),
    "entry is a list": (by.config(quantization_config=["halve"]), ("quantized",)),
}


def test_the_good_model_is_read(packed, tmp_path):
    """Otherwise the tests below would prove nothing."""
    assert halve.inspect(packed).sparsity == 0.5
    halve.unpack(packed, tmp_path / "out")
    mask = Checkpoint.open(packed).read_packed(Q).parts["_mask"]
    assert tuple(mask.shape) == (48, 1)


@pytest.mark.parametrize("row", FOUND_ON_OPENING | FOUND_ON_READING)
def test_invalid_matrices_are_rejected_on_reading(row, spoilt):
    spoil, mentions = INVALID[row]
    folder = spoilt(spoil)
    if row in FOUND_ON_READING:
        checkpoint = Checkpoint.open(folder)
        valid = [name for name in checkpoint.tensors if name != Q]
        assert checkpoint.read(valid).keys() == set(valid)
    with pytest.raises(CheckpointError) as refusal:
        Checkpoint.open(folder).read([Q])
    for mention in mentions:
        assert mention in str(refusal.value), (mention, refusal.value)
    assert refusal.value.remedy


@pytest.mark.parametrize("row", INVALID)
def test_invalid_matrices_are_rejected_by_every_verb(row, spoilt, refused, tmp_path):
    spoil, mentions = INVALID[row]
    folder = spoilt(spoil)
    with pytest.raises(CheckpointError):
        halve.inspect(folder)
    refused("inspect", folder, mentions=mentions)
    out = ("-o", tmp_path / "out", "--quiet")
    refused("unpack", folder, *out, mentions=mentions, started=row in FOUND_ON_READING)


@pytest.mark.parametrize("row", CONFIGS)
def test_invalid_configs_are_rejected(row, spoilt, refused, tmp_path):
    spoil, mentions = CONFIGS[row]
    folder = spoilt(spoil)
    with pytest.raises(UnsupportedModelError):
        halve.inspect(folder)
    refused("inspect", folder, mentions=mentions)
    for verb in ("pack", "unpack"):
        refused(verb, folder, "-o", tmp_path / "out", mentions=mentions)


@pytest.mark.parametrize("row", ["mask: a bit flipped", "values: one less"])
def test_invalid_matrices_are_rejected_before_the_model_runs(
    row, spoilt, refused, text, tmp_path
):
    spoil, mentions = INVALID[row]
    folder = spoilt(spoil)
    options = ("--solver", "magnitude", "--device", "cpu", "--quiet")
    out = ("-o", tmp_path / "out", *options)
    refused("prune", folder, *out, mentions=mentions, started=True)


def test_parts_in_several_files(packed, tmp_path):
    """Parts are found in any file, and a duplicate is rejected."""
    tensors = load_file(packed / by.WEIGHTS)
    mask = {name: tensors.pop(name) for name in list(tensors) if name == MASK}
    save_file(tensors, tmp_path / "a.safetensors")
    save_file(mask, tmp_path / "b.safetensors")
    files = dict.fromkeys(tensors, "a.safetensors")
    index = {"weight_map": files | {MASK: "b.safetensors"}}
    (tmp_path / by.INDEX).write_text(json.dumps(index))
    assert Checkpoint.open(tmp_path).read([Q])[Q].shape == (48, 48)
    save_file({OFFSETS: tensors[OFFSETS]} | mask, tmp_path / "b.safetensors")
    with pytest.raises(CheckpointError, match="both"):
        Checkpoint.open(tmp_path)


few = settings(
    max_examples=200,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
NUMBERS = (-(2**63), -1, 0, 1, 2, 3, 63, 64, 65, 2**31, 2**32, 2**62, 2**63 - 1)


def _written(tensor, place, value):
    """Overwrite up to eight bytes of a part."""
    data = tensor.clone().flatten().view(torch.uint8)
    if data.numel():
        begin = 8 * place % data.numel()
        word = torch.tensor(list(struct.pack("<q", value)), dtype=torch.uint8)
        part = data[begin : begin + 8]
        part.copy_(word[: part.numel()])
    return data.view(tensor.dtype).view(tensor.shape)


def _flipped(tensor, place, value):
    data = tensor.clone().flatten().view(torch.uint8)
    if data.numel():
        data[place % data.numel()] ^= 1 << value % 8
    return data.view(tensor.dtype).view(tensor.shape)


CHANGES = {
    "written": _written,
    "flipped": _flipped,
    "shorter": lambda tensor, place, value: tensor[:-1],
    "longer": lambda tensor, place, value: torch.cat([tensor, tensor[:1]]),
    "upright": lambda tensor, place, value: tensor.unsqueeze(-1),
    "flat": lambda tensor, place, value: tensor.flatten(),
    "recast": lambda tensor, place, value: tensor.to(
        [torch.int64, torch.uint64, torch.uint32, torch.float32][value % 4]
    ),
    "gone": lambda tensor, place, value: None,
}
ENDS = ("", "_mask", "_offsets", "_layout")
changes = st.lists(
    st.tuples(
        st.sampled_from(ENDS),
        st.sampled_from(list(CHANGES)),
        st.integers(0, 40),
        st.sampled_from(NUMBERS),
    ),
    max_size=3,
)


@few
@given(
    st.sampled_from(list(DTYPES)),
    st.integers(1, 4),
    st.integers(1, 130),
    st.booleans(),
    st.integers(0, 2**32),
    changes,
)
def test_random_changes(tmp_path, dtype, rows, columns, transposed, seed, edits):  # noqa: PLR0913, PLR0917
    """The result is either an error or a matrix of the shape in the header."""
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(rows, columns, generator=generator).relu().to(dtype)
    weight = weight.T.contiguous() if transposed else weight
    tensors: dict[str, torch.Tensor] = dict(split("w", pack(weight, transposed)))
    for end, change, place, value in edits:
        if (old := tensors.pop("w" + end, None)) is not None and old.dim():
            new = CHANGES[change](old, place, value)
            tensors |= {} if new is None else {"w" + end: new.contiguous()}
    save_file(tensors, tmp_path / by.WEIGHTS)
    try:
        checkpoint = Checkpoint.open(tmp_path)
        read = checkpoint.read(checkpoint.tensors)
    except HalveError as error:
        assert edits
        assert error.problem.endswith(".")
        assert error.remedy.endswith(".")
        return
    assert edits or torch.equal(read["w"], weight)
    for name, info in checkpoint.tensors.items():
        tensor = read[name]
        assert (tuple(tensor.shape), tensor.dtype) == (info.shape, info.dtype)
