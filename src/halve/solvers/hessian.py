"""The Hessian of a layer problem, and the error that it measures."""

from collections.abc import Callable, Iterator
from typing import TypeVar

from torch import Tensor

from halve.errors import NumericalError
from halve.numerics.matmul import linear

# Up to this share of the mean diagonal the damping is raised.
_MAX_DAMPING = 1.0
# Rows and columns that are mirrored at once.
_TILE = 1024

Factor = TypeVar("Factor")


def factorise(
    gram: Tensor, damping: float, attempt: Callable[[Tensor], Factor | None]
) -> tuple[Factor, float]:
    """Factorise a damped Hessian, with ten times the damping until that succeeds.

    Args:
        gram: X^T X, [columns, columns]; overwritten.
        damping: Share of the mean diagonal to begin with.
        attempt: Given the damped Hessian, returns a factor, which may lie in its place.
            Or returns None where it is not positive definite, and has overwritten no
            more than the diagonal and what is above it.

    Returns:
        The factor, and the damping with which it was found.

    Raises:
        NumericalError: Not positive definite with any damping up to 1.
    """
    diagonal = gram.diagonal().clone()
    for share in _dampings(damping):
        gram.diagonal().copy_(diagonal).masked_fill_(diagonal == 0, 1)
        gram.diagonal().add_(damping_of(diagonal, share))
        factor = attempt(gram)
        if factor is not None:
            return factor, share
        _mirror(gram)
    raise NumericalError(
        "The Gram matrix is not positive definite, even with all of its mean diagonal "
        "added.",
        "Calibrate on other or more text.",
    )


def _dampings(first: float) -> Iterator[float]:
    yield first
    share = max(first * 10, 1e-4)
    while first < _MAX_DAMPING:
        first = min(share, _MAX_DAMPING)
        yield first
        share *= 10


def _mirror(matrix: Tensor) -> None:
    """Copy what is below the diagonal above it, in place."""
    for start in range(0, len(matrix), _TILE):
        stop = start + _TILE
        square = matrix[start:stop, start:stop]
        square.copy_(square.tril() + square.tril(-1).T)
        matrix[start:stop, stop:] = matrix[stop:, start:stop].T


def damping_of(diagonal: Tensor, damping: float) -> float:
    """Return what is added to the diagonal of X^T X, [columns].

    Args:
        diagonal: Zero for inputs that are always zero, which count as 1.
        damping: Share of the mean.
    """
    return damping * float(diagonal.masked_fill(diagonal == 0, 1).mean())


def damped(gram: Tensor, dead: Tensor, damping: float) -> Tensor:
    """Return H of the published code, up to its scale, on which nothing depends.

    Args:
        gram: X^T X, [columns, columns].
        dead: [columns], True for inputs that are always zero.
        damping: Share of the mean diagonal that is added to the diagonal.
    """
    hessian = gram.clone()
    diagonal = hessian.diagonal()
    added = damping_of(diagonal, damping)
    diagonal[dead] = 1
    diagonal += added
    return hessian


def relative_error(gram: Tensor, weight: Tensor, solution: Tensor) -> float:
    """Return ||X (W - Z)^T||^2 / ||X W^T||^2 from X^T X.

    Args:
        gram: X^T X, [columns, columns].
        weight: W, [rows, columns].
        solution: Z, [rows, columns].

    Returns:
        0 where both are zero, and infinity where only the dense output is.
    """
    lost, kept = (_energy(gram, m) for m in (weight - solution, weight))
    if kept == 0:
        return 0.0 if lost == 0 else float("inf")
    return max(lost, 0.0) / kept


def _energy(gram: Tensor, matrix: Tensor) -> float:
    return float((linear(matrix, gram) * matrix).sum())
