"""How fast a model runs on a GPU; what is measured is described in `speed`."""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from halve.runtime.cuda.clock import gpu_seconds
from halve.runtime.cuda.greedy import GreedyDecoder, has_greedy_loop

# Tokens before those that are timed: one that sets up, and one that is captured.
_UNTIMED = 2
# Much larger than any cache.
_COPIED_BYTES = 2**30
_COPIES = 20


def time_prefill(
    model: Any,  # noqa: ANN401
    prompt: Tensor,
    seconds: Callable[[Callable[[], object]], float],
) -> float:
    """Return the seconds of a forward pass over a prompt, after one that is not timed.

    Args:
        model: A model on a GPU.
        prompt: Token ids, [batch, length], on the same GPU.
        seconds: Times a piece of work.
    """
    read = partial(model, prompt, use_cache=True, logits_to_keep=1)
    read()
    return seconds(read)


def time_decoding(
    model: Any,  # noqa: ANN401
    prompt: Tensor,
    count: int,
    seconds: Callable[[Callable[[], object]], float],
) -> tuple[float, str]:
    """Return the seconds of decoding tokens greedily, and what decoded.

    Args:
        model: A model on a GPU.
        prompt: Token ids, [batch, length], on the same GPU.
        count: Tokens that are timed.
        seconds: Times a piece of work.

    Returns:
        The seconds, and `cuda graph`, or `transformers` where the model supports none.
    """
    if not has_greedy_loop(model):
        return seconds(_continue(model, prompt, count)), "transformers"
    decoder = GreedyDecoder(model, prompt, prompt.shape[1] + _UNTIMED + count)
    for _ in range(_UNTIMED):
        decoder.step()
    found = seconds(lambda: [decoder.step() for _ in range(count)])
    return found, "cuda graph" if decoder.is_by_graph else "transformers"


def _continue(model: Any, prompt: Tensor, count: int) -> Callable[[], None]:  # noqa: ANN401
    """Return what decodes so many tokens with the cache that the model makes."""
    states = [model(prompt, use_cache=True)]

    def decode(tokens: int) -> None:
        for _ in range(tokens):
            next_ids: Tensor = states[0].logits[:, -1:].argmax(-1)
            past = states[0].past_key_values
            states[0] = model(next_ids, past_key_values=past, use_cache=True)

    decode(_UNTIMED)
    return lambda: decode(count)


def copy_bandwidth(device: torch.device) -> float:
    """Return the memory bandwidth of a GPU, copying, in bytes per second.

    Bytes that are read and bytes that are written are counted. The best of several
    copies.
    """
    source = torch.empty(_COPIED_BYTES, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    times = [gpu_seconds(lambda: target.copy_(source), device) for _ in range(_COPIES)]
    return 2 * _COPIED_BYTES / min(times)
