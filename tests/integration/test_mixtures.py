"""Mixtures of experts through the public entry point, and back into transformers."""

import json
import resource
import shutil
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM

import halve
from halve.models import Experts, build_meta_model
from halve.options import PruneOptions
from halve.pruning.plan import make_plan
from halve.runtime.blockwise_model import BlockwiseModel
from tests.tables import MIXTURES

SIZES: dict[str, Any] = {"samples": 4, "seq_len": 32, "device": "cpu"}
# Families whose checkpoints hold all experts of a block in one tensor.
FUSED = {"granitemoe", "gpt_oss", "gemma4"}


def _tensors(folder):
    found = {}
    for path in sorted(folder.glob("*.safetensors")):
        found |= load_file(path)
    return found


def _slices(tensors, name):
    """Return a tensor, or the slice of one that the name of a matrix ends with."""
    tensor, _, index = name.rstrip("]").partition("[")
    return tensors[tensor][int(index)] if index else tensors[tensor]


@pytest.mark.parametrize("sparsity", ["50%", "2:4"])
@pytest.mark.parametrize("row", MIXTURES)
def test_a_pruned_mixture_loads_in_transformers(row, sparsity, pico, text, tmp_path):
    folder, out = pico(row, dtype=torch.bfloat16), tmp_path / "out"
    solver = "sparsegpt" if sparsity == "50%" else "wanda"
    record = halve.prune(
        folder, out, sparsity=sparsity, solver=solver, calibration=str(text), **SIZES
    )
    before, after = _tensors(folder), _tensors(out)
    names = [m.tensor for m in record.all_matrices]
    pruned = {name.partition("[")[0] for name in names}

    described = ({n: (t.shape, t.dtype) for n, t in x.items()} for x in (before, after))
    assert next(described) == next(described)
    assert len(set(names)) == len(names)
    for name in names:
        matrix = _slices(after, name)
        assert int((matrix == 0).sum()) == matrix.numel() // 2, name
    assert all(torch.equal(after[n], before[n]) for n in before.keys() - pruned)
    held = {n.rpartition(".experts.")[0] for n in pruned if ".experts." in n}
    assert held or row == "granitemoe"  # whose tensors are not named after experts
    info = AutoModelForCausalLM.from_pretrained(out, output_loading_info=True)[1]  # pyright: ignore[reportIndexIssue]
    assert not any(info.values()), info
    assert json.loads((out / "config.json").read_text()) == json.loads(
        (folder / "config.json").read_text()
    )
    assert halve.inspect(out).sparsity == 0.5
    assert not halve.verify(out).findings


@pytest.mark.parametrize("row", MIXTURES)
def test_routers_and_gates_are_never_pruned(row, pico):
    plan = make_plan(pico(row), PruneOptions())
    pruned = {m.tensor for b in plan.layout.blocks for m in b.matrices}
    assert any(b.experts for b in plan.layout.blocks)
    routers = {
        name
        for name in plan.layout.left_dense
        if any(word in name for word in ("gate.", "router.", "shared_expert_gate"))
    }
    assert routers
    assert all("proj" in n or not n.endswith("gate.weight") for n in pruned)
    # What else is left dense is no linear layer: kernels of convolutions, biases.
    others = set(plan.layout.left_dense) - routers
    assert all(
        any(w in n for w in ("conv", "_bias", "A_log", "moe_statics")) for n in others
    ), others


def test_a_shared_expert_as_wide_as_experts_are_many_is_pruned(pico):
    plan = make_plan(pico("qwen2_moe"), PruneOptions())  # 4 experts, 4 inner columns
    pruned = {m.tensor for m in plan.layout.blocks[0].matrices}
    assert "model.layers.0.mlp.shared_expert.gate_proj.weight" in pruned
    left = "model.layers.0.mlp.shared_expert_gate.weight"
    assert left in plan.layout.left_dense


@pytest.mark.parametrize("row", MIXTURES)
def test_experts_as_linear_layers_equal_the_models_own_loop(row, pico):
    """To the last bit."""
    folder = pico(row)
    whole: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    whole.set_experts_implementation("eager")
    model, found = BlockwiseModel.open(folder, "cpu"), 0
    generator = torch.Generator().manual_seed(0)
    for path in model.experts:
        index = int(path.removeprefix(model.meta_model.path + ".").partition(".")[0])
        inside = path.removeprefix(model.block_name(index) + ".")
        own = whole.get_submodule(path)
        with model.block(index) as block, torch.no_grad():
            experts = block.get_submodule(inside)
            assert isinstance(experts, Experts)
            hidden = torch.randn(30, 32, generator=generator)
            chosen = torch.rand(30, 4, generator=generator).topk(2).indices
            weights = torch.rand(30, 2, generator=generator)
            expected = own(hidden, chosen, weights)
            assert torch.equal(experts(hidden, chosen, weights), expected)
            found += 1
        assert type(model.meta_model.model.get_submodule(path)) is type(own)
    assert found


@pytest.mark.parametrize("row", MIXTURES)
def test_a_plan_from_the_config_alone_is_that_of_the_checkpoint(row, pico, tmp_path):
    folder = pico(row, dtype=torch.bfloat16)
    shutil.copy(folder / "config.json", tmp_path)
    whole = make_plan(folder, PruneOptions(**SIZES))
    bare = make_plan(tmp_path, PruneOptions(**SIZES), needs_weights=False)
    for a, b in zip(whole.layout.blocks, bare.layout.blocks, strict=True):
        # Names may differ: files may use older ones, and other parts of experts.
        assert sorted(m.matrix.shape for m in a.matrices) == sorted(
            m.matrix.shape for m in b.matrices
        )


class TestCheckpointsThatContradictTheirConfigs:
    @pytest.mark.parametrize(
        ("row", "count", "found"),
        [
            ("mixtral", 3, "belongs to expert 3, but the config asks for 3 experts"),
            ("mixtral", 5, "has the shape"),
            ("gpt_oss", 3, "has the shape"),
            ("gpt_oss", 5, "has the shape"),
        ],
    )
    def test_another_number_of_experts(self, row, count, found, pico, tmp_path):
        folder = shutil.copytree(pico(row), tmp_path / "model")
        config = json.loads((folder / "config.json").read_text())
        config["num_local_experts"] = count
        (folder / "config.json").write_text(json.dumps(config))
        with pytest.raises(halve.CheckpointError, match=found):
            make_plan(folder, PruneOptions(**SIZES))

    def test_a_missing_matrix_of_one_expert(self, pico, tmp_path):
        folder = shutil.copytree(pico("olmoe"), tmp_path / "model")
        tensors = load_file(folder / "model.safetensors")
        del tensors["model.layers.1.mlp.experts.2.up_proj.weight"]
        save_file(tensors, folder / "model.safetensors", {"format": "pt"})
        with pytest.raises(halve.CheckpointError, match=r"no tensor for .*experts\.2"):
            make_plan(folder, PruneOptions(**SIZES))


HUB_SIZED = {
    "deepseek_v3": ({}, 61, 256 * 3 * 58),
    "qwen3_next": ({"num_hidden_layers": 16}, 16, 512 * 3 * 16),
    "gpt_oss": ({"num_hidden_layers": 36, "num_local_experts": 128}, 36, 128 * 2 * 36),
}


@pytest.mark.parametrize("kind", HUB_SIZED)
def test_models_of_the_hubs_size_are_planned_without_memory(kind, tmp_path):
    """The parameter of one block's experts alone takes up to 30 GB."""
    options, depth, experts = HUB_SIZED[kind]
    AutoConfig.for_model(kind, dtype="bfloat16", **options).save_pretrained(tmp_path)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    plan = make_plan(tmp_path, PruneOptions(seq_len=128), needs_weights=False)
    after = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    blocks = plan.layout.blocks
    matrices = [m for b in blocks for m in b.matrices if m.matrix.expert is not None]
    assert (len(blocks), len(matrices)) == (depth, experts)
    assert after - before < 2**20  # kilobytes


def test_experts_of_an_unknown_form_are_refused(tmp_path):
    options = {"hidden_size": 32, "num_hidden_layers": 1, "num_local_experts": 2}
    config = AutoConfig.for_model("llama4_text", **options)
    config.layer_types = ["full_attention"]
    config.save_pretrained(tmp_path)
    with pytest.raises(halve.HalveError, match="in a form that Halve does not know"):
        make_plan(tmp_path, PruneOptions(seq_len=32), needs_weights=False)


def test_packing_experts_is_refused(pico, tmp_path):
    with pytest.raises(halve.HalveError, match="cannot load packed experts yet"):
        halve.prune(pico("mixtral"), tmp_path / "out", packed=True)
    with pytest.raises(halve.HalveError, match="cannot load packed experts yet"):
        halve.pack(pico("mixtral"), tmp_path / "out")
    assert not any(tmp_path.iterdir())


def test_blocks_of_several_classes_are_found(pico):
    blocks = build_meta_model(pico("jamba")).blocks
    assert len({type(block) for block in blocks}) == 2
