"""Laws that every solver obeys, and the promises of each one."""

import json
from pathlib import Path

import pytest
import torch

from halve.calibration_stats import GramMatrix
from halve.errors import NumericalError
from halve.grids import QuantScheme
from halve.patterns import NM, Unstructured, parse_pattern
from halve.solvers import (
    ADMM,
    Hessian,
    Magnitude,
    Quantized,
    Refitted,
    Solver,
    SparseGPT,
    Wanda,
    factors,
)
from halve.solvers import SOLVERS as SOLVER_CLASSES
from halve.solvers.sweep import fixed_mask, sweep
from tests.contracts.problems import (
    ZEROS,
    Problem,
    correlated,
    few_tokens,
    outliers,
    two_directions,
)
from tests.tables import PATTERNS, SOLVERS
from tests.twins import sparsegpt as twin
from tests.twins.refit import least_squares

GOLDEN = Path(__file__).parents[1] / "golden/masks.json"
over_solvers = pytest.mark.parametrize("solver", SOLVERS)
over_patterns = pytest.mark.parametrize("text", PATTERNS)


@over_solvers
@over_patterns
def test_pattern_holds_exactly(solver, text):
    problem, pattern = correlated(), parse_pattern(text)
    weight = problem.solve(solver, pattern).weight
    assert pattern.shortfall(weight) is None
    assert int((weight == 0).sum()) == pattern.count(weight.numel())
    assert weight.isfinite().all()


@over_solvers
@pytest.mark.parametrize("shape", [(1, 8), (3, 24), (5, 136), (200, 8), (17, 264)])
def test_awkward_shapes_obey_too(solver, shape):
    for pattern in (Unstructured(0.37), NM(2, 4), NM(3, 8)):
        weight = correlated(*shape).solve(solver, pattern).weight
        assert weight.shape == shape
        assert int((weight == 0).sum()) == pattern.count(weight.numel())


@over_solvers
@over_patterns
def test_same_problem_same_bits(solver, text):
    first, second = (correlated().solve(solver, text).weight for _ in range(2))
    assert torch.equal(first, second)


@over_solvers
@over_patterns
def test_the_dense_weight_is_left_alone(solver, text):
    problem = correlated()
    before = problem.weight.clone()
    problem.solve(solver, text)
    assert torch.equal(problem.weight, before)


@over_solvers
@over_patterns
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_fewer_bits_and_another_order_change_nothing(solver, text, dtype):
    problem = correlated()
    stored = problem.weight.T.contiguous().to(dtype).T
    found = Problem(stored, problem.inputs).solve(solver, text)
    expected = Problem(stored.float().contiguous(), problem.inputs).solve(solver, text)
    assert found.weight.dtype == torch.float32
    assert torch.equal(found.weight, expected.weight)
    errors = [solution.outcome.error or 0.0 for solution in (found, expected)]
    assert errors[0] == pytest.approx(errors[1], rel=1e-5)


@over_solvers
@pytest.mark.parametrize("text", ["2:4", "4:8"])
def test_permuted_rows_give_permuted_solutions(solver, text):
    problem = correlated()
    order = torch.randperm(len(problem.weight))
    permuted = Problem(problem.weight[order], problem.inputs)
    expected = problem.solve(solver, text).weight[order]
    assert torch.allclose(permuted.solve(solver, text).weight, expected, atol=1e-5)


@over_solvers
def test_weights_that_are_zero_already_count(solver):
    problem = correlated()
    sparse = problem.weight * (torch.rand_like(problem.weight) > 0.7)
    solution = Problem(sparse, problem.inputs).solve(solver, "50%").weight
    assert Unstructured(0.5).shortfall(solution) is None


WITH_ZEROS: dict[str, Solver] = {
    **{name: solver() for name, solver in SOLVER_CLASSES.items()},
    "wanda, refitted": Refitted(Wanda()),
}


@over_patterns
@pytest.mark.parametrize("kind", ZEROS)
@pytest.mark.parametrize("solver", WITH_ZEROS)
def test_zeros_that_are_there_stay(solver, kind, text):
    """Whatever the pattern prunes beside them, it holds; of more there are no more."""
    problem, pattern = correlated(24, 160), parse_pattern(text)
    zeros = ZEROS[kind](problem.weight.shape)
    weight = problem.solve_with(WITH_ZEROS[solver], pattern, zeros=zeros).weight
    assert bool((weight[zeros] == 0).all())
    assert pattern.shortfall(weight) is None
    if solver != "wanda" and not isinstance(pattern, NM) and "wanda" not in solver:
        expected = max(pattern.count(weight.numel()), int(zeros.sum()))
        assert int((weight == 0).sum()) == expected


@pytest.mark.parametrize("kind", ZEROS)
def test_sparsegpt_compensates_for_zeros_as_for_what_it_prunes(kind):
    """Its twin prunes the same weights by a mask that was chosen before."""
    problem = correlated(24, 160)
    zeros = ZEROS[kind](problem.weight.shape)
    found = problem.solve_with(SparseGPT(), "0.01", zeros=zeros).weight
    remaining = problem.weight.T.contiguous()
    hessian = problem.hessian(SparseGPT().needs)
    sweep(remaining, hessian.factor, fixed_mask((found == 0).T.contiguous(), 128))
    assert torch.allclose(found, remaining.T, atol=1e-5)


@over_solvers
def test_a_matrix_of_zeros_stays_one(solver):
    problem = correlated()
    solved = Problem(torch.zeros_like(problem.weight), problem.inputs).solve(
        solver, "50%"
    )
    assert torch.equal(solved.weight, torch.zeros_like(problem.weight))


@over_patterns
def test_sparsegpt_loses_less_than_the_others(text):
    problem = correlated()
    errors = {s: problem.error(problem.solve(s, text).weight) for s in SOLVERS}
    assert errors["sparsegpt"] < min(errors["wanda"], errors["magnitude"])


HARD = {
    "correlated": correlated(),
    "wide": correlated(8, 320, seed=3),
    "few tokens": few_tokens(),
    "outliers": outliers(),
    "two directions": two_directions(),
}


@over_patterns
@pytest.mark.parametrize("name", HARD)
def test_admm_loses_no_more_than_sparsegpt(name, text):
    problem = HARD[name]
    errors = [
        problem.error(problem.solve(s, text).weight) for s in ("sparsegpt", "admm")
    ]
    assert errors[1] <= errors[0]


@over_solvers
@over_patterns
@pytest.mark.parametrize("name", HARD)
def test_refit_never_raises_the_error_and_keeps_the_mask(name, solver, text):
    problem = HARD[name]
    plain = problem.solve(solver, text).weight
    refitted = problem.solve_with(Refitted(SOLVER_CLASSES[solver]()), text).weight
    # Errors are compared in float32, which cannot tell apart what is nearer than that.
    assert problem.error(refitted) <= problem.error(plain) * (1 + 1e-6) + 1e-7
    assert bool((refitted[plain == 0] == 0).all())


def test_refit_comes_near_the_exact_solution():
    """Ten steps are within a few per cent of least squares, row by row."""
    problem = correlated(16, 64)
    plain = problem.solve("magnitude", "50%").weight
    refitted = problem.solve_with(Refitted(Magnitude()), "50%").weight
    exact = least_squares(problem.weight, problem.inputs, plain != 0)
    errors = [problem.error(z) for z in (plain, refitted, exact)]
    assert errors[2] <= errors[1] <= errors[2] + 0.05 * (errors[0] - errors[2])


@over_patterns
def test_inputs_of_one_kind_make_all_solvers_agree(text):
    """With X^T X = c I nothing can be compensated, and only magnitude counts.

    Unstructured, Wanda chooses row by row, so it is left out there.
    """
    weight = torch.randn(32, 64)
    problem = Problem(weight, torch.eye(64).repeat(3, 1))
    expected = problem.solve("magnitude", text).weight
    assert torch.equal(problem.solve("sparsegpt", text).weight, expected)
    if ":" in text:
        assert torch.equal(problem.solve("wanda", text).weight, expected)
    assert torch.allclose(problem.solve("admm", text).weight, expected, atol=1e-5)


@over_patterns
@pytest.mark.parametrize("columns", [48, 160, 264])
def test_sparsegpt_equals_its_plain_twin(text, columns):
    problem, pattern = correlated(40, columns), parse_pattern(text)
    ours = problem.solve("sparsegpt", pattern).weight.double()
    theirs = twin.prune(problem.weight, problem.inputs, pattern, 0.01, 128)
    same = (ours == 0) == (theirs == 0)
    assert same.double().mean() >= 0.999
    rows = same.all(dim=1)
    assert (ours - theirs)[rows].norm() <= 1e-4 * theirs[rows].norm()


@pytest.mark.parametrize("block_size", [32, 64, 160])
def test_n_m_does_not_depend_on_the_block_size(block_size):
    problem = correlated()
    one = problem.solve("sparsegpt", "2:4", block_size=block_size).weight
    other = problem.solve("sparsegpt", "2:4").weight
    assert torch.allclose(one, other, atol=1e-4)


@over_patterns
@pytest.mark.parametrize("ridge", [0.0, 1.0])
@pytest.mark.parametrize("solver", ["sparsegpt", "admm"])
def test_reported_error_is_the_error(solver, ridge, text):
    """Without the ridge, which is only there while a matrix is solved."""
    problem = correlated()
    solution = problem.solve(solver, text, ridge=ridge)
    expected = problem.error(solution.weight)
    assert solution.outcome.error == pytest.approx(expected, rel=1e-3)


def unexplained(problem: Problem, damping: float = 0.01) -> torch.Tensor:
    """Return the fraction of each input's mean square that others do not explain.

    By regression: 1 / [H^-1]_jj is what is left of input j.
    """
    gram = problem.inputs.double().T @ problem.inputs.double()
    gram += damping * gram.diagonal().mean() * torch.eye(len(gram))
    fractions = []
    for j in range(len(gram)):
        others = torch.arange(len(gram)) != j
        square = gram[others][:, others]
        left = gram[j, j] - gram[j, others] @ torch.linalg.solve(
            square, gram[j, others]
        )
        fractions.append(left / (problem.inputs[:, j].double() ** 2).sum())
    return torch.stack(fractions)


@over_patterns
@pytest.mark.parametrize("solver", ["sparsegpt", "admm"])
def test_a_ridge_is_as_if_inputs_had_more_of_what_others_do_not_explain(solver, text):
    problem, damping = correlated(), 0.01
    gram = problem.inputs.double().T @ problem.inputs.double()
    ridges = unexplained(problem) ** 2 * gram.diagonal()
    inputs = torch.linalg.cholesky(gram + ridges.diag()).T.float()
    raised = Problem(problem.weight, inputs)
    same = damping * float(gram.diagonal().mean() / (gram.diagonal() + ridges).mean())
    wanted = raised.solve(solver, text, damping=same).weight
    found = problem.solve(solver, text, ridge=1.0).weight
    assert float(((wanted == 0) == (found == 0)).float().mean()) > 0.995
    assert raised.error(found) == pytest.approx(raised.error(wanted), rel=1e-3)
    plain = problem.solve(solver, text).weight
    assert not torch.allclose(plain, found, rtol=1e-3)


def test_a_ridge_leaves_dead_inputs_and_those_that_others_explain():
    problem = correlated()
    inputs = problem.inputs.clone()
    inputs[:, 3] = 0
    inputs[:, 5] = inputs[:, 6]
    hessian = Problem(problem.weight, inputs).hessian(damping=1e-4, ridge=1.0)
    fractions = hessian.ridges / hessian.diagonal
    assert hessian.ridges[3] == 0
    assert fractions[5] < 1e-4 < 10 * fractions[torch.arange(160) > 6].min()


@pytest.mark.parametrize("solver", ["sparsegpt", "admm"])
def test_dead_inputs_lose_their_weights(solver):
    problem = correlated()
    problem.inputs[:, [0, 7, 159]] = 0
    solution = problem.solve(solver, "50%").weight
    assert (solution[:, [0, 7, 159]] == 0).all()
    assert solution.isfinite().all()


def test_damping_is_raised_until_it_works_and_said():
    problem = correlated()
    few = Problem(problem.weight, problem.inputs[:20])  # X^T X has rank 20 of 160
    outcome = few.solve("sparsegpt", "50%", damping=0.0).outcome
    assert outcome.damping is not None
    assert outcome.damping > 0


def test_attempts_that_failed_leave_no_trace():
    """The factorisation works in the Gram matrix's place, which each must restore."""
    problem = correlated()
    few = Problem(problem.weight, problem.inputs[:20])
    raised = few.solve("sparsegpt", "50%", damping=0.0)
    assert raised.outcome.damping is not None
    at_once = few.solve("sparsegpt", "50%", damping=raised.outcome.damping)
    assert torch.equal(raised.weight, at_once.weight)
    assert raised.outcome == at_once.outcome


def test_factorising_takes_no_second_matrix():
    problem = correlated()
    hessian = problem.hessian(SparseGPT().needs)
    place = hessian.gram.data_ptr()
    assert hessian.factor.data_ptr() == place


def test_an_overwritten_gram_matrix_cannot_be_read():
    """Whether by one solver or by another: the factor is all that is left of it."""
    hessian = correlated().hessian(SparseGPT().needs)
    hessian.prepare(SparseGPT().needs)
    for read in (lambda: hessian.gram, lambda: hessian.damped, lambda: hessian.scaled):
        with pytest.raises(AssertionError, match="overwritten"):
            read()


def test_a_statistic_that_was_taken_over_is_empty():
    statistic = GramMatrix(160, torch.device("cpu"))
    statistic.add(correlated().inputs)
    Hessian.of(statistic)
    assert statistic.take().numel() == 0


@over_patterns
def test_candidates_share_one_preparation(text, monkeypatch):
    """Whatever was solved before on a Hessian, a solution has the same bits."""
    solvers = [
        ADMM(),
        Refitted(Wanda()),
        SparseGPT(),
        *(Quantized(ADMM(), QuantScheme(bits)) for bits in (4, 3)),
        Quantized(Magnitude(), QuantScheme(3)),
    ]
    problem, pattern = correlated(), parse_pattern(text)
    factored = []
    factor = factors.inverse_factor
    monkeypatch.setattr(
        "halve.solvers.hessian.inverse_factor",
        lambda matrix: factored.append(len(matrix)) or factor(matrix),
    )
    shared = problem.hessian()
    together = [s.solve(shared, problem.weight, pattern).weight for s in solvers]
    assert factored == [160]
    for solver, solution in zip(solvers, together, strict=True):
        assert torch.equal(solution, problem.solve_with(solver, pattern).weight)


@pytest.mark.parametrize("solver", [SparseGPT(), ADMM()])
def test_a_matrix_that_is_no_gram_matrix_is_refused(solver):
    statistic = GramMatrix(8, torch.device("cpu"))
    statistic.add(torch.randn(32, 8))
    statistic._matrix.neg_()
    hessian = Hessian.of(statistic, needs=solver.needs)
    with pytest.raises(NumericalError, match="not positive definite"):
        solver.solve(hessian, torch.randn(4, 8), Unstructured(0.5))


@over_solvers
@over_patterns
def test_masks_replay(solver, text):
    """Recorded masks come out again; a change to them is a declared change."""
    problem = correlated(16, 64, seed=1)
    mask = problem.solve(solver, text).weight == 0
    weights = 2 ** torch.arange(4)
    digits = (mask.reshape(-1, 4) * weights).sum(dim=1)
    found = "".join(f"{int(digit):x}" for digit in digits)
    assert found == json.loads(GOLDEN.read_text())[f"{solver} {text}"]
