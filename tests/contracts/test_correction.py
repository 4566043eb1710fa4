"""Error-corrected targets: against least squares, and for what they are there."""

import pytest
import torch

from halve.calibration_stats import CrossGram, GramMatrix
from halve.errors import NumericalError
from halve.pruning.observe.held_out import HeldOut
from halve.solvers import Hessian
from halve.solvers.correction import corrected_target
from tests.contracts.problems import Problem, correlated, few_tokens, outliers

PROBLEMS = {"correlated": correlated(), "few": few_tokens(), "outliers": outliers()}
over_problems = pytest.mark.parametrize("name", PROBLEMS)


def drifted(problem: Problem) -> torch.Tensor:
    """Return the problem's inputs as they were before something was pruned."""
    generator = torch.Generator().manual_seed(9)
    columns = problem.inputs.shape[1]
    mixing = torch.randn(columns, columns, generator=generator) / columns**0.5
    return problem.inputs + 0.2 * problem.inputs @ mixing


def corrected(problem: Problem, dense: torch.Tensor, damping: float = 0.01):
    """Return the corrected target of a problem's weight."""
    columns = problem.inputs.shape[1]
    statistic, drift = GramMatrix(columns, dense.device), CrossGram([problem.weight])
    for part, other in zip(problem.inputs.split(50), dense.split(50), strict=True):
        statistic.add(part)
        drift.add(part, other)
    hessian = Hessian.of(statistic, damping)
    return corrected_target(hessian, problem.weight, drift.drift(0))


@over_problems
def test_target_is_the_damped_least_squares_solution(name):
    problem = PROBLEMS[name]
    dense = drifted(problem)
    x, weight = problem.inputs.double(), problem.weight.double()
    gram = x.T @ x
    damping = 0.01 * gram.diagonal().mean()
    system = gram + damping * torch.eye(len(gram))
    wanted = weight @ (dense.double().T @ x + damping * torch.eye(len(gram)))
    expected = torch.linalg.solve(system, wanted.T).T
    found = corrected(problem, dense).double()
    assert (found - expected).norm() <= 1e-3 * expected.norm()


@pytest.mark.parametrize("heights", [(8, 8, 8), (3, 4), (1,)], ids=str)
def test_drift_is_the_same_whichever_way_it_is_summed(heights):
    generator = torch.Generator().manual_seed(0)
    weights = [torch.randn(rows, 16, generator=generator) for rows in heights]
    inputs, dense = torch.randn(2, 60, 16, generator=generator).unbind()
    drift = CrossGram(weights)
    for part, other in zip(inputs.split(25), dense.split(25), strict=True):
        drift.add(part, other)
    for index, weight in enumerate(weights):
        expected = weight.double() @ (dense - inputs).double().T @ inputs.double()
        assert torch.allclose(drift.drift(index).double(), expected, atol=1e-3)


@over_problems
def test_without_drift_the_target_is_the_weight(name):
    problem = PROBLEMS[name]
    assert torch.equal(corrected(problem, problem.inputs), problem.weight)


@over_problems
@pytest.mark.parametrize("solver", ["sparsegpt", "admm"])
def test_solving_for_the_target_comes_nearer_to_the_dense_outputs(name, solver):
    problem = PROBLEMS[name]
    dense = drifted(problem)
    held = HeldOut([(problem.inputs, dense)])
    aimed = Problem(corrected(problem, dense), problem.inputs).solve(solver, "50%")
    plain = problem.solve(solver, "50%")
    errors = held.errors(problem.weight, [aimed.weight, plain.weight])
    assert errors[0] < errors[1]


def test_a_matrix_that_is_no_gram_matrix_is_refused():
    statistic, drift = GramMatrix(8, torch.device("cpu")), CrossGram([torch.ones(4, 8)])
    statistic.add(torch.randn(32, 8))
    statistic._matrix.neg_()
    with pytest.raises(NumericalError, match="not positive definite"):
        corrected_target(Hessian.of(statistic), torch.ones(4, 8), drift.drift(0))


def test_held_out_error_is_the_error():
    problem = correlated()
    dense, solution = drifted(problem), problem.weight * 0.9
    held = HeldOut()
    for part, other in zip(problem.inputs.split(64), dense.split(64), strict=True):
        held.add(part, other)
    wanted = dense.double() @ problem.weight.double().T
    lost = wanted - problem.inputs.double() @ solution.double().T
    by_token = lost.square().sum(1) / wanted.square().sum(1)
    expected = float(by_token.mean())
    assert held.errors(problem.weight, [solution]) == pytest.approx(
        [expected], rel=1e-4
    )


def test_held_out_inputs_are_bounded():
    held = HeldOut.of(30_000)
    for _ in range(10):
        inputs = torch.randn(3000, 4)
        held.add(inputs, inputs)
    assert 3000 < sum(len(inputs) for inputs, _ in held.pairs) <= 4096
