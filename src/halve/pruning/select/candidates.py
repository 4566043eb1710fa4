"""The ways to prune a matrix that settings name; `CandidateSet` chooses from several."""

import torch

from halve.grids import QuantScheme
from halve.options import PruneOptions
from halve.patterns import Pattern
from halve.pruning.select.selection import Candidate
from halve.solvers import (
    ADMM,
    SOLVERS,
    Magnitude,
    Quantized,
    Refitted,
    RoundToNearest,
    Solver,
    SparseGPT,
)

# Solvers that `auto` chooses from, and whether their masks are refitted.
_AUTO = (("admm", False), ("wanda", True))


def candidates(options: PruneOptions, dtype: torch.dtype) -> tuple[Candidate, ...]:
    """Return the ways that settings name.

    Args:
        options: Several for `auto`, and where bits a weight are given.
        dtype: What the matrices are stored in; the values of a grid are numbers of it.

    Raises:
        GridError: They cannot be.
    """
    auto = options.solver == "auto"
    named = _AUTO if auto else ((options.solver, options.refit),)
    return tuple(
        _candidate(options, name, pattern, grid and grid.exact_in(dtype))
        for pattern, grid in options.pairs
        # Where all weights are kept there is no mask to choose.
        for name in (named if pattern.sparsity else named[:1])
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
        return Candidate(title, _plain(options, name, refit), pattern)
    title = f"{title}, {pattern} zeros, {grid}" if pattern.sparsity else f"gptq, {grid}"
    return Candidate(title, _rounding(options, named, pattern, grid), pattern, grid)


def _plain(options: PruneOptions, name: str, refit: bool) -> Solver:
    if name == "sparsegpt":
        solver = SparseGPT(options.damping, options.block_size)
    elif name == "admm":
        solver = ADMM(options.damping)
    else:
        solver = SOLVERS[name]()
    return Refitted(solver, options.damping) if refit else solver


def _rounding(
    options: PruneOptions, named: tuple[str, bool], pattern: Pattern, grid: QuantScheme
) -> Solver:
    """Return a solver that rounds: as published where it was, else with the mask held.

    Magnitude knows no inputs, so nothing makes up for its rounding; SparseGPT rounds
    while it prunes.
    """
    if named == ("magnitude", False):
        return RoundToNearest(grid)
    if named == ("sparsegpt", False):
        return SparseGPT(options.damping, options.block_size, grid)
    inner = _plain(options, *named) if pattern.sparsity else Magnitude()
    return Quantized(inner, grid, options.damping)
