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
greedy decoding there is a shorter loop, `GreedyDecoder`, which waits for the GPU only
now and then.
"""

import inspect
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache, wraps
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from transformers import StaticCache
from transformers.cache_utils import StaticLayer, StaticSlidingWindowLayer
from transformers.modeling_outputs import CausalLMOutputWithPast

from halve._compat.torch import change_class
from halve._compat.transformers import attention_name, can_compile, has_default_cache
from halve.errors import HalveWarning
from halve.runtime.default_cache import makes_default_cache

# What runs one token: called without arguments, returns logits [batch, 1, vocabulary]
# in memory that the next call may overwrite.
Run = Callable[[], Tensor]
# Makes of a forward pass one that can be repeated, on a device. The pass must not be
# carried out meanwhile, as it advances the cache.
Record = Callable[[Run, torch.device], Run]

# Arguments of a forward pass that may have any value, if it is always the same.
_PLAIN = ("use_cache", "return_dict", "logits_to_keep")
# How torch reports that the host waits for the GPU, which cannot be captured.
_WAITED = "called a synchronizing CUDA operation"
# Tokens that are decoded before the host looks whether the text has ended.
_TOKENS_PER_LOOK = 16


def capture(run: Run, device: torch.device) -> Run:
    """Capture a forward pass as a CUDA graph.

    Args:
        run: The pass. Its kernels must have been launched before with the same shapes.
        device: The GPU that it runs on.

    Returns:
        The replay. It reads the tensors that `run` reads, wherever they are now: they
        must be kept alive, and be written to in place.

    Raises:
        RuntimeError: The pass does what cannot be captured, such as waiting.
    """
    graph = torch.cuda.CUDAGraph()
    # Other threads, such as a server's, may go on using the GPU meanwhile.
    with (
        torch.cuda.device(device),
        torch.cuda.graph(
            graph,
            stream=torch.cuda.Stream(device),
            capture_error_mode="thread_local",
        ),
    ):
        logits = run()

    def replay() -> Tensor:
        graph.replay()
        return logits

    return replay


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
        _warn(reason)
    elif not is_prepared(model):
        change_class(model, _with_graphs(type(model), record))
    return reason


def is_prepared(model: Any) -> bool:  # noqa: ANN401
    """Whether `prepare` has changed a model."""
    return hasattr(type(model), "halve_graphs")


def has_greedy_loop(model: Any) -> bool:  # noqa: ANN401
    """Whether a `GreedyDecoder` can continue texts with a model.

    It makes the attention mask itself, in the form in which torch's attention takes it.
    Other attention functions take others, or derive more than a mask from it.
    """
    return is_prepared(model) and attention_name(model.config) == "sdpa"


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


def _warn(reason: str) -> None:
    warnings.warn(
        f"Tokens are decoded without CUDA graphs, and slowly: {reason}.",
        HalveWarning,
        stacklevel=3,
    )


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
        and _only_grows(past)
        # Before the prompt nothing is allocated.
        and past.is_initialized
    )


def _only_grows(past: StaticCache) -> bool:
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
        and _only_grows(StaticCache(config=model.config, max_cache_len=1))
    )


class TokenGraph:
    """The forward pass of one token with one cache: run, then captured, then replayed.

    Args:
        past: The cache, which holds a prompt. No reference to it is kept.
        record: How a pass is captured.
    """

    def __init__(self, past: StaticCache, record: Record) -> None:
        self._record = record
        self._written = _tensors_of(past)
        self._signature: tuple[Any, ...] | None = None
        self._inputs: dict[str, Tensor] = {}
        self._run: Run | None = None
        self._obstacle: str | None = None

    @property
    def is_recorded(self) -> bool:
        """Whether a pass has been captured."""
        return self._run is not None

    def decode(self, forward: Callable[..., Any], inputs: dict[str, Any]) -> Any:  # noqa: ANN401
        """Append one token to each sequence.

        Args:
            forward: The model's own forward pass.
            inputs: Its arguments.

        Returns:
            What `forward` does; of a replay only the logits and the cache.
        """
        past, signature = inputs["past_key_values"], _signature(inputs)
        if self._obstacle is not None or signature is None:
            return forward(**inputs)
        if self._signature is None:
            self._signature = signature
            return self._warm_up(forward, inputs)
        if signature != self._signature or not self._fits(past):
            return forward(**inputs)
        if self._run is None:
            self._run = self._try_to_record(forward, inputs)
        if self._run is None:
            return forward(**inputs)
        for name, value in _named_tensors(inputs):
            self._inputs[name].copy_(value)
        return CausalLMOutputWithPast(
            logits=self._run().clone(),  # type: ignore[arg-type]
            past_key_values=past,
        )

    def _fits(self, past: StaticCache) -> bool:
        """Whether the cache still has the buffers that the graph points to."""
        return all(
            own is other
            for own, other in zip(self._written, _tensors_of(past), strict=True)
        )

    def _warm_up(self, forward: Callable[..., Any], inputs: dict[str, Any]) -> Any:  # noqa: ANN401
        """Run the pass, and notice whether the host waits for the GPU in it."""
        if inputs["input_ids"].device.type != "cuda":
            return forward(**inputs)
        with _waits() as waits:
            result = forward(**inputs)
        if waits:
            self._give_up("the forward pass of the model waits for the GPU")
        return result

    def _try_to_record(
        self, forward: Callable[..., Any], inputs: dict[str, Any]
    ) -> Run | None:
        self._inputs = {name: t.clone() for name, t in _named_tensors(inputs)}
        static = _with_tensors(inputs, self._inputs)
        try:
            return self._record(
                lambda: forward(**static).logits, inputs["input_ids"].device
            )
        except RuntimeError as error:
            reason = " ".join(str(error).split())[:160].rstrip(". ")
            self._give_up(f"the forward pass cannot be captured ({reason})")
            return None

    def _give_up(self, reason: str) -> None:
        self._obstacle = reason
        _warn(reason)


def _tensors_of(past: StaticCache) -> list[Any]:
    """Return what a forward pass writes to, and a graph points to."""
    return [
        tensor
        for layer in past.layers
        for tensor in (layer.keys, layer.values, layer.cumulative_length)  # type: ignore[attr-defined]
    ]


def _named_tensors(inputs: dict[str, Any]) -> Iterator[tuple[str, Tensor]]:
    """Yield the tensors among arguments; some are in dictionaries, such as masks."""
    for name, value in inputs.items():
        if isinstance(value, Tensor):
            yield name, value
        elif isinstance(value, dict):
            for key, tensor in value.items():
                if tensor is not None:
                    yield f"{name}.{key}", tensor


def _with_tensors(inputs: dict[str, Any], tensors: dict[str, Tensor]) -> dict[str, Any]:
    """Return arguments with other tensors of the same names."""
    return {
        name: {key: tensors.get(f"{name}.{key}") for key in value}
        if isinstance(value, dict)
        else tensors.get(name, value)
        for name, value in inputs.items()
    }


def _signature(inputs: dict[str, Any]) -> tuple[Any, ...] | None:
    """Return what must be equal for two passes to be replayed by one graph.

    None if an argument may change the outputs that are returned beside the logits.
    """
    plain = {
        name: value
        for name, value in inputs.items()
        if name != "past_key_values" and not isinstance(value, Tensor | dict)
    }
    if plain.get("use_cache") is False or plain.get("return_dict") is False:
        return None
    if any(value for name, value in plain.items() if name not in _PLAIN):
        return None
    tensors = ((n, t.shape, t.dtype, t.device) for n, t in _named_tensors(inputs))
    return (*tensors, *((name, plain.get(name)) for name in _PLAIN))


@contextmanager
def _waits() -> Iterator[list[str]]:
    """Yield a list that, after the context, has an entry for each wait for the GPU.

    torch can report them as warnings. Those of Halve itself are passed on.
    """
    found: list[str] = []
    before = torch.cuda.get_sync_debug_mode()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        try:
            yield found
        finally:
            torch.cuda.set_sync_debug_mode(before)
    for warning in caught:
        if _WAITED in str(warning.message):
            found.append(str(warning.message))
        elif issubclass(warning.category, HalveWarning):
            warnings.warn_explicit(
                warning.message, warning.category, warning.filename, warning.lineno
            )


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
    if not _only_grows(past):
        _warn("some blocks keep a window of the cache only")
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
        if _only_grows(self.past):
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
