"""The forward pass of one token as a CUDA graph, and when that can be replayed."""

import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from transformers import StaticCache
from transformers.modeling_outputs import CausalLMOutputWithPast

from halve.errors import HalveWarning

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
        warn_of_slowness(reason)


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


def warn_of_slowness(reason: str) -> None:
    """Warn that, and why, tokens are decoded without graphs."""
    warnings.warn(
        f"Tokens are decoded without CUDA graphs, and slowly: {reason}.",
        HalveWarning,
        stacklevel=3,
    )
