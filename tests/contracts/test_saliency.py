"""Laws of sparsities by saliency: one threshold for all weights, within bounds."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from halve.pruning.saliency import log_saliency, spread_by_saliency

SPARSITIES = st.floats(0.01, 0.99)
MATRICES = st.lists(
    st.tuples(
        st.integers(1, 10**8),  # weights
        st.floats(-60, 20),  # the smallest logarithm
        st.lists(st.floats(0, 5), min_size=4, max_size=4),  # steps to the next ones
    ),
    min_size=1,
    max_size=8,
)


def of(matrices):
    """Return the quantiles and the weights of matrices."""
    weights, first, steps = zip(*matrices, strict=True)
    start = torch.tensor(first, dtype=torch.float64).unsqueeze(1)
    later = start + torch.tensor(steps, dtype=torch.float64).cumsum(1)
    return torch.cat([start, later], dim=1), weights


@settings(deadline=None)  # a busy machine is no defect
@given(MATRICES, SPARSITIES)
def test_sparsities_keep_the_mean_and_the_bounds(matrices, sparsity):
    quantiles, weights = of(matrices)
    found = spread_by_saliency(quantiles, weights, sparsity)
    mean = sum(s * w for s, w in zip(found, weights, strict=True)) / sum(weights)
    assert mean == pytest.approx(sparsity, abs=1e-9)
    tolerance = 1e-12
    for each in found:
        assert sparsity / 2 - tolerance <= each <= (1 + sparsity) / 2 + tolerance


@settings(deadline=None)  # a busy machine is no defect
@given(MATRICES, SPARSITIES, st.floats(0, 10))
def test_what_is_worth_more_is_never_pruned_more(matrices, sparsity, more):
    quantiles, weights = of(matrices)
    both = torch.cat([quantiles, quantiles[:1] + more])
    found = spread_by_saliency(both, (*weights, weights[0]), sparsity)
    assert found[-1] <= found[0] + 1e-12


@settings(deadline=None)  # a busy machine is no defect
@given(MATRICES, SPARSITIES)
def test_where_all_are_worth_the_same_it_is_uniform(matrices, sparsity):
    quantiles, weights = of(matrices)
    alike = quantiles[:1].expand_as(quantiles)
    found = spread_by_saliency(alike, weights, sparsity)
    assert found == pytest.approx([sparsity] * len(weights), abs=1e-9)
    nothing = torch.full_like(quantiles, -69.0)  # no weight of the model matters
    assert spread_by_saliency(nothing, weights, sparsity) == pytest.approx(found)


def problem(rows, columns, scale, seed):
    """Return a matrix, the importance of its rows, and the squares of its inputs."""
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(rows, columns, generator=generator)
    importance = scale * torch.rand(rows, generator=generator).exp()
    return weight, importance, torch.rand(columns, generator=generator)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_threshold_is_that_of_all_weights_sorted(dtype):
    problems = [
        problem(40, 60, 1.0, 0),
        problem(64, 1000, 1.6, 1),  # small enough for all weights to count
        problem(800, 600, 0.8, 2),  # a sample of 2^18 weights
    ]
    problems = [(w.to(dtype), f, x) for w, f, x in problems]
    every = [
        (w.double().square() * f.double()[:, None] * x.double() / 2).flatten()
        for w, f, x in problems
    ]
    threshold = torch.cat(every).sort().values[sum(map(len, every)) // 2]
    expected = [float((s <= threshold).double().mean()) for s in every]
    quantiles = torch.stack([log_saliency(*each) for each in problems])
    found = spread_by_saliency(quantiles, [len(s) for s in every], 0.5)
    assert found == pytest.approx(expected, abs=3e-3)
    assert max(expected) - min(expected) > 0.1


def test_weights_and_rows_that_are_zero_are_worth_nothing():
    weight, importance, squares = problem(30, 50, 1.0, 3)
    weight[:, 10:] = 0
    importance[20:] = 0
    logs = log_saliency(weight, importance, squares)
    worthless = 1 - (20 * 10) / (30 * 50)
    assert float((logs < -60).double().mean()) == pytest.approx(worthless, abs=5e-3)
    assert bool(logs.isfinite().all())
