"""The importance of rows: what it is, and what it does to masks."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

import halve
from halve.errors import HalveError, UnsupportedModelError
from halve.grids import QuantScheme
from halve.options import PruneOptions
from halve.patterns import parse_pattern
from halve.pruning.importance import Importance, ImportanceRun, importance_passes
from halve.pruning.plan import make_plan
from halve.runtime.blockwise_model import BlockwiseModel
from halve.solvers import ADMM, Quantized, SparseGPT
from tests.contracts.problems import correlated
from tests.integration.test_better_solvers import tensors
from tests.interruptions import Stopped, digests, stop_at
from tests.tables import PATTERNS

OPTIONS: dict[str, Any] = {"samples": 8, "seq_len": 32, "device": "cpu"}
WINDOWS = torch.randint(3, 4096, (48, 16), generator=torch.Generator().manual_seed(1))


def measured(model: Path, windows: Tensor = WINDOWS) -> dict[str, Tensor]:
    """Return the importance of the rows of a model."""
    return everything(model, windows).rows


def everything(model: Path, windows: Tensor = WINDOWS) -> Importance:
    """Return all that is measured of a model."""
    blocks = make_plan(model, PruneOptions(solver="magnitude")).layout.blocks
    blockwise = BlockwiseModel.open(model, "cpu")
    run = ImportanceRun(blockwise, blocks, windows, 2**30, None, lambda *_: None)
    return run.measure()


# Each row takes a forward pass; every sixth one tells.
EVERY = 6


def divergences(model: Path, path: str) -> Tensor:
    """Return the mean KL divergence that the same noise in rows of a module costs.

    Noise of every sixth row, one at a time and independent for each token, is added to
    the outputs of the module, in a forward pass of the whole model by transformers.
    """
    whole = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float64).eval()
    generator = torch.Generator().manual_seed(3)
    noise, row = torch.randn(WINDOWS.shape, generator=generator).double(), -1

    def disturb(module: object, args: object, output: Tensor) -> Tensor:
        changed = output.clone()
        if row >= 0:
            changed[..., row] += 0.01 * output.std() * noise.view_as(changed[..., row])
        return changed

    module = whole.get_submodule(path)
    module.register_forward_hook(disturb)
    with torch.no_grad():
        before = whole(WINDOWS).logits.log_softmax(-1)
        found = {}
        for row in range(0, _rows(module), EVERY):
            after = whole(WINDOWS).logits.log_softmax(-1)
            found[row] = (before.exp() * (before - after)).sum(-1).mean()
    return torch.stack([*found.values()])


def _rows(module: Any) -> int:
    return getattr(module, "out_features", None) or module.nf  # of GPT-2's Conv1D


# Row -> modules of different places in a block.
MODULES = {
    "opt": ("model.decoder.layers.0.self_attn.k_proj", "model.decoder.layers.1.fc1"),
    "gpt2": ("transformer.h.1.attn.c_attn",),
    "llama": (
        "model.layers.0.self_attn.q_proj",
        "model.layers.0.mlp.up_proj",
        "model.layers.1.mlp.gate_proj",
    ),
    "gptj": ("transformer.h.0.attn.v_proj",),
}


@pytest.mark.parametrize("row", MODULES)
def test_it_is_what_an_error_in_a_row_costs_the_predictions(row, pico):
    """Errors of the same size, one row at a time, in the whole model."""
    found = measured(pico(row))
    for path in MODULES[row]:
        importance = found[f"{path}.weight"]
        assert float(importance.mean()) == pytest.approx(1, abs=1e-4)
        expected = divergences(pico(row), path)
        importance = importance[::EVERY].double()
        expected = importance.mean() * expected / expected.mean()
        expected = (expected + 0.01) / 1.01
        ratios = importance / expected
        assert float((ratios.log()).abs().median()) < 0.2, path
        logs = torch.stack([importance.log(), expected.log()])
        assert float(torch.corrcoef(logs)[0, 1]) > 0.8, path


# Draws of noise in all weights of a matrix.
DRAWS = 8


def cost_of_noise(model: Path, path: str) -> float:
    """Return the mean KL divergence of multiplying all weights by 1 + 1 % or 1 - 1 %.

    Divided by the square of 1 % and by the number of weights: errors of different
    weights cancel out on average, and what is left is the mean cost of one alone.
    """
    whole: Any = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float64).eval()
    generator, costs = torch.Generator().manual_seed(4), []
    weight = whole.get_submodule(path).weight
    with torch.no_grad():
        before, dense = whole(WINDOWS).logits.log_softmax(-1), weight.clone()
        for _ in range(DRAWS):
            signs = torch.randint(2, dense.shape, generator=generator) * 2 - 1
            weight.copy_(dense * (1 + 0.01 * signs))
            after = whole(WINDOWS).logits.log_softmax(-1)
            costs.append((before.exp() * (before - after)).sum(-1).mean())
    return float(torch.stack(costs).mean()) / 0.01**2 / dense.numel()


@pytest.mark.parametrize("row", MODULES)
def test_saliencies_of_all_matrices_are_divergences(row, pico):
    found = everything(pico(row)).saliency
    for path in MODULES[row]:
        mean = float(found[f"{path}.weight"].exp().mean())
        assert mean == pytest.approx(cost_of_noise(pico(row), path), rel=0.15), path


def test_only_so_many_windows_that_are_not_held_out_are_looked_at(
    pico, text, tmp_path, monkeypatch
):
    seen = []

    def note(run: ImportanceRun) -> Importance:
        seen.append(len(run.windows))
        return Importance()

    monkeypatch.setattr(ImportanceRun, "measure", note)
    options: dict[str, Any] = OPTIONS | {"calibration": str(text)}
    for samples in (None, 3, 100):
        halve.prune(
            pico("opt"), tmp_path / f"{samples}", importance_samples=samples, **options
        )
    assert seen == [7, 3, 7]
    assert importance_passes(2, 8) == 1
    assert importance_passes(100, 8) == 4


def test_experts_are_not_measured(pico, text, tmp_path, monkeypatch):
    monkeypatch.setattr(ImportanceRun, "measure", None)
    options: dict[str, Any] = OPTIONS | {"calibration": str(text)}
    halve.prune(pico("mixtral"), tmp_path / "out", **options)


def test_a_block_without_gradients_is_refused_with_what_to_do(pico, text, tmp_path):
    real = Tensor.backward

    def fail(tensor: Tensor, gradient: Tensor | None = None) -> None:
        if gradient is not None:  # a block's, and not the predictions'
            raise RuntimeError("derivative for some kernel is not implemented")
        real(tensor)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Tensor, "backward", fail)
        with pytest.raises(UnsupportedModelError, match="--importance-samples"):
            halve.prune(pico("opt"), tmp_path / "out", calibration=str(text), **OPTIONS)


def test_a_resumed_run_measures_it_again_unless_nothing_is_left(
    pico, text, tmp_path, monkeypatch
):
    options: dict[str, Any] = OPTIONS | {"calibration": str(text)}
    halve.prune(pico("llama"), tmp_path / "whole", **options)
    with pytest.raises(Stopped):
        halve.prune(pico("llama"), tmp_path / "out", progress=stop_at(18), **options)
    assert (tmp_path / "out.partial/shard-00001.safetensors").exists()
    halve.prune(pico("llama"), tmp_path / "out", **options)
    assert digests(tmp_path / "out") == digests(tmp_path / "whole")


SOME = torch.linspace(0.1, 10, 48).roll(17)
SCHEME = QuantScheme(4, 32, True)


@pytest.mark.parametrize("text", PATTERNS)
def test_equal_rows_change_nothing_and_patterns_hold(text):
    problem, pattern = correlated(), parse_pattern(text)
    plain = problem.solve_with(ADMM(), pattern).weight
    alike = problem.solve_with(ADMM().weighing(torch.ones(48)), pattern)
    weighed = problem.solve_with(ADMM().weighing(SOME), pattern)
    assert torch.equal(alike.weight, plain)
    assert pattern.shortfall(weighed.weight) is None
    assert int((weighed.weight == 0).sum()) == pattern.count(weighed.weight.numel())
    assert torch.equal(weighed.weight, plain) == (":" in text)
    error = problem.error(weighed.weight)
    assert weighed.outcome.error == pytest.approx(error, rel=1e-3)


@pytest.mark.parametrize("text", ["50%", "0.3", "0.9"])
def test_rows_that_matter_keep_more_and_what_counts_falls(text):
    problem = correlated()

    def lost(solution: Tensor) -> float:
        outputs = problem.inputs.double() @ (problem.weight - solution).double().T
        return float((outputs.square() * SOME).sum())

    plain = problem.solve_with(ADMM(), text).weight
    weighed = problem.solve_with(ADMM().weighing(SOME), text).weight
    assert lost(weighed) < lost(plain)
    extra = (weighed != 0).sum(1) - (plain != 0).sum(1)
    third = SOME.argsort()
    assert int(extra[third[-16:]].sum()) > 0 > int(extra[third[:16]].sum())


def test_quantized_masks_are_weighed_and_published_solvers_are_not():
    problem = correlated()
    plain = problem.solve_with(Quantized(ADMM(), SCHEME), "50%").weight
    weighed = problem.solve_with(Quantized(ADMM(), SCHEME).weighing(SOME), "50%").weight
    assert not torch.equal(plain == 0, weighed == 0)
    solver = SparseGPT()
    assert solver.weighing(SOME) is solver


ALIKE: dict[str, dict[str, Any]] = {
    "2:4": {"solver": "auto", "sparsity": "2:4"},
    "sparsegpt": {"solver": "sparsegpt"},
    "no zeros": {"solver": "auto", "sparsity": 0, "quantize": "int4", "group_size": 32},
}


@pytest.mark.parametrize("row", [*ALIKE, "auto", "admm"])
def test_it_reaches_masks_for_which_rows_compete_and_no_others(
    row, pico, text, tmp_path
):
    options: dict[str, Any] = (
        OPTIONS | {"calibration": str(text)} | ALIKE.get(row, {"solver": row})
    )
    for name, samples in (("left out", None), ("0", 0)):
        halve.prune(pico("opt"), tmp_path / name, importance_samples=samples, **options)
    default, off = (tensors(tmp_path / name) for name in ("left out", "0"))
    same = all(torch.equal(default[name], off[name]) for name in off)
    assert same == (row in ALIKE)
    if row in ALIKE:
        with pytest.raises(HalveError, match="importance_samples is 4"):
            halve.prune(pico("opt"), tmp_path / "4", importance_samples=4, **options)


def test_a_rule_may_be_what_rows_compete_for():
    assert PruneOptions(sparsity="2:4").row_samples == 0
    assert (
        PruneOptions(sparsity="2:4", rules=("fc1=70%",), seq_len=512).row_samples == 8
    )
    assert PruneOptions(sparsity="2:4", rules=("fc1=1:4",)).row_samples == 0
    assert PruneOptions(target_bits=3.0, seq_len=2048).row_samples == 2
    assert PruneOptions(target_bits=3.0, seq_len=5000).row_samples == 1
