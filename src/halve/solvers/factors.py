"""The Cholesky factor of an inverse, computed in the memory of the matrix.

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
        matrix: H, [columns, columns]. On the CPU it is overwritten by U or, where there
            is none, its diagonal and upper triangle are undefined.

    Cost:
        2/3 columns^3 operations, and the memory that `scratch` returns.
    """
    if matrix.device.type != "cpu":
        inverse = _inverse_of_cholesky(matrix.flip(0, 1))
        return None if inverse is None else inverse.flip(0, 1)
    _reverse(matrix)
    succeeded = _factorize(matrix) and _invert(matrix)
    if succeeded:
        matrix.tril_()
    _reverse(matrix)
    return matrix if succeeded else None


def scratch(columns: int) -> int:
    """Return how many numbers are in memory beside a matrix on the CPU, at most."""
    # A square, and its transpose while one multiplies by it; measured: docs/log.md.
    return 2 * _SQUARE**2 + 3 * _SQUARE * _STRIP if columns > _SQUARE else 0


def _cut(first: int, last: int, size: int) -> list[slice]:
    return [slice(s, min(s + size, last)) for s in range(first, last, size)]


def _factorize(matrix: Tensor) -> bool:
    """Overwrite the lower triangle of A, diagonal included, by L with L L^T = A.

    Right-looking and blocked: the square on the diagonal, the panel below it, then the
    trailing matrix, tile by tile.

    Returns:
        False where A is not positive definite.
    """
    size = len(matrix)
    for block in _cut(0, size, _SQUARE):
        # The matrix itself, where one square is the whole.
        square = matrix[block, block].contiguous()
        if not _by_lapack(square, "potrf", clean=0, overwrite_a=1):
            return False
        _put_lower(matrix[block, block], square)
        for rows in _cut(block.stop, size, _STRIP):  # L21 = A21 L11^-T
            panel = matrix[rows, block]
            panel.copy_(solve_triangular(square.T, panel, upper=True, left=False))
        for rows in _cut(block.stop, size, _STRIP):  # A22 -= L21 L21^T
            left = matrix[rows, block].contiguous()
            for columns in _cut(block.stop, rows.stop, _STRIP):
                tile = matrix[rows, columns]
                change = linear(left, matrix[columns, block])
                tile -= change.tril_() if rows == columns else change
    return True


def _invert(matrix: Tensor) -> bool:
    """Overwrite L, on and below the diagonal, by its inverse.

    From the last block to the first: with the inverse of the trailing part N22 known,
    N11 = L11^-1 and N21 = -N22 L21 N11.

    Returns:
        False where that overflows.
    """
    size = len(matrix)
    for block in reversed(_cut(0, size, _SQUARE)):
        square = matrix[block, block].contiguous()
        if not _by_lapack(square, "trtri", overwrite_c=1):
            return False
        _put_lower(matrix[block, block], square)
        if block.stop < size:  # a copy then, whose upper triangle is not cleared yet
            square.tril_()
        # From the last strip up: each is a sum over those above it, which still hold L.
        for rows in reversed(_cut(block.stop, size, _STRIP)):
            product = torch.zeros(rows.stop - rows.start, len(square))
            for columns in _cut(block.stop, rows.stop, _STRIP):
                tile = matrix[rows, columns]
                tile = tile.tril() if rows == columns else tile
                product += linear(tile, matrix[columns, block].T)
            matrix[rows, block] = linear(product, square.T).neg_()
    return True


def _put_lower(place: Tensor, square: Tensor) -> None:
    """Copy a square's lower triangle to a view, unless it is that very view."""
    if place.data_ptr() == square.data_ptr():
        return
    for rows in _cut(0, len(square), _STRIP):
        place[rows, : rows.start] = square[rows, : rows.start]
        place[rows, rows] = place[rows, rows].triu(1) + square[rows, rows].tril()


def _by_lapack(square: Tensor, name: str, **options: Any) -> bool:  # noqa: ANN401
    """Run a LAPACK routine on the lower triangle in place; False where it fails."""
    # LAPACK is column-major: it sees the transpose, whose upper triangle this is.
    columns = square.numpy().T
    (routine,) = get_lapack_funcs((name,), (columns,))
    result, failed = routine(columns, lower=0, **options)
    assert result.ctypes.data == columns.ctypes.data, "LAPACK worked on a copy"
    return not failed and bool(square.diagonal().isfinite().all())


def _inverse_of_cholesky(matrix: Tensor) -> Tensor | None:
    """Return L^-1 of a symmetric matrix L L^T; None on failure."""
    lower, failed = torch.linalg.cholesky_ex(matrix)
    if failed or not lower.diagonal().isfinite().all():
        return None
    identity = torch.eye(len(lower), device=lower.device)
    return solve_triangular(lower, identity, upper=False)


def _reverse(matrix: Tensor) -> None:
    """Reverse the rows and the columns of a matrix in place: its numbers, backwards.

    Piece by piece, so that no second matrix is needed.
    """
    numbers = matrix.view(-1)
    size = len(numbers)
    for start in range(0, size // 2, _PIECE):
        stop = min(start + _PIECE, size // 2)
        front, back = numbers[start:stop], numbers[size - stop : size - start]
        saved = front.flip(0)
        front.copy_(back.flip(0))
        back.copy_(saved)
