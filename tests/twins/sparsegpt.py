"""A plain reference of SparseGPT: one column and one row at a time, in float64.

Follows algorithm 1 of Frantar and Alistarh, "SparseGPT" (2023), with the full inverse
of the Hessian and without lazy batch updates. Slow; for small matrices only.
"""

import torch
from torch import Tensor

from halve.patterns import NM, Pattern


def prune(
    weight: Tensor, inputs: Tensor, pattern: Pattern, damping: float, block: int
) -> Tensor:
    """Prune a matrix and compensate each pruned weight in those to its right.

    Args:
        weight: W, the dense matrix, [rows, columns].
        inputs: X, [tokens, columns].
        pattern: Which weights are pruned.
        damping: Fraction of the mean of H's diagonal that is added to the diagonal.
        block: Columns over which an unstructured mask is chosen at once.

    Returns:
        [rows, columns] in float64.
    """
    weight, inputs = weight.double().clone(), inputs.double()
    rows, columns = weight.shape
    hessian = 2 * inputs.T @ inputs
    # An input that is always zero: its weights do not matter and are pruned.
    for j in range(columns):
        if hessian[j, j] == 0:
            hessian[j, j] = 1
            weight[:, j] = 0
    hessian += damping * hessian.diagonal().mean() * torch.eye(columns)
    # U, upper triangular with U^T U = H^-1.
    factor = torch.linalg.cholesky(torch.linalg.inv(hessian), upper=True)
    pruned = torch.zeros(rows, columns, dtype=torch.bool)
    for j in range(columns):
        _choose(pruned, weight, factor, pattern, j, block)
        for i in range(rows):
            if pruned[i, j]:
                # w -= w_j / U_jj U_j, which sets w_j to 0.
                error = weight[i, j] / factor[j, j]
                weight[i, j + 1 :] -= error * factor[j, j + 1 :]
                weight[i, j] = 0
    return weight


def _choose(
    pruned: Tensor, weight: Tensor, factor: Tensor, pattern: Pattern, j: int, block: int
) -> None:
    """Choose the mask of the block or group that begins at column j, if one does."""
    rows, columns = weight.shape
    # The score of a weight is the error that pruning it adds: w^2 / U_jj^2.
    if isinstance(pattern, NM):
        if j % pattern.group == 0:
            stop = j + pattern.group
            scores = (weight[:, j:stop] / factor.diagonal()[j:stop]) ** 2
            for i in range(rows):
                lowest = scores[i].argsort()[: pattern.group - pattern.kept]
                pruned[i, j + lowest] = True
    elif j % block == 0:
        stop = min(j + block, columns)
        scores = (weight[:, j:stop] / factor.diagonal()[j:stop]) ** 2
        # Counts up to each block, so that rounding does not add up over blocks.
        count = pattern.count(rows * stop) - pattern.count(rows * j)
        threshold = scores.flatten().sort().values[count - 1]
        pruned[:, j:stop] = scores <= threshold
