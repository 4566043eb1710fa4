"""What makes a generated token cheaper, beside the products with weights.

On a GPU that is a CUDA graph (`halve.runtime.cuda.decode`). The rest is for the CPU.

For every family whose attention transformers lets others provide: attention of one
token by Halve's kernel, and a cache that is not copied. For Llama and its like also the
whole step of a token as one call of the library. `generate` and the model's own code
stay what they are, and do whatever the kernels do not. Nothing has to be compiled:
torch.compile saves no more time, and takes a minute for the first token of a model
(docs/log.md).
"""

from collections.abc import Callable
from functools import cache, wraps
from typing import Any

import torch
from torch import Tensor
from transformers import Cache
from transformers.modeling_outputs import CausalLMOutputWithPast

from halve._compat.torch import change_class
from halve._compat.transformers import (
    attention_name,
    can_choose_attention,
    has_default_cache,
)
from halve.runtime.cpu.attention import ATTENTION, PLAIN
from halve.runtime.cpu.kernels import kernels
from halve.runtime.cpu.step import UnsupportedLayerError
from halve.runtime.cuda import decode as cuda_decode
from halve.runtime.default_cache import makes_default_cache
from halve.runtime.growing_cache import GrowingCache
from halve.runtime.llama_step import LlamaStep

# Arguments of a forward pass that do not change what a decode step computes. Others
# must be None or False.
_HARMLESS = ("use_cache", "return_dict", "logits_to_keep", "past_key_values")


def prepare(model: Any) -> str | None:  # noqa: ANN401
    """Let a model decode by Halve's kernels or by CUDA graphs, as far as possible.

    Args:
        model: A transformers model, in evaluation mode. Its attention function
            changes, and its class to one that cannot be pickled.

    Returns:
        Why the model decodes as before, or None.
    """
    if model.device.type == "cuda":
        return cuda_decode.prepare(model)
    reason = _obstacle(model)
    if reason is None:
        model.set_attn_implementation(ATTENTION)
        if not hasattr(type(model), "_plain_forward"):
            change_class(model, _with_steps(type(model)))
    return reason


def _obstacle(model: Any) -> str | None:  # noqa: ANN401
    if model.device.type != "cpu":
        return f"it is on {model.device.type}"
    if kernels() is None:
        return "there are no kernels"
    name = attention_name(model.config)
    if name not in (PLAIN, ATTENTION):
        return f"its attention is {name}, not {PLAIN}"
    if not can_choose_attention(model):
        return f"{type(model).__name__} does not let its attention be chosen"
    if not has_default_cache(model):
        return f"{type(model).__name__} has a cache of its own kind"
    return None


def new_cache(model: Any) -> Cache | None:  # noqa: ANN401
    """Return an empty cache for a model that is prepared.

    It serves for one generation, during which the layers of the model must not be
    replaced. For a model that decodes as before the result is None, with which
    transformers makes its own cache.
    """
    prepared = attention_name(model.config) == ATTENTION
    return GrowingCache(model.config) if prepared else None


def by_step(past: Cache | None) -> bool:
    """Whether tokens were decoded by a step, each in one call of the library."""
    return isinstance(past, GrowingCache) and past.step is not None


@cache
def _with_steps(plain: type) -> type:
    """Return a model's class whose forward pass decodes by a step where it can."""
    forward: Callable[..., Any] = plain.forward  # type: ignore[attr-defined]

    @wraps(forward)
    def forward_or_step(
        self: Any,  # noqa: ANN401
        input_ids: Tensor | None = None,
        *args: Any,  # noqa: ANN401
        **kwargs: Any,  # noqa: ANN401
    ) -> Any:  # noqa: ANN401
        past = kwargs.get("past_key_values")
        if not args and input_ids is not None and isinstance(past, GrowingCache):
            step = _step_for(self, input_ids, past, kwargs)
            if step is not None:
                logits: Any = step.decode(input_ids)
                return CausalLMOutputWithPast(logits=logits, past_key_values=past)
        return forward(self, input_ids, *args, **kwargs)

    @wraps(plain.generate)  # type: ignore[attr-defined]
    def generate_with_cache(self: Any, *args: Any, **kwargs: Any) -> Any:  # noqa: ANN401
        if makes_default_cache(self, kwargs):
            kwargs["past_key_values"] = new_cache(self)
        return plain.generate(self, *args, **kwargs)  # type: ignore[attr-defined]

    members = {
        "forward": forward_or_step,
        "generate": generate_with_cache,
        "_plain_forward": forward,
    }
    return type(plain.__name__, (plain,), members | {"__module__": plain.__module__})


def _step_for(
    model: Any,  # noqa: ANN401
    ids: Tensor,
    past: GrowingCache,
    kwargs: dict[str, Any],
) -> LlamaStep | None:
    """Return what decodes these tokens, or None if the model itself has to."""
    if not _is_one_token(ids, past.get_seq_length(), kwargs):
        return None
    kernel = kernels()
    if past.obstacle is not None or kernel is None:
        return None
    if past.step is None or not past.step.fits(ids):
        try:
            past.step = LlamaStep(model, past, kernel)
        except UnsupportedLayerError as error:
            past.step, past.obstacle = None, str(error)
    return past.step


def _is_one_token(ids: Tensor, length: int, kwargs: dict[str, Any]) -> bool:
    """Whether a forward pass appends one token to each sequence, without padding."""
    if ids.shape[1] != 1 or length == 0 or torch.is_grad_enabled():
        return False
    rest = {name: value for name, value in kwargs.items() if name not in _HARMLESS}
    mask, positions = rest.pop("attention_mask", None), rest.pop("position_ids", None)
    return (
        kwargs.get("use_cache") is not False
        and kwargs.get("return_dict") is not False
        and not any(value is not None and value is not False for value in rest.values())
        and (mask is None or (mask.shape[1:] == (length + 1,) and bool(mask.all())))
        and (positions is None or bool((positions == length).all()))
    )
