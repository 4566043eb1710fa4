"""Calibration statistics, compensated sums and the matrix products they use."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers.pytorch_utils import Conv1D

from halve.calibration_stats import ColumnNorms, CrossGram, GramMatrix
from halve.numerics import matmul
from halve.numerics.compensated_sum import CompensatedSum, no_reduce
from halve.numerics.matmul import FastMatmul, linear

CPU = torch.device("cpu")


@pytest.mark.parametrize("columns", [1, 2, 5, 6, 7, 64, 97, 600])
def test_gram_is_the_product_of_all_inputs(columns):
    batches = [torch.randn(tokens, columns) for tokens in (1, 33, 128)]
    gram = GramMatrix(columns, CPU)
    for batch in batches:
        gram.add(batch)
    inputs = torch.cat(batches).double()
    matrix = gram.take()
    assert torch.allclose(matrix.double(), inputs.T @ inputs, rtol=1e-4, atol=1e-4)
    assert torch.equal(matrix, matrix.T)


def test_gram_is_near_to_float64_for_nearly_equal_inputs():
    """The error of entry ij is a few roundings of sqrt(G_ii G_jj) for any batches."""
    generator = torch.Generator().manual_seed(0)
    gram, exact = GramMatrix(40, CPU), torch.zeros(40, 40, dtype=torch.float64)
    scales = 10 ** torch.linspace(-4, 4, 40)  # from negligible features to outliers
    common = torch.randn(1, 40, generator=generator)
    for _ in range(200):
        batch = scales * (common + 1e-3 * torch.randn(256, 40, generator=generator))
        gram.add(batch)
        exact += batch.double().T @ batch.double()
    norms = exact.diagonal().sqrt()
    error = (gram.take().double() - exact).abs() / norms / norms[:, None]
    assert float(error.max()) < 1e-5


@pytest.mark.parametrize("columns", [3, 200, 600])
def test_sums_do_not_depend_on_which_process_adds_which_batch(columns):
    """One process with all batches, two with every second one, and another order."""
    generator = torch.Generator().manual_seed(columns)
    scales = 10 ** torch.linspace(-3, 3, columns)
    pairs = [
        tuple(scales * torch.randn(2, 64, columns, generator=generator))
        for _ in range(12)
    ]
    weights = [torch.randn(5, columns, generator=generator)]

    def sums(pairs, reduce=no_reduce):
        """Return the three finished sums."""
        gram, norms = GramMatrix(columns, CPU), ColumnNorms(columns, CPU)
        cross = CrossGram(weights)
        for inputs, dense in pairs:
            gram.add(inputs)
            norms.add(inputs)
            cross.add(inputs, dense)
        for each in (gram, norms, cross):
            each.finish(reduce)
        return gram.take(), norms.squares, cross.drift(0)

    sent: list[torch.Tensor] = []
    sums(pairs[1::2], lambda part: sent.append(part.clone()))
    received = iter(sent)
    together = sums(pairs[::2], lambda part: part.add_(next(received)))
    backwards = sums(pairs[::-1])
    for one, two, three in zip(sums(pairs), together, backwards, strict=True):
        assert torch.equal(one, two)
        assert torch.equal(one, three)


@given(st.lists(st.floats(-1e9, 1e9, width=32), min_size=1, max_size=50))
def test_a_sum_is_as_precise_as_one_in_float64_and_rounded_once(terms):
    compensated = CompensatedSum.zeros(2, device=CPU)
    for term in terms:
        compensated.add(torch.tensor([term, -term]))
    exact = math.fsum(terms)
    size = max(map(abs, terms), default=0.0)
    expected = torch.tensor([exact, -exact], dtype=torch.float64)
    total = compensated.high.double() + compensated.low
    assert float((total - expected).abs().max()) <= 2**-44 * len(terms) * size
    assert torch.equal(compensated.total(), total.float())


def test_column_norms_are_the_diagonal_of_the_gram_matrix():
    inputs = torch.randn(50, 12)
    gram, norms = GramMatrix(12, CPU), ColumnNorms(12, CPU)
    gram.add(inputs)
    norms.add(inputs)
    assert torch.allclose(gram.take().diagonal(), norms.squares, rtol=1e-5)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), 1e30])
@pytest.mark.parametrize("kind", [GramMatrix, ColumnNorms])
def test_one_number_that_is_not_finite_is_detected(kind, bad):
    statistic = kind(9, CPU)
    inputs = torch.randn(40, 9)
    statistic.add(inputs)
    assert statistic.is_finite()
    inputs[17, 5] = bad
    statistic.add(inputs)
    assert not statistic.is_finite()


@pytest.mark.parametrize("shape", [(0, 4, 3), (1, 1, 1), (5, 7, 9), (64, 33, 130)])
@pytest.mark.parametrize("strided", [False, True])
def test_linear_is_torchs_linear(shape, strided):
    tokens, columns, rows = shape
    inputs, weight = torch.randn(tokens, columns), torch.randn(rows, columns)
    if strided:
        inputs, weight = inputs.T.contiguous().T, weight.T.contiguous().T
    bias = torch.randn(rows)
    expected = torch.nn.functional.linear(inputs, weight, bias)
    assert torch.allclose(linear(inputs, weight, bias), expected, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("strided", [False, True])
def test_large_matrices_are_converted_in_strips(dtype, strided, monkeypatch):
    weight, bias = torch.randn(33, 130).to(dtype), torch.randn(33)
    if strided:
        weight = weight.T.contiguous().T
    inputs, layer = torch.randn(2, 5, 130), torch.nn.Linear(130, 33)
    layer.weight.data, layer.bias.data = weight, bias
    conv1d = Conv1D(33, 130)
    conv1d.weight.data, conv1d.bias.data = weight.T, bias
    expected = torch.nn.functional.linear(inputs, weight.float(), bias)
    converted: list[int] = []
    takes = matmul._onednn_takes

    def watched(*operands):
        converted.append(operands[1].numel())
        return takes(*operands)

    monkeypatch.setattr(matmul, "MAX_CONVERTED", 1000)
    monkeypatch.setattr(matmul, "_onednn_takes", watched)
    with torch.no_grad(), FastMatmul():
        for multiply in (layer, conv1d, lambda x: linear(x, weight, bias)):
            assert torch.allclose(multiply(inputs), expected, atol=1e-5)
    assert max(converted) <= 1000


def test_models_compute_the_same_within_fast_matmul():
    layer = torch.nn.Sequential(torch.nn.Linear(8, 16), torch.nn.Linear(16, 4))
    inputs, bias = torch.randn(3, 5, 8), torch.randn(6)
    left, right = torch.randn(7, 8), torch.randn(8, 6)
    with torch.no_grad():
        expected = layer(inputs), torch.addmm(bias, left, right)
        with FastMatmul():
            computed = layer(inputs), torch.addmm(bias, left, right)
    for actual, reference in zip(computed, expected, strict=True):
        assert torch.allclose(actual, reference, atol=1e-5)
