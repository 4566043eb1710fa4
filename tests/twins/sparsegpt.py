"""SparseGPT as plainly as it can be written: one column, one row at a time.

Follows algorithm 1 of the paper in float64, with the full inverse of the Hessian and
no lazy batches. Slow; for small matrices only.
"""

import torch
from torch import Tensor

from halve.patterns import NM, Pattern


def prune(
    weight: Tensor, inputs: Tensor, pattern: Pattern, damping: float, block: int
) -> Tensor:
    """Return the pruned [rows, columns] matrix for inputs [tokens, columns]."""
    weight, inputs = weight.double().clone(), inputs.double()
    rows, columns = weight.shape
    hessian = 2 * inputs.T @ inputs
    for j in range(columns):
        if hessian[j, j] == 0:
            hessian[j, j] = 1
            weight[:, j] = 0
    hessian += damping * hessian.diagonal().mean() * torch.eye(columns)
    factor = torch.linalg.cholesky(torch.linalg.inv(hessian), upper=True)
    pruned = torch.zeros(rows, columns, dtype=torch.bool)
    for j in range(columns):
        _choose(pruned, weight, factor, pattern, j, block)
        for i in range(rows):
            if pruned[i, j]:
                error = weight[i, j] / factor[j, j]
                weight[i, j + 1 :] -= error * factor[j, j + 1 :]
                weight[i, j] = 0
    return weight


def _choose(
    pruned: Tensor, weight: Tensor, factor: Tensor, pattern: Pattern, j: int, block: int
) -> None:
    """Choose the mask of the columns that begin at j, where one begins there."""
    rows, columns = weight.shape
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
        count = pattern.count(rows * stop) - pattern.count(rows * j)
        threshold = scores.flatten().sort().values[count - 1]
        pruned[:, j:stop] = scores <= threshold
