"""The importance of rows: what it is, and what it does to masks."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import halve
from halve.errors import HalveError, UnsupportedModelError
from halve.grids import QuantScheme
from halve.options import PruneOptions
from halve.patterns import parse_pattern
from halve.pruning.observe.block_state import BlockState, Streams
from halve.pruning.observe.importance import (
    ImportanceOptions,
    importance_passes,
    measure_importance,
)
from halve.pruning.plan import make_plan
from halve.runtime.blockwise_model import BlockwiseModel
from halve.runtime.stream import Stream
from halve.solvers import ADMM, Quantized, SparseGPT
from tests.contracts.problems import correlated
from tests.integration.test_better_solvers import tensors
from tests.tables import PATTERNS

OPTIONS: dict[str, Any] = {"samples": 8, "seq_len": 32, "device": "cpu"}
ROWS = ("opt", "gpt2", "llama", "gptj", "falcon")
LENGTH = 6


def windows(count: int) -> Tensor:
    """Return one window several times: only the random directions differ."""
    ids = torch.randint(
        3, 4096, (1, LENGTH), generator=torch.Generator().manual_seed(1)
    )
    return ids.expand(count, -1).contiguous()


@contextmanager
def second_block(model: Path, ids: Tensor) -> Iterator[BlockState]:
    """Yield a model's second block, with the hidden states that enter it."""
    planned = make_plan(model, PruneOptions(solver="magnitude")).layout.blocks[1]
    blockwise = BlockwiseModel.open(model, "cpu")
    stream = Stream.start(blockwise, ids, 2**30)
    with blockwise.block(0) as block:
        stream.advance(block, 0)
    with blockwise.block(1) as block:
        yield BlockState(block, planned, Streams(stream))


def measured(model: Path, ids: Tensor, samples: int) -> dict[str, Tensor]:
    """Return the importance of the rows of a model's second block."""
    with second_block(model, ids) as state:
        return measure_importance(state, ImportanceOptions(samples, 0))


def exact(model: Path, ids: Tensor) -> dict[str, Tensor]:
    """Return it by one backward pass for each entry of the block's outputs."""
    outputs_of: dict[str, Tensor] = {}

    def keep(name: str, output: Any) -> None:  # noqa: ANN401
        outputs_of[name] = output if output.requires_grad else output.requires_grad_()

    with second_block(model, ids[:1]) as state, torch.enable_grad():
        for planned in state.planned.matrices:
            module = state.block.get_submodule(planned.matrix.path)
            module.register_forward_hook(
                lambda module, args, output, name=planned.name: keep(name, output)
            )
        state.stream.hidden.requires_grad_(True)
        outputs = state.stream.run(state.block, 1, slice(0, 1))[0]
        entries = (outputs / outputs.detach().norm(dim=-1, keepdim=True)).flatten()
        found = dict.fromkeys(outputs_of, torch.zeros(1))
        for entry in entries:
            gradients = torch.autograd.grad(
                entry, list(outputs_of.values()), retain_graph=True
            )
            for name, gradient in zip(outputs_of, gradients, strict=True):
                found[name] = found[name] + gradient.flatten(0, -2).square().sum(0)
    return {name: squares / squares.mean() for name, squares in found.items()}


@pytest.mark.parametrize("row", ROWS)
def test_it_is_what_an_error_in_a_row_costs_the_block(row, pico):
    """The estimate from many random directions, against the whole Jacobian."""
    ids = windows(256)
    found, expected = measured(pico(row), ids, 256), exact(pico(row), ids)
    assert found.keys() == expected.keys()
    for name, squares in expected.items():
        assert float(found[name].mean()) == pytest.approx(1, abs=1e-4)
        # An estimate of a row varies by sqrt(2 / 256) of it or less, and 1 % is added.
        off = (found[name] / ((squares + 0.01) / 1.01) - 1).abs()
        assert float(off.median()) < 0.1, name
        assert float(off.max()) < 0.5, name


def test_only_so_many_windows_are_looked_at(pico):
    ids = torch.randint(
        3, 4096, (6, LENGTH), generator=torch.Generator().manual_seed(2)
    )
    some = measured(pico("llama"), ids, 2)
    same = measured(pico("llama"), ids[:2], 8)
    more = measured(pico("llama"), ids, 6)
    for name, importance in some.items():
        assert torch.equal(importance, same[name])
        assert not torch.equal(importance, more[name])
    assert importance_passes(2, 6) == 1
    assert importance_passes(8, 6) == 3


def test_experts_are_not_measured(pico):
    assert measured(pico("mixtral"), windows(2), 2) == {}


def test_a_block_without_gradients_is_refused_with_what_to_do(pico, text, tmp_path):
    def fail(*_: object, **__: object) -> None:
        raise RuntimeError("derivative for some kernel is not implemented")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Tensor, "backward", fail)
        with pytest.raises(UnsupportedModelError, match="--importance-samples"):
            halve.prune(pico("opt"), tmp_path / "out", calibration=str(text), **OPTIONS)


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
    options = OPTIONS | {"calibration": str(text)} | ALIKE.get(row, {"solver": row})
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
    assert PruneOptions(sparsity="2:4", rules=("fc1=70%",)).row_samples == 8
    assert PruneOptions(sparsity="2:4", rules=("fc1=1:4",)).row_samples == 0
    assert PruneOptions(target_bits=3.0).row_samples == 8
