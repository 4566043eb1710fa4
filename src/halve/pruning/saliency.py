"""Sparsities of matrices from what their weights are worth to the predictions.

Pruning one weight w_rc of a matrix, and no other, changes the matrix's output r by
w_rc x_c, and the predictions diverge by about

    s_rc = 1/2 F_r w_rc^2 E[x_c^2],

its saliency, with F_r as in `pruning.importance`: Optimal Brain Damage (LeCun et al.,
1990) with the diagonal of the Fisher information in place of the Hessian. All weights
of the model are compared with one threshold, which the requested fraction of them does
not exceed; the fraction of a matrix's weights that do not exceed it becomes the
sparsity of the matrix. Which weights are pruned in the end is up to the solver, which
knows how they are correlated.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

# A matrix's saliencies are known by this many quantiles, which are estimated from as
# many of its weights as `_SAMPLE`: sparsities are then within a tenth of a per cent.
_QUANTILES = 257
_SAMPLE = 2**18
# For the logarithm of 0: below every saliency that matters.
_SMALLEST = 1e-30
# Enough bisections to reduce any interval of float64 to the spacing of its numbers.
_BISECTIONS = 80
# Numbers that are in memory for each weight of a sample, at most, each of 8 bytes.
_COPIES = 6


def saliency_nbytes() -> int:
    """Return the bytes that `log_saliency` takes for a while."""
    return 8 * _COPIES * _SAMPLE


def log_saliency(weight: Tensor, importance: Tensor, squares: Tensor) -> Tensor:
    """Return quantiles of the logarithms of a matrix's saliencies.

    Args:
        weight: [rows, columns], of any floating dtype.
        importance: F, [rows].
        squares: E[x^2] of the inputs, [columns].

    Returns:
        [257], float64, on the CPU, ascending: from the smallest to the largest.
    """
    columns = weight.shape[1]
    places = _sample(weight.numel())
    row = (places // columns).to(weight.device)
    column = (places % columns).to(weight.device)
    values = weight[row, column].double().square()
    values *= importance.double()[row] * squares.double()[column] / 2
    logs = values.clamp_(min=_SMALLEST).log_().sort().values
    ranks = torch.linspace(0, len(logs) - 1, _QUANTILES, dtype=torch.float64)
    return logs[ranks.round().long().to(logs.device)].cpu()


def _sample(elements: int) -> Tensor:
    """Return the indices of all weights, or of a random sample of them."""
    if elements <= _SAMPLE:
        return torch.arange(elements)
    generator = torch.Generator().manual_seed(0)
    return torch.randint(elements, (_SAMPLE,), generator=generator)


def spread_by_saliency(
    quantiles: Tensor, weights: Sequence[int], sparsity: float
) -> tuple[float, ...]:
    """Return the sparsity of each matrix: its weights up to a common threshold.

    Args:
        quantiles: Of each matrix's saliencies, or of their logarithms, ascending,
            [matrices, quantiles], float64.
        weights: Number of weights in each matrix, positive.
        sparsity: S, the sparsity of all matrices together, in (0, 1).

    Returns:
        Sparsities between S / 2 and (1 + S) / 2 whose mean over all weights is S, up to
        rounding. The bounds are for what the saliency does not know: that weights are
        pruned together.
    """
    counts = torch.tensor(weights, dtype=torch.float64)
    shares = counts / counts.sum()
    low, high = float(quantiles.min()) - 1, float(quantiles.max()) + 1
    for _ in range(_BISECTIONS):
        threshold = (low + high) / 2
        is_above = float(_within(quantiles, threshold, sparsity) @ shares) > sparsity
        low, high = (low, threshold) if is_above else (threshold, high)
    below, above = (_within(quantiles, t, sparsity) for t in (low, high))
    # Where many saliencies are equal, the mean jumps over S between the two.
    gap = float((above - below) @ shares)
    part = (sparsity - float(below @ shares)) / gap if gap else 0.0
    return tuple((below + part * (above - below)).tolist())


def _within(quantiles: Tensor, threshold: float, sparsity: float) -> Tensor:
    """Return the fraction of each matrix up to a threshold, within the bounds."""
    steps = quantiles.shape[1] - 1
    upper = (quantiles <= threshold).sum(dim=1, keepdim=True).clamp(1, steps)
    below = quantiles.gather(1, upper - 1)
    gap = (quantiles.gather(1, upper) - below).clamp(min=torch.finfo(below.dtype).tiny)
    part = ((threshold - below) / gap).clamp(0, 1)
    fraction = (upper - 1 + part).squeeze(1) / steps
    return fraction.clamp(sparsity / 2, (1 + sparsity) / 2)
