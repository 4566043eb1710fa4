"""Laws of quantization grids: parsing, values, scales, and pairs for a bit budget."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from halve.errors import QuantizationError
from halve.grids import (
    BITS,
    QuantParams,
    QuantScheme,
    fit_quant_params,
    grid_shortfall,
    parse_scheme,
    schemes_for_bits,
)
from tests.tables import GRIDS

over_grids = pytest.mark.parametrize("grid", GRIDS, ids=repr)


def weights(rows: int = 12, columns: int = 160) -> torch.Tensor:
    """Return weights with heavy tails, of which some are zero."""
    generator = torch.Generator().manual_seed(0)
    dense = torch.randn(rows, columns, generator=generator) ** 3
    return dense * (torch.rand(rows, columns, generator=generator) > 0.3)


@pytest.mark.parametrize("bits", BITS)
def test_parse_scheme_accepts_the_names_of_grids(bits):
    grid = parse_scheme(f" int{bits} ", 64, symmetric=False)
    assert grid == QuantScheme(bits, 64, symmetric=False)
    assert str(grid) == f"int{bits}"


@pytest.mark.parametrize("text", ["", "int", "int5", "int16", "4", "INT4", "nf4"])
def test_parse_scheme_refuses_other_names(text):
    with pytest.raises(QuantizationError, match="Choose one of int8, int4, int3, int2"):
        parse_scheme(text)


@pytest.mark.parametrize("size", [0, -1])
def test_group_sizes_below_one_are_refused(size):
    with pytest.raises(QuantizationError, match="not positive"):
        parse_scheme("int4", size)


@pytest.mark.parametrize(
    ("grid", "sparsity", "bits"),
    [
        (QuantScheme(3), 0.0, 3.125),
        (QuantScheme(4, 64), 0.5, 3.25),
        (QuantScheme(4, 64, symmetric=False), 0.5, 3.3125),
        (QuantScheme(8, 16, symmetric=False), 0.75, 4.5),
    ],
)
def test_bits_per_weight_count_mask_codes_and_scales(grid, sparsity, bits):
    assert grid.bits_per_weight(sparsity) == bits


@pytest.mark.parametrize(
    ("target", "pairs"),
    [
        # int3 with groups of 128 takes exactly these bits and must not be left out;
        # int2 would keep exactly all weights, which is no sparsity.
        (3.125, [(0, 3), (0.75, 8), (0.5, 4), (1 / 3, 3)]),
        (4.125, [(0, 4), (0.625, 8), (0.25, 4)]),
        (2.125, [(0, 2), (0.75, 4), (2 / 3, 3), (0.5, 2)]),
        # Less than any dense grid takes: pairs with zeros only.
        (2.0, [(0.78125, 4), (0.708333333, 3), (0.5625, 2)]),
        # More than int8 takes: no grid can use it up.
        (9.5, [(0, 8)]),
    ],
)
def test_schemes_for_bits_lists_what_the_bits_allow(target, pairs):
    found = schemes_for_bits(target, 128, symmetric=True)
    assert [scheme.bits for _, scheme in found] == [bits for _, bits in pairs]
    expected = [sparsity for sparsity, _ in pairs]
    assert [sparsity for sparsity, _ in found] == pytest.approx(expected)


@given(
    st.floats(1.5, 12),
    st.sampled_from([16, 32, 128]),
    st.booleans(),
)
def test_schemes_for_bits_take_no_more_and_waste_nothing(target, group_size, symmetric):
    try:
        pairs = schemes_for_bits(target, group_size, symmetric)
    except QuantizationError:
        pairs = []
    dense = [scheme for sparsity, scheme in pairs if sparsity == 0]
    allowed = [
        bits
        for bits in BITS
        if QuantScheme(bits, group_size, symmetric).bits_per_weight(0) <= target
    ]
    assert [scheme.bits for scheme in dense] == allowed[:1]
    for sparsity, scheme in pairs:
        assert (scheme.group_size, scheme.symmetric) == (group_size, symmetric)
        assert 0 <= sparsity <= 0.8
        taken = scheme.bits_per_weight(sparsity)
        assert taken <= target + 1e-9
        # Where a mask pays, all of the bits are used.
        if sparsity and 1 + (1 - sparsity) * scheme.bits <= scheme.bits:
            assert taken == pytest.approx(target)


@pytest.mark.parametrize("target", [0.0, 1.0, 1.3])
def test_too_few_bits_for_any_grid_are_refused(target):
    with pytest.raises(QuantizationError, match=f"{target:g} bits"):
        schemes_for_bits(target, 128, symmetric=True)


@over_grids
@pytest.mark.parametrize("magnitude", [1.0, 1e-9, 1e-4, 1e5])
def test_rounded_weights_lie_on_the_grid(grid, magnitude):
    weight = weights() * magnitude
    quant_params = fit_quant_params(grid, weight)
    rounded, codes = quant_params.fake_quantize(weight), quant_params.quantize(weight)
    assert codes.dtype == torch.int8
    assert grid.lowest <= int(codes.min()) <= int(codes.max()) <= grid.highest
    for found in (
        quant_params.dequantize(codes),
        quant_params.dequantize(quant_params.quantize(rounded)),
    ):
        assert found.numpy().tobytes() == rounded.numpy().tobytes()


@over_grids
def test_a_column_is_rounded_as_the_matrix_is(grid):
    weight = weights()
    quant_params = fit_quant_params(grid, weight)
    columns = [
        quant_params.fake_quantize_column(column, j)
        for j, column in enumerate(weight.T)
    ]
    assert torch.equal(torch.stack(columns, dim=1), quant_params.fake_quantize(weight))


@over_grids
def test_zero_is_on_every_grid_and_has_no_sign(grid):
    """Except midrise ones, where it stands for a weight without a code."""
    quant_params = fit_quant_params(grid, weights())
    zeros = torch.full((12, 160), -0.0)
    rounded = quant_params.fake_quantize_kept(zeros)
    assert not rounded.numpy().tobytes().strip(b"\0")
    zero = -0.5 if grid.midrise else 0
    assert not grid.symmetric or bool((quant_params.zero == zero).all())
    levels = quant_params.fake_quantize(torch.cat([zeros, weights()], dim=1)[:, :160])
    assert bool((levels == 0).any()) != grid.midrise


@over_grids
def test_weights_that_are_not_zero_are_rounded_alike_whether_zeros_are_kept(grid):
    weight = weights()
    weight[:, ::3] = 0
    quant_params = fit_quant_params(grid, weight)
    kept = quant_params.fake_quantize_kept(weight)
    assert torch.equal(kept, quant_params.fake_quantize(weight).where(weight != 0, 0))


@over_grids
def test_scales_fit_into_sixteen_bits_and_zero_points_into_a_code(grid):
    for magnitude in (1e-12, 1.0, 1e12):
        quant_params = fit_quant_params(grid, weights() * magnitude)
        assert torch.equal(quant_params.scale.half().float(), quant_params.scale)
        assert bool((quant_params.scale != 0).all())
        assert bool(quant_params.scale.isfinite().all())
        codes = quant_params.zero + 0.5 * grid.midrise
        assert torch.equal(codes.round(), codes)
        assert (
            grid.lowest
            <= quant_params.zero.min()
            <= quant_params.zero.max()
            <= grid.highest
        )


@over_grids
def test_a_group_of_zeros_has_scale_one_and_stays_zero(grid):
    weight = weights()
    weight[3], weight[:, :48] = 0, 0
    quant_params = fit_quant_params(grid, weight, torch.rand(160))
    assert bool((quant_params.scale[3] == 1).all())
    assert torch.equal(quant_params.fake_quantize_kept(weight)[3], torch.zeros(160))


def plain_levels(grid: QuantScheme, weight: torch.Tensor) -> QuantParams:
    """Return scales and zero points of minimum and maximum, one group at a time."""
    scale = torch.ones(len(weight), grid.groups(weight.shape[1]))
    zero = torch.zeros_like(scale)
    for i, row in enumerate(weight):
        for j, group in enumerate(row.split(grid.group_size)):
            low, high = min(float(group.min()), 0.0), max(float(group.max()), 0.0)
            if grid.midrise:
                scale[i, j] = max(-low, high) / (grid.highest + 0.5)
                zero[i, j] = -0.5
            elif grid.symmetric:
                scale[i, j] = max(-low, high) / grid.highest
            else:
                scale[i, j] = (high - low) / (2**grid.bits - 1)
                zero[i, j] = round(grid.lowest - low / float(scale[i, j]))
    return QuantParams(grid, scale.half().float(), zero)


@over_grids
@pytest.mark.parametrize("alike", [True, False])
def test_searched_scales_lose_no_more_than_minimum_and_maximum(grid, alike):
    weight = weights()
    importance = torch.ones(160) if alike else torch.rand(160) ** 4
    losses = [
        ((weight - quant_params.fake_quantize(weight)).square() * importance).sum(dim=1)
        for quant_params in (
            fit_quant_params(grid, weight, None if alike else importance),
            plain_levels(grid, weight),
        )
    ]
    assert bool((losses[0] <= losses[1] * (1 + 1e-5)).all())


def test_zeros_do_not_change_the_scales():
    """Scales are chosen for the nonzero weights, however many zeros lie between."""
    grid, weight = QuantScheme(4, 16), weights(4, 16)
    interleaved = torch.zeros(4, 16 * 3)
    interleaved[:, ::3] = weight
    wide = fit_quant_params(QuantScheme(4, 48), interleaved)
    assert torch.equal(wide.scale, fit_quant_params(grid, weight).scale)


def test_scales_of_a_row_do_not_depend_on_the_other_rows():
    weight = torch.randn(3000, 64)
    whole = fit_quant_params(QuantScheme(4, 16), weight)
    for part in (slice(0, 1), slice(1500, 2600)):
        assert torch.equal(
            fit_quant_params(QuantScheme(4, 16), weight[part]).scale, whole.scale[part]
        )


@over_grids
@pytest.mark.parametrize("magnitude", [1.0, 1e-4, 1e5])
def test_shortfall_accepts_rounded_weights_and_finds_one_that_is_off(grid, magnitude):
    weight = weights() * magnitude
    rounded = fit_quant_params(grid, weight).fake_quantize(weight)
    assert grid_shortfall(grid, rounded) is None
    groups = 12 * grid.groups(160)
    assert f"of {groups} groups" in (grid_shortfall(grid, weight) or "")
    row = int((rounded[:, :16] != 0).sum(dim=1).argmax())
    first = int(rounded[row].nonzero()[0])
    rounded[row, first] *= 1 + 2**-20
    assert (grid_shortfall(grid, rounded) or "").startswith("1 of")


@over_grids
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_weights_rounded_to_16_bits_lie_on_a_grid(grid, dtype):
    if not grid.symmetric and grid.bits == 8 and dtype == torch.bfloat16:
        pytest.skip("bfloat16 has too few bits for this grid")
    weight = weights()
    rounded = fit_quant_params(grid.exact_in(dtype), weight).fake_quantize(weight)
    assert grid_shortfall(grid, rounded.to(dtype)) is None


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("bits", BITS[1:])
def test_one_code_too_many_does_not_lie_on_a_grid(bits, symmetric):
    """All codes of a grid lie on it, one more below the lowest does not."""
    grid = QuantScheme(bits, symmetric=symmetric)
    codes = torch.arange(grid.lowest, grid.highest + 1.0)[None]
    assert grid_shortfall(grid, codes * 0.375) is None
    assert grid_shortfall(grid, codes * -0.375) is None
    assert grid_shortfall(grid, torch.zeros_like(codes)) is None
    codes[0, 0] -= 1
    assert grid_shortfall(grid, codes) is not None


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_what_lies_on_a_midrise_grid(bits):
    """Odd multiples of half a scale and zeros, but no even one, and not one more."""
    grid = QuantScheme(bits, midrise=True)
    codes = torch.arange(grid.lowest, grid.highest + 1.0)[None] + 0.5
    codes = torch.cat([codes, torch.zeros(1, 1)], dim=1)
    assert grid_shortfall(grid, codes * 0.375) is None
    for wrong in (grid.lowest - 0.5, 1.0):
        changed = codes.clone()
        changed[0, 0] = wrong
        assert grid_shortfall(grid, changed * 0.375) is not None


@pytest.mark.parametrize("options", [{"bits": 8}, {"bits": 2, "symmetric": False}])
def test_midrise_grids_have_few_bits_and_no_zero_points(options):
    with pytest.raises(QuantizationError, match="midrise"):
        QuantScheme(**options, midrise=True)


def test_a_midrise_grid_without_a_mask_takes_its_bits_alone():
    grid = QuantScheme(2, 128, midrise=True)
    assert grid.bits_per_weight(0) == 2.125
    assert grid.bits_per_weight(0.25) == 1 + 1.5 + 0.125
