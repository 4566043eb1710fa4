"""Whole experts dropped: through the public entry point, and back into transformers."""

import json
import shutil
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch.overrides import TorchFunctionMode
from transformers import AutoModelForCausalLM

import halve
from halve.options import PruneOptions
from halve.pruning import drop_experts
from halve.pruning.observe.expert_outputs import ExpertSums
from halve.pruning.plan import make_plan
from halve.pruning.select.experts import SALIENCIES, keep_best, mean_norm, reap
from halve.pruning.windows import calibration_windows
from tests.interruptions import Stopped, digests, stop_at
from tests.tables import MIXTURES, save_pico

SIZES: dict[str, Any] = {"samples": 3, "seq_len": 16, "device": "cpu"}
COUNTS = ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts")
TOTAL = 8
# Row of MIXTURES -> fraction of the experts that is kept. DeepSeek's have two groups.
FAMILIES = {
    "mixtral": "75%",
    "qwen2_moe": "0.25",
    "qwen3_moe": "60%",
    "olmoe": "50%",
    "deepseek_v3": "75%",
    "ernie4_5_moe": "50%",
    "granitemoe": "75%",
    "gpt_oss": "50%",
    "gemma4": "75%",
    "nemotron_h": "50%",
    "jamba": "75%",
    "lfm2_moe": "50%",
}
# Parts of the names of what a router adds to scores, or multiplies them by.
CORRECTIONS = ("correction_bias", "expert_bias", "router.bias", "per_expert_scale")


@pytest.fixture(scope="module")
def text(text, tmp_path_factory):  # in place of the fixture of all tests
    start = tmp_path_factory.mktemp("start") / "python.txt"
    start.write_bytes(text.read_bytes()[:20_000])
    return start


@pytest.fixture(scope="module")
def mixture(tmp_path_factory):
    """Return a function that makes a model of eight experts, once for each row."""
    made = {}

    def make(row, **changes):
        key = json.dumps([row, changes], sort_keys=True)
        if key not in made:
            _, options = MIXTURES[row]
            every: dict[str, Any] = {n: TOTAL for n in COUNTS if n in options}
            groups = {"n_group": 2, "topk_group": 1} if row == "deepseek_v3" else {}
            folder = tmp_path_factory.mktemp(row)
            every |= groups | changes
            made[key] = save_pico(folder, row, **every)
            _fill_corrections(folder)
        return made[key]

    return make


def _fill_corrections(folder):
    """Give corrections values, which are all alike in a new model."""
    tensors = load_file(folder / "model.safetensors")
    generator = torch.Generator().manual_seed(1)
    for name, tensor in tensors.items():
        if any(part in name for part in CORRECTIONS):
            tensor.copy_(0.1 + 0.4 * torch.rand(tensor.shape, generator=generator))
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})


def _tensors(folder):
    found = {}
    for path in sorted(folder.glob("*.safetensors")):
        found |= load_file(path)
    return found


def _drop(folder, out, text, fraction, **options):
    options = {"sparsity": 0, "calibration": str(text), "yes": True} | SIZES | options
    return halve.prune(folder, out, experts=fraction, **options)


class _SeesOnly(TorchFunctionMode):
    """Routers whose scores of dropped experts are minus infinity.

    The scores are told by the router's matrix, which is the second argument of their
    product.
    """

    def __init__(self, kept: dict[int, list[int]]) -> None:
        super().__init__()
        self.kept = kept

    def __torch_function__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        if func is torch.nn.functional.linear:
            kept = self.kept.get(args[1].data_ptr())
            if kept is not None:
                hidden = torch.full_like(result, -torch.inf)
                hidden[..., kept] = result[..., kept]
                return hidden
        return result


def _twin_logits(folder, record, ids):
    """Return the dense model's logits, its routers seeing only the experts kept."""
    model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    model.set_experts_implementation("eager")
    kept = {}
    named = dict(model.named_parameters()) | dict(model.named_buffers())
    for module in record.experts.modules:
        home, numbers = module.module.rpartition(".")[0], list(module.kept)
        dropped = [n for n in range(TOTAL) if n not in numbers]
        for name, value in named.items():
            inside = name.startswith(f"{home}.") and ".experts." not in name
            if not inside or TOTAL not in value.shape:
                continue
            if value.dim() == 2 and len(value) == TOTAL:
                kept[value.data_ptr()] = numbers
            elif "bias" in name:
                value.data[..., dropped] = -torch.inf
    assert len(kept) == len(record.experts.modules)
    with torch.no_grad(), _SeesOnly(kept):
        return model.eval()(ids, use_cache=False).logits


@pytest.mark.parametrize(("row", "fraction"), FAMILIES.items())
def test_what_is_left_equals_a_twin_that_sees_only_the_kept_experts(
    row, fraction, mixture, text, tmp_path
):
    """In plain transformers, with no key missing or unexpected."""
    folder, out = mixture(row), tmp_path / "out"
    record = _drop(folder, out, text, fraction)
    loaded: Any = AutoModelForCausalLM.from_pretrained(out, output_loading_info=True)
    model, info = loaded
    assert not any(info.values()), info
    model.set_experts_implementation("eager")
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(3, 4000, (4, 24), generator=generator)
    with torch.no_grad():
        logits = model.eval()(ids, use_cache=False).logits
    expected = _twin_logits(folder, record, ids)
    assert (logits - expected).norm() <= 2e-6 * expected.norm()

    assert record.experts is not None
    kept = -(-TOTAL * float(fraction.strip("%")) // (100 if "%" in fraction else 1))
    assert record.experts.kept == kept
    before, after = _tensors(folder), _tensors(out)
    assert after.keys() <= before.keys()
    assert {n: t.dtype for n, t in after.items()}.items() <= {
        n: t.dtype for n, t in before.items()
    }.items()
    assert record.sparsity == 0
    assert not halve.verify(out).findings
    written = json.loads((out / "config.json").read_text())
    source = json.loads((folder / "config.json").read_text())
    changed = {
        n for n in written.keys() | source.keys() if written.get(n) != source.get(n)
    }
    assert changed & set(COUNTS)
    # Blocks for further tokens, which the output never has.
    assert changed <= {*COUNTS, "num_nextn_predict_layers"}


def _plain_sums(experts, call, fitted):
    """Return tokens, sums of norms and of weighted norms, token by token."""
    hidden, index, weights = call
    norms, weighted = torch.zeros(2, TOTAL, dtype=torch.float64)
    tokens = torch.zeros(TOTAL, dtype=torch.int64)
    for token in range(fitted):
        for expert, weight in zip(index[token], weights[token], strict=True):
            alone = experts(hidden[token, None], expert.view(1, 1), torch.ones(1, 1))
            norm = alone.double().norm()
            tokens[expert] += 1
            norms[expert] += norm
            weighted[expert] += weight * norm
    return tokens, norms, weighted


@torch.no_grad()
def _first_block(folder, windows):
    """Return the first block, what its experts are called with, and its outputs."""
    model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    block = model.model.layers[0]
    calls, outputs = [], []
    block.mlp.experts.register_forward_pre_hook(lambda _, args: calls.append(args))
    block.register_forward_hook(lambda *args: outputs.append(args[2]))
    model(windows, use_cache=False)
    output = outputs[0][0] if isinstance(outputs[0], tuple) else outputs[0]
    return block, calls[0], output.double()


class TestScores:
    def test_all_are_those_of_a_plain_loop(self, mixture, text, tmp_path, monkeypatch):
        """Sums, scores, the experts kept, and the error of the first block."""
        folder, out = mixture("mixtral"), tmp_path / "out"
        seen: list[ExpertSums] = []
        real = drop_experts.sum_expert_outputs

        def spy(routed):
            seen.append(real(routed))
            return seen[-1]

        monkeypatch.setattr(drop_experts, "sum_expert_outputs", spy)
        monkeypatch.setitem(SALIENCIES, "worst", lambda sums: -reap(sums))
        record = _drop(folder, out, text, "50%")
        options = PruneOptions(calibration=str(text), experts="50%", **SIZES)
        plan = make_plan(folder, options)
        windows = calibration_windows(plan, trust_remote_code=False).ids
        block, call, whole = _first_block(folder, windows)
        fitted = 2 * SIZES["seq_len"]  # of three windows one is held out
        with torch.no_grad():
            tokens, norms, weighted = _plain_sums(block.mlp.experts, call, fitted)
        assert torch.equal(seen[0].tokens, tokens)
        torch.testing.assert_close(seen[0].norms, norms, rtol=1e-5, atol=0)
        torch.testing.assert_close(seen[0].weighted, weighted, rtol=1e-5, atol=0)

        assert record.experts is not None
        first = record.experts.modules[0]
        assert first.kept == keep_best(SALIENCIES[first.saliency](seen[0]), 4)
        error = first.errors[first.saliency]
        assert error == min(first.errors.values()) < max(first.errors.values())
        _, _, left = _first_block(out, windows)
        ratios = (whole - left)[2:].square().sum(-1) / whole[2:].square().sum(-1)
        assert error == pytest.approx(float(ratios.mean()), rel=1e-4)

    def test_an_expert_without_tokens_scores_nothing(self):
        zeros = torch.zeros(2, dtype=torch.float64)
        sums = ExpertSums(torch.tensor([0, 4]), zeros + torch.tensor([0, 8]), zeros)
        assert mean_norm(sums).tolist() == [0, 2]
        assert reap(sums).tolist() == [0, 0]

    @pytest.mark.parametrize(
        ("scores", "kept", "groups", "expected"),
        [
            ([3, 1, 2, 4], 2, 1, (0, 3)),
            ([1, 1, 1, 1], 2, 1, (0, 1)),
            ([9, 8, 7, 6, 1, 2, 3, 4], 4, 2, (0, 1, 6, 7)),
        ],
    )
    def test_the_highest_are_kept_in_each_group(self, scores, kept, groups, expected):
        scores = torch.tensor(scores, dtype=torch.float64)
        assert keep_best(scores, kept, groups) == expected


# What follows -> the row that it is tried with, and options.
WAYS: dict[str, tuple[str, dict[str, Any]]] = {
    "nothing": ("mixtral", {}),
    "sparsegpt": ("gpt_oss", {"sparsity": "2:4", "solver": "sparsegpt"}),
    "tuning": ("gpt_oss", {"refine": True, "epochs": 1}),
    "few bits": (
        "mixtral",
        {"solver": "sparsegpt", "quantize": "int4", "group_size": 16},
    ),
    "allocation": (
        "gpt_oss",
        {"sparsity": "63%", "solver": "wanda", "allocation": "error"},
    ),
}


@pytest.mark.parametrize("way", WAYS)
def test_every_way_follows_and_resumes(way, mixture, text, tmp_path):
    row, options = WAYS[way]
    folder, whole, stopped = mixture(row), tmp_path / "whole", tmp_path / "stopped"
    phases = []
    record = _drop(folder, whole, text, "75%", progress=phases.append, **options)
    assert [p.phase for p in phases].count("choosing experts") == 2
    # While experts are chosen; and in the second block.
    for step in (1, len(phases) - 1) if way == "nothing" else (len(phases) - 1,):
        with pytest.raises(Stopped):
            _drop(folder, stopped, text, "75%", progress=stop_at(step), **options)
    resumed = []
    _drop(folder, stopped, text, "75%", progress=resumed.append, **options)
    assert not any(p.phase == "choosing experts" for p in resumed)
    assert digests(whole) == digests(stopped)
    assert not halve.verify(whole).findings
    wanted = {"sparsegpt": 0.5, "allocation": 0.63}.get(way, 0)
    assert wanted - 1e-4 < record.sparsity
    evaluated = halve.perplexity(whole, data=str(text), seq_len=16, segments=2)
    assert evaluated.perplexity > 1
    if way == "tuning":
        assert record.sparsity == 0
        assert all(b.refined and b.refined[1] <= b.refined[0] for b in record.blocks)


def test_a_dry_run_knows_of_it_from_the_config_alone(mixture, text, tmp_path):
    folder = mixture("deepseek_v3")
    shutil.copy(folder / "config.json", tmp_path)
    options: dict[str, Any] = {"calibration": str(text)} | SIZES
    whole = halve.plan(folder, experts="50%", sparsity=0, **options)
    bare = halve.plan(tmp_path, experts="50%", sparsity=0, **options)
    full = halve.plan(folder, **options)
    assert bare.forecast.output == whole.forecast.output < full.forecast.output
    phase = whole.forecast.by_name()["choosing experts"]
    assert phase["weights"] == full.forecast.by_name()["collecting"]["weights"]
    shown = whole.to_dict()
    assert (shown["experts"], shown["experts_kept"]) == (TOTAL, 4)
    assert "experts" not in full.to_dict()["identity"]  # runs of before can resume


def test_a_changed_number_of_experts_is_found(mixture, text, tmp_path):
    out = tmp_path / "out"
    record = _drop(mixture("mixtral"), out, text, "75%")
    assert record.experts is not None
    kept = record.experts.modules
    changed = [
        halve.records.KeptExpertsRecord(m.module, m.kept[:-1], m.saliency, m.errors)
        for m in kept
    ]
    fields = vars(record) | {
        "experts": halve.records.ExpertsRecord(TOTAL, 5, tuple(changed))
    }
    (out / "halve.json").write_text(halve.PruneRecord(**fields).to_json())
    problems = {finding.problem for finding in halve.verify(out).findings}
    assert problems == {"there are 6 experts, not 5"}
    with pytest.raises(ValueError, match="not 5 of 8 experts"):
        halve.records.ExpertsRecord(TOTAL, 5, kept)


def test_blocks_for_further_tokens_are_left_out(mixture, text, tmp_path):
    """They hold experts that nobody has scored, and would contradict the config."""
    folder = shutil.copytree(mixture("deepseek_v3"), tmp_path / "model")
    tensors = load_file(folder / "model.safetensors")
    extra = "model.layers.61.mlp.experts.0.up_proj.weight"
    beside = "model.layers.61.input_layernorm.weight"
    vision = "vision_tower.layers.0.weight"  # not read by a model of text
    tensors |= {name: torch.zeros(32, 32) for name in (extra, beside, vision)}
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    config |= {"num_nextn_predict_layers": 1}
    (folder / "config.json").write_text(json.dumps(config))
    _drop(folder, tmp_path / "out", text, "50%")
    written = _tensors(tmp_path / "out")
    assert not {extra, beside} & written.keys()
    assert vision in written
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["num_nextn_predict_layers"] == 0


class TestRefusals:
    @pytest.mark.parametrize(
        ("row", "fraction", "found"),
        [
            ("mixtral", "10%", "1 of 8 experts would be kept, but a router"),
            ("mixtral", "99%", "is all of them"),
            ("mixtral", "100%", "is not a fraction of experts"),
            ("mixtral", 0, "is not a fraction of experts"),
            ("mixtral", "2:4", "is not a fraction of experts"),
            ("deepseek_v3", "60%", r"in 2 groups .* a multiple of 2\. .* 75%"),
            ("deepseek_v3", "25%", "needs 4 at least"),
        ],
    )
    def test_a_number_that_cannot_be_routed_to(
        self, row, fraction, found, mixture, tmp_path
    ):
        with pytest.raises(halve.PatternError, match=found):
            halve.prune(mixture(row), tmp_path / "out", experts=fraction)
        assert not any(tmp_path.iterdir())

    def test_a_model_without_experts(self, pico, tmp_path):
        with pytest.raises(halve.UnsupportedModelError, match="has no experts to drop"):
            halve.prune(pico("llama"), tmp_path / "out", experts="50%")

    def test_a_router_that_looks_experts_up(self, pico, tmp_path):
        folder = pico("deepseek_v4")
        with pytest.raises(halve.UnsupportedModelError, match=r"tid2eid .*a table"):
            halve.prune(folder, tmp_path / "out", experts="50%")

    def test_more_than_half_is_asked_for_twice(self, mixture, text, tmp_path):
        with pytest.raises(halve.HalveError, match=r"5 of 8 experts .*--yes"):
            _drop(mixture("mixtral"), tmp_path / "out", text, "30%", yes=False)
        assert not any(tmp_path.iterdir())

    def test_a_config_that_does_not_say_how_many(self, mixture, tmp_path, monkeypatch):
        monkeypatch.setattr("halve.models.fewer_experts._COUNTS", ("count",))
        with pytest.raises(halve.UnsupportedModelError, match="looked for count"):
            halve.prune(mixture("mixtral"), tmp_path / "out", experts="50%")

    def test_an_entry_that_does_not_change_the_model(
        self, mixture, tmp_path, monkeypatch
    ):
        monkeypatch.setattr("halve.models.fewer_experts._COUNTS", ("pad_token_id",))
        folder = shutil.copytree(mixture("mixtral"), tmp_path / "model")
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps(config | {"pad_token_id": 8}))
        with pytest.raises(halve.UnsupportedModelError, match="as many slices"):
            halve.prune(folder, tmp_path / "out", experts="50%")
