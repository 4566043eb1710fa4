"""Decoding on a GPU: the forward pass of one token as a CUDA graph.

A token of a model with 32 blocks is about a thousand launches of kernels, which take
Python several milliseconds, longer than the GPU needs to read the weights. A graph
replays all of them by one call.

transformers gets there by `torch.compile` with `mode="reduce-overhead"`, where a static
cache is used. Halve captures the graph itself instead: compilation takes tens of
seconds for each model and needs a C compiler, and fuses only what is small beside the
products with weights, which are opaque to it. The capture takes as long as one token
without a graph.

The first token after the prompt is decoded without a graph: kernels are compiled and
libraries set up then, which cannot be captured. The second token is captured and
replayed, as are all others. `StaticCache` makes this possible: it has room for all
tokens from the beginning, and counts them in a tensor on the GPU. Whatever else differs
from token to token (ids, positions, the attention mask) is copied into tensors that the
graph reads. So `generate` stays what it is, with sampling, streaming and batches; for
greedy decoding there is a shorter loop (`greedy`), which waits for the GPU only now and
then.
"""

from collections.abc import Callable, Iterator
from functools import cache, wraps
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from transformers import StaticCache
from transformers.cache_utils import StaticLayer

from halve._compat.torch import change_class
from halve._compat.transformers import can_compile, has_default_cache
from halve.runtime.cuda.token_graph import (
    Record,
    TokenGraph,
    capture,
    warn_of_slowness,
)
from halve.runtime.default_cache import makes_default_cache


def prepare(model: Any, record: Record = capture) -> str | None:  # noqa: ANN401
    """Let a model decode by CUDA graphs, if it can be captured.

    Args:
        model: A transformers model on a GPU, in evaluation mode. Its class changes to
            one that cannot be pickled.
        record: How a pass is captured. A test that has no GPU passes a function that
            returns the pass as it is.

    Returns:
        Why the model decodes as before, or None.

    Warns:
        HalveWarning: It decodes as before.
    """
    reason = _obstacle(model)
    if reason is not None:
        warn_of_slowness(reason)
    elif not is_prepared(model):
        change_class(model, _with_graphs(type(model), record))
    return reason


def is_prepared(model: Any) -> bool:  # noqa: ANN401
    """Whether `prepare` has changed a model."""
    return hasattr(type(model), "halve_graphs")


def by_graph(model: Any, past: Any) -> bool:  # noqa: ANN401
    """Whether tokens were decoded by a graph with this cache."""
    graph = type(model).halve_graphs.get(past) if is_prepared(model) else None
    return graph is not None and graph.is_recorded


def _obstacle(model: Any) -> str | None:  # noqa: ANN401
    name = type(model).__name__
    if len({tensor.device for tensor in _tensors(model)}) > 1:
        return "the model lies on several devices"
    if not can_compile(model):
        return f"{name} does not support a static cache"
    if not has_default_cache(model):
        return f"{name} has a cache of its own kind"
    # As modules of packed experts say of themselves; they are of the layer above.
    if any(getattr(module, "reads_routing", False) for module in model.modules()):
        return "it waits for the router to choose the experts of each token"
    return None


def _tensors(model: nn.Module) -> Iterator[Tensor]:
    yield from model.parameters()
    yield from model.buffers()


@cache
def _with_graphs(plain: type, record: Record) -> type:
    """Return a model's class whose forward pass replays a graph where it can."""
    forward: Callable[..., Any] = plain.forward  # type: ignore[attr-defined]
    graphs: WeakKeyDictionary[StaticCache, TokenGraph] = WeakKeyDictionary()

    @wraps(forward)
    def forward_or_replay(
        self: Any,  # noqa: ANN401
        input_ids: Tensor | None = None,
        *args: Any,  # noqa: ANN401
        **kwargs: Any,  # noqa: ANN401
    ) -> Any:  # noqa: ANN401
        past: Any = kwargs.get("past_key_values")
        if args or input_ids is None or not _appends_one_token(input_ids, past):
            return forward(self, input_ids, *args, **kwargs)
        if past not in graphs:
            graphs[past] = TokenGraph(past, record)
        return graphs[past].decode(
            lambda **inputs: forward(self, **inputs), {"input_ids": input_ids} | kwargs
        )

    @wraps(plain.generate)  # type: ignore[attr-defined]
    def generate_with_static_cache(self: Any, *args: Any, **kwargs: Any) -> Any:  # noqa: ANN401
        if makes_default_cache(self, kwargs) and _is_simple(self, kwargs):
            kwargs |= {"cache_implementation": "static", "disable_compile": True}
        return plain.generate(self, *args, **kwargs)  # type: ignore[attr-defined]

    members = {
        "forward": forward_or_replay,
        "generate": generate_with_static_cache,
        "halve_graphs": graphs,
    }
    return type(plain.__name__, (plain,), members | {"__module__": plain.__module__})


def _appends_one_token(ids: Tensor, past: Any) -> bool:  # noqa: ANN401
    """Whether a forward pass appends one token to a prompt in a cache for graphs."""
    return (
        ids.shape[1] == 1
        and not torch.is_grad_enabled()
        and isinstance(past, StaticCache)
        and only_grows(past)
        # Before the prompt nothing is allocated.
        and past.is_initialized
    )


def only_grows(past: StaticCache) -> bool:
    """Whether all layers of a cache hold all tokens.

    The others count tokens in Python, where a graph does not.
    """
    return all(type(layer) is StaticLayer for layer in past.layers)


def _is_simple(model: Any, kwargs: dict[str, Any]) -> bool:  # noqa: ANN401
    """Whether `generate` decodes one token at a time, with a cache that only grows."""
    configs = kwargs.get("generation_config"), model.generation_config
    beams = [kwargs.get("num_beams"), *(c and c.num_beams for c in configs)]
    others = ("assistant_model", "prompt_lookup_num_tokens", "custom_generate")
    return (
        all(count in (None, 1) for count in beams)
        and not any(kwargs.get(name) for name in others)
        and only_grows(StaticCache(config=model.config, max_cache_len=1))
    )
