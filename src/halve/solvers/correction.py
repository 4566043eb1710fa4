"""Error-corrected targets: what a matrix should be, now that its inputs have changed.

Pruning what comes before a matrix changes its inputs from X_dense to X. Its outputs are
nearest to those of the dense model, X_dense W^T, with

    W' = argmin ||X_dense W^T - X Z^T||^2 + damping ||W - Z||^2
       = W + W (X_dense - X)^T X (H + damping)^-1,   H = X^T X,

and up to a constant that error is that of pruning W' on X. So a solver is given W' in
the place of W, and need not know. (Frantar and Alistarh's problem with other targets,
as in Li et al., "GPTAQ" (2025), there column by column.)
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from halve.calibration_stats import CrossGram, GramMatrix
from halve.solvers.hessian import factorise


@dataclass(frozen=True)
class Correction:
    """What the matrices of a group share.

    Attributes:
        drift: W (X_dense - X)^T X for each.
        factor: Lower Cholesky factor of the damped H, [columns, columns].
    """

    drift: CrossGram
    factor: Tensor

    @classmethod
    def of(
        cls, statistic: GramMatrix, drift: CrossGram, damping: float
    ) -> "Correction":
        """Factorise; 1/3 columns^3 operations.

        Args:
            statistic: H.
            drift: Of the same inputs.
            damping: Share of the mean diagonal of H that pulls towards W; raised
                tenfold, up to 1, where the factorisation fails.

        Raises:
            NumericalError: Not positive definite with any damping up to 1.
        """
        own = statistic.matrix().clone()  # the solvers want it too
        factor, _ = factorise(own, damping, _cholesky)
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
    sound = not failed and factor.diagonal().isfinite().all()
    return factor if sound else None
