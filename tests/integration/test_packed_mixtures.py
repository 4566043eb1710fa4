"""Mixtures of experts are packed expert by expert, and run so in transformers."""

import copy
import json
import pickle
from functools import partial
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

import halve
from halve.checkpoint import Checkpoint
from halve.runtime.cpu import packed_experts as packed_experts_module
from halve.runtime.cpu.kernels import kernels
from halve.runtime.cpu.operations import Product, multiply_all
from halve.runtime.cpu.packed_experts import PackedExperts, packed_experts
from halve.runtime.cpu.packed_linear import PackedLinear
from tests.integration.test_sparse_models import load, some_ids
from tests.interruptions import digests
from tests.tables import MIXTURES
from tests.twins.format_reader import read_checkpoint

# A tensor for each matrix, with and without a dense block, shared experts and a gate;
# then one tensor for all experts, transposed and interleaved with biases, or renamed.
ROWS = (
    *("mixtral", "qwen3_moe", "olmoe", "deepseek_v3", "nemotron_h"),
    *("gpt_oss", "granitemoe"),
)
STACKED = ("gpt_oss", "granitemoe")
# Wide enough for a mask to take fewer bytes than a layout.
SIZES = {"moe_intermediate_size": 64, "intermediate_size": 64}
# Length and batch: from one row an expert to more than the kernels multiply packed.
SHAPES = ((1, 1), (3, 5), (120, 4))
prune = partial(halve.prune, solver="magnitude", device="cpu")


@pytest.fixture(scope="module")
def both(pico, tmp_path_factory):
    """Return a function that returns a family's pruned model, dense and packed."""
    made = {}

    def folders(row, quantize=None, dtype=torch.float32):
        key = (row, quantize, dtype)
        if key not in made:
            home = tmp_path_factory.mktemp(row)
            options: dict[str, Any] = {"quantize": quantize} if quantize else {}
            prune(pico(row, dtype=dtype, **SIZES), home / "dense", **options)
            halve.pack(home / "dense", home / "packed")
            made[key] = home / "dense", home / "packed"
        return made[key]

    return folders


def expert_matrices(folder) -> list[Any]:
    return [m for m in halve.inspect(folder).matrices if m.experts is not None]


def packed_modules(model) -> list[PackedExperts]:
    return [m for m in model.modules() if isinstance(m, PackedExperts)]


def stored(folder) -> dict[str, Tensor]:
    found = {}
    for path in sorted(folder.glob("*.safetensors")):
        found |= load_file(path)
    return found


@pytest.mark.parametrize("row", ROWS)
def test_every_expert_is_packed_and_comes_back_byte_for_byte(row, both, tmp_path):
    dense, packed = both(row, dtype=torch.bfloat16)
    matrices = expert_matrices(packed)
    assert matrices
    assert all(m.packed and m.bytes < m.rows * m.columns * 2 for m in matrices)
    halve.unpack(packed, tmp_path / "out")
    assert digests(tmp_path / "out") == digests(dense)
    assert not halve.verify(packed).findings
    read, expected = read_checkpoint(packed), stored(dense)
    assert read.keys() == expected.keys()
    for name, tensor in expected.items():
        assert torch.equal(torch.from_numpy(read[name]), tensor.float()), name


@pytest.mark.parametrize("row", ["mixtral", "gpt_oss"])
def test_pruning_packed_is_pruning_and_packing(row, both, pico, tmp_path):
    prune(pico(row, dtype=torch.float32, **SIZES), tmp_path / "out", packed=True)
    assert digests(tmp_path / "out") == digests(both(row)[1])


@pytest.mark.parametrize("row", ROWS)
def test_version_1_suffices_unless_experts_are_stacked(row, both):
    config = json.loads((both(row)[1] / "config.json").read_text())
    version = 2 if row in STACKED else 1
    assert config["quantization_config"]["version"] == version


@pytest.mark.parametrize("row", ROWS)
@torch.no_grad()
def test_a_packed_mixture_computes_what_the_dense_one_does(row, both):
    dense, packed = (load(folder) for folder in both(row))
    modules = packed_modules(packed)
    assert modules
    for module in modules:
        matrices = module.layers.count * len(module.layers.layers)
        own = [m for m in module.modules() if isinstance(m, PackedLinear)]
        assert len(own) == matrices
    for ids in (some_ids(1, 1), some_ids(5, 3), some_ids(60, 4)):
        expected = dense(ids).logits
        assert torch.allclose(packed(ids).logits, expected, rtol=1e-4, atol=1e-5)
    texts = (
        model.generate(some_ids(8, 2), max_new_tokens=16, do_sample=False)
        for model in (dense, packed)
    )
    assert torch.equal(*texts)


@pytest.mark.parametrize("row", ["qwen3_moe", "gpt_oss", "nemotron_h"])
@pytest.mark.parametrize("grid", [None, "int4"])
@torch.no_grad()
def test_experts_in_one_call_are_those_one_by_one(row, grid, both, monkeypatch):
    model = load(both(row, grid, dtype=torch.bfloat16)[1])
    calls = []

    def counted(kernel, products):
        calls.append(multiply_all(kernel, products))
        return calls[-1]

    monkeypatch.setattr(packed_experts_module, "multiply_all", counted)
    together = [model(some_ids(*shape)).logits for shape in SHAPES]
    assert calls and calls[0]
    assert not calls[-1], "many rows an expert are unpacked instead"
    monkeypatch.setattr(packed_experts_module, "multiply_all", lambda *_: False)
    for shape, logits in zip(SHAPES, together, strict=True):
        assert torch.equal(model(some_ids(*shape)).logits, logits)


def test_biases_alone_get_gradients(both):
    """Also where inputs want none, so that no product may leave autograd."""
    (module, *_) = packed_modules(load(both("gpt_oss")[1]))
    biases = [p for n, p in module.named_parameters() if n.endswith("bias")]
    assert biases
    for bias in biases:
        bias.requires_grad_()
    width = module.layers.layers[0].shape[1]
    index = torch.tensor([[0, 1], [1, 2]])
    weights = torch.full((2, 2), 0.5)
    module(torch.randn(2, width), index, weights).sum().backward()
    for bias in biases:
        assert bias.grad is not None and bias.grad.any()


def test_products_that_do_not_fit_are_not_computed(both):
    (module, *_) = packed_modules(load(both("qwen3_moe")[1]))
    layer = next(m for m in module.modules() if isinstance(m, PackedLinear))
    kernel = kernels()
    assert kernel is not None
    x = torch.ones(2, layer.in_features)
    y = torch.zeros(2, layer.out_features)
    bias = torch.zeros(layer.out_features)
    assert multiply_all(kernel, [Product(layer, x, y, bias)])
    assert y.any()
    for bad in (
        Product(layer, x[:, 1:].contiguous(), y, None),
        Product(layer, x, y[:, 1:].contiguous(), None),
        Product(layer, x, y, bias[1:]),
        Product(layer, x, y, bias.double()),
        Product(layer, x.bfloat16(), y.bfloat16(), None),
        Product(None, x, y, None),
    ):
        y.zero_()
        assert not multiply_all(kernel, [bad])
        assert not y.any()


@pytest.mark.parametrize("way", ["int4", "int3"])
@pytest.mark.parametrize("row", ["qwen3_moe", "gpt_oss"])
@torch.no_grad()
def test_so_do_codes(row, way, both):
    dense, packed = both(row, way, dtype=torch.bfloat16)
    assert all("int" in m.storage for m in expert_matrices(packed))
    ids, exact = some_ids(20, 2), load(dense, dtype=torch.float32)
    logits = load(packed, dtype=torch.float32)(ids).logits
    # The kernels hold activations as 16-bit integers with a scale.
    assert (logits - exact(ids).logits).norm() < 1e-3 * exact(ids).logits.norm()


@pytest.mark.parametrize("row", ["mixtral", "gpt_oss"])
@torch.no_grad()
def test_bfloat16_logits_are_as_close_to_float32_as_transformers(row, both):
    dense, packed = both(row, dtype=torch.bfloat16)
    ids = some_ids(40, 2)
    exact = load(dense, dtype=torch.float32)(ids).logits
    errors = [load(f)(ids).logits.float() - exact for f in (dense, packed)]
    assert errors[1].norm() <= 1.001 * errors[0].norm()


@pytest.mark.parametrize("row", ROWS)
def test_saved_again_it_has_the_same_tensors(row, both, tmp_path):
    packed = both(row)[1]
    load(packed).save_pretrained(tmp_path)
    before, after = stored(packed), stored(tmp_path)
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)


@pytest.mark.parametrize("row", ["mixtral", "gpt_oss", "nemotron_h"])
@torch.no_grad()
def test_dequantized_it_is_the_dense_model(row, both):
    dense, packed = (load(folder) for folder in both(row))
    packed.dequantize()
    assert not packed_modules(packed)
    assert packed.state_dict().keys() == dense.state_dict().keys()
    for name, tensor in dense.state_dict().items():
        assert torch.equal(packed.state_dict()[name], tensor), name
    assert torch.equal(packed(some_ids()).logits, dense(some_ids()).logits)


@pytest.mark.parametrize("row", ["mixtral", "gpt_oss"])
@torch.no_grad()
def test_compiles_whole_with_one_operator_for_each_module_of_experts(row, both):
    model, graphs = load(both(row)[1]), []

    def keep(graph, _):
        graphs.append(graph)
        return graph.forward

    compiled = torch.compile(model, fullgraph=True, backend=keep)
    ids = some_ids()
    assert torch.allclose(compiled(ids).logits, model(ids).logits, atol=1e-5)
    calls = [n.target for graph in graphs for n in graph.graph.nodes]
    assert calls.count(packed_experts) == len(packed_modules(model))


@pytest.mark.parametrize("row", ["mixtral", "gpt_oss"])
def test_gradients_pass_through_to_the_inputs(row, both):
    gradients = []
    for folder in both(row):
        model = load(folder)
        x = model.get_input_embeddings()(some_ids()).detach().requires_grad_()
        model(inputs_embeds=x).logits.square().mean().backward()
        gradients.append(x.grad)
    assert torch.allclose(*gradients, rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize(
    "clone", [copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))]
)
@torch.no_grad()
def test_a_copy_outlives_its_original(clone, both):
    model = load(both("mixtral")[1])
    ids = some_ids()
    expected = model(ids).logits
    copied = clone(model)
    del model
    assert torch.equal(copied(ids).logits, expected)


@torch.no_grad()
def test_choices_of_no_expert_count_nothing(both):
    (experts, *_) = packed_modules(load(both("mixtral")[1]))
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(5, experts.layers.layers[0].shape[1], generator=generator)
    index = torch.tensor([[0, 3], [2, 4], [4, 1], [4, 4], [0, 0]])
    weights = torch.rand(5, 2, generator=generator)
    alone = [
        experts(hidden[i : i + 1], index[i : i + 1], weights[i : i + 1])
        for i in range(5)
    ]
    assert torch.allclose(experts(hidden, index, weights), torch.cat(alone), atol=1e-6)
    assert not alone[3].any()
    without = experts(hidden[1:2], index[1:2, :1], weights[1:2, :1])
    assert torch.allclose(alone[1], without, atol=1e-6)
    nothing = experts(hidden, torch.full_like(index, 4), weights)
    assert not nothing.any() and nothing.shape == hidden.shape


@pytest.mark.parametrize("row", ["mixtral", "gpt_oss"])
def test_a_packed_mixture_is_pruned_and_evaluated_like_its_dense_one(
    row, both, text, tmp_path
):
    results = []
    for folder in both(row):
        out = tmp_path / folder.name
        record = prune(folder, out, sparsity="70%", packed=True)
        options = {"data": str(text), "seq_len": 32, "segments": 2, "device": "cpu"}
        results.append(
            (record.sparsity, halve.perplexity(folder, **options).perplexity)
        )
    assert results[0][0] == results[1][0] > 0.69
    assert results[0][1] == pytest.approx(results[1][1], rel=1e-5)
    outputs = [tmp_path / folder.name for folder in both(row)]
    assert stored(outputs[0]).keys() == stored(outputs[1]).keys()
    for name, tensor in stored(outputs[0]).items():
        assert torch.equal(tensor, stored(outputs[1])[name]), name


@pytest.mark.parametrize("row", ["mixtral", "gpt_oss"])
def test_experts_that_stay_dense_lie_beside_packed_ones(row, pico, both, tmp_path):
    """One matrix of every expert, of another sparsity, gains nothing when packed."""
    model = pico(row, dtype=torch.float32, **SIZES)
    rule = r"(w2|down_proj).*"
    prune(model, tmp_path / "packed", packed=True, skip=(rule,))
    kinds = {m.packed for m in expert_matrices(tmp_path / "packed")}
    assert kinds == {True, False}
    halve.unpack(tmp_path / "packed", tmp_path / "dense")
    dense, packed = (load(tmp_path / kind) for kind in ("dense", "packed"))
    ids = some_ids()
    with torch.no_grad():
        assert torch.allclose(packed(ids).logits, dense(ids).logits, atol=1e-5)
    packed.save_pretrained(tmp_path / "again")
    assert stored(tmp_path / "again").keys() == stored(tmp_path / "packed").keys()
    packed.config.dtype = torch.float32
    packed.dequantize()
    with torch.no_grad():
        assert torch.equal(packed(ids).logits, dense(ids).logits)


class TestStacksThatContradictThemselves:
    NAME = "model.layers.0.mlp.experts.gate_up_proj"

    @staticmethod
    def spoilt(folder, out, change) -> Any:
        tensors = stored(folder)
        change(tensors)
        out.mkdir()
        save_file(tensors, out / "model.safetensors", {"format": "pt"})
        (out / "config.json").write_bytes((folder / "config.json").read_bytes())
        return out

    def drop_slice(self, tensors):
        for name in list(tensors):
            if name.startswith(f"{self.NAME}[1]."):
                del tensors[name]

    def drop_last(self, tensors):
        for name in list(tensors):
            if name.startswith(f"{self.NAME}[3]."):
                del tensors[name]

    def drop_mask(self, tensors):
        del tensors[f"{self.NAME}[2].weight_mask"]

    def dense_slice(self, tensors):
        for part in ("_mask", "_offsets", "_layout"):
            del tensors[f"{self.NAME}[2].weight{part}"]

    def another_shape(self, tensors):
        for part in ("", "_mask", "_offsets", "_layout"):
            other = self.NAME.replace("gate_up", "down")
            tensors[f"{self.NAME}[2].weight{part}"] = tensors[
                f"{other}[2].weight{part}"
            ].clone()

    def twice(self, tensors):
        tensors[self.NAME] = torch.zeros(4, 32, 128)

    @pytest.mark.parametrize(
        ("change", "found"),
        [
            ("drop_slice", r"gate_up_proj\[2\].* but .*\[1\].weight is missing"),
            ("drop_last", "has the shape"),
            ("drop_mask", r"gate_up_proj\[2\].weight"),
            ("dense_slice", "is not packed itself"),
            ("another_shape", "another shape, dtype or orientation"),
            ("twice", "twice, dense and packed"),
        ],
    )
    def test_they_are_refused(self, change, found, both, tmp_path):
        folder = both("gpt_oss")[1]
        bad = self.spoilt(folder, tmp_path / "bad", getattr(self, change))
        with pytest.raises(halve.CheckpointError, match=found):
            halve.inspect(bad)
        with pytest.raises(halve.CheckpointError, match=found):
            load(bad)

    def test_a_good_one_is_read(self, both, tmp_path):
        folder = both("gpt_oss")[1]
        good = self.spoilt(folder, tmp_path / "good", lambda _: None)
        assert halve.inspect(good).sparsity == 0.5
        info = Checkpoint.open(good).tensors[self.NAME]
        assert info.shape == (4, 32, 128)


def test_the_table_has_every_kind_of_checkpoint():
    assert set(ROWS) <= set(MIXTURES)
