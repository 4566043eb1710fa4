"""Laws of allocation: exact counts, and less sparsity where the error is greater."""

from fractions import Fraction

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from halve.patterns import Exact, Unstructured
from halve.pruning.allocate.apportion import apportion
from halve.pruning.allocate.spread import apportion_zeros, spread_sparsity
from tests.contracts.problems import correlated
from tests.tables import SOLVERS

ERRORS = st.floats(0, 1e3)
STRENGTHS = st.floats(0, 1)
SPARSITIES = st.floats(0.01, 0.99)
BLOCKS = st.lists(
    st.tuples(ERRORS, st.lists(st.integers(1, 10**8), min_size=1, max_size=5)),
    min_size=1,
    max_size=8,
)


def sparsities_of(blocks, sparsity, strength):
    errors, matrices = zip(*blocks, strict=True)
    weights = [sum(sizes) for sizes in matrices]
    return spread_sparsity(errors, weights, sparsity, strength)


@settings(deadline=None)  # a busy machine is no defect
@given(st.integers(0, 10**12), st.lists(st.integers(1, 10**9), min_size=1))
def test_apportioned_counts_add_up_and_are_each_within_one(total, claims):
    counts = apportion(total, claims)
    assert sum(counts) == total
    for count, claim in zip(counts, claims, strict=True):
        assert abs(count - Fraction(total * claim, sum(claims))) < 1


def test_of_equal_remainders_the_first_is_rounded_up():
    assert apportion(4, [1, 1, 1]) == (2, 1, 1)
    assert apportion(0, [0, 0]) == (0, 0)


@settings(deadline=None)  # a busy machine is no defect
@given(BLOCKS, SPARSITIES, STRENGTHS)
def test_sparsities_keep_the_mean_and_the_bounds(blocks, sparsity, strength):
    found = sparsities_of(blocks, sparsity, strength)
    weights = [sum(sizes) for _, sizes in blocks]
    mean = sum(s * w for s, w in zip(found, weights, strict=True)) / sum(weights)
    assert mean == pytest.approx(sparsity, abs=1e-12)
    assert all(sparsity / 2 <= s <= (1 + sparsity) / 2 for s in found)
    assert max(found) - min(found) <= 2 * strength + 1e-12


@settings(deadline=None)  # a busy machine is no defect
@given(BLOCKS, SPARSITIES, STRENGTHS)
def test_a_greater_error_never_means_a_greater_sparsity(blocks, sparsity, strength):
    found = sparsities_of(blocks, sparsity, strength)
    pairs = list(zip([error for error, _ in blocks], found, strict=True))
    for error, block_sparsity in pairs:
        assert all(other <= block_sparsity for more, other in pairs if more > error)


@settings(deadline=None)  # a busy machine is no defect
@given(BLOCKS, SPARSITIES, STRENGTHS, ERRORS)
def test_equal_errors_or_no_strength_are_uniform(blocks, sparsity, strength, error):
    assert set(sparsities_of(blocks, sparsity, 0.0)) == {sparsity}
    alike = [(error, sizes) for _, sizes in blocks]
    assert set(sparsities_of(alike, sparsity, strength)) == {sparsity}


@settings(deadline=None)  # a busy machine is no defect
@given(BLOCKS, SPARSITIES, STRENGTHS)
def test_the_budget_is_met_to_one_weight(blocks, sparsity, strength):
    matrices = [sizes for _, sizes in blocks]
    total = sum(map(sum, matrices))
    budget = Unstructured(sparsity).count(total)
    found = sparsities_of(blocks, sparsity, strength)
    counts = apportion_zeros(budget, found, matrices)
    assert sum(map(sum, counts)) == budget
    for zeros, sizes in zip(counts, matrices, strict=True):
        assert len(zeros) == len(sizes)
        assert all(0 <= z <= n for z, n in zip(zeros, sizes, strict=True))


@settings(deadline=None)  # a busy machine is no defect
@given(st.integers(1, 10**10), st.floats(0, 1), st.floats(0, 1))
def test_an_exact_pattern_counts_its_matrix_exactly_and_parts_in_proportion(
    elements, fraction, part
):
    zeros, some = int(fraction * elements), int(part * elements)
    pattern = Exact(zeros, elements)
    assert pattern.count(elements) == zeros
    assert pattern.count(0) == 0
    assert pattern.count(some) <= min(zeros, some)
    assert abs(pattern.count(some) - Fraction(zeros * some, elements)) < 1


@pytest.mark.parametrize("solver", SOLVERS)
@pytest.mark.parametrize("zeros", [1, 777, 7679])
def test_every_solver_prunes_exactly_so_many(solver, zeros):
    pattern = Exact(zeros, 48 * 160)
    found = correlated().solve(solver, pattern).weight
    assert int((found == 0).sum()) == zeros
    assert pattern.shortfall(found) is None
    more = Exact(zeros + 1, 48 * 160)
    assert more.shortfall(found) == (
        f"{zeros} of 7680 weights are zero, not {zeros + 1}"
    )
