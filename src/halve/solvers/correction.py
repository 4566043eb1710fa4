"""Error-corrected targets: what to prune a matrix to, now that its inputs have changed.

Pruning what comes before a matrix changes its inputs from X_dense to X. Its outputs are
closest to those of the dense model, X_dense W^T, with

    W' = argmin ||X_dense W^T - X Z^T||^2 + damping ||W - Z||^2
       = W + W (X_dense - X)^T X (H + damping)^-1,   H = X^T X,

and up to a constant that error is the error of pruning W' on X. So a solver is given W'
in place of W, and needs no change. (Frantar and Alistarh's problem with other targets,
as in Li et al., "GPTAQ" (2025), where it is done column by column.)
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from halve.calibration_stats import CrossGram
from halve.solvers.hessian import Hessian, factorize


@dataclass(frozen=True)
class Correction:
    """What the matrices of a group share.

    Attributes:
        drift: W (X_dense - X)^T X of each matrix W.
        factor: Lower Cholesky factor of the damped H, [columns, columns].
    """

    drift: CrossGram
    factor: Tensor

    @classmethod
    def of(cls, hessian: Hessian, drift: CrossGram) -> "Correction":
        """Factorize; 1/3 columns^3 operations.

        Args:
            hessian: H, and the damping that pulls towards W; raised tenfold, up to 1,
                where the factorization fails.
            drift: Of the same inputs.

        Raises:
            NumericalError: Not positive definite with any damping up to 1.
        """
        factor, _ = factorize(hessian.gram.clone(), hessian.damping, _cholesky)
        return cls(drift, factor)

    def target(self, index: int, weight: Tensor) -> Tensor:
        """Return W' for W, [rows, columns]; 2 to 3 rows * columns^2 operations.

        Args:
            index: Which matrix of the group W is.
            weight: W.
        """
        pulled = self.drift.pulled(index)
        return weight + torch.cholesky_solve(pulled.T, self.factor).T


def _cholesky(hessian: Tensor) -> Tensor | None:
    """Return the lower Cholesky factor, None where there is none."""
    factor, failed = torch.linalg.cholesky_ex(hessian)
    return None if failed or not factor.diagonal().isfinite().all() else factor
