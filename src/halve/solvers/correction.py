"""Error-corrected targets: what to prune a matrix to, now that its inputs have changed.

Pruning what comes before a matrix changes its inputs from X_dense to X. Its outputs are
closest to those of the dense model, X_dense W^T, with

    W' = argmin ||X_dense W^T - X Z^T||^2 + damping ||W - Z||^2
       = W + W (X_dense - X)^T X (H + damping)^-1,   H = X^T X,

and up to a constant that error is the error of pruning W' on X. So a solver is given W'
in place of W, and needs no change. (Frantar and Alistarh's problem with other targets,
as in Li et al., "GPTAQ" (2025), where it is done column by column.)
"""

import torch
from torch import Tensor

from halve.numerics.matmul import linear
from halve.solvers.hessian import Hessian


def corrected_target(hessian: Hessian, weight: Tensor, drift: Tensor) -> Tensor:
    """Return W' for W, [rows, columns] in float32; 4 rows * columns^2 operations.

    Args:
        hessian: Of X; solvers share its factor U, U^T U = (H + damping)^-1.
        weight: W, of any floating dtype.
        drift: W (X_dense - X)^T X, as `CrossGram.drift` returns it.

    Raises:
        NumericalError: H is not positive definite with any damping up to 1.
    """
    # Without a copy of U^T, as large as H, which `linear` would make for the second.
    return weight + torch.mm(linear(drift, hessian.factor), hessian.factor)
