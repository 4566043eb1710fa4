"""The Cholesky factor of an inverse, in the place of the matrix that is inverted.

With J the reversal of rows and columns, J H J = L L^T gives H = M M^T for the upper
triangular M = J L J, hence H^-1 = (M^-1)^T M^-1, and U = M^-1 = J L^-1 J is the factor.
Both steps are LAPACK's, which works in place. Large matrices are cut into squares for
it: OpenBLAS overruns a buffer where it is given one of 49 152 columns.
"""

from typing import Any

import torch
from scipy.linalg import get_lapack_funcs
from torch import Tensor
from torch.linalg import solve_triangular

from halve.numerics.matmul import linear

# Columns of the largest matrix that LAPACK is given; rows of what is multiplied at a
# time, of which that is a multiple; numbers that are reversed at once.
_SQUARE, _STRIP, _PIECE = 8192, 1024, 2**20


def inverse_factor(matrix: Tensor) -> Tensor | None:
    """Return upper triangular U with U^T U = H^-1, None where H is not positive.

    Args:
        matrix: H, [columns, columns]. On the CPU U takes its place, or, where there is
            none, only what is below its diagonal is left as it was.

    Cost:
        2/3 columns^3 operations, and the memory that `scratch` tells.
    """
    if matrix.device.type != "cpu":
        inverse = _inverse_of_cholesky(matrix.flip(0, 1))
        return None if inverse is None else inverse.flip(0, 1)
    _reverse(matrix)
    sound = _factorise(matrix) and _invert(matrix)
    if sound:
        matrix.tril_()
    _reverse(matrix)
    return matrix if sound else None


def scratch(columns: int) -> int:
    """Return how many numbers are in memory beside a matrix on the CPU, at most."""
    # A square, and its transpose while one multiplies by it; measured: docs/log.md.
    return 2 * _SQUARE**2 + 3 * _SQUARE * _STRIP if columns > _SQUARE else 0


def _cut(first: int, last: int, size: int) -> list[slice]:
    return [slice(s, min(s + size, last)) for s in range(first, last, size)]


def _factorise(matrix: Tensor) -> bool:
    """Put L, L L^T = A, on the diagonal of A and below; what is above stays.

    Returns:
        False where A is not positive definite.
    """
    size = len(matrix)
    for own in _cut(0, size, _SQUARE):
        square = matrix[own, own].contiguous()  # itself, where it is the whole
        if not _by_lapack(square, "potrf", clean=0, overwrite_a=1):
            return False
        _put_lower(matrix[own, own], square)
        for rows in _cut(own.stop, size, _STRIP):
            below = matrix[rows, own]
            below.copy_(solve_triangular(square.T, below, upper=True, left=False))
        for rows in _cut(own.stop, size, _STRIP):
            left = matrix[rows, own].contiguous()
            for columns in _cut(own.stop, rows.stop, _STRIP):
                tile = matrix[rows, columns]
                change = linear(left, matrix[columns, own])
                tile -= change.tril_() if rows == columns else change
    return True


def _invert(matrix: Tensor) -> bool:
    """Replace L, on and below the diagonal, by its inverse; what is above stays.

    Returns:
        False where that overflows.
    """
    size = len(matrix)
    for own in reversed(_cut(0, size, _SQUARE)):
        square = matrix[own, own].contiguous()
        if not _by_lapack(square, "trtri", overwrite_c=1):
            return False
        _put_lower(matrix[own, own], square)
        if own.stop < size:  # so it is a copy
            square.tril_()
        # From below: a strip is a sum over those above it, which are L's still.
        for rows in reversed(_cut(own.stop, size, _STRIP)):
            product = torch.zeros(rows.stop - rows.start, len(square))
            for columns in _cut(own.stop, rows.stop, _STRIP):
                tile = matrix[rows, columns]
                tile = tile.tril() if rows == columns else tile
                product += linear(tile, matrix[columns, own].T)
            matrix[rows, own] = linear(product, square.T).neg_()
    return True


def _put_lower(place: Tensor, square: Tensor) -> None:
    """Copy a square's lower triangle, unless it lies in that very place."""
    if place.data_ptr() == square.data_ptr():
        return
    for rows in _cut(0, len(square), _STRIP):
        place[rows, : rows.start] = square[rows, : rows.start]
        place[rows, rows] = place[rows, rows].triu(1) + square[rows, rows].tril()


def _by_lapack(square: Tensor, name: str, **options: Any) -> bool:  # noqa: ANN401
    """Let LAPACK change the lower triangle of a matrix in place; False if it cannot."""
    # It works on columns in one piece, and so on the transpose, which is upper.
    columns = square.numpy().T
    (routine,) = get_lapack_funcs((name,), (columns,))
    found, failed = routine(columns, lower=0, **options)
    assert found.ctypes.data == columns.ctypes.data, "LAPACK worked on a copy"
    return not failed and bool(square.diagonal().isfinite().all())


def _inverse_of_cholesky(matrix: Tensor) -> Tensor | None:
    """Return L^-1 of a symmetric matrix L L^T; None on failure."""
    lower, failed = torch.linalg.cholesky_ex(matrix)
    if failed or not lower.diagonal().isfinite().all():
        return None
    identity = torch.eye(len(lower), device=lower.device)
    return solve_triangular(lower, identity, upper=False)


def _reverse(matrix: Tensor) -> None:
    """Reverse the rows and the columns of a matrix, in place: its numbers, backwards.

    Piece by piece, so that no second matrix is needed.
    """
    numbers = matrix.view(-1)
    size = len(numbers)
    for start in range(0, size // 2, _PIECE):
        stop = min(start + _PIECE, size // 2)
        front, back = numbers[start:stop], numbers[size - stop : size - start]
        kept = front.flip(0)
        front.copy_(back.flip(0))
        back.copy_(kept)
