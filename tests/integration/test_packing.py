"""Packing is lossless and recorded; a model without zeros is rejected."""

import json
import shutil
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import halve
from halve.checkpoint import Checkpoint
from halve.cli import main
from halve.errors import HalveError
from halve.records import PackRecord
from tests.integration.test_resume import Stopped, _stop_at_rename, digests, stop_at
from tests.tables import files_of_at_most, save_pico

ROWS = ("opt", "gpt2", "bloom", "llama", "falcon", "phi3")
DTYPES = (torch.bfloat16, torch.float16, torch.float32)
ENTRY = {"quant_method": "halve", "requires_halve": "0.1", "version": 1}

# Magnitude needs no text, and the solver does not matter here.
prune = partial(halve.prune, solver="magnitude", device="cpu")


@pytest.fixture(scope="session")
def made(pico, tmp_path_factory):
    """Return a function that returns dense, pruned and packed folders of a family.

    Tests must not write to them.
    """
    homes: dict[str, Path] = {}

    def folders(row: str = "llama", sparsity: str = "50%", **options):
        options = {"dtype": torch.bfloat16} | options
        key = f"{row}-{sparsity}-{options}"
        if key not in homes:
            homes[key] = tmp_path_factory.mktemp(row)
            prune(pico(row, **options), homes[key] / "pruned", sparsity=sparsity)
            halve.pack(homes[key] / "pruned", homes[key] / "packed")
        return pico(row, **options), homes[key] / "pruned", homes[key] / "packed"

    return folders


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


def _edited(source, folder, change):
    """Copy a model of safetensors, one tensor changed; return the folder."""
    shutil.copytree(source, folder)
    for path in folder.glob("*.safetensors"):
        tensors = load_file(path)
        if DENSE in tensors:
            tensors[DENSE] = change(tensors[DENSE])
            save_file(tensors, path, {"format": "pt"})
    return folder


DENSE = "model.layers.1.mlp.up_proj.weight"


def test_a_matrix_without_zeros_stays_dense(made, tmp_path):
    _, pruned, _ = made()
    mixed = _edited(pruned, tmp_path / "mixed", torch.ones_like)
    record = halve.pack(mixed, tmp_path / "packed")
    assert [m.tensor for m in record.matrices if not m.packed] == [DENSE]
    for matrix in halve.inspect(tmp_path / "packed").matrices:
        assert matrix.packed == (matrix.tensor != DENSE)
        assert (matrix.pattern == "dense") == (matrix.tensor == DENSE)
        assert matrix.packed_bytes is not None
        if matrix.tensor == DENSE:
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
    edited = _edited(pruned, tmp_path / "edited", _with_odd_numbers)
    halve.pack(edited, tmp_path / "packed")
    halve.unpack(tmp_path / "packed", tmp_path / "out")
    assert _same_tensors(tmp_path / "out", edited)


def test_inspect_predicts_the_bytes_of_minus_zeros(made, tmp_path):
    _, pruned, _ = made()
    edited = _edited(pruned, tmp_path / "edited", _with_odd_numbers)
    halve.pack(edited, tmp_path / "packed")
    for matrix in halve.inspect(tmp_path / "packed").matrices:
        assert matrix.packed_bytes == matrix.bytes, matrix.tensor


def _times_a_mask(matrix):
    """Prune as many programs do; here every zero gets a minus sign."""
    return -matrix.abs() * (matrix != 0)


def test_minus_zeros_are_stored_or_dropped_as_asked(made, tmp_path):
    _, pruned, packed = made()
    edited = _edited(pruned, tmp_path / "edited", _times_a_mask)
    size = {m.tensor: m.bytes for m in halve.inspect(packed).matrices}[DENSE]
    for drop in (False, True):
        out, back = tmp_path / f"packed {drop}", tmp_path / f"back {drop}"
        record = halve.pack(edited, out, positive_zeros=drop)
        (matrix,) = [m for m in record.matrices if m.tensor == DENSE]
        assert (matrix.packed, matrix.stored_bytes == size) == (drop, drop)
        halve.unpack(out, back)
        assert _same_tensors(back, edited) == (not drop)
        assert torch.equal(_tensors(back)[DENSE], _tensors(edited)[DENSE])


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


def test_a_finished_folder_is_not_rewritten(made, tmp_path):
    _, pruned, _ = made()
    first = halve.pack(pruned, tmp_path / "out")
    before = {p.name: p.stat().st_mtime_ns for p in (tmp_path / "out").iterdir()}
    assert halve.pack(pruned, tmp_path / "out") == first
    after = {p.name: p.stat().st_mtime_ns for p in (tmp_path / "out").iterdir()}
    assert after == before
    with pytest.raises(halve.HalveError, match="verb: pack there"):
        prune(pruned, tmp_path / "out")


# Verb -> what runs it, given the dense, pruned and packed folders and an output.
VERBS = {
    "pack": lambda folders, out, **more: halve.pack(folders[1], out, **more),
    "unpack": lambda folders, out, **more: halve.unpack(folders[2], out, **more),
    "prune packed": lambda folders, out, **more: prune(
        folders[0], out, packed=True, **more
    ),
}


@pytest.mark.parametrize("verb", VERBS)
def test_stopped_at_every_step(verb, made, tmp_path):
    folders, run = made(), VERBS[verb]
    expected = digests(folders[1] if verb == "unpack" else folders[2])
    stops = 0
    for count in range(1, 40):
        out = tmp_path / f"out-{count}"
        try:
            run(folders, out, progress=stop_at(count))
        except Stopped:
            stops += 1
            assert not out.exists()
            run(folders, out)
        assert digests(out) == expected
        if stops < count:
            break
    assert 4 < stops < 39


@pytest.mark.parametrize("verb", VERBS)
def test_stopped_at_every_write(verb, made, tmp_path, monkeypatch):
    folders, run = made(), VERBS[verb]
    expected = digests(folders[1] if verb == "unpack" else folders[2])
    stops = 0
    for count in range(1, 40):
        out = tmp_path / f"out-{count}"
        with monkeypatch.context() as patch:
            done = _stop_at_rename(patch, count)
            try:
                run(folders, out)
            except Stopped:
                stops += 1
                assert not out.exists()
        if done():
            break
        run(folders, out)
        assert digests(out) == expected
    assert stops > 8


def test_stopped_with_a_solver_that_carries_hidden_states(pico, text, tmp_path):
    """Resuming reads the packed shards of the blocks that were finished."""
    options = {"calibration": str(text), "samples": 8, "seq_len": 32, "device": "cpu"}
    halve.prune(pico("gpt2"), tmp_path / "whole", packed=True, **options)
    with pytest.raises(Stopped):
        halve.prune(
            *(pico("gpt2"), tmp_path / "out"),
            packed=True,
            progress=stop_at(6),
            **options,
        )
    ledger = tmp_path / "out.partial" / "ledger.jsonl"
    assert len(ledger.read_text().splitlines()) > 1
    halve.prune(pico("gpt2"), tmp_path / "out", packed=True, **options)
    assert digests(tmp_path / "out") == digests(tmp_path / "whole")
    halve.prune(pico("gpt2"), tmp_path / "plain", **options)
    halve.pack(tmp_path / "plain", tmp_path / "packed")
    assert digests(tmp_path / "packed") == digests(tmp_path / "whole")


def test_packed_and_dense_runs_do_not_mix(made, tmp_path):
    dense, _, _ = made()
    with pytest.raises(Stopped):
        prune(dense, tmp_path / "out", packed=True, progress=stop_at(3))
    with pytest.raises(halve.HalveError, match="packed: True there, False here"):
        prune(dense, tmp_path / "out")


@pytest.fixture
def run(monkeypatch, capsys):
    """Return a function that runs a command line and gives (output, errors)."""

    def run(*words):
        monkeypatch.setattr(sys, "argv", ["halve", *map(str, words)])
        with pytest.raises(SystemExit) as end:
            main()
        assert not end.value.code
        return capsys.readouterr()

    return run


def test_pack_prints_how_much_smaller_the_model_is(run, made, tmp_path):
    _, pruned, packed = made()
    out, errors = run("pack", pruned, "-o", tmp_path / "out")
    assert digests(tmp_path / "out") == digests(packed)
    matrices = halve.inspect(packed).matrices
    dense = sum(m.rows * m.columns * 2 for m in matrices)
    percent = 100 * sum(m.bytes for m in matrices) / dense
    assert "14 of 14 matrices are packed" in out
    assert f"{percent:.2f}% of" in out
    assert "packing" in errors


def test_pack_names_what_stays_dense(run, made, tmp_path):
    _, pruned, _ = made()
    mixed = _edited(pruned, tmp_path / "mixed", torch.ones_like)
    out, errors = run("pack", mixed, "-o", tmp_path / "out", "--quiet")
    assert "13 of 14 matrices are packed" in out
    assert DENSE in out
    assert errors == ""
    matrices = json.loads(run("inspect", tmp_path / "out", "--json")[0])["matrices"]
    stored = {matrix["tensor"]: matrix["storage"] for matrix in matrices}
    assert stored.pop(DENSE) == "dense"
    assert set(stored.values()) == {"bitmask"}


def test_inspect_prints_whole_names(run, made):
    _, pruned, _ = made()
    block, _, name = DENSE.partition(".mlp.")
    out = run("inspect", pruned, "--all")[0]
    assert block in out
    assert f"mlp.{name.removesuffix('.weight')} " in out


def test_pack_and_unpack_print_their_records_as_json(run, made, tmp_path):
    _, pruned, packed = made()
    words = (("pack", pruned), ("unpack", packed))
    for number, (verb, folder) in enumerate(words):
        target = tmp_path / str(number)
        out, errors = run(verb, folder, "-o", target, "--json", "--quiet")
        assert errors == ""
        assert json.loads(out) == json.loads((target / "halve.json").read_text())
        assert json.loads(out)["kind"] == verb


def test_unpack_prints_what_it_did(run, made, tmp_path):
    _, pruned, packed = made()
    out, errors = run("unpack", packed, "-o", tmp_path / "out")
    assert digests(tmp_path / "out") == digests(pruned)
    assert "14 matrices are dense" in out
    assert "unpacking" in errors


def test_inspect_distinguishes_packed_from_dense(run, made):
    _, pruned, packed = made()
    matrices = json.loads(run("inspect", packed, "--json")[0])["matrices"]
    assert all(matrix["packed"] for matrix in matrices)
    assert all(matrix["bytes"] == matrix["packed_bytes"] for matrix in matrices)
    assert run("inspect", packed, "--all")[0].count(" bitmask") == 14
    assert run("inspect", pruned, "--all")[0].count(" bitmask") == 0


@pytest.mark.parametrize("verb", ["pack", "unpack"])
def test_help_ends_with_examples(verb, run):
    examples = run(verb, "--help")[0].partition("Examples")[2]
    assert f"halve {verb} ./" in examples


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
