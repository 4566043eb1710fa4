"""Quantized and sparse releases are read as the dense models that they stand for."""

import json
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModelForCausalLM,
    FineGrainedFP8Config,
    GptOssConfig,
)
from transformers.integrations.finegrained_fp8 import Fp8Dequantize
from transformers.integrations.mxfp4 import convert_moe_packed_tensors

import halve
from halve.checkpoint import Checkpoint
from halve.errors import CheckpointError, UnsupportedModelError
from halve.models import StoredTensor, build_meta_model, match_names
from tests.interruptions import digests
from tests.quantized_inputs import (
    FP8,
    WEIGHTS,
    WRITERS,
    announce,
    decoded,
    write_both,
)

Q = "model.layers.1.self_attn.q_proj.weight"
MAGNITUDE: dict[str, Any] = {"solver": "magnitude", "device": "cpu"}
# Formats that transformers 5.23 reads by itself. It refuses partial blocks, and needs
# another package for what compressed-tensors writes.
BY_TRANSFORMERS = ("fp8 blocks", "fp8 per tensor", "mxfp8")


@pytest.fixture(scope="module")
def folders(pico, tmp_path_factory):
    """Return a function from a row to the folders of both models."""
    made = {}

    def both(row):
        if row not in made:
            folder = tmp_path_factory.mktemp("quantized")
            made[row] = folder / "quantized", folder / "dense"
            write_both(pico("llama", dtype=torch.bfloat16), row, *made[row])
        return made[row]

    return both


@pytest.mark.parametrize("row", WRITERS)
def test_every_tensor_is_that_of_the_dense_model(row, folders):
    quantized, dense = map(Checkpoint.open, folders(row))
    assert quantized.tensors.keys() == dense.tensors.keys()
    assert (quantized.is_dense, quantized.is_packed) == (False, False)
    assert quantized.tensors[Q].label == WRITERS[row].label
    for name, info in dense.tensors.items():
        seen = quantized.tensors[name]
        assert (seen.shape, seen.dtype) == (info.shape, info.dtype)
        assert torch.equal(quantized.read([name])[name], dense.read([name])[name])


@pytest.mark.parametrize("row", BY_TRANSFORMERS)
def test_transformers_gives_the_same_weights(row, folders):
    quantized, _ = folders(row)
    model = AutoModelForCausalLM.from_pretrained(
        quantized,
        dtype=torch.bfloat16,
        quantization_config=FineGrainedFP8Config(
            dequantize=True, weight_block_size=WRITERS[row].entry["weight_block_size"]
        ),
    )
    checkpoint = Checkpoint.open(quantized)
    state = model.state_dict()
    for name in checkpoint.tensors:
        assert torch.equal(checkpoint.read([name])[name], state[name]), name


@pytest.mark.parametrize("row", ["fp8 partial blocks", "sparse-24-bitmask of fp8"])
def test_every_verb_sees_the_dense_model(row, folders, text, tmp_path):
    quantized, dense = folders(row)
    options = {"data": str(text), "seq_len": 32, "segments": 4, "device": "cpu"}
    seen, expected = (halve.perplexity(f, **options) for f in folders(row))
    assert seen.perplexity == expected.perplexity
    seen, expected = (halve.inspect(f) for f in folders(row))
    assert (seen.parameters, seen.zeros) == (expected.parameters, expected.zeros)
    assert seen.bytes < expected.bytes
    for matrix, other in zip(seen.matrices, expected.matrices, strict=True):
        assert (matrix.packed, matrix.packed_bytes) == (False, other.packed_bytes)
        assert matrix.bytes < other.bytes
    seen, expected = (halve.plan(f).to_dict() for f in folders(row))
    # Codes and scales are in memory as well while a block is read.
    assert seen["bytes_by_phase"].pop("reading")["files"] > 0
    same = ("prunable_weights", "matrices", "bytes_output", "bytes_by_phase")
    assert [seen[key] for key in same] == [expected[key] for key in same]
    halve.unpack(quantized, tmp_path / "unpacked")
    unpacked, original = Checkpoint.open(tmp_path / "unpacked"), Checkpoint.open(dense)
    assert unpacked.is_dense
    for name in original.tensors:
        assert torch.equal(unpacked.read([name])[name], original.read([name])[name])


@pytest.mark.parametrize(
    "options", [MAGNITUDE, MAGNITUDE | {"quantize": "int4", "packed": True}], ids=str
)
@pytest.mark.parametrize("row", ["fp8 blocks", "int-quantized, groups"])
def test_pruning_it_is_pruning_the_dense_model(row, options, folders, tmp_path):
    for kind, folder in zip(("quantized", "dense"), folders(row), strict=True):
        halve.prune(folder, tmp_path / kind, **options)
    assert digests(tmp_path / "quantized") == digests(tmp_path / "dense")
    config = json.loads((tmp_path / "quantized/config.json").read_text())
    method = config.get("quantization_config", {}).get("quant_method")
    assert method == ("halve" if options.get("packed") else None)
    assert not halve.verify(tmp_path / "quantized").findings


def test_solvers_that_run_the_model_see_the_dense_one(folders, text, tmp_path):
    options = {"calibration": str(text), "samples": 4, "seq_len": 32, "device": "cpu"}
    for kind, folder in zip(("a", "b"), folders("fp8 blocks"), strict=True):
        halve.prune(folder, tmp_path / kind, solver="sparsegpt", **options)
    assert digests(tmp_path / "a") == digests(tmp_path / "b")


def test_a_quantized_model_is_not_run_as_it_is(folders):
    with pytest.raises(UnsupportedModelError, match=r"fp8, 16 x 16.*halve unpack"):
        halve.load(folders("fp8 blocks")[0], "cpu")


@pytest.mark.parametrize("name", ["quantization_config", "compression_config"])
def test_other_places_of_the_entry(name, folders, tmp_path):
    """Old releases name the entry otherwise, and it may be within the text config."""
    quantized, dense = folders("sparse-bitmask")
    for path in quantized.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    config = json.loads((tmp_path / "config.json").read_text())
    entry = config.pop("quantization_config")
    config |= {name: entry} if name[0] == "c" else {"text_config": {name: entry}}
    (tmp_path / "config.json").write_text(json.dumps(config))
    seen, expected = Checkpoint.open(tmp_path), Checkpoint.open(dense)
    assert torch.equal(seen.read([Q])[Q], expected.read([Q])[Q])
    if name[0] == "c":
        halve.prune(tmp_path, tmp_path / "out", **MAGNITUDE)
        assert name not in json.loads((tmp_path / "out/config.json").read_text())


def save(folder, tensors, entry):
    save_file(tensors, folder / WEIGHTS, {"format": "pt"})
    config = {"quantization_config": entry}
    (folder / "config.json").write_text(json.dumps(config))


@pytest.mark.parametrize("kind", [torch.uint8, torch.float8_e8m0fnu], ids=str)
@pytest.mark.parametrize("dtype", [FP8, torch.float8_e5m2], ids=str)
def test_every_code_with_every_exponent_is_that_of_transformers(dtype, kind, tmp_path):
    """Subnormal products and overflows included; NaN has many bit patterns."""
    codes = torch.arange(256).to(torch.uint8).view(dtype)
    numbers = codes[~codes.float().isnan()].view(torch.uint8).expand(255, -1)
    codes = numbers.contiguous().view(dtype)
    scales = torch.arange(255).to(torch.uint8).view(kind).view(255, 1)
    tensors = {"a.weight": codes, "a.weight_scale_inv": scales}
    save(tmp_path, tensors, {"quant_method": "mxfp8"})
    read = Checkpoint.open(tmp_path).read(["a.weight"])["a.weight"]
    expected = Fp8Dequantize(None)._dequantize_one(codes, scales, torch.bfloat16)
    assert torch.equal(read.view(torch.int16), expected.view(torch.int16))


def test_every_pair_of_mxfp4_with_every_exponent_is_that_of_transformers(tmp_path):
    blocks = torch.arange(256).view(1, 1, 16, 16).expand(1, 255, 16, 16)
    scales = torch.arange(255).view(1, 255, 1).expand(1, 255, 16)
    blocks, scales = (t.to(torch.uint8).contiguous() for t in (blocks, scales))
    save(tmp_path, {"e_blocks": blocks, "e_scales": scales}, {"quant_method": "mxfp4"})
    read = Checkpoint.open(tmp_path).read(["e"])["e"]
    expected = convert_moe_packed_tensors(blocks, scales, dtype=torch.bfloat16)
    assert torch.equal(read.view(torch.int16), expected.view(torch.int16))


def test_a_stack_of_matrices_has_scales_for_each(tmp_path):
    """Experts may be fused into one parameter, whose name has no `.weight`."""
    generator = torch.Generator().manual_seed(0)
    codes = torch.randn(3, 32, 48, generator=generator).to(FP8)
    scales = torch.rand(3, 2, 3, generator=generator)
    tensors = {"experts.up_proj": codes, "experts.up_proj_scale_inv": scales}
    save(tmp_path, tensors, {"quant_method": "fp8", "weight_block_size": [16, 16]})
    expected = Fp8Dequantize(None)._dequantize_one(codes, scales, torch.bfloat16)
    checkpoint = Checkpoint.open(tmp_path)
    assert list(checkpoint.tensors) == ["experts.up_proj"]
    read = checkpoint.read(["experts.up_proj"])["experts.up_proj"]
    assert torch.equal(read, expected)


def test_blocks_have_128_rows_and_columns_unless_the_config_says_otherwise(tmp_path):
    codes, scales = torch.ones(192, 130).to(FP8), torch.rand(2, 2)
    tensors = {"a.weight": codes, "a.weight_scale_inv": scales}
    save(tmp_path, tensors, {"quant_method": "fp8"})
    read = Checkpoint.open(tmp_path).read(["a.weight"])["a.weight"]
    assert torch.equal(read, decoded(codes, scales, (128, 128)))


def test_scales_of_activations_and_of_the_cache_are_left_out(tmp_path):
    weight = torch.ones(4, 8)
    tensors, _ = WRITERS["float-quantized, channel"].write("attn.k_proj", weight)
    dense = {"attn.norm.weight": torch.ones(8), "other.k_scale": torch.ones(1)}
    unused = ("attn.k_scale", "attn.v_scale", "attn.k_proj.output_scale")
    tensors |= {name: torch.ones(1) for name in unused} | dense
    save(tmp_path, tensors, WRITERS["float-quantized, channel"].entry)
    kept = {"attn.k_proj.weight", *dense}
    assert Checkpoint.open(tmp_path).tensors.keys() == kept


@pytest.fixture(scope="module")
def gpt_oss(tmp_path_factory):
    """Return a random gpt-oss whose experts are stored in MXFP4."""
    folder = tmp_path_factory.mktemp("gpt-oss")
    torch.manual_seed(0)
    config = GptOssConfig(
        vocab_size=64,
        hidden_size=64,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=2,
        head_dim=32,
        num_local_experts=3,
        num_experts_per_tok=2,
        pad_token_id=0,
    )
    model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    model.save_pretrained(folder)
    tensors = load_file(folder / WEIGHTS)
    generator = torch.Generator().manual_seed(1)
    for name in [n for n in tensors if n.endswith(("gate_up_proj", "down_proj"))]:
        experts, inputs, outputs = tensors.pop(name).shape
        shape = (experts, outputs, inputs // 32)
        blocks = torch.randint(256, (*shape, 16), generator=generator)
        tensors[f"{name}_blocks"] = blocks.to(torch.uint8)
        # The last exponent would be NaN.
        scales = torch.randint(255, shape, generator=generator)
        tensors[f"{name}_scales"] = scales.to(torch.uint8)
    save_file(tensors, folder / WEIGHTS, {"format": "pt"})
    announce(folder, {"quant_method": "mxfp4", "modules_to_not_convert": ["router"]})
    return folder


def test_mxfp4_is_what_transformers_makes_of_it(gpt_oss):
    checkpoint, stored = Checkpoint.open(gpt_oss), load_file(gpt_oss / WEIGHTS)
    for end, shape in (("gate_up_proj", (3, 64, 64)), ("down_proj", (3, 32, 64))):
        name = f"model.layers.0.mlp.experts.{end}"
        info = checkpoint.tensors[name]
        assert (info.shape, info.dtype, info.label) == (shape, torch.bfloat16, "mxfp4")
        blocks, scales = stored[f"{name}_blocks"], stored[f"{name}_scales"]
        expected = convert_moe_packed_tensors(blocks, scales, dtype=torch.bfloat16)
        assert torch.equal(checkpoint.read([name])[name], expected)
        assert f"{name}_blocks" not in checkpoint.tensors
        assert f"{name}_scales" not in checkpoint.tensors


def test_transformers_loads_the_same_experts(gpt_oss):
    model = AutoModelForCausalLM.from_pretrained(gpt_oss, dtype=torch.bfloat16)
    checkpoint, state = Checkpoint.open(gpt_oss), model.state_dict()
    assert checkpoint.tensors.keys() == state.keys()
    for name in checkpoint.tensors:
        assert torch.equal(checkpoint.read([name])[name], state[name]), name


def test_a_dry_run_counts_codes_and_scales_while_a_block_is_read(gpt_oss):
    """Of the largest quantized tensor; the dense ones are in memory anyway."""
    plan = halve.plan(gpt_oss, samples=2, seq_len=8, device="cpu")
    infos = Checkpoint.open(gpt_oss).tensors.values()
    phase = plan.forecast.by_name()["reading"]
    assert phase["files"] == max(i.stored_bytes for i in infos if i.format) > 0
    assert phase["weights"] == plan.forecast.by_name()["collecting"]["weights"]


def test_its_tensors_are_those_of_the_model(gpt_oss):
    infos = Checkpoint.open(gpt_oss).tensors.values()
    stored = [StoredTensor(i.name, i.shape, i.dtype) for i in infos]
    assert len(match_names(build_meta_model(gpt_oss), stored).places) >= len(stored)


REFUSED = {
    "gptq": ({"quant_method": "gptq", "bits": 4}, "gptq"),
    "awq": ({"quant_method": "awq", "bits": 4}, "awq"),
    "bitsandbytes": (
        {"quant_method": "bitsandbytes", "load_in_4bit": True},
        r"bitsandbytes.*model\.dequantize\(\)",
    ),
    "packed int4": (
        {"quant_method": "compressed-tensors", "format": "pack-quantized"},
        r"pack-quantized.*CompressedTensorsConfig\(dequantize=True\)",
    ),
    "a group of nvfp4": (
        {
            "quant_method": "compressed-tensors",
            "format": "mixed-precision",
            "config_groups": {"a": {"format": "nvfp4-pack-quantized"}},
        },
        "nvfp4-pack-quantized",
    ),
    "old sparse and int4": (
        {
            "quant_method": "compressed-tensors",
            "sparsity_config": {"format": "marlin_24"},
        },
        "marlin-24",
    ),
    "rotated": (
        {
            "quant_method": "compressed-tensors",
            "format": "float-quantized",
            "transform_config": {"config_groups": {"R1": {"type": "hadamard"}}},
        },
        "rotated weights",
    ),
    "blocks of two sizes": (
        {
            "quant_method": "compressed-tensors",
            "config_groups": {
                name: {"weights": {"block_structure": size}}
                for name, size in (("a", [128, 128]), ("b", "64x128"))
            },
        },
        "several sizes",
    ),
    "fp4 experts": ({"quant_method": "fp8", "expert_dtype": "fp4"}, "FP4"),
}


@pytest.mark.parametrize("row", REFUSED)
def test_others_are_refused_by_name(row, folders, tmp_path):
    entry, message = REFUSED[row]
    (tmp_path / "config.json").write_bytes(
        (folders("fp8 blocks")[1] / "config.json").read_bytes()
    )
    announce(tmp_path, entry)
    with pytest.raises(UnsupportedModelError, match=message):
        build_meta_model(tmp_path)


def test_codes_without_an_entry_in_the_config_are_refused(folders, tmp_path):
    quantized, dense = folders("fp8 blocks")
    (tmp_path / WEIGHTS).write_bytes((quantized / WEIGHTS).read_bytes())
    (tmp_path / "config.json").write_bytes((dense / "config.json").read_bytes())
    with pytest.raises(CheckpointError, match=r"float8_e4m3fn, and no scales"):
        Checkpoint.open(tmp_path)
