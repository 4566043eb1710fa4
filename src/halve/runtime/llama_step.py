"""The decode step of Llama, and of families that differ from it in weights only."""

from typing import Any

import torch
from torch import Tensor

from halve._compat.torch import has_hooks
from halve.runtime.cpu.kernels import Kernels
from halve.runtime.cpu.step import Step, UnsupportedLayerError
from halve.runtime.growing_cache import GrowingCache, GrowingLayer

# Classes whose code was compared with the step.
FAMILIES = (
    *("LlamaForCausalLM", "MistralForCausalLM"),
    *("Qwen2ForCausalLM", "Qwen3ForCausalLM"),
)
# Rotary embeddings of a position that do not depend on the length of the text.
_ROPES = ("default", "linear", "llama3", "yarn")


class LlamaStep:
    """Decodes one token of each sequence of a batch, without padding.

    It holds pointers to weights and to the cache: it is of no use once either has been
    replaced. `fits` notices that of the cache.

    Args:
        model: A model of `FAMILIES` on the CPU.
        cache: Its cache, filled with a prompt.
        kernel: The loaded kernels.

    Raises:
        UnsupportedLayerError: The step would not compute what the model does.
    """

    def __init__(self, model: Any, cache: GrowingCache, kernel: Kernels) -> None:  # noqa: ANN401
        check_supported(model, cache)
        self._layers: list[Any] = cache.layers
        for layer in self._layers:
            _reserve(layer, layer.get_seq_length() + 1)
        self._rooms = [_buffers(layer) for layer in self._layers]
        self._embed = model.get_input_embeddings()
        batch = self._rooms[0][0].shape[0]
        self._capacity = min(keys.shape[2] for keys, _ in self._rooms)
        self._step = Step(kernel, model.dtype)
        self._hidden = self._step.buffer("hidden", batch, model.config.hidden_size)
        self._table = _rotations(model, self._capacity)
        for block, rooms in zip(model.model.layers, self._rooms, strict=True):
            self._add_attention(block, rooms)
            self._add_mlp(block)
        normal = self._norm("normal", model.model.norm, self._hidden)
        self._logits = self._step.linear("logits", model.lm_head, normal)

    def fits(self, ids: Tensor) -> bool:
        """Whether the cache is still that of the step, and has room for a token."""
        return (
            ids.shape[0] == self._hidden.shape[0]
            and self._layers[0].get_seq_length() < self._capacity
            and all(
                layer.key_room.buffer is keys and layer.value_room.buffer is values
                for layer, (keys, values) in zip(self._layers, self._rooms, strict=True)
            )
        )

    def decode(self, ids: Tensor) -> Tensor:
        """Append tokens [batch, 1] to the cache; return logits, [batch, 1, words]."""
        self._hidden.copy_(self._embed(ids)[:, 0])
        self._step.run(self._layers[0].get_seq_length())
        for layer in self._layers:
            layer.key_room.length += 1
            layer.value_room.length += 1
        return self._logits[:, None].clone()

    def _add_attention(self, block: Any, rooms: tuple[Tensor, Tensor]) -> None:  # noqa: ANN401
        attention, step = block.self_attn, self._step
        normal = self._norm("normal", block.input_layernorm, self._hidden)
        width = rooms[0].shape[3]
        query = step.linear("query", attention.q_proj, normal).view(-1, width)
        key = step.linear("key", attention.k_proj, normal).view(-1, width)
        value = step.linear("value", attention.v_proj, normal).view(-1, width)
        if hasattr(attention, "q_norm"):
            query = self._norm("query norm", attention.q_norm, query)
            key = self._norm("key norm", attention.k_norm, key)
        step.rotate(query, self._table)
        step.rotate(key, self._table)
        step.store(key, rooms[0])
        step.store(value, rooms[1])
        heads = query.view(self._hidden.shape[0], -1, 1, width)
        out = step.attend("attended", heads, rooms, attention.scaling)
        step.add(self._hidden, step.linear("sum", attention.o_proj, out))

    def _add_mlp(self, block: Any) -> None:  # noqa: ANN401
        mlp, step = block.mlp, self._step
        normal = self._norm("normal", block.post_attention_layernorm, self._hidden)
        gate = step.linear("gate", mlp.gate_proj, normal)
        gated = step.gate(gate, step.linear("up", mlp.up_proj, normal))
        step.add(self._hidden, step.linear("sum", mlp.down_proj, gated))

    def _norm(self, name: str, norm: Any, x: Tensor) -> Tensor:  # noqa: ANN401
        return self._step.norm(name, norm.weight, norm.variance_epsilon, x)


def check_supported(model: Any, cache: GrowingCache) -> None:  # noqa: ANN401
    """Check that the step computes what a model does.

    Raises:
        UnsupportedLayerError: It does not.
    """
    kind = type(model)
    config = model.config
    obstacles = {
        f"{kind.__name__} has no decode step": kind.__name__ not in FAMILIES
        or not kind.__module__.startswith("transformers.models."),
        "the model is being trained": model.training,
        "it has hooks": any(has_hooks(module) for module in model.modules()),
        "some blocks keep a window of the cache": any(
            type(layer) is not GrowingLayer for layer in cache.layers
        ),
    }
    for reason, holds in obstacles.items():
        if holds:
            raise UnsupportedLayerError(reason)
    if config.hidden_act != "silu":
        raise UnsupportedLayerError(f"its activation is {config.hidden_act}")
    rope = (config.rope_parameters or {}).get("rope_type", "default")
    if rope not in _ROPES:
        raise UnsupportedLayerError(f"its rotary embedding is {rope}")


def _reserve(layer: GrowingLayer, length: int) -> None:
    layer.key_room.reserve(length)
    layer.value_room.reserve(length)


def _buffers(layer: GrowingLayer) -> tuple[Tensor, Tensor]:
    return layer.key_room.buffer, layer.value_room.buffer


def _rotations(model: Any, positions: int) -> Tensor:  # noqa: ANN401
    """Return cosines and sines of all positions, [positions, 2, width]."""
    like = torch.empty(0, dtype=model.dtype)
    cosines, sines = model.model.rotary_emb(like, torch.arange(positions)[None])
    return torch.stack((cosines[0], sines[0]), dim=1).contiguous()
