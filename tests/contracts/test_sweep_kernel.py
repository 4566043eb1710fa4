"""The kernel that fixes columns on GPUs agrees with the plain path, column by column.

Triton's interpreter runs it on CPU tensors. Sums are taken in another order there, so
weights that lie halfway between two grid values, or scores that nearly tie, may fall
otherwise.
"""

import json
import os
import subprocess
import sys
from itertools import cycle

import pytest
import torch

from halve.errors import HalveWarning
from halve.grids import QuantParams, QuantScheme, fit_quant_params
from halve.patterns import parse_pattern
from halve.solvers import quantized, sweep
from halve.solvers.quantized import coordinate_descent, round_with_mask
from tests.contracts.problems import correlated
from tests.tables import GRIDS

triton = pytest.importorskip("triton")
if not triton.knobs.runtime.interpret:
    pytest.skip("needs TRITON_INTERPRET=1", allow_module_level=True)
sweep_kernel = pytest.importorskip("halve.solvers.sweep_kernel")

# Rows, columns, columns of a block, pattern, grid. Blocks are ragged at the end, or of
# one column, or larger than the matrix; rows are fewer and more than a program takes.
SWEEPS = (
    (33, 40, 16, "50%", None),
    (33, 40, 16, "2:4", None),
    (7, 56, 24, "3:8", None),
    (5, 40, 128, "90%", None),
    (5, 30, 128, "1:2", None),
    (5, 30, 20, "3:5", None),
    (9, 20, 1, "50%", None),
    (2, 144, 144, "2:4", None),
    (6, 40, 16, "50%", QuantScheme(4, 16)),
    (6, 40, 16, "2:4", QuantScheme(4, 16, symmetric=False)),
    (6, 40, 24, "2:4", QuantScheme(3, 48)),
    (6, 40, 16, "50%", QuantScheme(2, 16, midrise=True)),
)
SOME = (
    GRIDS[:-3:5] + GRIDS[-3:]
)  # all bits, all group sizes, symmetric and not, midrise
over_grids = pytest.mark.parametrize("grid", SOME, ids=repr)


@pytest.fixture
def kernels(monkeypatch):
    """Return a function that runs another on the plain path and by the kernel."""

    def both(function):
        plain = function()
        with monkeypatch.context() as patch:
            for module in (sweep, quantized):
                patch.setattr(module, "has_triton", lambda device: True)
            calls = []
            fix = sweep_kernel.BlockKernel.fix

            def counted(*args):
                errors = fix(*args)
                calls.append(args[0])
                return errors

            patch.setattr(sweep_kernel.BlockKernel, "fix", counted)
            return plain, function(), len(calls)

    return both


def problem(rows, columns):
    """Return a matrix and the factor of its inputs' inverse Hessian."""
    found = correlated(rows, columns, seed=rows)
    return found.weight, found.hessian().factor, found.hessian().damped


def swept(weight, factor, rule):
    remaining = sweep.transposed_copy(weight)
    error = sweep.sweep(remaining, factor, rule)
    return remaining.T, error


@pytest.mark.parametrize(("rows", "columns", "size", "text", "grid"), SWEEPS)
def test_a_sweep_chooses_the_same_masks_and_values(
    kernels, rows, columns, size, text, grid
):
    weight, factor, _ = problem(rows, columns)
    params = grid and fit_quant_params(grid, weight)
    rule = sweep.adaptive_mask(parse_pattern(text), size, params)
    (plain, error), (ours, our_error), calls = kernels(
        lambda: swept(weight, factor, rule)
    )
    assert calls >= -(-columns // rule.size)
    assert ((plain == 0) == (ours == 0)).double().mean() >= 0.985
    assert (plain - ours).norm() <= 0.1 * plain.norm()
    assert our_error == pytest.approx(error, rel=0.05)
    if grid is None:
        assert torch.allclose(plain, ours, rtol=1e-3, atol=1e-4)
        assert our_error == pytest.approx(error, rel=1e-4)


@over_grids
def test_a_sweep_with_a_given_mask_rounds_to_the_same_values(kernels, grid):
    weight, factor, _ = problem(12, 136)
    pruned = torch.rand(weight.shape) < 0.3
    params = fit_quant_params(grid, weight.masked_fill(pruned, 0))
    plain, ours, calls = kernels(
        lambda: round_with_mask(weight, pruned, factor, params)
    )
    assert calls >= 2
    assert bool((ours[pruned] == 0).all())
    again = params.fake_quantize(ours).where(~pruned, 0)
    assert torch.equal(again, ours)
    # Bits, so that -0 is told from 0.
    assert not bool(torch.signbit(ours[ours == 0]).any())
    assert (plain == ours).double().mean() >= 0.97


# A second sweep runs the kernel again, from what the first one has moved.
@pytest.mark.parametrize(
    ("grid", "sweeps"), list(zip(SOME, cycle([2, 1, 1, 1]))), ids=repr
)
def test_a_descent_makes_the_same_moves(kernels, grid, sweeps):
    weight, _, hessian = problem(12, 136)
    pruned = torch.rand(weight.shape) < 0.3
    params = fit_quant_params(grid, weight.masked_fill(pruned, 0))
    start = params.fake_quantize(weight).masked_fill_(pruned, 0)
    plain, ours, calls = kernels(
        lambda: coordinate_descent(hessian, weight, start, pruned, params, sweeps)
    )
    assert calls >= 2
    assert bool((ours[pruned] == 0).all())
    assert torch.equal(params.fake_quantize(ours).where(~pruned, 0), ours)
    assert (plain == ours).double().mean() >= 0.99


def test_values_halfway_between_two_codes_go_to_the_even_one(kernels):
    grid = QuantScheme(4, 16)
    weight = (torch.arange(-8, 8) + 0.5).repeat(3, 1)
    params = QuantParams(grid, torch.ones(3, 1), torch.zeros(3, 1))
    none = torch.zeros_like(weight, dtype=torch.bool)
    plain, ours, _ = kernels(
        lambda: round_with_mask(weight, none, torch.eye(16), params)
    )
    assert torch.equal(plain, params.fake_quantize(weight))
    assert torch.equal(ours, plain)


def test_ties_prune_the_first_of_each_group(kernels):
    rule = sweep.adaptive_mask(parse_pattern("2:4"), 16)
    plain, ours, _ = kernels(lambda: swept(torch.ones(5, 32), torch.eye(32), rule)[0])
    assert torch.equal(ours, plain)


def test_what_is_not_finite_does_not_become_finite(kernels):
    weight = torch.ones(2, 16)
    weight[1, 3] = torch.nan
    params = fit_quant_params(QuantScheme(4, 16), torch.ones(2, 16))
    none = torch.zeros_like(weight, dtype=torch.bool)
    plain, ours, _ = kernels(
        lambda: round_with_mask(weight, none, torch.eye(16), params)
    )
    assert bool(ours[1, 3].isnan())
    assert torch.equal(ours.isnan(), plain.isnan())


@pytest.mark.parametrize("columns", [1, 16, 100, 128, 1024])
@pytest.mark.parametrize("kind", ["given", "2:4", "quantized", "descent"])
def test_constants_cover_the_block(columns, kind):
    """A tile has every column, and at least a number for each thread."""
    groups = parse_pattern("2:4") if kind == "2:4" else None
    grid = QuantScheme(4) if kind in ("quantized", "descent") else None
    kernel = sweep_kernel.BlockKernel(columns, groups, grid, kind == "descent")
    constants = kernel.constants
    assert columns <= constants["SIZE"] < max(2 * columns, 17)
    assert constants["SIZE"] * constants["ROWS"] >= 32 * kernel.warps


def test_a_block_that_does_not_fit_takes_the_plain_path(kernels):
    weight, factor, _ = problem(2, 1032)
    rule = sweep.adaptive_mask(parse_pattern("50%"), 1032)
    (plain, _), (ours, _), calls = kernels(lambda: swept(weight, factor, rule))
    assert calls == 0
    assert torch.equal(plain, ours)


def test_where_triton_fails_the_plain_path_goes_on_with_a_warning(monkeypatch):
    weight, factor, _ = problem(6, 40)
    rule = sweep.adaptive_mask(parse_pattern("2:4"), 20)
    plain, _ = swept(weight, factor, rule)

    def fails(*_):
        raise RuntimeError("Failed to find C compiler")

    sweep_kernel._works.cache_clear()
    monkeypatch.setattr(sweep, "has_triton", lambda device: True)
    monkeypatch.setattr(sweep_kernel.BlockKernel, "fix", fails)
    with pytest.warns(HalveWarning, match="C compiler") as warnings:
        ours, _ = swept(weight, factor, rule)
    sweep_kernel._works.cache_clear()
    assert len(warnings) == 1
    assert torch.equal(plain, ours)


def test_it_compiles_for_gpus_without_spilling():
    """No GPU is needed for that; a process of its own is, without the interpreter."""
    if not sys.platform.startswith("linux"):
        pytest.skip("Triton brings its assembler on Linux only")
    ran = subprocess.run(
        [sys.executable, "-m", "tests.contracts.compile_sweep_kernel"],
        env=os.environ | {"TRITON_INTERPRET": "0"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert ran.returncode == 0, ran.stderr
    lines = [json.loads(line) for line in ran.stdout.splitlines()]
    assert len(lines) == 16
    for line in lines:
        assert line["spilled"] == line["inexact"] == 0, line
        assert line["registers"] <= 200, line
