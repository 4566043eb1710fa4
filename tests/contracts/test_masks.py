"""Masks are exact: no solver prunes a weight more or less than the pattern says.

`shortfall`, which verifies a stored matrix, cannot test that. A stored matrix may have
more zeros than its pattern asks for, since the dense matrix may have had some, so
`shortfall` reports too few zeros and never too many. Here the dense weights are not
zero, and every zero of a solution is a decision of the solver.

Ties are the hard case, and common: a bfloat16 matrix has few distinct magnitudes.
"""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from halve.patterns import NM, Exact, Pattern, parse_pattern
from tests.contracts.problems import Problem, correlated
from tests.tables import PATTERNS, SOLVERS

over_solvers = pytest.mark.parametrize("solver", SOLVERS)
over_patterns = pytest.mark.parametrize("text", PATTERNS)

ROWS, COLUMNS = 24, 64


def alike() -> Tensor:
    """Return weights that are all equal."""
    return torch.ones(ROWS, COLUMNS)


def few_magnitudes() -> Tensor:
    """Return weights of two magnitudes and both signs."""
    signs = torch.randint(0, 2, (ROWS, COLUMNS)) * 2 - 1
    return signs * torch.randint(1, 3, (ROWS, COLUMNS)).float()


def in_bfloat16() -> Tensor:
    """Return normal weights rounded to bfloat16, of which some are equal."""
    weight = torch.randn(ROWS, COLUMNS).bfloat16().float()
    return weight.where(weight != 0, 1)


WEIGHTS: dict[str, Callable[[], Tensor]] = {
    "alike": alike,
    "few magnitudes": few_magnitudes,
    "bfloat16": in_bfloat16,
}
over_weights = pytest.mark.parametrize("weights", WEIGHTS)


def mask_of(weight: Tensor, inputs: Tensor, solver: str, pattern: Pattern) -> Tensor:
    """Return where a solver prunes a matrix without zeros, [rows, columns]."""
    assert bool((weight != 0).all())
    return Problem(weight, inputs).solve(solver, pattern).weight == 0


def same_for_all() -> Tensor:
    """Return inputs with X^T X = c I, under which equal weights have equal scores."""
    return torch.eye(COLUMNS).repeat(3, 1)


def assert_exact(mask: Tensor, pattern: Pattern) -> None:
    assert int(mask.sum()) == pattern.count(mask.numel())
    if isinstance(pattern, NM):
        pruned = mask.reshape(-1, pattern.group).sum(dim=1)
        assert pruned.unique().tolist() == [pattern.group - pattern.kept]


@over_solvers
@over_patterns
@over_weights
def test_masks_are_exact_where_scores_tie(solver, text, weights):
    torch.manual_seed(0)
    pattern = parse_pattern(text)
    mask = mask_of(WEIGHTS[weights](), same_for_all(), solver, pattern)
    assert_exact(mask, pattern)


@over_solvers
@over_patterns
@over_weights
def test_masks_are_exact_on_correlated_inputs(solver, text, weights):
    torch.manual_seed(0)
    pattern = parse_pattern(text)
    inputs = correlated(ROWS, COLUMNS).inputs
    assert_exact(mask_of(WEIGHTS[weights](), inputs, solver, pattern), pattern)


@over_solvers
@pytest.mark.parametrize("zeros", [1, 7, ROWS * COLUMNS // 2 + 1, ROWS * COLUMNS - 1])
def test_exact_counts_are_exact_to_the_weight(solver, zeros):
    pattern = Exact(zeros, ROWS * COLUMNS)
    mask = mask_of(alike(), same_for_all(), solver, pattern)
    assert int(mask.sum()) == zeros


@pytest.mark.parametrize("solver", ["magnitude", "wanda"])
@pytest.mark.parametrize("text", ["2:4", "4:8", "1:4"])
def test_ties_prune_the_first_of_each_group(solver, text):
    """Equal scores leave the choice to the pattern, so the mask is known."""
    pattern = parse_pattern(text)
    assert isinstance(pattern, NM)
    mask = mask_of(alike(), same_for_all(), solver, pattern)
    first = torch.arange(COLUMNS) % pattern.group < pattern.group - pattern.kept
    assert torch.equal(mask, first.expand(ROWS, COLUMNS))
