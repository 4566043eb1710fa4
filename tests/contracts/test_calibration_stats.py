"""Calibration statistics, compensated sums and the matrix products they use."""

import math
import os
from importlib.util import find_spec

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers.pytorch_utils import Conv1D

from halve import calibration_stats
from halve.calibration_stats import ColumnNorms, CrossGram, GramMatrix
from halve.errors import HalveWarning
from halve.numerics import compensated_sum, matmul
from halve.numerics.compensated_sum import CompensatedSum, no_reduce
from halve.numerics.finite import finite_flag, is_finite
from halve.numerics.matmul import FastMatmul, linear, mixed_linear
from halve.numerics.precision import matmul_precision

CPU, CUDA = torch.device("cpu"), torch.device("cuda")
# Triton reads it when a kernel is defined: unless it is 0, kernels run on the CPU.
os.environ.setdefault("TRITON_INTERPRET", "1")
KERNELS = CUDA if os.environ["TRITON_INTERPRET"] == "0" else CPU
needs_triton = pytest.mark.skipif(
    find_spec("triton") is None, reason="Triton is not installed"
)


@pytest.fixture(params=["tiles of the CPU", "tiles of CUDA"])
def tiles(request, monkeypatch):
    """Sum as on each device, on tensors of the CPU."""
    if request.param == "tiles of CUDA":
        monkeypatch.setattr(calibration_stats, "_is_gpu", lambda device: True)
        monkeypatch.setattr(calibration_stats, "CUDA_TILE", 150)


@pytest.mark.usefixtures("tiles")
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


@pytest.mark.usefixtures("tiles")
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


def sums_in_a_square(rows, columns):
    """Return empty sums whose rounding errors are in the mirror image, as in Grams."""
    square = torch.zeros(rows + columns, rows + columns, device=KERNELS)
    return CompensatedSum(square[:rows, rows:], square[rows:, :rows].T)


def separate_sums(rows, columns):
    return CompensatedSum.zeros(rows, columns, device=KERNELS)


@needs_triton
@pytest.mark.parametrize("shape", [(1, 1), (5, 7), (64, 64), (130, 200), (3, 500)])
@pytest.mark.parametrize("make", [sums_in_a_square, separate_sums])
def test_the_kernel_adds_the_same_bits(shape, make, monkeypatch):
    from halve.numerics.two_sum_kernel import add_two_sum  # noqa: PLC0415

    generator = torch.Generator().manual_seed(0)
    exponents = torch.randint(-20, 20, (6, *shape), generator=generator)
    batches = torch.randn(6, *shape, generator=generator) * 2.0**exponents
    batches[2, 0, 0] = -0.0
    plain, fused = make(*shape), make(*shape)
    for sums, kernel in ((plain, None), (fused, add_two_sum)):
        monkeypatch.setattr(compensated_sum, "_fused", lambda device, k=kernel: k)
        for index, terms in enumerate(batches.to(KERNELS)):
            own = terms.clone()  # it is overwritten
            sums.add(own.T.contiguous().T if index == 1 else own)
    for one, other in ((plain.high, fused.high), (plain.low, fused.low)):
        assert torch.equal(one, other)
        assert torch.equal(one.signbit(), other.signbit())


@needs_triton
def test_without_a_compiler_torch_adds_with_one_warning(monkeypatch):
    from halve.numerics import two_sum_kernel  # noqa: PLC0415

    def fail(*tensors):
        raise OSError("no C compiler")

    monkeypatch.setattr(two_sum_kernel, "add_two_sum", fail)
    monkeypatch.setattr(compensated_sum, "has_triton", lambda device: True)
    compensated_sum._fused.cache_clear()
    sums = CompensatedSum.zeros(2, 3, device=CPU)
    try:
        with pytest.warns(HalveWarning, match="no C compiler") as said:
            for _ in range(3):
                sums.add(torch.ones(2, 3))
    finally:
        compensated_sum._fused.cache_clear()
    assert len(said) == 1
    assert torch.equal(sums.total(), torch.full((2, 3), 3.0))


@needs_triton
@pytest.mark.parametrize("capability", [80, 90])
def test_the_kernel_compiles_without_a_gpu(capability):
    """With neither spills nor a fused multiplication, which would change bits."""
    import triton  # noqa: PLC0415
    from triton.backends.compiler import GPUTarget  # noqa: PLC0415
    from triton.compiler import ASTSource  # noqa: PLC0415

    from halve.numerics import two_sum_kernel  # noqa: PLC0415

    function = getattr(two_sum_kernel._two_sum, "fn", two_sum_kernel._two_sum)
    kernel = triton.JITFunction(function)
    constants = {"high_column": 1, "low_row": 1, "terms_column": 1, "SIDE": 64}
    types = {"high": "*fp32", "low": "*fp32", "terms": "*fp32"}
    signature = {
        name: "constexpr" if name in constants else types.get(name, "i32")
        for name in kernel.arg_names
    }
    source = ASTSource(fn=kernel, signature=signature, constexprs=constants)
    compiled = triton.compile(source, target=GPUTarget("cuda", capability, 32))
    assert "fma" not in compiled.asm["ptx"]
    assert ".local" not in compiled.asm["ptx"]


def test_a_flag_is_what_is_finite_tells():
    for bad in (0.0, float("nan"), float("inf"), float("-inf")):
        tensor = torch.zeros(3, 4)
        tensor[1, 2] = bad
        flag = finite_flag(tensor)
        assert flag.shape == ()
        assert flag.dtype == torch.bool
        assert bool(flag) == is_finite(tensor) == (bad == 0.0)
    assert bool(finite_flag(torch.empty(0)))


def test_statistics_are_in_full_precision_within_passes_that_are_not(monkeypatch):
    """The setting of the process is restored, also within a pass and after errors."""
    used = []
    real = CompensatedSum.add

    def add(self, terms):
        used.append(torch.get_float32_matmul_precision())
        real(self, terms)

    monkeypatch.setattr(CompensatedSum, "add", add)
    monkeypatch.setattr(
        calibration_stats,
        "matmul_precision",
        lambda name, device: matmul_precision(name, CUDA),
    )
    inputs = torch.randn(4, 6)
    with pytest.raises(ZeroDivisionError), matmul_precision("high", CUDA):
        GramMatrix(6, CPU).add(inputs)
        CrossGram([torch.randn(2, 6)]).add(inputs, inputs)
        assert torch.get_float32_matmul_precision() == "high"
        _ = 1 / 0
    assert set(used) == {"highest"}
    assert torch.get_float32_matmul_precision() == "highest"
    with matmul_precision("high", CPU):
        assert torch.get_float32_matmul_precision() == "highest"


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


@pytest.mark.parametrize(
    ("mixed", "error"), [(False, 1e-5), (True, 2**-7)], ids=["float32", "bfloat16"]
)
@pytest.mark.parametrize("with_bias", [False, True])
def test_gradients_of_linear_are_those_of_torch(mixed, error, with_bias, monkeypatch):
    monkeypatch.setattr(matmul, "multiplies_bfloat16", lambda: mixed)
    generator = torch.Generator().manual_seed(0)
    operands = [
        torch.randn(*shape, generator=generator)
        for shape in ((2, 50, 30), (40, 30), (40,))
    ]
    results = []
    for multiply, dtype in (
        (torch.nn.functional.linear, torch.float64),
        (linear, torch.float32),
    ):
        inputs, weight, bias = (x.to(dtype).requires_grad_() for x in operands)
        outputs = multiply(inputs, weight, bias if with_bias else None)
        outputs.square().sum().backward()
        found = [outputs.detach(), inputs.grad, weight.grad]
        assert all(x is not None and x.dtype == dtype for x in found)
        results.append([*found, bias.grad] if with_bias else found)
    for expected, found in zip(*results, strict=True):
        assert (found - expected).norm() < error * expected.norm()
    # The product is one of bfloat16, and not only near one.
    product = results[1][2]
    assert torch.equal(product, product.bfloat16().float()) == mixed


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("mixed", [False, True])
def test_passes_for_training_round_as_training_does(mixed, dtype, monkeypatch):
    """Mixed precision without gradients gives what `linear` gives with them."""
    monkeypatch.setattr(matmul, "multiplies_bfloat16", lambda: mixed)
    inputs, bias = torch.randn(2, 50, 30), torch.randn(40)
    weight = torch.randn(40, 30).to(dtype)
    trained = weight.float().clone().requires_grad_()
    with torch.no_grad():
        found = mixed_linear(inputs, weight, bias)
        with FastMatmul(mixed=True):
            layer = torch.nn.functional.linear(inputs, weight, bias)
            conv1d = torch.addmm(bias, inputs[0], weight.T)
    expected = linear(inputs, trained, bias).detach()
    assert found.dtype == torch.float32
    assert torch.allclose(found, expected, atol=1e-5)
    assert torch.equal(layer, found)
    assert (conv1d - found[0]).norm() < 2**-7 * found[0].norm()
    exact = linear(inputs, weight, bias)
    assert torch.allclose(found, exact, atol=1e-5) != mixed


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


@pytest.mark.parametrize("is_causal", [False, True])
def test_attention_with_fewer_key_heads_is_fused(is_causal, monkeypatch):
    generator = torch.Generator().manual_seed(0)
    query = torch.randn(2, 6, 5, 8, generator=generator)
    key, value = torch.randn(2, 2, 2, 5, 8, generator=generator)
    attend = torch.nn.functional.scaled_dot_product_attention
    expected = attend(query, key, value, is_causal=is_causal, enable_gqa=True)
    monkeypatch.setattr(matmul, "_keeps_scores", lambda query: True)
    asked = []

    def watched(query, key, value, **options):
        asked.append((key.shape[1], options["enable_gqa"]))
        return attend(query, key, value, **options)

    monkeypatch.setattr(matmul.functional, "scaled_dot_product_attention", watched)
    with FastMatmul():
        found = attend(query, key, value, is_causal=is_causal, enable_gqa=True)
    assert asked == [(6, False)]
    assert torch.allclose(found, expected, atol=1e-6)
