"""Mixtures of experts through the public entry point, and back into transformers."""

import copy
import json
import resource
import shutil
import sys
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM

import halve
from halve.cli import main
from halve.distributed import SINGLE_PROCESS, Ranks
from halve.models import Experts, build_meta_model
from halve.options import PruneOptions
from halve.pruning import MemoryPlan, forecast_run, plan_memory, prune_block
from halve.pruning import prune as prune_module
from halve.pruning.memory import forecast as forecast_module
from halve.pruning.memory.limit import agree
from halve.pruning.observe import expert_statistics
from halve.pruning.plan import make_plan
from halve.pruning.windows import calibration_windows
from halve.runtime import blockwise_model as model_module
from halve.runtime import experts_in_turn as turn_module
from halve.runtime.blockwise_model import BlockwiseModel
from tests.interruptions import Stopped, digests, stop_at
from tests.tables import MIXTURES

# Tokens of the block's mean for each column: of an expert's inputs, and inside it.
A = (0.3, 0.1)

SIZES: dict[str, Any] = {"samples": 4, "seq_len": 32, "device": "cpu"}
# Families whose checkpoints hold all experts of a block in one tensor.
FUSED = {"granitemoe", "gpt_oss", "gemma4"}


@pytest.fixture(scope="module")
def text(text, tmp_path_factory):  # in place of the fixture of all tests
    """Return the start of the text: encoding all of it takes longer than pruning."""
    start = tmp_path_factory.mktemp("start") / "python.txt"
    start.write_bytes(text.read_bytes()[:20_000])
    return start


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


def test_a_router_that_looks_experts_up_stays(pico, text, tmp_path):
    folder = shutil.copytree(pico("deepseek_v4"), tmp_path / "model")
    tensors = load_file(folder / "model.safetensors")
    table = "model.layers.0.ffn.gate.tid2eid"
    tensors[table] = torch.arange(tensors[table].numel()).view(-1, 2) % 4
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    out = tmp_path / "out"
    options: dict[str, Any] = {"calibration": str(text)} | SIZES
    record = halve.prune(folder, out, solver="sparsegpt", **options)
    assert record.sparsity == 0.5
    after = _tensors(out)
    assert torch.equal(after[table], tensors[table])
    last = "model.norm.weight"  # which a renaming of other norms would take away
    assert torch.equal(after[last], tensors[last])
    info = AutoModelForCausalLM.from_pretrained(out, output_loading_info=True)[1]  # pyright: ignore[reportIndexIssue]
    assert not any(info.values()), info


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
    "deepseek_v4": ({"num_hidden_layers": 4}, 4, 256 * 3 * 4),
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


def test_blocks_of_several_classes_are_found(pico):
    blocks = build_meta_model(pico("jamba")).blocks
    assert len({type(block) for block in blocks}) == 2


class TestStatistics:
    """Each expert's statistic against that of a plain loop in the dense model."""

    ROWS = ("mixtral", "deepseek_v3", "nemotron_h", "granitemoe", "gpt_oss", "gemma4")

    @staticmethod
    def observed(monkeypatch, folder, out, text, **options):
        """Prune; return the Gram matrix and weight of each group, and the record."""
        found: dict[str, torch.Tensor] = {}
        real = prune_block.solve_stage

        def spy(state, model, stage, options):
            for inputs in copy.deepcopy(stage):
                inputs.finish(SINGLE_PROCESS, needs_held_out=True)
                name = f"{state.planned.name}.{inputs.group.leader}"
                found[name] = inputs.statistic.matrix
            return real(state, model, stage, options)

        monkeypatch.setattr(prune_block, "solve_stage", spy)
        record = halve.prune(folder, out, calibration=str(text), **(SIZES | options))
        return found, record

    @staticmethod
    def windows(folder, text, **options):
        plan = make_plan(
            folder, PruneOptions(calibration=str(text), **SIZES, **options)
        )
        return calibration_windows(plan, trust_remote_code=False).ids

    @staticmethod
    def calls(dense, pruned, path, blocks, windows):
        """Return what a module of experts is called with behind pruned blocks."""
        index = int(path.removeprefix(f"{blocks}.").partition(".")[0])
        for earlier in range(index):
            other = pruned.get_submodule(f"{blocks}.{earlier}")
            dense.set_submodule(f"{blocks}.{earlier}", other)
        calls = []
        module = dense.get_submodule(path)
        handle = module.register_forward_pre_hook(lambda _, args: calls.append(args))
        with torch.no_grad():
            dense(windows, use_cache=False)
        handle.remove()
        return module, calls[0]

    @staticmethod
    def products(module, number, rows):
        """Return X and the inner activations of one expert, by its 3-D parameters."""
        first = "gate_up_proj" if module.has_gate else "up_proj"
        weight = getattr(module, first)[number]
        outputs = rows @ (weight if module.is_transposed else weight.T)
        if module.has_bias:
            outputs = outputs + getattr(module, f"{first}_bias")[number]
        gate = module._apply_gate if module.has_gate else module.act_fn
        return rows, gate(outputs)

    @pytest.mark.parametrize("row", ROWS)
    def test_gram_matrices_are_those_of_a_plain_loop(
        self, row, pico, text, tmp_path, monkeypatch
    ):
        """Of each expert's tokens, shrunk towards those of all tokens.

        There are fewer tokens than would be thinned, so both means are exact.
        """
        folder, out = pico(row), tmp_path / "out"
        options = {"solver": "sparsegpt"}
        found, record = self.observed(monkeypatch, folder, out, text, **options)
        windows = self.windows(folder, text, **options)
        pruned: Any = AutoModelForCausalLM.from_pretrained(out).eval()
        paths = BlockwiseModel.open(folder, "cpu").experts
        blocks = build_meta_model(folder).path
        for path in paths:
            dense: Any = AutoModelForCausalLM.from_pretrained(folder).eval()
            module, call = self.calls(dense, pruned, path, blocks, windows)
            hidden, index = call[0].flatten(0, -2), call[1]
            counts = [int((index == e).any(dim=1).sum()) for e in range(4)]
            block, _, inside = path.removeprefix(f"{blocks}.").partition(".")
            recorded = record.blocks[int(block)].expert_tokens[inside]
            assert list(recorded) == counts
            for number in range(4):
                own = hidden[(index == number).any(dim=1)]
                every = self.products(module, number, hidden)
                prefix = f"{path}.{number}."
                grams = [g for name, g in found.items() if name.startswith(prefix)]
                for actual, rows, all_rows, a in zip(
                    *(grams, self.products(module, number, own), every, A), strict=True
                ):
                    x, all_x = rows.double(), all_rows.double()
                    mean = all_x.T @ all_x / len(all_x)
                    expected = x.T @ x + a * x.shape[1] * mean
                    difference = (actual - expected).norm() / expected.norm()
                    assert difference < 1e-5, prefix

    def test_rows_may_be_weighed_by_the_router(self, pico, text, tmp_path, monkeypatch):
        """By weights whose mean square is 1, for an expert's own tokens."""
        weighting = expert_statistics.Weighting(0, 0, first=True, last=True)
        monkeypatch.setattr(expert_statistics, "WEIGHTING", weighting)
        folder, options = pico("mixtral"), {"solver": "sparsegpt"}
        found, _ = self.observed(monkeypatch, folder, tmp_path / "o", text, **options)
        windows = self.windows(folder, text, **options)
        dense: Any = AutoModelForCausalLM.from_pretrained(folder).eval()
        path = "model.layers.0.mlp.experts"
        module, call = self.calls(dense, dense, path, "model.layers", windows)
        hidden, (_, index, weights) = call[0].flatten(0, -2), call
        for number in range(4):
            sent = index == number
            own = weights[sent].double() / weights[sent].double().square().mean().sqrt()
            prefix = f"{path}.{number}."
            grams = [g for name, g in found.items() if name.startswith(prefix)]
            rows = self.products(module, number, hidden[sent.any(dim=1)])
            for actual, inputs in zip(grams, rows, strict=True):
                x = inputs.double() * own[:, None]
                assert (actual - x.T @ x).norm() < 1e-5 * (x.T @ x).norm(), prefix

    def test_experts_without_tokens_are_fitted_to_those_of_all(
        self, pico, text, tmp_path
    ):
        folder, out = pico("mixtral", num_local_experts=24), tmp_path / "out"
        few: dict[str, Any] = SIZES | {"samples": 2, "seq_len": 4}
        with pytest.warns(halve.HalveWarning, match=r"sent no token to \d+ experts"):
            record = halve.prune(folder, out, calibration=str(text), **few)
        assert record.sparsity == 0.5
        for block in record.blocks:
            (tokens,) = block.expert_tokens.values()
            assert min(tokens) == 0
            # One of the two windows is held out; each token has two experts.
            assert sum(tokens) == 4 * 2


# Each of a checkpoint with a tensor for each matrix, and of one with one for all.
WAYS: dict[str, dict[str, Any]] = {
    "refined": {"solver": "auto", "refine": True, "epochs": 2, "sparsity": "2:4"},
    "in order": {"solver": "sparsegpt", "sequential": True},
    "quantized": {"solver": "auto", "quantize": "int4", "group_size": 16},
    "allocated": {"solver": "sparsegpt", "allocation": "error", "sparsity": "63%"},
    "magnitude": {"solver": "magnitude"},
}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("row", ["mixtral", "gpt_oss"])
def test_every_way_prunes_experts_and_resumes(row, way, pico, text, tmp_path):
    folder = pico(row, dtype=torch.bfloat16)
    options: dict[str, Any] = {"calibration": str(text)} | SIZES | WAYS[way]
    whole, stopped = tmp_path / "whole", tmp_path / "stopped"
    phases = []
    record = halve.prune(folder, whole, progress=phases.append, **options)
    with pytest.raises(Stopped):  # in the second block
        halve.prune(folder, stopped, progress=stop_at(len(phases) - 1), **options)
    halve.prune(folder, stopped, **options)
    assert digests(whole) == digests(stopped)
    assert not halve.verify(whole).findings
    wanted = 0.63 if way == "allocated" else 0.5
    # Rounding to a grid adds zeros: those of the weights that are kept and small.
    added = 5e-3 if way == "quantized" else 2e-3
    assert wanted - 1e-4 < record.sparsity < wanted + added
    if way == "refined":
        assert all(b.refined and b.refined[1] <= b.refined[0] for b in record.blocks)
    evaluated = halve.perplexity(whole, data=str(text), seq_len=32, segments=4)
    assert evaluated.perplexity > 1


@pytest.mark.parametrize("row", ["mixtral", "gpt_oss", "deepseek_v3", "gemma4"])
@pytest.mark.parametrize("way", ["in order", "corrected"])
def test_spilled_experts_change_no_byte(way, row, pico, text, tmp_path, monkeypatch):
    folder = pico(row, dtype=torch.bfloat16)
    options: dict[str, Any] = {"calibration": str(text)} | SIZES
    options |= {"solver": "auto"} if way == "corrected" else WAYS[way]
    phases = []
    halve.prune(folder, tmp_path / "held", progress=phases.append, **options)

    in_turn, outputs = [], turn_module._outputs
    monkeypatch.setattr(
        turn_module, "_outputs", lambda *a: in_turn.append(a) or outputs(*a)
    )
    mapped, spill = [], model_module.spill_weight
    monkeypatch.setattr(
        model_module, "spill_weight", lambda *a: mapped.append(a) or spill(*a)
    )
    spilled = MemoryPlan(2**30, spilled=True)
    monkeypatch.setattr(prune_module, "plan_memory", lambda *_: spilled)
    with pytest.raises(Stopped):
        halve.prune(
            folder, tmp_path / "out", progress=stop_at(len(phases) - 1), **options
        )
    halve.prune(folder, tmp_path / "out", **options)
    assert len(in_turn) >= 3  # two blocks, one of them again on resuming
    assert mapped
    assert digests(tmp_path / "held") == digests(tmp_path / "out")


def test_processes_spill_where_one_of_them_has_to():
    """Else they would wait for each other's tensors in different orders."""

    class Two(Ranks):
        def all_gather(self, value):
            return [value, MemoryPlan(5, spilled=True)]

    assert agree(MemoryPlan(7), Two()) == MemoryPlan(7, spilled=True)
    assert agree(MemoryPlan(7), SINGLE_PROCESS) == MemoryPlan(7)


def test_experts_are_spilled_where_a_block_does_not_fit(pico, monkeypatch):
    monkeypatch.setattr(forecast_module, "resident_memory", lambda: 0)
    wide = {"intermediate_size": 256, "num_local_experts": 24}
    plan = make_plan(pico("mixtral", **wide), PruneOptions(**SIZES, solver="sparsegpt"))
    held, spilled = (forecast_run(plan, 0, spilled=s) for s in (False, True))
    experts = 24 * 3 * 256 * 32 * 4  # float32
    tensor = 256 * 32 * 4
    phases = zip(held.phases, spilled.phases, strict=True)
    saved = {mine.name: mine.bytes - other.bytes for mine, other in phases}
    assert saved.pop("embedding") == 0
    assert set(saved.values()) == {experts - tensor}
    kept = 4 * 32 * 32 * 4  # samples, tokens, columns, bytes
    assert spilled.mapped - held.mapped == experts + 2 * kept
    assert plan_memory(plan, spilled.peak, None).spilled
    assert not plan_memory(plan, 2 * held.peak, None).spilled
    with pytest.raises(halve.HalveError, match="needs at least"):
        plan_memory(plan, spilled.peak - 1, None)


def test_inspection_shows_the_experts_of_a_block_on_one_line(pico, capsys, monkeypatch):
    arguments = ["halve", "inspect", "--all", str(pico("mixtral"))]
    monkeypatch.setattr(sys, "argv", arguments)
    with pytest.raises(SystemExit):
        main()
    lines = capsys.readouterr().out.splitlines()
    shown = [line for line in lines if "experts x 4" in line]
    assert len(shown) == 6
    assert "block_sparse_moe.experts.*.w1, experts x 4" in shown[0]


def test_a_dry_run_knows_experts(pico):
    """Inputs that are kept, the Gram matrices of one expert, and all weights."""
    one, many = (
        halve.plan(pico("mixtral", num_local_experts=n), **SIZES) for n in (4, 24)
    )
    small, large = (run.forecast.by_name() for run in (one, many))
    for name in ("observing an expert", "solving an expert"):
        assert small[name]["grams"] == large[name]["grams"] > 0
        assert large[name]["weights"] > 3 * small[name]["weights"]
    kept = 4 * 32 * 32 * 4  # samples, tokens, columns, bytes
    assert (kept, one.plan.activation_parts) in one.forecast.activations
