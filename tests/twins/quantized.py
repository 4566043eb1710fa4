"""A plain reference of GPTQ and coordinate descent: one weight at a time, in float64.

The sweep follows optimal brain quantization (Frantar and Alistarh, 2022): it keeps the
inverse of the Hessian itself and eliminates each column from it once that column is
quantized. The nearest value of the grid is found by comparing with all of them. Slow;
for small matrices only.
"""

import torch
from torch import Tensor

from halve.grids import QuantParams


def values(quant_params: QuantParams, row: int, column: int) -> Tensor:
    """Return all values that one weight may take, [2^bits] in float64."""
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
    """Quantize a matrix from left to right with a fixed mask, as GPTQ does.

    Args:
        weight: What is quantized, [rows, columns].
        pruned: [rows, columns], True where the result is zero.
        hessian: H, [columns, columns], positive definite.
        quant_params: The grid, its scales and its zero points.

    Returns:
        [rows, columns] in float64.
    """
    weight, inverse = weight.double().clone(), torch.linalg.inv(hessian.double())
    rows, columns = weight.shape
    for j in range(columns):
        for i in range(rows):
            choices = values(quant_params, i, j)
            nearest = choices[(choices - weight[i, j]).abs().argmin()]
            q = 0.0 if pruned[i, j] else nearest
            # The columns to the right compensate: w -= (w_j - q) / [H^-1]_jj [H^-1]_j.
            error = (weight[i, j] - q) / inverse[j, j]
            weight[i, j + 1 :] -= error * inverse[j, j + 1 :]
            weight[i, j] = q
        # Gaussian elimination: the inverse of H without row and column j.
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
    """Try every value of the grid for every weight in turn, and keep the best.

    Args:
        weight: W, the dense matrix, [rows, columns].
        rounded: Z, where the descent starts, [rows, columns], on the grid.
        pruned: [rows, columns], True where Z is zero and stays zero.
        hessian: H, [columns, columns].
        quant_params: The grid of Z, its scales and its zero points.
        sweeps: Number of passes over the columns.

    Returns:
        [rows, columns] in float64; trace (W - Z) H (W - Z)^T never rises.
    """
    weight, hessian = weight.double(), hessian.double()
    z = rounded.double().clone()
    rows, columns = weight.shape
    for _ in range(sweeps):
        for j in range(columns):
            for i in range(rows):
                if not pruned[i, j]:
                    choices = values(quant_params, i, j)
                    # W - Z of this row, with each choice in place of Z_ij.
                    residuals = (weight[i] - z[i]).repeat(len(choices), 1)
                    residuals[:, j] = weight[i, j] - choices
                    errors = ((residuals @ hessian) * residuals).sum(dim=1)
                    z[i, j] = choices[errors.argmin()]
    return z
