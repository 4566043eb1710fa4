"""What rounding promises, beside what every solver does."""

from dataclasses import replace
from itertools import pairwise

import pytest
import torch

from halve.grids import QuantParams, QuantScheme, fit_quant_params
from halve.patterns import Unstructured, is_sparse, parse_pattern
from halve.solvers import (
    ADMM,
    SOLVERS,
    Magnitude,
    Quantized,
    Refitted,
    RoundToNearest,
    Solution,
    Solver,
    SparseGPT,
)
from halve.solvers.quantized import coordinate_descent, round_with_mask
from tests.contracts.problems import (
    ZEROS,
    Problem,
    correlated,
    few_tokens,
    outliers,
    two_directions,
)
from tests.tables import GRIDS
from tests.twins import quantized as twin

HARD = {
    "correlated": correlated(),
    "few tokens": few_tokens(),
    "outliers": outliers(),
    "two directions": two_directions(),
}
# Coarse enough to tell ways of rounding apart.
COARSE = tuple(grid for grid in GRIDS if grid.bits < 8)
SOME = COARSE[::5]  # all bits, all group sizes, symmetric and not
over_grids = pytest.mark.parametrize("grid", GRIDS, ids=repr)
over_some_grids = pytest.mark.parametrize("grid", SOME, ids=repr)
over_patterns = pytest.mark.parametrize("text", ["0%", "50%", "2:4"])
over_problems = pytest.mark.parametrize("name", HARD)


def ways(grid: QuantScheme) -> dict[str, Solver]:
    """Return every way to round."""
    return {
        "nearest": RoundToNearest(grid),
        "joint": SparseGPT(grid=grid),
        "rounded": Quantized(SparseGPT(), grid),
        "joint, polished": Quantized(SparseGPT(grid=grid), grid),
    }


over_ways = pytest.mark.parametrize("way", ways(QuantScheme(4)))


def solve(problem: Problem, solver: Solver, text: str) -> Solution:
    return problem.solve_with(solver, parse_pattern(text, allow_dense=True))


def levels_of(solution: Solution) -> QuantParams:
    assert solution.quant_params is not None
    return solution.quant_params


def hessian_of(problem: Problem) -> torch.Tensor:
    return problem.hessian().damped


def factor_of(problem: Problem) -> torch.Tensor:
    return problem.hessian().factor


@over_ways
@over_grids
@over_patterns
def test_every_weight_lies_on_the_grid_and_the_pattern_holds(way, grid, text):
    solution = solve(correlated(), ways(grid)[way], text)
    quant_params, weight = levels_of(solution), solution.weight
    again = quant_params.fake_quantize_kept(weight)
    assert again.numpy().tobytes() == weight.numpy().tobytes()
    assert parse_pattern(text, allow_dense=True).shortfall(weight) is None


@over_some_grids
@over_patterns
@pytest.mark.parametrize("inner", SOLVERS)
def test_zeros_stay_zeros(grid, text, inner):
    problem = correlated(8, 48)
    plain = solve(problem, SOLVERS[inner](), text).weight
    rounded = solve(problem, Quantized(SOLVERS[inner](), grid), text).weight
    assert bool((rounded[plain == 0] == 0).all())


@over_ways
@over_some_grids
@over_patterns
@pytest.mark.parametrize("kind", ZEROS)
def test_zeros_that_are_there_stay(way, grid, text, kind):
    """Also where what is rounded is not zero there: a target that was corrected."""
    problem, zeros = correlated(8, 48), ZEROS[kind](torch.Size((8, 48)))
    pattern = parse_pattern(text, allow_dense=True)
    solution = problem.solve_with(ways(grid)[way], pattern, zeros=zeros)
    assert bool((solution.weight[zeros] == 0).all())
    assert pattern.shortfall(solution.weight) is None
    again = levels_of(solution).fake_quantize_kept(solution.weight)
    assert torch.equal(again, solution.weight)


@over_ways
@over_patterns
def test_same_problem_same_bits(way, text):
    first, second = (
        solve(correlated(), ways(QuantScheme(3, 48))[way], text) for _ in range(2)
    )
    assert torch.equal(first.weight, second.weight)
    assert torch.equal(levels_of(first).scale, levels_of(second).scale)


@over_ways
@pytest.mark.parametrize("text", ["0%", "2:4"])
def test_permuted_rows_give_permuted_solutions(way, text):
    problem, solver = correlated(), ways(QuantScheme(4, 48))[way]
    order = torch.randperm(len(problem.weight))
    permuted = Problem(problem.weight[order], problem.inputs)
    expected = solve(problem, solver, text).weight[order]
    found = solve(permuted, solver, text).weight
    # A sum in another order may tip a weight that lies between two levels.
    assert (found == expected).double().mean() >= 0.99
    assert problem.error(found[order.argsort()]) == pytest.approx(
        problem.error(expected[order.argsort()]), rel=0.02
    )


@over_ways
def test_the_dense_weight_is_left_alone(way):
    problem = correlated()
    before = problem.weight.clone()
    solve(problem, ways(QuantScheme(4))[way], "50%")
    assert torch.equal(problem.weight, before)


@over_some_grids
@over_patterns
@over_problems
@pytest.mark.parametrize("inner", [SparseGPT(), Refitted(SparseGPT())])
def test_compensation_loses_no_more_than_the_nearest_levels(grid, text, name, inner):
    problem = HARD[name]
    plain = solve(problem, inner, text).weight
    rounded = solve(problem, Quantized(inner, grid), text)
    nearest = problem.error(levels_of(rounded).fake_quantize(plain))
    assert problem.error(rounded.weight) <= nearest
    if isinstance(inner, Refitted):  # else the sweep rounds towards values not the best
        swept = solve(problem, Quantized(inner, grid, sweeps=0), text)
        assert problem.error(swept.weight) <= nearest


@over_some_grids
@over_patterns
@over_problems
def test_polish_never_raises_the_error(grid, text, name):
    problem = HARD[name]
    swept = solve(problem, Quantized(SparseGPT(), grid, sweeps=0), text)
    pruned = solve(problem, SparseGPT(), text).weight == 0
    hessian, quant_params = hessian_of(problem), levels_of(swept)
    errors = []
    for sweeps in range(4):
        found = coordinate_descent(
            hessian, problem.weight, swept.weight, pruned, quant_params, sweeps
        )
        lost = (problem.weight - found).double()
        errors.append(float(((lost @ hessian.double()) * lost).sum()))
        assert bool((found[pruned] == 0).all())
    # float32 cannot tell apart moves that gain less than its rounding.
    assert all(b <= a * (1 + 1e-6) for a, b in pairwise(errors))
    polished = solve(problem, Quantized(SparseGPT(), grid), text)
    assert problem.error(polished.weight) <= problem.error(swept.weight) * (1 + 1e-6)


@over_patterns
@over_problems
@pytest.mark.parametrize("inner", [Refitted(SparseGPT()), ADMM()])
def test_eight_bits_lose_hardly_more_than_no_rounding(text, name, inner):
    problem = HARD[name]
    plain = solve(problem, inner, text).weight
    rounded = solve(problem, Quantized(inner, QuantScheme(8, 16)), text).weight
    assert problem.error(rounded) <= 1.01 * problem.error(plain) + 1e-4


def test_from_the_best_values_less_is_lost_than_from_dense_ones():
    """The reason why `Quantized` sweeps what the solver made, and not the matrix."""
    problem = correlated()
    plain = solve(problem, ADMM(), "50%").weight
    quant_params = fit_quant_params(QuantScheme(4, 16), plain)
    errors = [
        problem.error(
            round_with_mask(start, plain == 0, factor_of(problem), quant_params)
        )
        for start in (plain, problem.weight)
    ]
    assert errors[0] < 0.8 * errors[1]


@over_patterns
def test_the_joint_pass_is_the_sweep_with_its_own_mask_held(text):
    """Of the dense weights, with the same levels: bit for bit."""
    problem = correlated()
    joint = solve(problem, SparseGPT(grid=QuantScheme(3, 48)), text)
    found = round_with_mask(
        problem.weight, joint.weight == 0, factor_of(problem), levels_of(joint)
    )
    assert torch.equal(found, joint.weight)


@over_patterns
def test_levels_of_a_solver_that_rounds_are_kept_to(text):
    problem, inner = correlated(), SparseGPT(grid=QuantScheme(3, 48))
    joint = solve(problem, inner, text)
    polished = solve(problem, Quantized(inner, QuantScheme(4)), text)
    assert torch.equal(levels_of(polished).scale, levels_of(joint).scale)
    assert problem.error(polished.weight) <= problem.error(joint.weight)


@over_patterns
def test_reported_error_is_the_error(text):
    problem = correlated()
    for way in ("joint", "rounded"):
        solution = solve(problem, ways(QuantScheme(3))[way], text)
        expected = problem.error(solution.weight)
        assert solution.outcome.error == pytest.approx(expected, rel=1e-3)


def test_nearest_levels_are_the_nearest():
    problem, grid = correlated(4, 40), QuantScheme(3, 16)
    solution = solve(problem, RoundToNearest(grid), "0%")
    for i in range(4):
        for j in range(40):
            choices = twin.values(levels_of(solution), i, j)
            distances = (choices - problem.weight[i, j]).abs()
            found = (problem.weight[i, j] - solution.weight[i, j]).abs()
            assert float(found) == pytest.approx(float(distances.min()), abs=1e-6)


@pytest.mark.parametrize("solver", SOLVERS)
def test_a_sparsity_of_nothing_returns_the_weight(solver):
    problem = correlated()
    solution = problem.solve(solver, Unstructured(0.0)).weight
    # ADMM scales, and scales back.
    assert torch.allclose(solution, problem.weight, atol=1e-5)


@pytest.mark.parametrize("inner", [Magnitude(), SparseGPT(), ADMM()])
def test_dead_inputs_do_no_harm(inner):
    problem = correlated()
    problem.inputs[:, [0, 7, 159]] = 0
    for solver in (
        Quantized(inner, QuantScheme(4, 16)),
        SparseGPT(grid=QuantScheme(4, 16)),
    ):
        solution = solve(problem, solver, "50%")
        assert bool(solution.weight.isfinite().all())
        assert problem.error(solution.weight) < 0.3


@over_ways
@over_patterns
def test_a_matrix_of_zeros_stays_one(way, text):
    problem = Problem(torch.zeros(8, 160), correlated().inputs)
    assert torch.equal(
        solve(problem, ways(QuantScheme(4, 48))[way], text).weight, problem.weight
    )


@over_some_grids
@over_patterns
def test_the_sweep_equals_its_plain_twin(grid, text):
    problem = correlated(6, 72)
    plain = solve(problem, SparseGPT(), text).weight
    quant_params = fit_quant_params(grid, plain)
    pruned = plain == 0
    ours = round_with_mask(plain, pruned, factor_of(problem), quant_params)
    theirs = twin.sweep(plain, pruned, hessian_of(problem), quant_params)
    assert (ours.double() == theirs).double().mean() >= 0.99


@over_some_grids
@over_patterns
def test_the_polish_equals_its_plain_twin(grid, text):
    problem = correlated(6, 72)
    plain = solve(problem, SparseGPT(), text).weight
    quant_params, hessian, pruned = (
        fit_quant_params(grid, plain),
        hessian_of(problem),
        plain == 0,
    )
    start = quant_params.fake_quantize_kept(plain)
    ours = coordinate_descent(
        hessian, problem.weight, start, pruned, quant_params, sweeps=2
    )
    theirs = twin.coordinate_descent(
        problem.weight, start, pruned, hessian, quant_params, sweeps=2
    )
    assert (ours.double() == theirs).double().mean() >= 0.99


@pytest.mark.parametrize(("zeros", "stay"), [(3, False), (2000, True)])
def test_a_few_zeros_by_chance_do_not_force_a_mask_on_a_midrise_grid(zeros, stay):
    problem = correlated(64, 48)
    weight = problem.weight.clone()
    weight.view(-1)[torch.randperm(weight.numel())[:zeros]] = 0
    sparse = replace(problem, weight=weight)
    assert is_sparse(weight) == stay
    fixed = weight == 0 if stay else None
    grid = QuantScheme(2, midrise=True)
    for solver in (
        RoundToNearest(grid),
        Quantized(Magnitude(), grid),
        SparseGPT(grid=grid),
    ):
        found = sparse.solve_with(solver, Unstructured(0.0), zeros=fixed).weight
        assert int((found == 0).sum()) == (zeros if stay else 0)
        assert not stay or bool((found[weight == 0] == 0).all())
