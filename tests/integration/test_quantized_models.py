"""A quantized checkpoint, packed as codes, is the rounded model in fewer bytes."""

import json
from typing import Any

import numpy as np
import pytest
import torch

import halve
from halve.checkpoint import Checkpoint
from halve.errors import HalveError
from halve.measure import bench as bench_module
from halve.measure.random_models import _SIZES
from halve.records.bench import Footprint
from halve.runtime.cpu.packed_linear import PackedEmbedding, PackedLinear
from halve.runtime.cpu.quantized_linear import (
    QuantizedEmbedding,
    QuantizedLinear,
    set_activations,
)
from tests.integration.test_sparse_models import FAMILIES, load, some_ids
from tests.interruptions import digests
from tests.twins.format_reader import read_checkpoint

# Name -> options of the run: dense codes, a mask over codes, zero points, midrise.
WAYS: dict[str, dict[str, Any]] = {
    "int8": {"quantize": "int8", "sparsity": "0"},
    "int8, 50%": {"quantize": "int8", "sparsity": "50%"},
    "int4, 2:4": {"quantize": "int4", "sparsity": "2:4", "group_size": 32},
    "int3": {"quantize": "int3", "sparsity": "0"},
    "int3, zero points": {
        **{"quantize": "int3", "sparsity": "0"},
        **{"symmetric": False, "group_size": 32},
    },
    "int2": {"quantize": "int2", "sparsity": "0", "group_size": 64},
}
over_ways = pytest.mark.parametrize("way", WAYS)
over_families = pytest.mark.parametrize("row", FAMILIES)


@pytest.fixture(scope="module")
def made(pico, tmp_path_factory):
    """Return a function that returns a quantized model, packed and unpacked."""
    folders = {}

    def folders_of(row, way="int3", dtype=torch.bfloat16):
        key = (row, way, dtype)
        if key not in folders:
            home = tmp_path_factory.mktemp("quantized")
            source = pico(row, dtype=dtype)
            options = {"solver": "magnitude", "packed": True} | WAYS[way]
            halve.prune(source, home / "packed", **options)
            halve.unpack(home / "packed", home / "dense")
            folders[key] = home / "packed", home / "dense"
        return folders[key]

    return folders_of


def tensors(folder):
    checkpoint = Checkpoint.open(folder)
    return checkpoint.read(checkpoint.tensors)


@over_ways
@pytest.mark.parametrize("row", ["opt", "gpt2"])
def test_an_independent_reader_reads_the_same(row, way, made):
    packed, dense = made(row, way)
    expected = tensors(dense)
    read = read_checkpoint(packed)
    assert read.keys() == expected.keys()
    for name, tensor in expected.items():
        assert np.array_equal(read[name], tensor.float().numpy()), name
    config = json.loads((packed / "config.json").read_text())["quantization_config"]
    assert (config["version"], config["requires_halve"]) == (2, "0.2")


@over_ways
def test_unpacked_and_packed_again_every_value_is_the_same(way, made, tmp_path):
    packed, dense = made("llama", way)
    halve.pack(dense, tmp_path / "again")
    before, after = (tensors(folder) for folder in (packed, tmp_path / "again"))
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    sizes = [halve.inspect(folder).bytes for folder in (packed, tmp_path / "again")]
    assert sizes[0] == sizes[1]
    for folder in (packed, dense, tmp_path / "again"):
        assert not halve.verify(folder).findings


@over_ways
def test_inspect_names_bits_and_groups(way, made):
    options = WAYS[way]
    bits, size = options["quantize"], options.get("group_size", 128)
    midrise = "m" * (bits == "int2")
    mask = ", masked" * (way in {"int8, 50%", "int4, 2:4"})
    for matrix in halve.inspect(made("llama", way)[0]).matrices:
        assert matrix.storage == f"{bits}{midrise} g{size}{mask}"
        assert matrix.packed_bytes == matrix.bytes
        assert matrix.dtype == "bfloat16"


def test_what_inspect_forecasts_for_a_dense_model_is_what_packing_gives(made):
    packed, dense = made("llama", "int3")
    forecast = [m.packed_bytes for m in halve.inspect(dense).matrices]
    assert forecast == [m.bytes for m in halve.inspect(packed).matrices]


@over_families
@torch.no_grad()
def test_packed_model_computes_what_the_dense_one_does(row, made):
    packed, dense = (load(folder, dtype=torch.float32) for folder in made(row))
    layers = [m for m in packed.modules() if isinstance(m, QuantizedLinear)]
    assert len(layers) >= 8
    for ids in (some_ids(1, 1), some_ids(5, 3), some_ids(40, 2)):
        expected, found = dense(ids).logits, packed(ids).logits
        # Activations of 16 bits: some 3e-5 of the size of a result, layer by layer.
        assert torch.allclose(found, expected, rtol=0, atol=2e-3 * expected.std())


@over_ways
@torch.no_grad()
def test_greedy_tokens_are_those_of_the_unpacked_model(way, made):
    packed, dense = (load(f, dtype=torch.float32) for f in made("llama", way))
    ids = some_ids(4, 1)
    options = {"max_new_tokens": 24, "do_sample": False, "min_new_tokens": 24}
    assert torch.equal(packed.generate(ids, **options), dense.generate(ids, **options))


@over_families
def test_saved_again_it_is_the_same_tensor_for_tensor(row, made, tmp_path):
    packed = made(row)[0]
    model = load(packed, dtype="auto")
    model.save_pretrained(tmp_path)
    again = load(tmp_path, dtype="auto")
    before, after = model.state_dict(), again.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    first, second = (tensors(folder) for folder in (packed, tmp_path))
    assert all(torch.equal(first[name], second[name]) for name in second)
    assert first.keys() == second.keys()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_scales_stay_what_they_are_whatever_the_model_is_converted_to(made, dtype):
    packed, dense = made("llama")
    model = load(packed, dtype=dtype)
    converted = load(packed, dtype="auto").to(dtype)
    for loaded in (model, converted):
        loaded.dequantize(dtype)
        assert loaded.dtype == dtype
        expected = tensors(dense)
        for name, value in loaded.state_dict().items():
            if name in expected:
                assert torch.equal(value, expected[name].to(dtype)), name


def test_embedding_and_tied_head_share_one_packed_matrix(made, pico):
    packed = load(made("opt")[0], dtype="auto")
    embedding, head = packed.get_input_embeddings(), packed.get_output_embeddings()
    assert isinstance(embedding, QuantizedEmbedding)
    assert isinstance(head, QuantizedLinear)
    assert head.weight is embedding.weight
    assert head.weight_scales is embedding.weight_scales
    assert embedding.packed.bits == 4  # int3 blocks: see `quantize_head`
    packed.dequantize()
    embedding, head = packed.get_input_embeddings(), packed.get_output_embeddings()
    assert head.weight is embedding.weight
    assert not any(
        isinstance(m, PackedLinear | PackedEmbedding) for m in packed.modules()
    )


def test_embedding_and_untied_head_are_two_packed_matrices(pico, tmp_path):
    source = pico("llama", dtype=torch.bfloat16, tie_word_embeddings=False)
    options: dict[str, Any] = {
        "quantize": "int4",
        "sparsity": "0",
        "solver": "magnitude",
    }
    record = halve.prune(source, tmp_path / "out", **options, packed=True)
    names = {"model.embed_tokens.weight", "lm_head.weight"}
    assert {head.tensor for head in record.heads} == names
    infos = Checkpoint.open(tmp_path / "out").tensors
    assert {infos[name].label for name in names} == {"int8 g128"}
    model = load(tmp_path / "out", dtype="auto")
    assert isinstance(model.get_input_embeddings(), QuantizedEmbedding)
    head, embedding = model.get_output_embeddings(), model.get_input_embeddings()
    assert not torch.equal(head.weight, embedding.weight)


@pytest.mark.parametrize("choice", ["none", "int8", "int4"])
def test_the_head_has_the_grid_that_was_asked_for(choice, pico, tmp_path):
    source = pico("opt", dtype=torch.bfloat16)
    options: dict[str, Any] = {
        "quantize": "int4",
        "sparsity": "0",
        "solver": "magnitude",
    }
    for packed in (False, True):
        out = tmp_path / f"{packed}"
        record = halve.prune(
            source, out, **options, packed=packed, quantize_head=choice
        )
        info = Checkpoint.open(out).tensors["model.decoder.embed_tokens.weight"]
        stored = f"{choice} g128" if packed and choice != "none" else "dense"
        assert info.label == stored
        assert len(record.heads) == (choice != "none")
        assert not halve.verify(out).findings
    first, second = (tensors(tmp_path / name) for name in ("False", "True"))
    assert all(torch.equal(first[name], second[name]) for name in first)
    halve.pack(tmp_path / "False", tmp_path / "packed")
    infos = [Checkpoint.open(tmp_path / f).tensors for f in ("True", "packed")]
    assert [i.label for i in infos[0].values()] == [i.label for i in infos[1].values()]


def test_an_embedding_of_a_class_of_the_models_stays_dense(pico, tmp_path):
    """Gemma's scales the rows that it looks up. To ask for its grid is an error."""
    source = pico("gemma3", dtype=torch.bfloat16)
    options: dict[str, Any] = {
        "quantize": "int4",
        "sparsity": "0",
        "solver": "magnitude",
    }
    record = halve.prune(source, tmp_path / "out", **options, packed=True)
    assert record.heads == ()
    infos = Checkpoint.open(tmp_path / "out").tensors
    assert infos["model.embed_tokens.weight"].label == "dense"
    with pytest.raises(HalveError, match=r"cannot be quantized.*quantize-head none"):
        halve.prune(source, tmp_path / "none", **options, quantize_head="int8")
    assert not (tmp_path / "none").exists()


@over_ways
def test_perplexity_is_exactly_that_of_the_dense(way, made, text):
    options: dict[str, Any] = {
        "data": str(text),
        "seq_len": 32,
        "segments": 4,
        "device": "cpu",
    }
    packed, dense = (halve.perplexity(f, **options) for f in made("llama", way))
    assert packed.perplexity == dense.perplexity


def test_it_can_be_pruned_further(made, tmp_path):
    for folder in made("llama", "int8"):
        out = tmp_path / f"{folder.name}-again"
        halve.prune(folder, out, sparsity="90%", solver="magnitude")
    assert digests(tmp_path / "packed-again") == digests(tmp_path / "dense-again")


def test_version_1_is_written_where_nothing_needs_version_2(pico, tmp_path):
    source = pico("llama", dtype=torch.bfloat16)
    halve.prune(source, tmp_path / "out", solver="magnitude", packed=True)
    config = json.loads((tmp_path / "out/config.json").read_text())
    assert config["quantization_config"] == {
        **{"quant_method": "halve", "version": 1, "requires_halve": "0.1"},
    }
    read, expected = read_checkpoint(tmp_path / "out"), tensors(tmp_path / "out")
    assert all(np.array_equal(read[n], t.float().numpy()) for n, t in expected.items())


def test_groups_that_cannot_be_packed_are_refused(pico, tmp_path):
    with pytest.raises(HalveError, match=r"Groups of 48 .* multiple of 32"):
        halve.prune(
            pico("llama"), tmp_path / "out", quantize="int4", group_size=48, packed=True
        )


@torch.no_grad()
def test_it_compiles_into_one_graph(made):
    model = load(made("llama")[0], dtype=torch.float32)
    ids = some_ids(5, 1)
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    assert torch.equal(compiled(ids).logits, model(ids).logits)


def test_gradients_pass_to_inputs_and_biases(made):
    packed, dense = (load(f, dtype=torch.float32) for f in made("opt"))
    path = "model.decoder.layers.0.fc1"
    x = torch.randn(3, 64, generator=torch.Generator().manual_seed(0))
    gradients = []
    for model in (packed, dense):
        layer, own = model.get_submodule(path), x.clone().requires_grad_()
        layer.bias.requires_grad_()
        layer(own).square().sum().backward()
        gradients.append((own.grad, layer.bias.grad))
    for found, expected in zip(*gradients, strict=True):
        assert torch.allclose(found, expected, rtol=1e-3, atol=1e-3)


@torch.no_grad()
def test_activations_of_8_bits_are_used_where_asked_for_and_lose_more(made):
    packed, dense = made("llama")
    ids = some_ids(12, 1)
    expected = load(dense, dtype=torch.float32)(ids).logits
    model = load(packed, dtype=torch.float32)
    losses = []
    for name in ("int16", "int8"):
        set_activations(model, name)
        losses.append(float((model(ids).logits - expected).norm() / expected.norm()))
    assert losses[0] < 1e-3
    assert 5 * losses[0] < losses[1] < 0.1
    for name in ("int16", "int8"):
        loaded = halve.load(packed, "cpu", activations=name)
        layers = [m for m in loaded.modules() if isinstance(m, QuantizedLinear)]
        assert {layer.activations for layer in layers} == {name}


def test_activations_that_would_change_nothing_are_refused(made):
    packed, dense = made("llama")
    with pytest.raises(HalveError, match="'int4' is no type of activations"):
        halve.load(packed, "cpu", activations="int4")
    with pytest.raises(HalveError, match="has none"):
        halve.load(dense, "cpu", activations="int8")
    with pytest.raises(HalveError, match="cannot be quantized for that"):
        halve.bench(packed, quantize="int4")
    with pytest.raises(HalveError, match="'int4' for activations"):
        halve.bench(packed, activations="int4")


def test_bench_quantizes_a_random_model_and_times_both_activations(monkeypatch):
    monkeypatch.setitem(_SIZES["llama"], "110m", (64, 128, 2, 4))
    # Each takes a process; test_command_line.py measures some.
    monkeypatch.setattr(bench_module, "footprint", lambda *_: Footprint(1, 2, 3))
    options: dict[str, Any] = {"sparsity": "0", "quantize": "int3", "prompt": 0}
    options |= {"generated": 2, "batches": (1,), "rounds": 1, "activations": "int8"}
    record = halve.bench(random_llama="110m", **options)
    packed, int8 = "halve packed", "halve packed, int8 activations"
    assert [r.backend for r in record.results] == ["torch", "halve dense", packed, int8]
    assert record.sizes[packed] == record.sizes[int8] < record.sizes["torch"] / 3
    assert "int3" in record.model
