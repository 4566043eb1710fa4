"""The Cholesky factor of an inverse, computed in the memory of the matrix.

With J the reversal of rows and columns, J H J = L L^T gives H = M M^T for the upper
triangular M = J L J, hence H^-1 = (M^-1)^T M^-1, and U = M^-1 = J L^-1 J is the factor.
Both steps are LAPACK's, which works in place. Large matrices are cut into squares for
it: OpenBLAS overruns a buffer where it is given one of 49 152 columns. On a GPU squares
are smaller, since some versions of cuSOLVER refuse more than 4096 columns, and are
copied; what is multiplied at a time is larger.
"""

from dataclasses import dataclass
from typing import Any
from warnings import warn

import torch
from scipy.linalg import get_lapack_funcs
from torch import Tensor
from torch.linalg import solve_triangular

from halve.errors import HalveWarning
from halve.numerics.matmul import linear

# On the CPU; see `_Cut`.
_SQUARE, _STRIP, _PIECE = 8192, 1024, 2**20
# On a GPU, where a product takes a launch, which costs the more the smaller it is.
_GPU_SQUARE, _GPU_STRIP, _GPU_PIECE = 4096, 4096, 2**24


@dataclass(frozen=True)
class _Cut:
    """In what pieces a matrix is worked on.

    Attributes:
        square: Columns of the largest matrix that LAPACK or cuSOLVER is given.
        strip: Rows of what is multiplied at a time; the square is a multiple of it.
        piece: Numbers that are reversed at once.
    """

    square: int
    strip: int
    piece: int

    @classmethod
    def of(cls, matrix: Tensor) -> "_Cut":
        """Return the pieces that suit the device of a matrix."""
        if matrix.device.type == "cpu":
            return cls(_SQUARE, _STRIP, _PIECE)
        return cls(_GPU_SQUARE, _GPU_STRIP, _GPU_PIECE)

    def squares(self, size: int) -> list[slice]:
        """Return slices of a diagonal of so many numbers."""
        return _slices(0, size, self.square)

    def strips(self, first: int, last: int) -> list[slice]:
        """Return slices of the rows, or columns, from the first up to the last."""
        return _slices(first, last, self.strip)


def inverse_factor(matrix: Tensor) -> Tensor | None:
    """Return upper triangular U with U^T U = H^-1, None where H is not positive.

    Args:
        matrix: H, [columns, columns], contiguous float32. It is overwritten by U or,
            where there is none, its diagonal and upper triangle are undefined.

    Cost:
        2/3 columns^3 operations, and the memory that `scratch` returns.
    """
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


def _slices(first: int, last: int, size: int) -> list[slice]:
    return [slice(s, min(s + size, last)) for s in range(first, last, size)]


def _factorize(matrix: Tensor) -> bool:
    """Overwrite the lower triangle of A, diagonal included, by L with L L^T = A.

    Right-looking and blocked: the square on the diagonal, the panel below it, then the
    trailing matrix, tile by tile.

    Returns:
        False where A is not positive definite.
    """
    size, cut = len(matrix), _Cut.of(matrix)
    for block in cut.squares(size):
        # The matrix itself, where one square is the whole.
        square = _cholesky(matrix[block, block].contiguous())
        if square is None:
            return False
        _put_lower(matrix[block, block], square)
        for rows in cut.strips(block.stop, size):  # L21 = A21 L11^-T
            panel = matrix[rows, block]
            panel.copy_(solve_triangular(square.T, panel, upper=True, left=False))
        for rows in cut.strips(block.stop, size):  # A22 -= L21 L21^T
            left = matrix[rows, block].contiguous()
            for columns in cut.strips(block.stop, rows.stop):
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
    size, cut = len(matrix), _Cut.of(matrix)
    for block in reversed(cut.squares(size)):
        square = _inverse_of_lower(matrix[block, block].contiguous())
        if square is None:
            return False
        _put_lower(matrix[block, block], square)
        if block.stop < size:  # a copy then, whose upper triangle is not cleared yet
            square.tril_()
        # From the last strip up: each is a sum over those above it, which still hold L.
        for rows in reversed(cut.strips(block.stop, size)):
            product = matrix.new_zeros(rows.stop - rows.start, len(square))
            for columns in cut.strips(block.stop, rows.stop):
                tile = matrix[rows, columns]
                tile = tile.tril() if rows == columns else tile
                product += linear(tile, matrix[columns, block].T)
            matrix[rows, block] = linear(product, square.T).neg_()
    return True


def _put_lower(place: Tensor, square: Tensor) -> None:
    """Copy a square's lower triangle to a view, unless it is that very view."""
    if place.data_ptr() == square.data_ptr():
        return
    for rows in _Cut.of(place).strips(0, len(square)):
        place[rows, : rows.start] = square[rows, : rows.start]
        place[rows, rows] = place[rows, rows].triu(1) + square[rows, rows].tril()


def _cholesky(square: Tensor) -> Tensor | None:
    """Return L with L L^T = A for a square A; None where A is not positive definite.

    Only the lower triangle of A is read, and only that of the result is meant. On the
    CPU it is computed in place, and above it A stays as it was.
    """
    if square.device.type == "cpu":
        return square if _by_lapack(square, "potrf", clean=0, overwrite_a=1) else None
    lower, failed = _cholesky_ex(square)
    # One look at the device for both.
    succeeded = (failed == 0) & lower.diagonal().isfinite().all()
    return lower if bool(succeeded) else None


def _cholesky_ex(square: Tensor) -> tuple[Tensor, Tensor]:
    """Return `torch.linalg.cholesky_ex`, computed on the CPU where a GPU cannot.

    Raises a HalveWarning in that case.
    """
    try:
        lower, failed = torch.linalg.cholesky_ex(square)
    except torch.OutOfMemoryError:
        raise
    except RuntimeError as error:
        warn(
            f"The Cholesky factorization failed on {square.device} ({error}). It is "
            "computed on the CPU, which takes longer; install another version of "
            "PyTorch to avoid that.",
            HalveWarning,
            stacklevel=2,
        )
        lower, failed = torch.linalg.cholesky_ex(square.cpu())
    return lower.to(square.device), failed.to(square.device)


def _inverse_of_lower(square: Tensor) -> Tensor | None:
    """Return the inverse of a lower triangular square L; None where it overflows.

    Only the lower triangle of L is read, and only that of the result is meant. On the
    CPU it is computed in place.
    """
    if square.device.type == "cpu":
        return square if _by_lapack(square, "trtri", overwrite_c=1) else None
    identity = torch.eye(len(square), device=square.device)
    inverse = solve_triangular(square, identity, upper=False)
    return inverse if bool(inverse.diagonal().isfinite().all()) else None


def _by_lapack(square: Tensor, name: str, **options: Any) -> bool:  # noqa: ANN401
    """Run a LAPACK routine on the lower triangle in place; False where it fails."""
    # LAPACK is column-major: it sees the transpose, whose upper triangle this is.
    columns = square.numpy().T
    (routine,) = get_lapack_funcs((name,), (columns,))
    result, failed = routine(columns, lower=0, **options)
    assert result.ctypes.data == columns.ctypes.data, "LAPACK worked on a copy"
    return not failed and bool(square.diagonal().isfinite().all())


def divide_by_factor(rows: Tensor, factor: Tensor) -> None:
    """Overwrite B, [rows, columns], by X with X U = B, for an upper triangular U.

    Square after square of U, and not by one call: on a GPU it is not known how that
    does with a result that is its own input, or with 2^31 numbers.

    Args:
        rows: B, float32; overwritten.
        factor: U, [columns, columns].

    Cost:
        rows * columns^2 operations, and a copy of as many columns as a square has.
    """
    for block in _Cut.of(rows).squares(len(factor)):
        part, square = rows[:, block], factor[block, block]
        part.copy_(solve_triangular(square, part, upper=True, left=False))
        if block.stop < len(factor):
            after = factor[block, block.stop :]
            rows[:, block.stop :].addmm_(part, after, alpha=-1)


def _reverse(matrix: Tensor) -> None:
    """Reverse the rows and the columns of a matrix in place: its numbers, backwards.

    Piece by piece, so that no second matrix is needed.
    """
    numbers = matrix.view(-1)
    size = len(numbers)
    for piece in _slices(0, size // 2, _Cut.of(matrix).piece):
        start, stop = piece.start, piece.stop
        front, back = numbers[start:stop], numbers[size - stop : size - start]
        saved = front.flip(0)
        front.copy_(back.flip(0))
        back.copy_(saved)
