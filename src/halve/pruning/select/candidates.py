"""From options to the candidates that `CandidateSet` selects from."""

import torch

from halve.grids import QuantScheme
from halve.options import PruneOptions
from halve.patterns import Pattern, Unstructured
from halve.pruning.select.selection import Candidate
from halve.solvers import (
    SOLVERS,
    Magnitude,
    Quantized,
    Refitted,
    RoundToNearest,
    Solver,
    SparseGPT,
)

# What a matrix is pruned to, and the grid of the weights that are kept, if they are
# quantized.
Pair = tuple[Pattern, QuantScheme | None]

# Leaves every bit of a matrix as it is.
UNCHANGED = Candidate("unchanged", Magnitude(), Unstructured(0.0))

# Solvers that `auto` selects from, and whether their masks are refitted.
_AUTO = (("admm", False), ("wanda", True))


def candidates(options: PruneOptions, dtype: torch.dtype) -> tuple[Candidate, ...]:
    """Return the candidates that the options name.

    Args:
        options: They name several with `auto`, and where bits a weight are given.
        dtype: Of the stored matrices; grid values must be exact in it.

    Raises:
        QuantizationError: They cannot be.
    """
    return tuple(
        candidate
        for pair in options.pairs
        for candidate in pair_candidates(options, pair, dtype)
    )


def pair_candidates(
    options: PruneOptions, pair: Pair, dtype: torch.dtype
) -> tuple[Candidate, ...]:
    """Return the candidates that prune to a pattern and quantize to a grid.

    Args:
        options: They name several solvers with `auto`.
        pair: The pattern and the grid.
        dtype: As for `candidates`.

    Raises:
        QuantizationError: As for `candidates`.
    """
    pattern, grid = pair
    if grid is None and not pattern.sparsity:
        return (UNCHANGED,)
    auto = options.solver == "auto"
    named = _AUTO if auto else ((options.solver, options.refit),)
    return tuple(
        _candidate(options, name, pattern, grid and grid.exact_in(dtype))
        # Where all weights are kept there is no mask to choose: one is enough.
        for name in (named if pattern.sparsity else named[:1])
    )


def trial_candidate(options: PruneOptions, pair: Pair, dtype: torch.dtype) -> Candidate:
    """Return what prunes a matrix in a trial of the whole model: SparseGPT."""
    pattern, grid = pair
    return _candidate(
        options, ("sparsegpt", False), pattern, grid and grid.exact_in(dtype)
    )


def _candidate(
    options: PruneOptions,
    named: tuple[str, bool],
    pattern: Pattern,
    grid: QuantScheme | None,
) -> Candidate:
    name, refit = named
    title = f"{name} --refit" if refit else name
    if grid is None:
        return Candidate(title, _solver(options, name, refit), pattern)
    title = f"{title}, {pattern} zeros, {grid}" if pattern.sparsity else f"gptq, {grid}"
    solver = _quantizing_solver(options, named, pattern, grid)
    return Candidate(title, solver, pattern, grid)


def _solver(options: PruneOptions, name: str, refit: bool) -> Solver:
    is_sparsegpt = name == "sparsegpt"
    solver = SparseGPT(options.block_size) if is_sparsegpt else SOLVERS[name]()
    return Refitted(solver) if refit else solver


def _quantizing_solver(
    options: PruneOptions, named: tuple[str, bool], pattern: Pattern, grid: QuantScheme
) -> Solver:
    """Return a solver that quantizes: as published, or with a fixed mask.

    Magnitude reads no inputs, so nothing can compensate for its rounding; SparseGPT
    quantizes in the pass that prunes.
    """
    if named == ("magnitude", False):
        return RoundToNearest(grid)
    if named == ("sparsegpt", False):
        return SparseGPT(options.block_size, grid)
    inner = _solver(options, *named) if pattern.sparsity else Magnitude()
    return Quantized(inner, grid)
