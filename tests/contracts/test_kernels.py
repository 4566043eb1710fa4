"""Every kernel that this CPU can run agrees with a plain product."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional

from halve.errors import HalveError
from halve.formats.bitmask import pack
from halve.runtime.cpu.kernels import kernels
from halve.runtime.cpu.operators import FUSED_ROWS, dense_linear, packed_linear
from tests.contracts.selected_kernel import print_selected_kernel
from tests.separate_process import SeparateProcess

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
SHAPES = (
    (1, 1),
    (1, 64),
    (2, 63),
    (3, 65),
    (5, 130),
    (7, 200),
    (64, 1),
    (33, 320),
    (256, 1000),
)
BATCHES = (1, 2, 3, 4, 5, 8, 16, 17, FUSED_ROWS, FUSED_ROWS + 1, 97)
loaded = kernels()
NAMES = loaded.available if loaded else []
needs_kernels = pytest.mark.skipif(loaded is None, reason="built without a compiler")


def random_matrix(shape, pattern, dtype, seed=0):
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(shape, generator=generator)
    noise = torch.rand(shape, generator=generator)
    rows = torch.arange(shape[0]).unsqueeze(1)
    dropped = {
        "half": noise < 0.5,
        "most": noise < 0.95,
        "none": noise < 0,
        "all": noise < 2,
        "rows": (rows % 2 == 0).expand(shape),
        "2:4": (noise + torch.arange(shape[1]) % 2 * 10) > 5,
    }[pattern]
    return weight.masked_fill(dropped, 0).to(dtype)


PATTERNS = ("half", "most", "none", "all", "rows", "2:4")


@pytest.fixture(params=NAMES)
def kernel(request):
    """Select one kernel."""
    assert loaded is not None
    before = loaded.name
    loaded.select(request.param)
    yield request.param
    loaded.select(before)


def tolerance(x, weight, dtype):
    """Return the product in float64 and the error allowed in each element.

    One rounding to the dtype, and float32 sums in any order.
    """
    magnitude = x.double().abs() @ weight.double().abs().T
    exact = x.double() @ weight.double().T
    tiny = {torch.float16: 2.0**-24}.get(dtype, 0.0)
    return exact, torch.finfo(dtype).eps * exact.abs() + 1e-6 * magnitude + tiny


def product(x, weight, bias=None):
    p = pack(weight)
    return packed_linear(x, p.values, p.mask, p.offsets, bias, p.columns)


@needs_kernels
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_packed_product_is_right_to_one_rounding(kernel, shape, dtype):
    for pattern in PATTERNS:
        weight = random_matrix(shape, pattern, dtype)
        for batch in BATCHES:
            x = torch.randn(batch, shape[1]).to(dtype)
            exact, allowed = tolerance(x, weight, dtype)
            error = (product(x, weight).double() - exact).abs()
            assert bool((error <= allowed).all()), (pattern, batch)


@needs_kernels
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_dense_product_is_right_to_one_rounding(kernel, dtype):
    for shape in SHAPES:
        weight = random_matrix(shape, "none", dtype)
        for batch in (1, 3, 16):
            x = torch.randn(batch, shape[1]).to(dtype)
            exact, allowed = tolerance(x, weight, dtype)
            error = (dense_linear(x, weight, None).double() - exact).abs()
            assert bool((error <= allowed).all()), (shape, batch)


@needs_kernels
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("batch", [1, 7, 40])
def test_bias_is_added_before_the_rounding(kernel, batch, dtype):
    weight, bias = random_matrix((33, 130), "half", dtype), torch.randn(33).to(dtype)
    x = torch.randn(batch, 130).to(dtype)
    exact, allowed = tolerance(x, weight, dtype)
    exact += bias.double()
    allowed += torch.finfo(dtype).eps * exact.abs()
    for y in (product(x, weight, bias), dense_linear(x, weight, bias)):
        assert bool(((y.double() - exact).abs() <= allowed).all())


@needs_kernels
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_kernels_unpack_bit_for_bit(kernel, shape, dtype):
    assert loaded is not None
    for pattern in PATTERNS:
        weight = random_matrix(shape, pattern, dtype)
        weight.view(-1)[:1] = -0.0
        p = pack(weight)
        for rows in (slice(0, shape[0]), slice(shape[0] // 2, shape[0])):
            out = torch.full((rows.stop - rows.start, shape[1]), 7.0).to(dtype)
            loaded.unpack(p.values, p.mask, p.offsets, rows, out)
            whole = torch.int16 if dtype.itemsize == 2 else torch.int32
            assert torch.equal(out.view(whole), weight[rows].view(whole))


@needs_kernels
def test_not_a_number_stays_one(kernel):
    for dtype in DTYPES:
        weight = random_matrix((3, 70), "half", dtype)
        x = torch.randn(2, 70).to(dtype)
        x[0, 3] = float("nan")
        y = product(x, weight)
        assert bool(y[0].isnan().all())
        assert bool(y[1].isfinite().all())


@needs_kernels
def test_wide_offsets_give_the_same(kernel):
    p = pack(random_matrix((9, 100), "half", torch.bfloat16))
    x = torch.randn(3, 100).bfloat16()
    wide = p.offsets.to(torch.uint64)
    y = packed_linear(x, p.values, p.mask, wide, None, 100)
    assert torch.equal(y, packed_linear(x, p.values, p.mask, p.offsets, None, 100))


@needs_kernels
@given(data=st.data())
@settings(max_examples=200, deadline=None)
def test_no_kernel_leaves_its_tensors_whatever_the_mask_says(data):
    """Invalid parts give wrong numbers, not a crash or a write past the result."""
    assert loaded is not None
    rows, columns = data.draw(st.integers(1, 9)), data.draw(st.integers(1, 200))
    words = -(-columns // 64)
    numbers = st.integers(0, 2**64 - 1)
    mask = data.draw(st.lists(numbers, min_size=rows * words, max_size=rows * words))
    starts = st.integers(0, 2**32 - 1) | st.integers(0, 300)
    offsets = data.draw(st.lists(starts, min_size=rows + 1, max_size=rows + 1))
    values = torch.randn(data.draw(st.integers(0, 300)))
    invalid = (
        values,
        torch.tensor(mask, dtype=torch.uint64).view(rows, words),
        torch.tensor(offsets, dtype=torch.uint32),
    )
    name = data.draw(st.sampled_from(NAMES))
    before = loaded.name
    loaded.select(name)
    for batch in (3, 30):
        y = loaded.packed_linear(torch.randn(batch, columns), *invalid, None, columns)
        assert y.shape == (batch, rows)
    frame = torch.full((rows + 2, columns), 7.0)
    loaded.unpack(*invalid, slice(0, rows), frame[1:-1])
    assert bool((frame[[0, -1]] == 7).all())
    loaded.select(before)


@needs_kernels
def test_dtypes_must_agree():
    weight = random_matrix((3, 70), "half", torch.bfloat16)
    with pytest.raises(RuntimeError, match=r"torch.float32 .* torch.bfloat16"):
        product(torch.randn(1, 70), weight)


@needs_kernels
def test_batches_of_any_shape_and_stride():
    weight = random_matrix((33, 70), "half", torch.float32)
    x = torch.randn(70, 2, 3).permute(1, 2, 0)
    assert torch.allclose(product(x, weight), functional.linear(x, weight), atol=1e-5)
    assert product(torch.randn(0, 5, 70), weight).shape == (0, 5, 33)


@needs_kernels
def test_operators_pass_the_checks_of_torch():
    p = pack(random_matrix((33, 130), "half", torch.float32))
    x, bias = torch.randn(2, 130), torch.randn(33)
    torch.library.opcheck(
        packed_linear, (x, p.values, p.mask, p.offsets, bias, p.columns)
    )
    torch.library.opcheck(dense_linear, (x, torch.randn(33, 130), bias))


@needs_kernels
def test_an_unknown_kernel_is_rejected_with_a_list_of_the_known_ones():
    assert loaded is not None
    with pytest.raises(HalveError, match=r"no kernel 'mmx'.*reference, torch"):
        loaded.select("mmx")


@pytest.fixture
def run_with_kernel(tmp_path):
    """Return a function that runs two products where `HALVE_KERNEL` is set."""

    def run(name):
        variables = {"HALVE_KERNEL": name}
        out = tmp_path / "out"
        return SeparateProcess(out, print_selected_kernel, variables=variables).finish()

    return run


@pytest.mark.parametrize("name", NAMES)
def test_the_environment_selects_the_kernel(name, run_with_kernel):
    done = run_with_kernel(name)
    assert done.stdout.split() == ["3.0", name], done.stderr


def test_without_kernels_it_works_and_warns_once(run_with_kernel):
    done = run_with_kernel("torch")
    assert done.stdout.split() == ["3.0", "none"]
    assert done.stderr.count("without Halve's kernels") == 1


@needs_kernels
def test_a_kernel_that_does_not_exist_is_an_error(run_with_kernel):
    done = run_with_kernel("mmx")
    assert done.returncode == 1
    assert "HalveError: There is no kernel 'mmx' for this CPU." in done.stderr
