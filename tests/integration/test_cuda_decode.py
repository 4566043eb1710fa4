"""Decoding by CUDA graphs generates what plain `generate` does.

Without a GPU the forward pass of a token is not captured but run again, on the tensors
that a graph would read. That nothing in it waits for a GPU shows on the meta device,
whose tensors have no values that the host could read.
"""

import gc
import warnings
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import AutoModelForCausalLM, DynamicCache, StaticCache

import halve
from halve.errors import HalveWarning
from halve.runtime import decode
from halve.runtime.cuda import decode as cuda_decode
from halve.runtime.cuda.greedy import (
    GreedyDecoder,
    continue_greedily,
    has_greedy_loop,
)
from tests.tables import FAMILIES, family_config

# Families whose model classes support no static cache, in some releases.
UNSUPPORTED = ("mpt", "gpt_bigcode")
# Families some of whose blocks keep a window of the cache; those of the table keep 16
# tokens.
WINDOWS = ("mistral", "gemma2", "gemma3")
# Families whose attention is not torch's.
OWN_ATTENTION = ("bloom", "gptj", "codegen", "gemma2")
GRAPHED = [row for row in FAMILIES if row not in (*UNSUPPORTED, *WINDOWS)]
LOOPED = [row for row in FAMILIES if row not in (*UNSUPPORTED, *OWN_ATTENTION)]
NEW = 40


def rerun(run, device):
    """What stands for a captured graph where there is no GPU."""
    return run


def load(folder) -> Any:
    return AutoModelForCausalLM.from_pretrained(folder).eval()


def prepared(folder, record=rerun) -> Any:
    model = load(folder)
    assert cuda_decode.prepare(model, record) is None
    return model


def some_ids(batch, length=20):
    generator = torch.Generator().manual_seed(0)
    return torch.randint(3, 4096, (batch, length), generator=generator)


def generate(model, ids, padding=0, **options):
    mask = torch.ones_like(ids)
    mask[0, :padding] = 0
    plain = {"max_new_tokens": NEW, "eos_token_id": None, "pad_token_id": 0}
    return model.generate(
        ids, attention_mask=mask, **(plain | {"do_sample": False} | options)
    )


def graphs(model):
    return list(type(model).halve_graphs.values())


def forget(model):
    type(model).halve_graphs.clear()


@pytest.mark.parametrize("row", GRAPHED)
@pytest.mark.parametrize(("batch", "padding"), [(1, 0), (2, 5)])
def test_generate_replays_and_returns_the_same_tokens(row, batch, padding, pico):
    ids = some_ids(batch)
    expected = generate(load(pico(row)), ids, padding)
    model = prepared(pico(row))
    assert torch.equal(generate(model, ids, padding), expected)
    assert [graph.is_recorded for graph in graphs(model)] == [True]
    forget(model)


@pytest.mark.parametrize("row", LOOPED)
@pytest.mark.parametrize("batch", [1, 2])
def test_the_greedy_loop_returns_the_tokens_of_generate(row, batch, pico):
    ids = some_ids(batch)
    expected = generate(load(pico(row)), ids)
    model = prepared(pico(row))
    assert has_greedy_loop(model)
    with torch.inference_mode(), warnings.catch_warnings():
        warnings.simplefilter("ignore", HalveWarning)
        decoder = GreedyDecoder(model, ids, ids.shape[1] + NEW)
        new = [decoder.step() for _ in range(NEW)]
    assert torch.equal(torch.cat([ids, *new], dim=1), expected)
    assert decoder.is_by_graph == (row in GRAPHED)
    forget(model)


@pytest.mark.parametrize("row", ["mistral", "gemma3"])
def test_a_window_that_covers_the_cache_is_none(row, pico):
    folder = pico(row, sliding_window=64)
    ids = some_ids(2)
    expected = generate(load(folder), ids)
    model = prepared(folder)
    with torch.inference_mode():
        decoder = GreedyDecoder(model, ids, ids.shape[1] + NEW)
        new = [decoder.step() for _ in range(NEW)]
    assert torch.equal(torch.cat([ids, *new], dim=1), expected)
    assert decoder.is_by_graph
    forget(model)


class _CrossDevice(TorchDispatchMode):
    """Notices operations that read or make tensors of the host."""

    def __init__(self):
        super().__init__()
        self.found: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        tensors = tree_leaves((args, kwargs, result))
        if any(isinstance(t, torch.Tensor) and t.device.type == "cpu" for t in tensors):
            self.found.append(str(func))
        return result


@pytest.mark.parametrize("row", [row for row in LOOPED if row in GRAPHED])
def test_a_token_is_decoded_without_the_host(row):
    found: list[str] = []

    def watch(run, device):
        assert device.type == "meta"
        with _CrossDevice() as mode:
            run()
        found.extend(mode.found)
        return run

    with torch.device("meta"):
        model: Any = AutoModelForCausalLM.from_config(family_config(row)).eval()
    assert cuda_decode.prepare(model, watch) is None
    ids = torch.zeros(2, 1, dtype=torch.int64, device="meta")
    with torch.inference_mode():
        decoder = GreedyDecoder(model, ids, 5)
        for _ in range(3):
            decoder.step()
    assert decoder.is_by_graph
    assert not found
    forget(model)


def test_a_text_ends_with_a_token_that_ends_texts(pico):
    model = prepared(pico("llama"))
    ids = some_ids(1)
    every = continue_greedily(model, ids, NEW, [])
    for count in (1, 16, 17, NEW):
        shorter = continue_greedily(model, ids, count, [])
        assert torch.equal(shorter, every[:, : 20 + count])
    new = every[0, 20:].tolist()
    for place in (0, 15, 16, 30):
        first = new.index(new[place])
        ended = continue_greedily(model, ids, NEW, [4095, new[place]])
        assert torch.equal(ended, every[:, : 20 + first + 1])
    forget(model)


def test_halve_generate_uses_the_loop_and_says_the_same(pico, monkeypatch):
    folder = pico("opt")
    plain = halve.generate(folder, "def main", max_new_tokens=20, device="cpu")
    monkeypatch.setattr(decode, "prepare", lambda m: cuda_decode.prepare(m, rerun))
    by_graph = halve.generate(folder, "def main", max_new_tokens=20, device="cpu")
    assert by_graph == plain


def test_sampling_draws_the_same(pico):
    drawn = []
    for model in (load(pico("llama")), prepared(pico("llama"))):
        torch.manual_seed(0)
        drawn.append(generate(model, some_ids(2), do_sample=True))
    assert torch.equal(*drawn)
    forget(model)


@pytest.mark.parametrize("options", [
    {"num_beams": 3},
    {"use_cache": False},
    {"prompt_lookup_num_tokens": 3},
    {"past_key_values": "dynamic"},
    {"return_dict_in_generate": True, "output_hidden_states": True},
], ids=str)  # fmt: skip
def test_whatever_else_is_asked_for_is_what_it_was(options, pico):
    ids = some_ids(1)
    found = []
    for model in (load(pico("llama")), prepared(pico("llama"))):
        asked = dict(options)
        if "past_key_values" in asked:
            asked["past_key_values"] = DynamicCache(config=model.config)
        result = generate(model, ids, **asked)
        found.append(getattr(result, "sequences", result))
    assert torch.equal(*found)
    assert not any(graph.is_recorded for graph in graphs(model))
    forget(model)


def test_a_cache_whose_buffers_were_replaced_is_not_replayed(pico):
    model, ids = prepared(pico("llama")), some_ids(2)
    expected = generate(load(pico("llama")), ids)
    with torch.inference_mode():
        decoder = GreedyDecoder(model, ids, 60)
        new = [decoder.step() for _ in range(5)]
        [graph] = graphs(model)
        assert graph._fits(decoder.past)
        reordered: Any = torch.tensor([0, 1])
        decoder.past.reorder_cache(reordered)
        assert not graph._fits(decoder.past)
        new += [decoder.step() for _ in range(5)]
    assert torch.equal(torch.cat([ids, *new], dim=1), expected[:, :30])
    forget(model)


def test_a_pass_that_cannot_be_captured_runs_as_before(pico):
    def refuse(run, device):
        raise RuntimeError("operation not permitted when stream is capturing")

    ids = some_ids(1)
    expected = generate(load(pico("llama")), ids)
    model = prepared(pico("llama"), refuse)
    with pytest.warns(HalveWarning, match="without CUDA graphs.*not permitted"):
        assert torch.equal(generate(model, ids), expected)


def test_a_model_without_a_static_cache_decodes_as_before(pico):
    ids = some_ids(1)
    expected = generate(load(pico("mpt")), ids)
    model = load(pico("mpt"))
    with pytest.warns(HalveWarning, match="without CUDA graphs"):
        assert cuda_decode.prepare(model, rerun) is not None
    assert torch.equal(generate(model, ids), expected)


def test_a_graph_lives_as_long_as_its_cache(pico):
    # A real graph keeps no reference to the cache either; `rerun` does.
    model = prepared(pico("llama"), lambda run, device: lambda: torch.zeros(1, 1, 9))
    with torch.inference_mode():
        decoder = GreedyDecoder(model, some_ids(1), 30)
        for _ in range(3):
            decoder.step()
        assert decoder.is_by_graph
    del decoder
    gc.collect()
    assert not graphs(model)


def test_gradients_are_not_lost(pico):
    model = prepared(pico("llama"))
    past = StaticCache(config=model.config, max_cache_len=30)
    model(some_ids(1), past_key_values=past, use_cache=True)
    logits = model(some_ids(1, 1), past_key_values=past, use_cache=True).logits
    assert logits.requires_grad
    assert not graphs(model)
