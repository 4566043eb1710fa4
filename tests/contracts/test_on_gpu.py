"""Solvers on a GPU: the same solutions, and the host does not wait for each step.

The GPU is not there (see `tests/fake_gpu.py`): what is tested is the code for it, up to
CUDA's own algorithms.
"""

from collections import Counter

import pytest
import torch
from torch import Tensor

from halve.errors import HalveWarning, NumericalError
from halve.grids import QuantScheme
from halve.patterns import parse_pattern
from halve.solvers import (
    ADMM,
    SOLVERS,
    Hessian,
    Quantized,
    Refitted,
    RoundToNearest,
    Solution,
    Solver,
    SparseGPT,
    factors,
    quantized,
    sweep,
)
from halve.solvers.correction import corrected_target
from tests.contracts.problems import Problem, correlated, few_tokens
from tests.contracts.test_factors import positive
from tests.fake_gpu import GPU, fake_gpu

GRID = QuantScheme(4, 48, symmetric=False)
WAYS: dict[str, Solver] = {
    **{name: SOLVERS[name]() for name in SOLVERS},
    "refitted": Refitted(SparseGPT()),
    "nearest": RoundToNearest(GRID),
    "joint": SparseGPT(grid=GRID),
    "rounded": Quantized(ADMM(), GRID),
}
over_ways = pytest.mark.parametrize("way", WAYS)
over_patterns = pytest.mark.parametrize("text", ["50%", "2:4"])


@pytest.fixture(autouse=True)
def small_pieces(monkeypatch):
    """Cut matrices as large ones are, and leave Triton to the tests of its kernel."""
    monkeypatch.setattr(factors, "_GPU_SQUARE", 64)
    monkeypatch.setattr(factors, "_GPU_STRIP", 32)
    monkeypatch.setattr(factors, "_GPU_PIECE", 1000)
    for module in (sweep, quantized):
        monkeypatch.setattr(module, "has_triton", lambda device: False)


def test_tensors_of_two_devices_do_not_mix():
    with fake_gpu() as waits:
        there = torch.ones(3, 4, device="cuda")
        assert (there + 1).T[0].new_zeros(2).device == GPU
        assert (there * torch.tensor(2.0)).device == GPU
        assert there.to("cpu", torch.float64).device == torch.ones(1).device
        with pytest.raises(RuntimeError, match="same device"):
            _ = there + torch.ones(4)
        with pytest.raises(TypeError, match="numpy"):
            there.numpy()
        assert not waits
        assert float(there.sum()) == 12
        assert sum(waits.values()) == 1


def on_gpu(problem: Problem, solver: Solver, text: str) -> tuple[Solution, Counter]:
    """Solve a problem on the GPU; return how often the host has waited for it, too."""
    with fake_gpu() as waits:
        weight, inputs = problem.weight.to(GPU), problem.inputs.to(GPU)
        statistic = solver.needs.statistic(inputs.shape[1], GPU)
        statistic.add(inputs)
        hessian = Hessian.of(statistic, needs=solver.needs)
        solution = solver.solve(hessian, weight, parse_pattern(text))
        assert solution.weight.device == GPU
        if (params := solution.quant_params) is not None:
            assert params.scale.device == params.zero.device == GPU
        return solution, Counter(waits)


@over_ways
@over_patterns
@pytest.mark.parametrize("problem", [correlated, few_tokens])
def test_solutions_are_those_of_the_cpu(way, text, problem):
    expected = problem().solve_with(WAYS[way], text)
    found, _ = on_gpu(problem(), WAYS[way], text)
    assert parse_pattern(text).shortfall(found.weight) is None
    same = (found.weight == 0) == (expected.weight == 0)
    assert same.double().mean() >= 0.985
    errors = [problem().error(s.weight) for s in (found, expected)]
    assert errors[0] == pytest.approx(errors[1], rel=0.02, abs=1e-6)
    if expected.outcome.error is not None:
        assert found.outcome.error == pytest.approx(errors[0], rel=0.01, abs=1e-6)


@pytest.mark.parametrize("way", ["magnitude", "wanda", "sparsegpt", "joint"])
def test_the_host_does_not_wait_for_columns(way):
    """Once for a matrix, a square or a sum of squares; never for a block of columns."""
    few, many = (
        sum(on_gpu(correlated(8, columns), WAYS[way], "50%")[1].values())
        for columns in (128, 640)
    )
    squares = 2 * (640 - 128) // 64  # of the factorization, and of the inverse
    assert many <= few + squares


def test_dead_and_repeated_features_are_damped_there_too():
    problem = correlated()
    problem.inputs[:, [0, 7, 159]] = 0
    expected = problem.solve("sparsegpt", "50%")
    found, _ = on_gpu(problem, SparseGPT(), "50%")
    assert torch.allclose(found.weight, expected.weight, rtol=1e-3, atol=1e-4)


def test_corrected_targets_are_those_of_the_cpu():
    problem = correlated()
    drift = torch.randn(problem.weight.shape)
    expected = corrected_target(problem.hessian(), problem.weight, drift)
    with fake_gpu():
        gram = problem.hessian().gram.to(GPU)
        hessian = Hessian(gram, gram.diagonal(), 0.01, False)
        found = corrected_target(hessian, problem.weight.to(GPU), drift.to(GPU))
        assert found.device == GPU
    assert torch.allclose(found, expected, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("columns", [1, 40, 64, 65, 200])
def test_the_factor_is_computed_in_place(columns):
    expected = factors.inverse_factor(positive(columns))
    assert expected is not None
    with fake_gpu():
        own = positive(columns).to(GPU)
        found = factors.inverse_factor(own)
        assert found is not None
        assert found.device == GPU
        assert found.data_ptr() == own.data_ptr()
    assert torch.equal(found, found.triu())
    assert torch.allclose(found, expected, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("place", [0, 100, 199])
def test_what_is_not_positive_keeps_all_below_its_diagonal(place):
    matrix = positive(200)
    matrix[place, place] = -5
    with fake_gpu():
        own = matrix.to(GPU)
        assert factors.inverse_factor(own) is None
    assert torch.equal(own.tril(-1), matrix.tril(-1))


def test_a_matrix_that_is_not_positive_is_an_error():
    with fake_gpu():
        gram = -torch.eye(8, device=GPU)
        hessian = Hessian(gram, gram.diagonal().clone(), 0.01, False)
        with pytest.raises(NumericalError, match="not positive"):
            _ = hessian.factor


def refuses(square: Tensor) -> None:
    """Fail on a GPU, as some versions of cuSOLVER do."""
    if square.device == GPU:
        raise RuntimeError("cusolver error: CUSOLVER_STATUS_INVALID_VALUE")
    return factorize(square)


factorize = torch.linalg.cholesky_ex


def test_what_cusolver_refuses_is_done_on_the_cpu_with_a_warning(monkeypatch):
    expected = factors.inverse_factor(positive(100))
    assert expected is not None
    monkeypatch.setattr(torch.linalg, "cholesky_ex", refuses)
    with fake_gpu(), pytest.warns(HalveWarning, match="computed on the CPU"):
        found = factors.inverse_factor(positive(100).to(GPU))
        assert found is not None
        assert found.device == GPU
    assert torch.allclose(found, expected, rtol=1e-4, atol=1e-6)


def test_exhausted_memory_is_not_taken_for_a_refusal(monkeypatch):
    def exhausted(_):
        raise torch.OutOfMemoryError

    monkeypatch.setattr(torch.linalg, "cholesky_ex", exhausted)
    with fake_gpu(), pytest.raises(torch.OutOfMemoryError):
        factors.inverse_factor(positive(100).to(GPU))


@pytest.mark.parametrize(("rows", "columns"), [(1, 1), (7, 64), (5, 65), (300, 200)])
def test_rows_are_divided_by_the_factor_in_place(rows, columns):
    factor = factors.inverse_factor(positive(columns))
    assert factor is not None
    dense = torch.randn(rows, columns)
    with fake_gpu():
        divided = dense.to(GPU)
        factors.divide_by_factor(divided, factor.to(GPU))
    assert torch.allclose(divided @ factor, dense, rtol=1e-4, atol=1e-4)
