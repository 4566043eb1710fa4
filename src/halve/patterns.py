"""Which weights may stay: a share of them, a number of them, or n:m.

A pattern chooses a mask from scores and verifies a matrix. Matrices are seen as
[rows = outputs, columns = inputs]. Masks are boolean, True where a weight is pruned.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from math import nan

import torch
from torch import Tensor

from halve.errors import PatternError


@dataclass(frozen=True)
class Unstructured:
    """Any weight may go; a share of them does.

    Attributes:
        sparsity: Share of weights pruned, in [0, 1); with 0 all stay, which makes sense
            only where they are rounded.
    """

    sparsity: float

    def __str__(self) -> str:
        return f"{100 * self.sparsity:g}%"

    def check_fits(self, name: str, columns: int) -> None:
        """Accept every shape."""

    def count(self, elements: int) -> int:
        """Return how many of `elements` weights are pruned, rounded down.

        Rounded by a hair upwards first, so that 0.7 of 10 is 7 in binary as well.
        """
        return int(elements * self.sparsity + 1e-9 * elements)

    def shortfall(self, weight: Tensor) -> str | None:
        """Return what is missing in a [rows, columns] matrix, None where it obeys."""
        return _too_few(weight, self.count(weight.numel()))


@dataclass(frozen=True)
class Exact:
    """Any weight of one matrix may go; a number of them does.

    Attributes:
        zeros: Weights pruned, 0 to `elements`.
        elements: Weights in the matrix, 1 or more.
    """

    zeros: int
    elements: int

    def __str__(self) -> str:
        return f"{self.zeros} zeros in {self.elements} weights"

    @property
    def sparsity(self) -> float:
        """Share of weights pruned."""
        return self.zeros / self.elements

    def check_fits(self, name: str, columns: int) -> None:
        """Accept every shape."""

    def count(self, elements: int) -> int:
        """Return how many of the first `elements` weights are pruned, rounded down.

        `count(self.elements) == self.zeros`.
        """
        return elements * self.zeros // self.elements

    def shortfall(self, weight: Tensor) -> str | None:
        """Return what is missing in a [rows, columns] matrix, None where it obeys."""
        return _too_few(weight, self.count(weight.numel()))


def _too_few(weight: Tensor, wanted: int) -> str | None:
    found = int((weight == 0).sum())
    if found >= wanted:
        return None
    return f"{found} of {weight.numel()} weights are zero, not {wanted}"


@dataclass(frozen=True)
class NM:
    """n kept of every m consecutive inputs, as NVIDIA counts it.

    Attributes:
        kept: n, weights kept in each group.
        group: m, weights in a group.
    """

    kept: int
    group: int

    def __str__(self) -> str:
        return f"{self.kept}:{self.group}"

    @property
    def sparsity(self) -> float:
        """Share of weights pruned."""
        return 1 - self.kept / self.group

    def check_fits(self, name: str, columns: int) -> None:
        """Raise PatternError where the matrix `name` cannot be cut into groups."""
        if columns % self.group:
            raise PatternError(
                f"Matrix {name} has {columns} inputs, which {self.group} does not "
                f"divide, so the pattern {self} does not fit it.",
                "Choose another pattern, or an unstructured sparsity such as 50%.",
            )

    def mask(self, scores: Tensor) -> Tensor:
        """Return the mask that prunes the lowest scores of each group.

        Args:
            scores: [rows, columns], m divides columns. Ties prune the first.
        """
        groups = [part.contiguous() for part in scores.reshape(-1, self.group).T]
        pruned = [
            _rank(index, groups) < self.group - self.kept for index in range(self.group)
        ]
        return torch.stack(pruned, dim=1).view(scores.shape)

    def count(self, elements: int) -> int:
        """Return how many of `elements` weights are pruned."""
        return elements // self.group * (self.group - self.kept)

    def shortfall(self, weight: Tensor) -> str | None:
        """Return what is missing in a [rows, columns] matrix, None where it obeys."""
        groups = weight.reshape(-1, self.group)
        broken = int(((groups != 0).sum(dim=1) > self.kept).sum())
        if not broken:
            return None
        return f"{broken} of {len(groups)} groups keep more than {self.kept} weights"


def _rank(index: int, members: list[Tensor]) -> Tensor:
    """Return how many members of each group come before one of them, ties in order.

    Comparing all pairs is several times faster than sorting groups of a few.
    """
    own = members[index]
    rank = torch.zeros_like(own, dtype=torch.int16)
    for other, scores in enumerate(members):
        if other != index:
            rank += scores <= own if other < index else scores < own
    return rank


Pattern = Unstructured | Exact | NM
# Tensor name -> the pattern it must obey, for the matrices of one block.
Patterns = Mapping[str, Exact]


def parse_pattern(text: str | float, allow_dense: bool = False) -> Pattern:
    """Read a pattern: `0.5`, `50%` or `2:4`.

    Args:
        text: The pattern.
        allow_dense: Whether a share of 0 is one.

    Raises:
        PatternError: The text is no pattern, or its sparsity is not in (0, 1).
    """
    if isinstance(text, str) and (match := re.fullmatch(r"(\d+):(\d+)", text.strip())):
        kept, group = int(match[1]), int(match[2])
        if 0 < kept < group:
            return NM(kept, group)
    elif 0 < (sparsity := _share(text)) < 1 or (sparsity == 0 and allow_dense):
        return Unstructured(sparsity)
    raise PatternError(
        f"{text!r} is not a sparsity: a share between 0 and 1 or an n:m pattern with "
        "0 < n < m was expected.",
        "Write it as 50%, 0.5 or 2:4 (n kept of every m).",
    )


def _share(text: str | float) -> float:
    """Return the share that a number or percentage means, NaN where it is neither."""
    try:
        if isinstance(text, str) and text.strip().endswith("%"):
            return float(text.strip()[:-1]) / 100
        return float(text)
    except ValueError:
        return nan


def lowest(scores: Tensor, count: int) -> Tensor:
    """Return the mask of exactly `count` lowest scores; ties go to the first.

    Args:
        scores: Any shape, finite.
        count: 0 to the number of scores.

    Costs one selection (linear time) and one pass, no sort.
    """
    if count == 0:
        return torch.zeros_like(scores, dtype=torch.bool)
    flat = scores.flatten()
    threshold = flat.kthvalue(count).values
    mask = flat < threshold
    ties = (flat == threshold).nonzero().flatten()
    mask[ties[: count - int(mask.sum())]] = True
    return mask.view_as(scores)


def describe(weight: Tensor) -> str:
    """Name the tightest pattern that a [rows, columns] matrix obeys.

    Returns:
        `dense` without zeros worth the name (under 1 %); `n:m`, m = 2, 4, 8 or 16, if
        that explains the zeros (all but a tenth of the slots it leaves are used);
        else `unstructured`.
    """
    kept = (weight != 0).contiguous()
    density = kept.float().mean().item()
    if density > 0.99:  # noqa: PLR2004  (stray zeros of trained weights)
        return "dense"
    fitting = [
        (most / group, group, most)
        for group in (2, 4, 8, 16)
        if weight.shape[1] % group == 0
        and 0 < (most := int(kept.view(-1, group).sum(dim=1).max())) < group
        and density > 0.9 * most / group
    ]
    if not fitting:
        return "unstructured"
    _, group, most = min(fitting)
    return f"{most}:{group}"
