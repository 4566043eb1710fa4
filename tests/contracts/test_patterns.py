"""Laws of sparsity patterns: parsing, exact masks, and verification."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from halve import patterns
from halve.errors import PatternError
from halve.patterns import NM, Exact, Unstructured, describe, lowest, parse_pattern

shapes = st.tuples(st.integers(1, 12), st.integers(1, 12))


@pytest.mark.parametrize(
    ("text", "pattern"),
    [
        ("50%", Unstructured(0.5)),
        (" 12.5% ", Unstructured(0.125)),
        ("0.7", Unstructured(0.7)),
        (0.3, Unstructured(0.3)),
        ("2:4", NM(2, 4)),
        ("1:4", NM(1, 4)),
    ],
)
def test_parse_pattern_accepts_percent_fraction_and_n_m(text, pattern):
    assert parse_pattern(text) == pattern
    assert parse_pattern(str(pattern)) == pattern


@pytest.mark.parametrize(
    "text", ["", "0", "1", "100%", "-5%", "4:4", "0:4", "4:2", "two", "2:", "nan"]
)
def test_parse_pattern_refuses_what_is_no_pattern(text):
    with pytest.raises(PatternError):
        parse_pattern(text)


@pytest.mark.parametrize("text", ["0%", "0", 0.0])
def test_a_sparsity_of_zero_needs_allow_dense(text):
    assert parse_pattern(text, allow_dense=True) == Unstructured(0.0)
    with pytest.raises(PatternError):
        parse_pattern(text)


@pytest.mark.parametrize("text", ["", "two", "nan", "100%", "-5%", "4:4", "0:4"])
def test_allow_dense_accepts_nothing_else(text):
    with pytest.raises(PatternError):
        parse_pattern(text, allow_dense=True)


@given(shapes, st.data())
def test_lowest_takes_exactly_the_lowest(shape, data):
    """Of equal scores, of which there are many here, the first are taken."""
    values = st.lists(
        st.integers(0, 4), min_size=shape[0] * shape[1], max_size=shape[0] * shape[1]
    )
    scores = torch.tensor(data.draw(values), dtype=torch.float32).view(shape)
    count = data.draw(st.integers(0, scores.numel()))
    mask = lowest(scores, count)
    expected = torch.zeros(scores.numel(), dtype=torch.bool)
    expected[scores.flatten().argsort(stable=True)[:count]] = True
    assert torch.equal(mask.flatten(), expected)


SCORES = {
    "normal": torch.randn(1000),
    "many ties": torch.randint(-2, 3, (1000,)).float(),
    "all equal": torch.full((77,), 3.5),
    "zeros of both signs": torch.tensor([0.0, -0.0] * 50 + [1.0, -1.0]),
    "infinities": torch.tensor([torch.inf, 0, -torch.inf, 1, torch.inf, -torch.inf]),
    "denormal": torch.arange(-20, 20) * 2.0**-149,
    "one": torch.tensor([2.0]),
    "largest": torch.tensor([1, -1]) * torch.finfo(torch.float32).max,
}


@pytest.mark.parametrize("name", SCORES)
@pytest.mark.parametrize("sorted_up_to", [0, 2000])
def test_the_gpu_takes_the_same_scores(monkeypatch, name, sorted_up_to):
    """Whether it sorts them or searches for the threshold."""
    monkeypatch.setattr(patterns, "_MAX_SORTED", sorted_up_to)
    scores = SCORES[name]
    total = scores.numel()
    for count in {1, 2, total // 2, total - 1, total} & set(range(1, total + 1)):
        expected = lowest(scores, count)
        assert int(expected.sum()) == count
        assert torch.equal(patterns._lowest_in_parallel(scores, count), expected)


@given(st.integers(1, 6), st.integers(1, 5), st.integers(2, 8), st.data())
def test_n_m_masks_keep_the_highest_of_each_group(rows, groups, m, data):
    n = data.draw(st.integers(1, m - 1))
    scores = torch.rand(rows, groups * m)
    pattern = NM(n, m)
    kept = scores.masked_fill(pattern.mask(scores), 0).view(-1, m)
    assert ((kept > 0).sum(dim=1) == n).all()
    top = scores.view(-1, m).topk(n).values.sort().values
    assert torch.equal(kept.sort(dim=1).values[:, m - n :], top)


# Scores that often tie: few values, or multiples of 1/64 that bfloat16 represents.
few_values = st.sampled_from([0.0, 1.0, 2.0])
bfloat16_values = st.integers(-255, 255).map(lambda code: abs(code) / 64)


@given(
    st.integers(1, 4),
    st.integers(1, 4),
    st.integers(2, 8),
    st.sampled_from([few_values, bfloat16_values, st.just(0.0), st.just(1.0)]),
    st.sampled_from([torch.float32, torch.float16, torch.bfloat16]),
    st.data(),
)
def test_n_m_masks_are_exact_where_scores_tie(rows, groups, m, values, dtype, data):
    """Each group loses exactly m - n weights; of equal scores the first are pruned."""
    n = data.draw(st.integers(1, m - 1))
    size = rows * groups * m
    drawn = data.draw(st.lists(values, min_size=size, max_size=size))
    scores = torch.tensor(drawn, dtype=dtype).view(rows, groups * m)
    mask = NM(n, m).mask(scores).view(-1, m)
    expected = torch.zeros_like(mask)
    order = scores.view(-1, m).argsort(dim=1, stable=True)
    expected.scatter_(1, order[:, : m - n], True)
    assert mask.sum(dim=1).unique().tolist() == [m - n]
    assert torch.equal(mask, expected)


@settings(max_examples=50)
@given(st.integers(1, 10**6), st.integers(1, 999))
def test_counts_are_exact_for_decimal_fractions(elements, thousandths):
    pattern = Unstructured(thousandths / 1000)
    assert pattern.count(elements) == elements * thousandths // 1000


def test_shortfall_reports_the_numbers():
    weight = torch.ones(4, 8)
    weight[:, :2] = 0
    assert Unstructured(0.25).shortfall(weight) is None
    assert Unstructured(0.5).shortfall(weight) == "8 of 32 weights are zero, not 16"
    assert NM(2, 4).shortfall(weight) == "4 of 8 groups keep more than 2 weights"


@pytest.mark.parametrize("pattern", [Unstructured(0.5), Exact(8, 16), NM(2, 4)])
def test_shortfall_allows_more_zeros_than_the_pattern_asks_for(pattern):
    """A stored matrix may have zeros that were in the dense one.

    That masks prune exactly as many weights as asked is tested in test_masks.py.
    """
    weight = torch.ones(2, 8)
    weight[:, [0, 1, 2, 4, 5]] = 0
    assert pattern.shortfall(weight) is None
    assert pattern.shortfall(torch.zeros(2, 8)) is None
    weight[:, 2] = 1
    assert pattern.shortfall(weight) is None
    weight[0, 0] = 1
    assert pattern.shortfall(weight) is not None


def test_a_width_that_m_does_not_divide_is_refused_by_name():
    with pytest.raises(PatternError, match=r"fc1 has 10 inputs"):
        NM(2, 4).check_fits("fc1", 10)


@pytest.mark.parametrize("text", ["2:4", "4:8", "1:4", "1:2", "3:8"])
def test_describe_finds_the_pattern(text):
    pattern = parse_pattern(text)
    assert isinstance(pattern, NM)
    scores = torch.rand(64, 96)
    assert describe(scores.masked_fill(pattern.mask(scores), 0)) == text


def test_describe_distinguishes_dense_from_unstructured():
    scores = torch.rand(64, 96) + 0.1
    assert describe(scores) == "dense"
    assert describe(scores.masked_fill(lowest(scores, 3000), 0)) == "unstructured"
