"""Quantized matrices whose parts are inconsistent are rejected by name.

A new case is one row: what format, what is changed, and what the message mentions.
"""

import json

import pytest
import torch
from safetensors.torch import save_file

from halve.checkpoint import Checkpoint
from halve.errors import CheckpointError, UnsupportedModelError
from tests.fuzz.judge import judge
from tests.quantized_inputs import FP8, WEIGHTS, WRITERS

BLOCKS, INT8 = "float-quantized, blocks", "int-quantized, groups"
SPARSE, SPARSE24 = "sparse-bitmask", "sparse-24-bitmask"
SPARSE_FP8 = "sparse-24-bitmask of fp8"
ROWS, COLUMNS = 30, 112
# Of masks, whose last octet is partial.
MASKED_COLUMNS = 100
W, SCALE, ZERO = "w.weight", "w.weight_scale", "w.weight_zero_point"
VALUES, MASK, SHAPE, OFFSETS = "w.compressed", "w.bitmask", "w.shape", "w.row_offsets"
BAD = (W, "are inconsistent")


def written(row):
    """Return the tensors of a small matrix in a format, and what it stands for."""
    generator = torch.Generator().manual_seed(0)
    columns = MASKED_COLUMNS if row.startswith("sparse") else COLUMNS
    weight = torch.randn(ROWS, columns, generator=generator).bfloat16()
    return WRITERS[row].write("w", weight)


def save(folder, tensors, row):
    contents = {name: tensor.contiguous() for name, tensor in tensors.items()}
    save_file(contents, folder / WEIGHTS)
    config = {"quantization_config": WRITERS[row].entry}
    (folder / "config.json").write_text(json.dumps(config))


def item(place, value):
    """Set one number of a part."""

    def change(tensor):
        tensor = tensor.clone()
        tensor.view(-1)[place] = value
        return tensor

    return change


def moved(mask):
    """Move a bit of the first row past the columns; their number does not change."""
    mask = mask.clone()
    octet = int(mask[0].nonzero()[0])
    mask[0, octet] &= mask[0, octet] - 1
    mask[0, -1] |= 128
    return mask


# Row -> format, part, its change (None removes it), what the message mentions.
ON_OPENING = {
    "scales: a tile less": (BLOCKS, SCALE, lambda s: s[:-1], (*BAD, "[24, 16]")),
    "scales: a tile more": (BLOCKS, SCALE, lambda s: torch.cat([s, s[:1]]), BAD),
    "scales: none": (BLOCKS, SCALE, lambda s: s[:0], (*BAD, "[0, 7]")),
    "scales: flat": (BLOCKS, SCALE, lambda s: s.flatten(), BAD),
    "scales: a stack": (BLOCKS, SCALE, lambda s: s[None], BAD),
    "scales: int64": (BLOCKS, SCALE, lambda s: s.long(), (*BAD, "int64")),
    "scales: float64": (BLOCKS, SCALE, lambda s: s.double(), (*BAD, "float64")),
    "scales: missing": (BLOCKS, SCALE, None, ("float8_e4m3fn, and no scales",)),
    "scales: exponents of int8": (INT8, SCALE, lambda s: s.byte(), (*BAD, "uint8")),
    "zeros: a group less": (INT8, ZERO, lambda z: z[:, :-1], (*BAD, "zero points")),
    "zeros: int32": (INT8, ZERO, lambda z: z.int(), (*BAD, "int32")),
    "codes: flat": (BLOCKS, W, lambda w: w.flatten(), (*BAD, "[3360]")),
    "codes: a number": (BLOCKS, W, lambda w: w[0, 0], (*BAD, "[] float8")),
    "codes: no columns": (BLOCKS, W, lambda w: w[:, :0], (*BAD, "[30, 0]")),
    "codes: a column more": (INT8, W, lambda w: torch.cat([w, w[:, :1]], 1), BAD),
    "shape: one number": (SPARSE, SHAPE, lambda s: s[:1], (W, "[30]")),
    "shape: int32": (SPARSE, SHAPE, lambda s: s.int(), (W, "rows and columns")),
    "shape: an octet more": (SPARSE, SHAPE, item(1, 105), (W, "[30, 105]")),
    "shape: huge rows": (SPARSE, SHAPE, item(0, 2**62), (W, f"[{2**62}, 100]")),
    "shape: huge": (SPARSE, SHAPE, lambda s: s + 2**62, (W, str(2**62 + 30))),
    "shape: negative": (SPARSE, SHAPE, lambda s: -s, (W, "[-30, -100]")),
    "shape: empty": (SPARSE, SHAPE, lambda s: s * 0, (W, "[0, 0]")),
    "shape: many numbers": (SPARSE, SHAPE, lambda s: s.repeat(2000), (W, "[]")),
    "shape: missing": (SPARSE, SHAPE, None, (SHAPE, "missing")),
    "mask: a row less": (SPARSE, MASK, lambda m: m[:-1], (W, "[29, 13]")),
    "mask: words": (SPARSE, MASK, lambda m: m.long(), (*BAD, "int64")),
    "values: int8": (SPARSE, VALUES, lambda v: v.char(), (*BAD, "int8")),
    "values: codes without scales": (SPARSE, VALUES, lambda v: v.to(FP8), BAD),
    "values: upright": (SPARSE, VALUES, lambda v: v.view(1, -1), BAD),
    "values: a column less": (SPARSE24, VALUES, lambda v: v[:, 1:], BAD),
    "values: scales of few rows": (SPARSE_FP8, SCALE, lambda s: s[:-7], BAD),
    "offsets: missing": (SPARSE, OFFSETS, None, (OFFSETS, "missing")),
    "offsets: one more": (SPARSE, OFFSETS, lambda o: torch.cat([o, o[:1]]), BAD),
    "offsets: float": (SPARSE, OFFSETS, lambda o: o.float(), BAD),
}
ON_READING = {
    "mask: a bit moved past the columns": (SPARSE, MASK, moved, (W, "past its 100")),
    "mask: empty": (SPARSE, MASK, torch.zeros_like, (W, "by its mask")),
    "mask: full, with 2:4": (SPARSE24, MASK, lambda m: m | 15, (W, "by its mask")),
    "values: one less": (SPARSE, VALUES, lambda v: v[:-1], (W, "by its")),
    "values: none": (SPARSE, VALUES, lambda v: v[:0], (W, "by its")),
    "offsets: negative": (SPARSE, OFFSETS, item(5, -1), (W, "by its offsets")),
    "offsets: first is 1": (SPARSE, OFFSETS, item(0, 1), (W, "begin at value 1")),
    "offsets: out of bounds": (SPARSE, OFFSETS, item(9, 2**62), (W, "by its offsets")),
}


@pytest.mark.parametrize("row", ON_OPENING | ON_READING)
def test_inconsistent_parts_are_rejected(row, tmp_path):
    form, name, change, mentions = (ON_OPENING | ON_READING)[row]
    tensors, _ = written(form)
    part = tensors.pop(name)
    save(tmp_path, tensors if change is None else tensors | {name: change(part)}, form)
    if row in ON_READING:
        assert Checkpoint.open(tmp_path).tensors[W].shape == (ROWS, MASKED_COLUMNS)
    with pytest.raises(CheckpointError) as refusal:
        Checkpoint.open(tmp_path).read([W])
    for mention in mentions:
        assert mention in str(refusal.value), (mention, refusal.value)


@pytest.mark.parametrize("row", WRITERS)
def test_the_good_ones_are_read(row, tmp_path):
    """Otherwise the test above would prove nothing."""
    tensors, dense = written(row)
    save(tmp_path, tensors, row)
    assert torch.equal(Checkpoint.open(tmp_path).read([W])[W], dense)


def test_columns_in_an_order_of_their_own_are_refused(tmp_path):
    tensors, _ = written(INT8)
    save(tmp_path, tensors | {"w.weight_g_idx": torch.arange(100)}, INT8)
    with pytest.raises(UnsupportedModelError, match="weight_g_idx"):
        Checkpoint.open(tmp_path)


def test_a_matrix_that_is_dense_as_well_is_refused(tmp_path):
    tensors, dense = written(SPARSE)
    save(tmp_path, tensors | {W: dense}, SPARSE)
    with pytest.raises(CheckpointError, match=r"w\.weight twice"):
        Checkpoint.open(tmp_path)


BLOCK_SIZES = (
    *([0, 16], [-24, -16], [2**62, 2**62], [24, 2**80], [24], [24, 16, 1]),
    *([24.0, 16.0], [True, True], "24x16x", "x", "-1x5", "9" * 5000, {}, None),
)


@pytest.mark.parametrize("size", BLOCK_SIZES, ids=lambda size: str(size)[:20])
def test_block_sizes_are_bounded_by_the_scales(size, tmp_path):
    """A size that contradicts the number of scales is not used."""
    tensors, _ = written(BLOCKS)
    save(tmp_path, tensors, BLOCKS)
    config = {"quantization_config": {"quant_method": "fp8", "weight_block_size": size}}
    (tmp_path / "config.json").write_text(json.dumps(config))
    verdict = judge(lambda: Checkpoint.open(tmp_path).read([W]), 8000)
    assert verdict.outcome == "refused", verdict


OCTETS = torch.zeros(2, 3, 5, 16, dtype=torch.uint8)
MXFP4 = {
    "scales: a group less": (OCTETS, OCTETS[:, :, 1:, 0]),
    "scales: float": (OCTETS, OCTETS[..., 0].float()),
    "blocks: 15 bytes": (OCTETS[..., 1:], OCTETS[..., 0]),
    "blocks: no stack": (OCTETS[0], OCTETS[0, ..., 0]),
    "blocks: none": (OCTETS[:0], OCTETS[:0, ..., 0]),
}


@pytest.mark.parametrize("row", MXFP4)
def test_inconsistent_mxfp4_is_rejected(row, tmp_path):
    blocks, scales = MXFP4[row]
    config = {"quantization_config": {"quant_method": "mxfp4"}}
    (tmp_path / "config.json").write_text(json.dumps(config))
    tensors = {"e_blocks": blocks.contiguous(), "e_scales": scales.contiguous()}
    save_file(tensors, tmp_path / WEIGHTS)
    with pytest.raises(CheckpointError, match="e is stored in MXFP4"):
        Checkpoint.open(tmp_path)
