"""Greedy decoding on a GPU by a loop that waits for the GPU only now and then."""

import inspect
from typing import Any

import torch
from torch import Tensor
from transformers import StaticCache
from transformers.cache_utils import StaticLayer, StaticSlidingWindowLayer

from halve._compat.transformers import attention_name
from halve.runtime.cuda.decode import by_graph, is_prepared, only_grows
from halve.runtime.cuda.token_graph import warn_of_slowness

# Tokens that are decoded before the host looks whether the text has ended.
_TOKENS_PER_LOOK = 16


def has_greedy_loop(model: Any) -> bool:  # noqa: ANN401
    """Whether a `GreedyDecoder` can continue texts with a model.

    It makes the attention mask itself, in the form in which torch's attention takes it.
    Other attention functions take others, or derive more than a mask from it.
    """
    return is_prepared(model) and attention_name(model.config) == "sdpa"


def new_cache(model: Any, capacity: int) -> StaticCache:  # noqa: ANN401
    """Return an empty cache for so many tokens.

    Args:
        model: A transformers model.
        capacity: Tokens of prompt and continuation together.

    Warns:
        HalveWarning: Graphs cannot be used with it.
    """
    past = StaticCache(config=model.config, max_cache_len=capacity)
    # A window that covers the whole cache hides nothing.
    past.layers = [
        StaticLayer(max_cache_len=capacity)
        if type(layer) is StaticSlidingWindowLayer and layer.max_cache_len >= capacity
        else layer
        for layer in past.layers
    ]
    if not only_grows(past):
        warn_of_slowness("some blocks keep a window of the cache only")
    return past


class GreedyDecoder:
    """Continues sequences of one length greedily, without waiting for the GPU.

    Args:
        model: A model for which `has_greedy_loop` holds.
        prompt: Token ids, [batch, length], on the model's device, without padding.
        capacity: Tokens of prompt and continuation together, at most.
    """

    def __init__(self, model: Any, prompt: Tensor, capacity: int) -> None:  # noqa: ANN401
        self.past = new_cache(model, capacity)
        self._model = model
        self._length = prompt.shape[1]
        outputs = model(
            prompt, past_key_values=self.past, use_cache=True, logits_to_keep=1
        )
        self._logits: Tensor = outputs.logits
        self._inputs = self._static_inputs(prompt, capacity)

    def _static_inputs(self, prompt: Tensor, capacity: int) -> dict[str, Tensor]:
        """Return positions and mask of the next token, as far as the model takes them.

        Otherwise each model would derive them from the cache, some by waiting for the
        GPU.
        """
        inputs: dict[str, Tensor] = {}
        batch, length = prompt.shape
        if "position_ids" in inspect.signature(self._model.forward).parameters:
            inputs["position_ids"] = torch.full_like(prompt[:, :1], length)
        if only_grows(self.past):
            mask = prompt.new_zeros(batch, 1, 1, capacity, dtype=torch.bool)
            mask[..., :length] = True
            inputs["attention_mask"] = mask
        return inputs

    @property
    def is_by_graph(self) -> bool:
        """Whether tokens are decoded by a graph."""
        return by_graph(self._model, self.past)

    def step(self) -> Tensor:
        """Return the most likely next tokens, [batch, 1], and run the model on them."""
        ids = self._logits[:, -1:].argmax(-1)
        if "attention_mask" in self._inputs:
            self._inputs["attention_mask"].select(-1, self._length).fill_(True)
        self._logits = self._model(
            ids, past_key_values=self.past, use_cache=True, **self._inputs
        ).logits
        if "position_ids" in self._inputs:
            self._inputs["position_ids"] += 1
        self._length += 1
        return ids


@torch.inference_mode()
def continue_greedily(
    model: Any,  # noqa: ANN401
    prompt: Tensor,
    count: int,
    ends: list[int],
) -> Tensor:
    """Continue a text greedily, up to a token that ends it.

    Args:
        model: A model for which `has_greedy_loop` holds.
        prompt: Token ids, [1, length], on the model's device.
        count: Largest number of tokens to generate, at least 1.
        ends: Tokens that end a text.

    Returns:
        [1, length + generated], with the token that ended the text.
    """
    # The model is run on the last token, too, so that every step is the same.
    decoder = GreedyDecoder(model, prompt, prompt.shape[1] + count)
    parts, found = [prompt], False
    while count and not found:
        steps = min(count, _TOKENS_PER_LOOK)
        new = torch.cat([decoder.step() for _ in range(steps)], dim=1)
        last = next((i for i, t in enumerate(new[0].tolist()) if t in ends), None)
        found = last is not None
        parts.append(new if last is None else new[:, : last + 1])
        count -= steps
    return torch.cat(parts, dim=1)
