"""Blocks of other shapes than those of Llama: hybrids, old conventions, 4-D states."""

from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

import halve
from halve.runtime.blockwise_model import BlockwiseModel
from halve.runtime.predictions import all_logits
from halve.runtime.stream import Stream
from tests.tables import BUNDLED, VOCABULARY

_TOKENS = {"vocab_size": VOCABULARY, "bos_token_id": 2, "eos_token_id": 2}
_USUAL = {
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
}
_STATES = {
    "mamba_d_state": 16,
    "mamba_d_head": 16,
    "mamba_n_heads": 8,
    "mamba_n_groups": 1,
    "mamba_chunk_size": 16,
}
_LINEAR_ATTENTION = {
    "head_dim": 16,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 16,
    "linear_value_head_dim": 16,
    "layer_types": ["linear_attention", "full_attention"],
}
# Type of a model -> options of its config.
TYPES: dict[str, dict[str, Any]] = {
    # Blocks return lists.
    "openai-gpt": {"n_embd": 64, "n_layer": 2, "n_head": 4, "n_positions": 128},
    # Blocks return three values.
    "rwkv": {
        "hidden_size": 64,
        "attention_hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 2,
        "context_length": 128,
    },
    # Hidden states are [4, batch, length, width].
    "gemma3n_text": _USUAL
    | {
        "head_dim": 16,
        "vocab_size_per_layer_input": VOCABULARY,
        "hidden_size_per_layer_input": 16,
        "num_kv_shared_layers": 0,
        "layer_types": ["full_attention"] * 2,
        "activation_sparsity_pattern": [0.0, 0.0],
    },
    # Recurrent blocks beside attention, and parameters of three dimensions.
    "bamba": _USUAL | _STATES | {"attn_layer_indices": [1]},
    "recurrent_gemma": _USUAL
    | {
        "lru_width": 64,
        "attention_window_size": 32,
        "block_types": ["recurrent", "attention"],
    },
    "lfm2": _USUAL | {"layer_types": ["conv", "full_attention"]},
    "qwen3_5_text": _USUAL | _LINEAR_ATTENTION,
    "xlstm": {
        "hidden_size": 64,
        "num_hidden_layers": 2,
        "num_blocks": 2,
        "num_heads": 4,
        "chunk_size": 16,
    },
    "falcon_mamba": {"hidden_size": 64, "num_hidden_layers": 2, "state_size": 8},
}


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """Return a function from a type to the folder of a random model."""
    folder = tmp_path_factory.mktemp("types")
    tokenizer = AutoTokenizer.from_pretrained(BUNDLED)

    def save(kind):
        if not (folder / kind).exists():
            torch.manual_seed(0)
            options = _TOKENS | TYPES[kind]
            config = AutoConfig.for_model(kind, **options)
            AutoModelForCausalLM.from_config(config).save_pretrained(folder / kind)
            tokenizer.save_pretrained(folder / kind)
        return folder / kind

    return save


@pytest.mark.parametrize("kind", TYPES)
def test_logits_block_by_block_are_those_of_transformers(kind, saved):
    folder = saved(kind)
    ids = torch.randint(3, 4000, (3, 24), generator=torch.Generator().manual_seed(0))
    model = BlockwiseModel.open(folder, "cpu")
    stream = Stream.start(model, ids, budget=2**30)
    for index in range(model.depth):
        with model.block(index) as block:
            stream.advance(block, index)
    assert len(stream.hidden) == len(ids)
    blockwise = torch.cat([logits for _, logits in all_logits(stream)])
    whole = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    with torch.no_grad():
        expected = whole(ids, use_cache=False).logits
    assert torch.allclose(blockwise, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind", TYPES)
def test_they_are_pruned_and_load(kind, saved, text, tmp_path):
    options = {"samples": 4, "seq_len": 32, "device": "cpu", "calibration": text}
    record = halve.prune(saved(kind), tmp_path / "out", solver="sparsegpt", **options)
    # Parameters that no layer multiplies by are reported.
    found = halve.inspect(tmp_path / "out")
    assert all(m.sparsity >= 0.5 for m in found.matrices)
    names = {m.tensor for m in found.matrices}
    assert names.isdisjoint(record.left_dense)
    info = AutoModelForCausalLM.from_pretrained(
        tmp_path / "out", output_loading_info=True
    )[1]  # pyright: ignore[reportIndexIssue]
    assert not any(info.values()), info


@pytest.mark.parametrize("kind", ["recurrent_gemma", "rwkv", "xlstm", "olmo_hybrid"])
def test_no_dense_model_is_called_a_mixture(kind, tmp_path):
    """Their default configs, which have no files of weights."""
    config = AutoConfig.for_model(kind)
    config.architectures = None
    config.save_pretrained(tmp_path)
    try:
        halve.plan(tmp_path, calibration="stdlib", seq_len=64)
    except halve.HalveError as error:
        assert "mixture" not in str(error)


def test_several_lists_of_blocks_are_refused(tmp_path):
    """BLT runs an encoder of bytes, a global model and a decoder."""
    AutoConfig.for_model("blt").save_pretrained(tmp_path)
    with pytest.raises(halve.HalveError, match=r"several lists|hidden_size"):
        halve.plan(tmp_path, calibration="stdlib", seq_len=64)
