"""Packing is lossless and recorded; a model without zeros is rejected."""

import json
import shutil
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file, save_file

import halve
from halve.checkpoint import Checkpoint
from halve.errors import HalveError
from halve.records import PackRecord
from tests.integration.packed_models import CHANGED, change_matrix, prune
from tests.interruptions import digests
from tests.tables import files_of_at_most, save_pico

ROWS = ("opt", "gpt2", "bloom", "llama", "falcon", "phi3")
DTYPES = (torch.bfloat16, torch.float16, torch.float32)
ENTRY = {"quant_method": "halve", "requires_halve": "0.1", "version": 1}


def _tensors(folder):
    tensors = {}
    for path in sorted(folder.glob("*.safetensors")):
        tensors |= load_file(path)
    return tensors


def _config(folder):
    return json.loads((folder / "config.json").read_text())


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("row", ROWS)
def test_a_model_comes_back_byte_for_byte(row, dtype, made, tmp_path):
    _, pruned, packed = made(row, dtype=dtype)
    halve.unpack(packed, tmp_path / "out")
    assert digests(tmp_path / "out") == digests(pruned)


@pytest.mark.parametrize("sparsity", ["50%", "2:4"])
@pytest.mark.parametrize("row", ROWS)
def test_pruning_packed_is_pruning_and_packing(row, sparsity, made, tmp_path):
    dense, _, packed = made(row, sparsity)
    prune(dense, tmp_path / "out", sparsity=sparsity, packed=True)
    assert digests(tmp_path / "out") == digests(packed)


def test_files_do_not_depend_on_the_files_of_the_input(made, tmp_path):
    dense, _, packed = made("phi", vocab_size=300)
    prune(dense, tmp_path / "out", packed=True)
    assert digests(tmp_path / "out") == digests(packed)


def test_packing_that_would_gain_nothing_is_refused_before_the_work(pico, tmp_path):
    with pytest.raises(HalveError, match=r"no matrix .* would get smaller"):
        prune(
            pico("llama", dtype=torch.bfloat16),
            tmp_path / "out",
            sparsity="2%",
            packed=True,
        )
    assert not list(tmp_path.iterdir())


def test_packing_what_is_packed_changes_nothing(made, tmp_path):
    _, _, packed = made()
    halve.pack(packed, tmp_path / "out")
    assert digests(tmp_path / "out") == digests(packed)


@pytest.mark.parametrize("row", ROWS)
def test_only_the_matrices_of_the_blocks_are_packed(row, made):
    _, pruned, packed = made(row)
    matrices = {matrix.tensor for matrix in halve.inspect(packed).matrices}
    before, after = _tensors(pruned), _tensors(packed)
    ends = ("_mask", "_offsets", "_layout")
    companions = {name + end for name in matrices for end in ends}
    assert after.keys() == before.keys() | companions
    for name in before.keys() - matrices:
        assert torch.equal(after[name], before[name]), name
    assert all(after[name].dim() == 1 for name in matrices)


def test_the_index_lists_every_part_and_counts_their_bytes(made, tmp_path):
    _, pruned, packed = made()
    with files_of_at_most(0):
        halve.pack(pruned, tmp_path / "out")
    index = json.loads((tmp_path / "out/model.safetensors.index.json").read_text())
    tensors = _tensors(packed)
    assert index["weight_map"].keys() == tensors.keys()
    total = sum(tensor.nbytes for tensor in tensors.values())
    assert index["metadata"]["total_size"] == total


@pytest.mark.parametrize("row", ROWS)
def test_the_config_gets_one_entry_and_nothing_else_changes(row, made):
    _, pruned, packed = made(row)
    assert _config(packed) == _config(pruned) | {"quantization_config": ENTRY}
    rewritten = {"config.json", "halve.json", "model.safetensors.index.json"}
    for path in pruned.iterdir():
        if path.name not in rewritten and path.suffix != ".safetensors":
            assert (packed / path.name).read_bytes() == path.read_bytes(), path


@pytest.mark.parametrize("row", ["gpt2", "llama"])
def test_perplexity_is_exactly_that_of_the_dense(row, made, text):
    _, pruned, packed = made(row)
    options = {"data": str(text), "seq_len": 32, "segments": 4, "device": "cpu"}
    dense = halve.perplexity(pruned, **options)
    assert halve.perplexity(packed, **options).perplexity == dense.perplexity


@pytest.mark.parametrize(
    ("sparsity", "pattern"), [("50%", "unstructured"), ("2:4", "2:4")]
)
@pytest.mark.parametrize("row", ROWS)
def test_inspect_sees_the_same_and_the_bytes(row, sparsity, pattern, made):
    _, pruned, packed = made(row, sparsity)
    before, after = halve.inspect(pruned), halve.inspect(packed)
    stored = _tensors(packed)
    for dense, sparse in zip(before.matrices, after.matrices, strict=True):
        for field in ("tensor", "rows", "columns", "dtype", "sparsity"):
            assert getattr(dense, field) == getattr(sparse, field)
        assert dense.pattern == sparse.pattern == pattern
        assert (dense.packed, sparse.packed) == (False, True)
        names = [n for n in stored if n.startswith(sparse.tensor)]
        assert len(names) == 4
        assert sparse.bytes == sum(stored[name].nbytes for name in names)
        assert dense.packed_bytes == sparse.packed_bytes == sparse.bytes < dense.bytes
    assert (before.parameters, before.zeros) == (after.parameters, after.zeros)
    assert after.bytes == sum(tensor.nbytes for tensor in stored.values())


def test_the_record_matches_the_files(made, tmp_path):
    _, pruned, packed = made()
    text = (packed / "halve.json").read_text()
    record = PackRecord.from_json(text)
    assert record.to_json() == text
    assert record.source == json.loads((pruned / "halve.json").read_text())
    checksums = digests(packed)
    assert {file: checksums[file] for file in record.shards} == record.shards
    inspected = {m.tensor: m for m in halve.inspect(packed).matrices}
    assert {m.tensor for m in record.matrices} == inspected.keys()
    for matrix in record.matrices:
        seen = inspected[matrix.tensor]
        assert (matrix.rows, matrix.columns) == (seen.rows, seen.columns)
        assert (matrix.packed, matrix.sparsity) == (seen.packed, seen.sparsity)
        assert matrix.stored_bytes == seen.bytes
    assert record.stored_bytes == sum(m.bytes for m in inspected.values())
    assert record.dense_bytes == sum(
        matrix.bytes for matrix in halve.inspect(pruned).matrices
    )


def test_a_dense_model_is_not_packed_and_nothing_is_left(pico, tmp_path):
    with pytest.raises(halve.HalveError, match=r"14 has 0\.0% zeros") as refusal:
        halve.pack(pico("llama", dtype=torch.bfloat16), tmp_path / "out")
    assert "halve prune" in refusal.value.remedy
    assert not any(tmp_path.iterdir())


def test_a_dense_model_is_not_unpacked(made, tmp_path):
    _, pruned, _ = made()
    with pytest.raises(
        halve.HalveError, match=r"is packed or quantized\. Use the model as it is"
    ):
        halve.unpack(pruned, tmp_path / "out")
    assert not any(tmp_path.iterdir())


def test_a_matrix_without_zeros_stays_dense(made, tmp_path):
    _, pruned, _ = made()
    mixed = change_matrix(pruned, tmp_path / "mixed", torch.ones_like)
    record = halve.pack(mixed, tmp_path / "packed")
    assert [m.tensor for m in record.matrices if not m.packed] == [CHANGED]
    for matrix in halve.inspect(tmp_path / "packed").matrices:
        assert matrix.packed == (matrix.tensor != CHANGED)
        assert (matrix.pattern == "dense") == (matrix.tensor == CHANGED)
        assert matrix.packed_bytes is not None
        if matrix.tensor == CHANGED:
            assert matrix.bytes < matrix.packed_bytes
    halve.unpack(tmp_path / "packed", tmp_path / "out")
    assert _same_tensors(tmp_path / "out", mixed)


def _same_tensors(a, b):
    a, b = _tensors(a), _tensors(b)
    return a.keys() == b.keys() and all(
        a[n].dtype == b[n].dtype
        and torch.equal(
            a[n].flatten().view(torch.uint8), b[n].flatten().view(torch.uint8)
        )
        for n in a
    )


def _with_odd_numbers(matrix):
    """Overwrite some weights and zeros by minus zero, infinity, NaN and denormals."""
    odd = torch.tensor([-0.0, float("inf"), float("-inf"), float("nan"), 1e-40, -1e-40])
    matrix.view(-1)[: 6 * 100] = odd.to(matrix.dtype).repeat(100)
    return matrix


def test_infinities_and_nans_come_back(made, tmp_path):
    """Packing does not reject weights."""
    _, pruned, _ = made()
    edited = change_matrix(pruned, tmp_path / "edited", _with_odd_numbers)
    halve.pack(edited, tmp_path / "packed")
    halve.unpack(tmp_path / "packed", tmp_path / "out")
    assert _same_tensors(tmp_path / "out", edited)


def test_inspect_predicts_the_bytes_of_minus_zeros(made, tmp_path):
    _, pruned, _ = made()
    edited = change_matrix(pruned, tmp_path / "edited", _with_odd_numbers)
    halve.pack(edited, tmp_path / "packed")
    for matrix in halve.inspect(tmp_path / "packed").matrices:
        assert matrix.packed_bytes == matrix.bytes, matrix.tensor


def _times_a_mask(matrix):
    """Prune as many programs do; here every zero gets a minus sign."""
    return -matrix.abs() * (matrix != 0)


def test_minus_zeros_are_stored_or_dropped_as_asked(made, tmp_path):
    _, pruned, packed = made()
    edited = change_matrix(pruned, tmp_path / "edited", _times_a_mask)
    size = {m.tensor: m.bytes for m in halve.inspect(packed).matrices}[CHANGED]
    for drop in (False, True):
        out, back = tmp_path / f"packed {drop}", tmp_path / f"back {drop}"
        record = halve.pack(edited, out, positive_zeros=drop)
        (matrix,) = [m for m in record.matrices if m.tensor == CHANGED]
        assert (matrix.packed, matrix.stored_bytes == size) == (drop, drop)
        halve.unpack(out, back)
        assert _same_tensors(back, edited) == (not drop)
        assert torch.equal(_tensors(back)[CHANGED], _tensors(edited)[CHANGED])


def test_pruning_what_is_packed_gives_a_plain_model(made, tmp_path):
    _, pruned, packed = made()
    prune(packed, tmp_path / "out", sparsity="75%")
    prune(pruned, tmp_path / "plain", sparsity="75%")
    assert digests(tmp_path / "out") == digests(tmp_path / "plain")
    assert "quantization_config" not in _config(tmp_path / "out")
    inspected = halve.inspect(tmp_path / "out")
    assert inspected.sparsity == 0.75
    assert not any(matrix.packed for matrix in inspected.matrices)


def test_the_parts_may_be_in_any_file(made, tmp_path):
    """Each kind of part has its own file."""
    _, pruned, packed = made()
    files: dict[str, dict[str, torch.Tensor]] = {}
    for name, tensor in _tensors(packed).items():
        kind = name.rpartition(".")[2]
        files.setdefault(f"{kind}.safetensors", {})[name] = tensor
    assert len(files) >= 4
    folder = tmp_path / "scattered"
    shutil.copytree(packed, folder, ignore=shutil.ignore_patterns("*.safetensors*"))
    for file, tensors in files.items():
        save_file(tensors, folder / file, {"format": "pt"})
    weight_map = {name: file for file, tensors in files.items() for name in tensors}
    index = folder / "model.safetensors.index.json"
    index.write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    halve.unpack(folder, tmp_path / "out")
    assert _same_tensors(tmp_path / "out", pruned)


PLAIN = """
import sys
from transformers import AutoModelForCausalLM
for folder in sys.argv[1:]:
    AutoModelForCausalLM.from_pretrained(folder)
    print("a model")
assert "halve" not in sys.modules
"""


def test_transformers_without_halve_rejects_a_packed_model(made, installed):
    """It must not fill the matrices with random numbers and continue.

    torch's switch keeps an installed Halve from being found (test_autoload.py).
    """
    _, pruned, packed = made()
    done = subprocess.run(
        [sys.executable, "-c", PLAIN, pruned, packed],
        check=False,
        capture_output=True,
        text=True,
        env={**installed, "TORCH_DEVICE_BACKEND_AUTOLOAD": "0"},
    )
    assert done.returncode != 0
    assert done.stdout.split() == ["a", "model"]  # the first, and not the second
    assert "AssertionError" not in done.stderr


def test_packed_tensors_appear_as_dense_ones(made):
    _, pruned, packed = made("gpt2")
    dense, sparse = Checkpoint.open(pruned), Checkpoint.open(packed)
    assert list(dense.tensors) == list(sparse.tensors)
    for name, info in dense.tensors.items():
        seen = sparse.tensors[name]
        assert (seen.shape, seen.dtype) == (info.shape, info.dtype)
        assert seen.nbytes == info.nbytes
        assert torch.equal(sparse.read([name])[name], dense.read([name])[name])
    assert sum(info.format is not None for info in sparse.tensors.values()) == 8


def test_single_rows_and_columns_are_packed(tmp_path):
    """Widths that are no multiple of a word or a vector work from end to end."""
    source = save_pico(
        tmp_path / "model",
        "llama",
        dtype=torch.bfloat16,
        hidden_size=20,
        intermediate_size=97,
        num_attention_heads=2,
        num_key_value_heads=1,
        vocab_size=300,
    )
    prune(source, tmp_path / "pruned", sparsity="90%")
    halve.pack(tmp_path / "pruned", tmp_path / "packed")
    halve.unpack(tmp_path / "packed", tmp_path / "out")
    assert digests(tmp_path / "out") == digests(tmp_path / "pruned")
