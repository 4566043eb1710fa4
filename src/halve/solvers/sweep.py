"""The sweep: fix column after column, and let the columns to the right compensate.

Algorithm 1 of Frantar and Alistarh, "SparseGPT" (2023), which is that of Frantar et
al., "GPTQ" (2022), with a mask. With w a column after the updates so far and q its
final value, the columns to its right are changed by -(w - q) / U_jj * U_j,. Here q is 0
where a weight is pruned, and elsewhere w itself or the grid value nearest to it. Within
a block the update is applied in small chunks, so that most of it is a matrix product.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from halve._compat.triton import has_triton
from halve.grids import QuantParams
from halve.numerics.matmul import linear
from halve.patterns import (
    NM,
    Exact,
    Pattern,
    Unstructured,
    lowest,
    pruned_first,
    with_zeros,
)

# Columns swept one by one before the rest of their block is updated at once.
CHUNK = 16


def transposed_copy(weight: Tensor) -> Tensor:
    """Return a copy of W^T to be swept, [columns, rows] in float32.

    A column of W, [rows, columns], is contiguous there.
    """
    order = torch.contiguous_format
    return weight.T.to(torch.float32, memory_format=order, copy=True)


# Given the index of the first of some columns and their scores w^2 / U_jj^2, [columns,
# rows], returns a mask of the same shape, True where pruned.
Choose = Callable[[int, Tensor], Tensor]


@dataclass(frozen=True)
class Rule:
    """How the final values of columns are chosen.

    Attributes:
        choose: Returns the mask of some columns.
        size: Columns of a block.
        span: Columns over which one mask is chosen; the size, or a divisor of it.
        quant_params: The grid of the kept weights; None where they are not quantized.
        groups: The n:m pattern by which `choose` decides from scores alone; None for
            any other way.
    """

    choose: Choose
    size: int
    span: int
    quant_params: QuantParams | None = None
    groups: NM | None = None

    @property
    def in_turn(self) -> bool:
        """Whether `choose` has to be called span after span, by no kernel."""
        return self.groups is None and self.span < self.size


def adaptive_mask(
    pattern: Pattern,
    size: int,
    quant_params: QuantParams | None = None,
    zeros: Tensor | None = None,
) -> Rule:
    """Return the rule that prunes the lowest scores as the sweep reaches them.

    Args:
        pattern: Unstructured chooses over a whole block, n:m group after group.
        size: Columns of a block; for n:m it is rounded to whole groups.
        quant_params: As in `Rule`.
        zeros: [columns, rows], True for weights that are pruned in any case; None for
            none.
    """
    if isinstance(pattern, NM):
        whole = max(size // pattern.group, 1) * pattern.group
        span = pattern.group
        if zeros is None:
            return Rule(
                lambda _, s: pattern.mask(s.T).T, whole, span, quant_params, pattern
            )
        grouped = _groups_with_zeros(pattern, zeros)
        return Rule(grouped, whole, span, quant_params)
    if zeros is not None:
        chosen = _lowest_beside(pattern, zeros)
        return Rule(chosen, size, size, quant_params)

    def choose(first: int, scores: Tensor) -> Tensor:
        columns, rows = scores.shape
        # Counted up to each block, and not within it: roundings do not add up.
        before, after = (pattern.count(n * rows) for n in (first, first + columns))
        return lowest(scores, after - before)

    return Rule(choose, size, size, quant_params)


def _groups_with_zeros(pattern: NM, zeros: Tensor) -> Choose:
    """Return how n:m prunes some weights, and then the lowest scores of each group."""

    def choose(first: int, scores: Tensor) -> Tensor:
        fixed = zeros[first : first + len(scores)]
        return with_zeros(pattern.mask(pruned_first(scores, fixed).T).T, fixed)

    return choose


def _lowest_beside(pattern: Unstructured | Exact, zeros: Tensor) -> Choose:
    """Return how a pattern's count is pruned of which some weights are a part.

    What is left of the count is divided over the blocks by their other weights, so that
    the whole matrix has as many zeros as the pattern asks for, unless there are more.
    """
    fixed = [0, *zeros.sum(dim=1).cumsum(0).tolist()]  # in the first columns
    elements = zeros.numel()
    left = max(pattern.count(elements) - fixed[-1], 0)

    def count(columns: int, rows: int) -> int:
        others = columns * rows - fixed[columns]
        return fixed[columns] + left * others // max(elements - fixed[-1], 1)

    def choose(first: int, scores: Tensor) -> Tensor:
        columns, rows = scores.shape
        before, after = (count(n, rows) for n in (first, first + columns))
        part = zeros[first : first + columns]
        return lowest(pruned_first(scores, part), after - before)

    return choose


def fixed_mask(
    pruned: Tensor, size: int, quant_params: QuantParams | None = None
) -> Rule:
    """Return the rule that keeps a given mask, [columns, rows]."""
    return Rule(
        lambda first, s: pruned[first : first + len(s)], size, size, quant_params
    )


def sweep(remaining: Tensor, factor: Tensor, rule: Rule) -> float:
    """Fix all columns, in place; rows * columns^2 operations.

    Args:
        remaining: W^T, [columns, rows]: a column of the matrix is contiguous.
        factor: U, [columns, columns], upper triangular with U^T U = H^-1.
        rule: How final values are chosen.

    Returns:
        trace (W - Z) H (W - Z)^T for the solution Z. With E the errors of all columns,
        W - Z = E U, so that this is ||E||^2.
    """
    columns = len(remaining)
    error = remaining.new_zeros((), dtype=torch.float64)
    for start in range(0, columns, rule.size):
        stop = min(start + rule.size, columns)
        block, triangle = remaining[start:stop], factor[start:stop, start:stop]
        errors = _sweep_block(block, triangle, rule, start)
        error += torch.linalg.vector_norm(errors).double().square()
        if stop < columns:
            # In place: the product alone would be as large as the matrix.
            remaining[stop:].addmm_(factor[start:stop, stop:].T, errors, alpha=-1)
    return float(error)


def _sweep_block(block: Tensor, factor: Tensor, rule: Rule, first: int) -> Tensor:
    """Fix the columns of a block in place and return their errors.

    Args:
        block: [size, rows], columns of the matrix as rows; changed in place.
        factor: [size, size], the block's part of U.
        rule: How final values are chosen.
        first: Index of the block's first column in the matrix.

    Returns:
        [size, rows]: for each column (w - q) / U_jj, to be propagated to its right.
    """
    if (errors := _sweep_by_kernel(block, factor, rule, first)) is not None:
        return errors
    columns = _BlockColumns(block, factor.diagonal()[:, None], rule, first)
    span = columns.span
    chunk = max(CHUNK // span, 1) * span if span < len(block) else CHUNK
    errors = carry(block, factor, columns.fix, chunk)
    block.masked_fill_(columns.pruned, 0)
    return errors


def _sweep_by_kernel(
    block: Tensor, factor: Tensor, rule: Rule, first: int
) -> Tensor | None:
    """Do what `_sweep_block` does in one kernel; None where there is none for it."""
    if not has_triton(block.device):
        return None
    from halve.solvers.sweep_kernel import BlockKernel  # noqa: PLC0415  (needs triton)

    params = rule.quant_params
    kernel = BlockKernel(len(block), rule.groups, params and params.grid)
    if rule.in_turn or not kernel.runs_on(block.device):
        return None
    pruned = None
    if rule.groups is None:
        scores = (block / factor.diagonal()[:, None]).square()
        pruned = rule.choose(first, scores)
    return kernel.fix(block, block, factor, pruned, params, first)


class _BlockColumns:
    """The columns of a block, their mask and their errors.

    Attributes:
        span: Columns of this block over which one mask is chosen.
        pruned: [size, rows], the mask as far as it has been chosen.
    """

    def __init__(self, block: Tensor, diagonal: Tensor, rule: Rule, first: int) -> None:
        self._block, self._diagonal = block, diagonal
        self._rule, self._first = rule, first
        self.span = min(rule.span, len(block))
        self.pruned = torch.empty_like(block, dtype=torch.bool)
        self._scale = torch.empty_like(block)  # 1 / U_jj where pruned, 0 where kept

    def fix(self, j: int, error: Tensor) -> None:
        """Choose the mask that begins at column j, and write the column's error."""
        if j % self.span == 0:
            self._choose(slice(j, j + self.span))
        column, params = self._block[j], self._rule.quant_params
        if params is None:
            # w - q is w where pruned and 0 where kept; pruned weights are zeroed when
            # the whole block is done.
            torch.mul(column, self._scale[j], out=error)
            return
        rounded = params.fake_quantize_column(column, self._first + j)
        rounded.masked_fill_(self.pruned[j], 0)
        torch.sub(column, rounded, out=error).div_(self._diagonal[j])
        column.copy_(rounded)

    def _choose(self, part: slice) -> None:
        scores = (self._block[part] / self._diagonal[part]).square()
        self.pruned[part] = self._rule.choose(self._first + part.start, scores)
        self._scale[part] = self.pruned[part] / self._diagonal[part]


def carry(
    block: Tensor,
    coefficients: Tensor,
    fix: Callable[[int, Tensor], None],
    chunk: int = CHUNK,
) -> Tensor:
    """Fix the columns of a block in turn, propagating each one's error to those after.

    Column k changes by -coefficients[j, k] * error_j for every column j before it.

    Args:
        block: [size, rows], columns of a matrix as rows; changed in place.
        coefficients: [size, size].
        fix: Given j and an output tensor, [rows], writes the error of column j to it.
        chunk: Columns after which the rest of the block is updated by one product.

    Returns:
        The errors, [size, rows].
    """
    errors = torch.empty_like(block)
    for start in range(0, len(block), chunk):
        stop = min(start + chunk, len(block))
        for j in range(start, stop):
            error = errors[j]
            fix(j, error)
            # A rank-one update within the chunk; the columns after it wait.
            block[j + 1 : stop].addr_(coefficients[j, j + 1 : stop], error, alpha=-1)
        block[stop:] -= linear(coefficients[start:stop, stop:].T, errors[start:stop].T)
    return errors
