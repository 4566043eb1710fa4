"""The ways to prune a matrix that settings name; `Contest` chooses from several."""

import torch

from halve.grids import Grid
from halve.patterns import Pattern
from halve.pruning.choice import Candidate
from halve.settings import Settings
from halve.solvers import (
    ADMM,
    SOLVERS,
    Magnitude,
    Nearest,
    Refitted,
    Rounded,
    Solver,
    SparseGPT,
)

# Solvers that `auto` chooses from, and whether their masks are refitted.
_AUTO = (("admm", False), ("wanda", True))


def candidates(settings: Settings, dtype: torch.dtype) -> tuple[Candidate, ...]:
    """Return the ways that settings name.

    Args:
        settings: Several for `auto`, and where bits a weight are given.
        dtype: What the matrices are stored in; the values of a grid are numbers of it.

    Raises:
        GridError: They cannot be.
    """
    auto = settings.solver == "auto"
    named = _AUTO if auto else ((settings.solver, settings.refit),)
    return tuple(
        _candidate(settings, name, pattern, grid and grid.exact_in(dtype))
        for pattern, grid in settings.pairs
        # Where all weights are kept there is no mask to choose.
        for name in (named if pattern.sparsity else named[:1])
    )


def _candidate(
    settings: Settings, named: tuple[str, bool], pattern: Pattern, grid: Grid | None
) -> Candidate:
    name, refit = named
    title = f"{name} --refit" if refit else name
    if grid is None:
        return Candidate(title, _plain(settings, name, refit), pattern)
    title = f"{title}, {pattern} zeros, {grid}" if pattern.sparsity else f"gptq, {grid}"
    return Candidate(title, _rounding(settings, named, pattern, grid), pattern, grid)


def _plain(settings: Settings, name: str, refit: bool) -> Solver:
    if name == "sparsegpt":
        solver = SparseGPT(settings.damping, settings.block_size)
    elif name == "admm":
        solver = ADMM(settings.damping)
    else:
        solver = SOLVERS[name]()
    return Refitted(solver, settings.damping) if refit else solver


def _rounding(
    settings: Settings, named: tuple[str, bool], pattern: Pattern, grid: Grid
) -> Solver:
    """Return a solver that rounds: as published where it was, else with the mask held.

    Magnitude knows no inputs, so nothing makes up for its rounding; SparseGPT rounds
    while it prunes.
    """
    if named == ("magnitude", False):
        return Nearest(grid)
    if named == ("sparsegpt", False):
        return SparseGPT(settings.damping, settings.block_size, grid)
    inner = _plain(settings, *named) if pattern.sparsity else Magnitude()
    return Rounded(inner, grid, settings.damping)
