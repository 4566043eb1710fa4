"""Gradients of a model's predictions by what leaves its last block."""

from collections.abc import Iterator

import torch
from torch import Tensor

from halve.runtime.predictions import tail_logits
from halve.runtime.stream import Stream

# Tokens whose logits are in memory at a time while gradients are computed, and numbers
# for each logit: itself, its logarithm, their gradients, and what tokens are drawn by.
GRADIENT_TOKENS, GRADIENT_COPIES = 256, 5


def prediction_gradient(stream: Stream, seed: int = 0) -> Tensor:
    """Return the gradient of log p(y) by what leaves the last block.

    The tokens y are drawn from the model's own predictions p, one for each position, so
    that squares of gradients estimate the Fisher information.

    Args:
        stream: A stream that has been advanced past the last block.
        seed: Seed of the draws.

    Returns:
        In the shape of `hidden`, float32, on its device.
    """
    gradient = torch.empty_like(stream.hidden)
    with stream.model.surroundings(with_head=True), torch.enable_grad():
        for sample, ids in enumerate(stream.windows):
            generator = torch.Generator().manual_seed(seed + sample)
            uniform = torch.rand(ids.shape, generator=generator)
            for tokens in _token_slices(stream):
                place = (slice(sample, sample + 1), *tokens)
                part = (ids[tokens].unsqueeze(0), stream.hidden[place])
                drawn = uniform[tokens].unsqueeze(0)
                gradient[place] = _gradient_of_draws(stream, *part, drawn)
    return gradient


def _token_slices(stream: Stream) -> Iterator[tuple[slice, ...]]:
    """Yield parts of a window whose logits are in memory at a time.

    What follows the blocks treats each token alone. Where hidden states have other
    dimensions than samples, tokens and width, all of a window are one part.
    """
    length = stream.windows.shape[1]
    if stream.hidden.shape[1:-1] != (length,):
        yield ()
        return
    for start in range(0, length, GRADIENT_TOKENS):
        yield (slice(start, start + GRADIENT_TOKENS),)


def _gradient_of_draws(
    stream: Stream, ids: Tensor, hidden: Tensor, uniform: Tensor
) -> Tensor:
    """Return the gradient by hidden states of log p of tokens drawn from p.

    Args:
        stream: Where the model runs.
        ids: [1, tokens].
        hidden: What leaves the last block, samples first.
        uniform: Numbers from 0 to 1, by which tokens are drawn, [1, tokens].
    """
    hidden = hidden.to(stream.model.device).requires_grad_()
    scores = tail_logits(stream, ids, hidden).float().log_softmax(-1)
    # Drawn on the CPU, so that every device draws the same.
    below = scores.detach().exp().cumsum(-1) < uniform.to(scores.device)[..., None]
    drawn = below.sum(-1, keepdim=True).clamp(max=scores.shape[-1] - 1)
    scores.gather(-1, drawn).sum().backward()
    assert hidden.grad is not None, "predictions depend on hidden states"
    return hidden.grad
