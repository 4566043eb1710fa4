"""The loss of recovery: KL(dense || pruned) of predictions, and its gradient.

For one token with dense probabilities p and logits z of the pruned model, q =
softmax(z),

    KL(p || q) = sum_i p_i (log p_i - log q_i),    dKL / dz = q - p.

The temperature is 1 and there are no labels (Hinton et al., "Distilling the Knowledge
in a Neural Network", 2015, with the teacher's distribution alone).
"""

import torch
from torch import Tensor


@torch.no_grad()
def divergence_and_gradient(logits: Tensor, dense: Tensor) -> tuple[Tensor, Tensor]:
    """Return the sum of KL(dense || pruned) over tokens, and its gradient.

    Args:
        logits: Logits of the pruned model, [windows, length, vocabulary], float32.
        dense: Logits of the dense model, of the same shape; overwritten.

    Returns:
        The sum in nats, float64, and its gradient by `logits`, in the memory of
        `dense`.

    Cost:
        Beside the arguments, four times the logits of one window.
    """
    total = torch.zeros((), dtype=torch.float64, device=logits.device)
    for window, target in zip(logits, dense, strict=True):
        log_q, log_p = window.log_softmax(-1), target.log_softmax(-1)
        p = log_p.exp()
        total += (p * (log_p - log_q)).sum(-1).double().sum()
        torch.sub(log_q.exp_(), p, out=target)
    return total, dense
