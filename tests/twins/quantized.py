"""Rounding as plainly as it can be written: one weight at a time, in float64.

The sweep is that of optimal brain quantisation: the inverse of the Hessian itself, from
which each column is eliminated once it is settled. Levels are compared one by one.
Slow; for small matrices only.
"""

import torch
from torch import Tensor

from halve.grids import QuantParams


def values(quant_params: QuantParams, row: int, column: int) -> Tensor:
    """Return all values that a weight may take."""
    group = column // quant_params.grid.group_size
    scale, zero = (
        float(t[row, group]) for t in (quant_params.scale, quant_params.zero)
    )
    half = 2 ** (quant_params.grid.bits - 1)
    codes = torch.arange(-half, half, dtype=torch.float64)
    return (codes - zero) * scale


def sweep(
    weight: Tensor, pruned: Tensor, hessian: Tensor, quant_params: QuantParams
) -> Tensor:
    """Return a matrix rounded from left to right with the mask held."""
    weight, inverse = weight.double().clone(), torch.linalg.inv(hessian.double())
    rows, columns = weight.shape
    for j in range(columns):
        for i in range(rows):
            choices = values(quant_params, i, j)
            nearest = choices[(choices - weight[i, j]).abs().argmin()]
            settled = 0.0 if pruned[i, j] else nearest
            error = (weight[i, j] - settled) / inverse[j, j]
            weight[i, j + 1 :] -= error * inverse[j, j + 1 :]
            weight[i, j] = settled
        inverse = inverse - inverse[:, [j]] * inverse[[j]] / inverse[j, j]
    return weight


def coordinate_descent(
    weight: Tensor,
    rounded: Tensor,
    pruned: Tensor,
    hessian: Tensor,
    quant_params: QuantParams,
    sweeps: int,
) -> Tensor:
    """Return a rounded matrix after trying every level for every weight in turn."""
    weight, hessian = weight.double(), hessian.double()
    found = rounded.double().clone()
    rows, columns = weight.shape
    for _ in range(sweeps):
        for j in range(columns):
            for i in range(rows):
                if not pruned[i, j]:
                    choices = values(quant_params, i, j)
                    tried = (weight[i] - found[i]).repeat(len(choices), 1)
                    tried[:, j] = weight[i, j] - choices
                    errors = ((tried @ hessian) * tried).sum(dim=1)
                    found[i, j] = choices[errors.argmin()]
    return found
