"""Sparsity patterns: a fraction of the weights, an exact number of them, or n:m.

A pattern says how many weights of a matrix are pruned, chooses n:m masks from scores,
and verifies a pruned matrix. Matrices are [rows, columns] = [outputs, inputs]. Masks
are boolean, True where a weight is pruned.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from halve.errors import PatternError
from halve.sparsity_text import parse_sparsity

# A matrix with a smaller fraction of zeros is dense: trained weights have stray zeros.
_STRAY_ZEROS = 0.01
# Scores up to which a GPU sorts, in at most half a gigabyte, to find a threshold.
_MAX_SORTED = 2**24
# The bits of infinity in float32, as an integer.
_INFINITY = 0x7F800000


@dataclass(frozen=True)
class Unstructured:
    """Prunes a fraction of a matrix's weights, wherever they are.

    Attributes:
        sparsity: Fraction of the weights that are pruned, in [0, 1). With 0 none is,
            which is useful only where the weights are quantized.
    """

    sparsity: float

    def __str__(self) -> str:
        return f"{100 * self.sparsity:g}%"

    def check_fits(self, name: str, columns: int) -> None:
        """Accept every shape."""

    def count(self, elements: int) -> int:
        """Return how many of `elements` weights are pruned, rounded down.

        1e-9 of them is added before rounding, since binary floating point may put a
        product such as 0.7 * 10 just below the integer that is meant.
        """
        return int(elements * self.sparsity + 1e-9 * elements)

    def shortfall(self, weight: Tensor) -> str | None:
        """Describe how a [rows, columns] matrix violates the pattern, or return None.

        More zeros than `count` are allowed: the dense matrix may have had them.
        """
        return _too_few(weight, self.count(weight.numel()))


@dataclass(frozen=True)
class Exact:
    """Prunes an exact number of one matrix's weights, wherever they are.

    Attributes:
        zeros: Number of weights that are pruned, 0 to `elements`.
        elements: Number of weights in the matrix, 1 or more.
    """

    zeros: int
    elements: int

    def __str__(self) -> str:
        return f"{self.zeros} zeros in {self.elements} weights"

    @property
    def sparsity(self) -> float:
        """Fraction of the weights that are pruned."""
        return self.zeros / self.elements

    def check_fits(self, name: str, columns: int) -> None:
        """Accept every shape."""

    def count(self, elements: int) -> int:
        """Return how many of the first `elements` weights are pruned, rounded down.

        `count(self.elements) == self.zeros`.
        """
        return elements * self.zeros // self.elements

    def shortfall(self, weight: Tensor) -> str | None:
        """Describe how a [rows, columns] matrix violates the pattern, or return None.

        More zeros than `count` are allowed: the dense matrix may have had them.
        """
        return _too_few(weight, self.count(weight.numel()))


def _too_few(weight: Tensor, expected: int) -> str | None:
    zeros = weight.numel() - int(weight.count_nonzero())
    if zeros >= expected:
        return None
    return f"{zeros} of {weight.numel()} weights are zero, not {expected}"


@dataclass(frozen=True)
class NM:
    """Keeps n of every m consecutive weights of a row: the n:m of NVIDIA.

    Attributes:
        kept: n, the number of weights in each group that are not pruned, 0 < n < m.
        group: m, the number of weights in a group.
    """

    kept: int
    group: int

    def __str__(self) -> str:
        return f"{self.kept}:{self.group}"

    @property
    def sparsity(self) -> float:
        """Fraction of the weights that are pruned."""
        return 1 - self.kept / self.group

    def check_fits(self, name: str, columns: int) -> None:
        """Raise PatternError where m does not divide the width of the matrix `name`."""
        if columns % self.group:
            raise PatternError(
                f"Matrix {name} has {columns} inputs, which {self.group} does not "
                f"divide, so the pattern {self} does not fit it.",
                "Choose another pattern, or an unstructured sparsity such as 50%.",
            )

    def mask(self, scores: Tensor) -> Tensor:
        """Return the mask that prunes the m - n lowest scores of each group.

        The count is exact: of equal scores, those of the lowest columns are pruned.

        Args:
            scores: [rows, columns], without NaN; m divides columns.

        Cost:
            m (m - 1) comparisons for each group, no sort.
        """
        # One contiguous tensor for each position within a group, [rows * groups].
        members = [part.contiguous() for part in scores.reshape(-1, self.group).T]
        pruned = [
            _rank(index, members) < self.group - self.kept
            for index in range(self.group)
        ]
        return torch.stack(pruned, dim=1).view(scores.shape)

    def count(self, elements: int) -> int:
        """Return how many of `elements` weights are pruned."""
        return elements // self.group * (self.group - self.kept)

    def shortfall(self, weight: Tensor) -> str | None:
        """Describe how a [rows, columns] matrix violates the pattern, or return None.

        Groups with fewer than n nonzero weights are allowed: the dense matrix may have
        had zeros.
        """
        groups = weight.reshape(-1, self.group)
        broken = int(((groups != 0).sum(dim=1) > self.kept).sum())
        if not broken:
            return None
        return f"{broken} of {len(groups)} groups keep more than {self.kept} weights"


def _rank(index: int, members: list[Tensor]) -> Tensor:
    """Return the rank of one member of each group when scores are sorted, stably.

    Comparing all pairs is several times faster than sorting groups of few members.

    Args:
        index: Position of the member within its group.
        members: The scores at each position, [groups] each.

    Returns:
        [groups], int16: how many members of the group are pruned before this one.
    """
    scores = members[index]
    rank = torch.zeros_like(scores, dtype=torch.int16)
    for position, others in enumerate(members):
        if position != index:
            # Of equal scores the first has the lower rank, so ranks are distinct.
            rank += others <= scores if position < index else others < scores
    return rank


Pattern = Unstructured | Exact | NM
# Tensor name -> exact count of zeros, for the matrices of one block.
Patterns = Mapping[str, Exact]


def parse_pattern(text: str | float, allow_dense: bool = False) -> Pattern:
    """Parse a pattern: `0.5`, `50%` or `2:4`.

    Args:
        text: The pattern.
        allow_dense: Whether a sparsity of 0 is accepted.

    Raises:
        PatternError: The text is not a pattern, or its sparsity is not in (0, 1).
    """
    parsed = parse_sparsity(text, allow_dense)
    return NM(*parsed) if isinstance(parsed, tuple) else Unstructured(parsed)


def lowest(scores: Tensor, count: int) -> Tensor:
    """Return the mask of exactly the `count` lowest scores.

    Of scores that equal the threshold, the first in row-major order are taken.

    Args:
        scores: Any shape, finite.
        count: Number of scores, 0 to all.

    Cost:
        On the CPU one selection (linear time) and one pass, no sort. Elsewhere the same
        mask by operations that a GPU is fast at, and that the host does not wait for.
    """
    if count == 0:
        return torch.zeros_like(scores, dtype=torch.bool)
    flat = scores.flatten()
    if flat.device.type != "cpu":
        return _lowest_in_parallel(flat, count).view_as(scores)
    threshold = flat.kthvalue(count).values
    mask = flat < threshold
    ties = (flat == threshold).nonzero().flatten()
    mask[ties[: count - int(mask.sum())]] = True
    return mask.view_as(scores)


def _lowest_in_parallel(flat: Tensor, count: int) -> Tensor:
    """Do what `lowest` does, [elements], without reading a result on the host.

    `kthvalue` selects with a single thread block on CUDA: twenty times the time of a
    sort.
    """
    # A sort takes three copies, and memory for the indices: that is for short ones.
    searched = flat.numel() > _MAX_SORTED and flat.dtype == torch.float32
    threshold = (
        _kth_by_bisection(flat, count) if searched else flat.sort().values[count - 1]
    )
    mask = flat < threshold
    ties = flat == threshold
    # The first of those that tie, as many as are left.
    whole = torch.int32 if flat.numel() < 2**31 else torch.int64
    number = ties.cumsum(0, dtype=whole)
    return mask | (ties & (number <= count - mask.sum()))


def _kth_by_bisection(flat: Tensor, count: int) -> Tensor:
    """Return the `count`-th lowest of float32 scores, a scalar on their device.

    A float's bits, read as an integer, rise with its magnitude. Of the 2^32 numbers the
    lowest is sought that at least `count` scores do not exceed; each of 32 passes over
    the scores halves the range.
    """
    # From -infinity to infinity, as integers that are ordered as the numbers are.
    high = torch.full((), _INFINITY, device=flat.device)
    low = -high
    for _ in range(32):
        middle = (low + high).div(2, rounding_mode="floor")
        enough = (flat <= _number(middle)).sum() >= count
        low = torch.where(enough, low, middle + 1)
        high = torch.where(enough, middle, high)
    return _number(high)


def _number(order: Tensor) -> Tensor:
    """Return the float32 number, a scalar, at a place in the order of all of them.

    Args:
        order: int64; the bits of its magnitude, negative where the number is.
    """
    magnitude = order.abs().to(torch.int32).view(torch.float32)
    return torch.where(order < 0, -magnitude, magnitude)


def is_sparse(weight: Tensor) -> bool:
    """Whether a matrix was pruned before: at least 1 % of its weights are zero."""
    zeros = weight.numel() - int(weight.count_nonzero())
    return zeros >= _STRAY_ZEROS * max(weight.numel(), 1)


def pruned_first(scores: Tensor, zeros: Tensor | None) -> Tensor:
    """Return scores by which some weights are pruned before all others.

    Args:
        scores: [rows, columns], not negative.
        zeros: [rows, columns], True for those weights; None for none.
    """
    return scores if zeros is None else scores.masked_fill(zeros, -1.0)


def with_zeros(pruned: Tensor, zeros: Tensor | None) -> Tensor:
    """Return a mask that prunes some weights as well, however few it prunes."""
    return pruned if zeros is None else pruned | zeros


def describe(weight: Tensor) -> str:
    """Name the tightest pattern that a [rows, columns] matrix obeys.

    Returns:
        `dense` where under 1 % of the weights are zero; `n:m`, m = 2, 4, 8 or 16, for
        the lowest n / m such that no group has more than n nonzero weights and the
        matrix has more than 90 % of the nonzero weights that n:m allows; otherwise
        `unstructured`.
    """
    kept = (weight != 0).contiguous()
    density = kept.float().mean().item()
    if not is_sparse(weight):
        return "dense"
    candidates = [
        (n / group, group, n)
        for group in (2, 4, 8, 16)
        if weight.shape[1] % group == 0
        and 0 < (n := int(kept.view(-1, group).sum(dim=1).max())) < group
        and density > 0.9 * n / group
    ]
    if not candidates:
        return "unstructured"
    _, group, n = min(candidates)
    return f"{n}:{group}"
