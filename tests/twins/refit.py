"""A plain reference of refitting: least squares, row by row, in float64."""

import torch
from torch import Tensor


def least_squares(weight: Tensor, inputs: Tensor, kept: Tensor) -> Tensor:
    """Fit the weights of a fixed mask to the outputs of the dense matrix.

    Args:
        weight: W, the dense matrix, [rows, columns].
        inputs: X, [tokens, columns].
        kept: [rows, columns], True where a weight is not pruned.

    Returns:
        Z, [rows, columns] in float64, zero where `kept` is False, that minimizes
        ||X (W - Z)^T||.
    """
    x, dense = inputs.double(), weight.double()
    solution = torch.zeros_like(dense)
    for row, mask in enumerate(kept):
        outputs = x @ dense[row]
        solution[row, mask] = torch.linalg.lstsq(x[:, mask], outputs).solution
    return solution
