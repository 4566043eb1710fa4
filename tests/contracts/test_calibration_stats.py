"""Sums over inputs, and the matrix products they are made of."""

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


def test_gram_in_float32_is_near_to_float64_where_inputs_hardly_differ():
    """Each entry is off by a few roundings of sqrt(G_ii G_jj), however many batches."""
    generator = torch.Generator().manual_seed(0)
    gram, exact = GramMatrix(40, CPU), torch.zeros(40, 40, dtype=torch.float64)
    scales = 10 ** torch.linspace(-4, 4, 40)  # outlier features, and hardly any
    common = torch.randn(1, 40, generator=generator)
    for _ in range(200):
        batch = scales * (common + 1e-3 * torch.randn(256, 40, generator=generator))
        gram.add(batch)
        exact += batch.double().T @ batch.double()
    norms = exact.diagonal().sqrt()
    off = (gram.take().double() - exact).abs() / norms / norms[:, None]
    assert float(off.max()) < 1e-5


@pytest.mark.parametrize("columns", [3, 200, 600])
def test_who_takes_in_which_batch_does_not_show(columns):
    """Sums of all batches, and of two processes that have every second one."""
    generator = torch.Generator().manual_seed(columns)
    scales = 10 ** torch.linspace(-3, 3, columns)
    pairs = [
        tuple(scales * torch.randn(2, 64, columns, generator=generator))
        for _ in range(12)
    ]
    weights = [torch.randn(5, columns, generator=generator)]

    def found(pairs, reduce=no_reduce):
        """Return the three sums, finished."""
        gram, norms = GramMatrix(columns, CPU), ColumnNorms(columns, CPU)
        drift = CrossGram(weights)
        for inputs, dense in pairs:
            gram.add(inputs)
            norms.add(inputs)
            drift.add(inputs, dense)
        for each in (gram, norms, drift):
            each.finish(reduce)
        return gram.take(), norms.squares, drift.drift(0)

    said: list[torch.Tensor] = []
    found(pairs[1::2], lambda own: said.append(own.clone()))
    left = iter(said)
    together = found(pairs[::2], lambda own: own.add_(next(left)))
    transposed_copy = found(pairs[::-1])
    for one, two, three in zip(found(pairs), together, transposed_copy, strict=True):
        assert torch.equal(one, two)
        assert torch.equal(one, three)


@given(st.lists(st.floats(-1e9, 1e9, width=32), min_size=1, max_size=50))
def test_a_sum_is_that_of_float64_rounded_once(terms):
    own = CompensatedSum.zeros(2, device=CPU)
    for term in terms:
        own.add(torch.tensor([term, -term]))
    exact = math.fsum(terms)
    size = max(map(abs, terms), default=0.0)
    expected = torch.tensor([exact, -exact], dtype=torch.float64)
    off = (own.high.double() + own.low - expected).abs().max()
    assert float(off) <= 2**-44 * len(terms) * size
    assert torch.equal(own.total(), (own.high.double() + own.low).float())


def test_column_norms_are_the_diagonal_of_the_gram_matrix():
    inputs = torch.randn(50, 12)
    gram, norms = GramMatrix(12, CPU), ColumnNorms(12, CPU)
    gram.add(inputs)
    norms.add(inputs)
    assert torch.allclose(gram.take().diagonal(), norms.squares, rtol=1e-5)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), 1e30])
@pytest.mark.parametrize("kind", [GramMatrix, ColumnNorms])
def test_one_bad_number_is_noticed(kind, bad):
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
def test_large_matrices_are_widened_in_strips(dtype, strided, monkeypatch):
    weight, bias = torch.randn(33, 130).to(dtype), torch.randn(33)
    if strided:
        weight = weight.T.contiguous().T
    inputs, layer = torch.randn(2, 5, 130), torch.nn.Linear(130, 33)
    layer.weight.data, layer.bias.data = weight, bias
    transposed_copy = Conv1D(33, 130)
    transposed_copy.weight.data, transposed_copy.bias.data = weight.T, bias
    expected = torch.nn.functional.linear(inputs, weight.float(), bias)
    as_float32: list[int] = []
    plain = matmul._onednn_takes

    def watched(*operands):
        as_float32.append(operands[1].numel())
        return plain(*operands)

    monkeypatch.setattr(matmul, "WIDENED", 1000)
    monkeypatch.setattr(matmul, "_onednn_takes", watched)
    with torch.no_grad(), FastMatmul():
        for multiply in (layer, transposed_copy, lambda x: linear(x, weight, bias)):
            assert torch.allclose(multiply(inputs), expected, atol=1e-5)
    assert max(as_float32) <= 1000


def test_models_run_the_same_within_fast_products():
    layer = torch.nn.Sequential(torch.nn.Linear(8, 16), torch.nn.Linear(16, 4))
    inputs, bias = torch.randn(3, 5, 8), torch.randn(6)
    left, right = torch.randn(7, 8), torch.randn(8, 6)
    with torch.no_grad():
        expected = layer(inputs), torch.addmm(bias, left, right)
        with FastMatmul():
            found = layer(inputs), torch.addmm(bias, left, right)
    for ours, theirs in zip(found, expected, strict=True):
        assert torch.allclose(ours, theirs, atol=1e-5)
