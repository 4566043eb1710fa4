"""The Hessian of a layer problem, and the error that it measures."""

from torch import Tensor

from halve.products import linear


def damped(gram: Tensor, dead: Tensor, damping: float) -> Tensor:
    """Return H of the published code, up to its scale, on which nothing depends.

    Args:
        gram: X^T X, [columns, columns].
        dead: [columns], True for inputs that are always zero.
        damping: Share of the mean diagonal that is added to the diagonal.
    """
    hessian = gram.clone()
    diagonal = hessian.diagonal()
    diagonal[dead] = 1
    diagonal += damping * diagonal.mean()
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
