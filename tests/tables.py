"""The tables that tests run over: a new solver, pattern or family is one row here."""

from pathlib import Path

import torch
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    PretrainedConfig,
)

from halve.grids import BITS, QuantScheme

BUNDLED = Path(__file__).parents[1] / "src/halve/data/pycode-opt"
VOCABULARY = 4096

SOLVERS = ("magnitude", "wanda", "sparsegpt", "admm")
PATTERNS = ("50%", "0.3", "0.9", "2:4", "4:8", "1:4")
# Group sizes that divide 160 columns, that do not, and that no row fills.
GRIDS = tuple(
    QuantScheme(bits, size, symmetric)
    for bits in BITS
    for size in (16, 48, 1000)
    for symmetric in (True, False)
)

_TOKENS = {"vocab_size": VOCABULARY, "bos_token_id": 2, "eos_token_id": 2}
_NEW = {  # the names of Llama and its heirs
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
}
_OLD = {"n_embd": 64, "n_layer": 2, "n_head": 4, "n_positions": 128}

# Row -> (model type, what its config is told).
FAMILIES: dict[str, tuple[str, dict]] = {
    "opt": (
        "opt",
        {
            "hidden_size": 64,
            "ffn_dim": 128,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "max_position_embeddings": 128,
            "word_embed_proj_dim": 64,
        },
    ),
    "opt-350m": (  # norms after the layers, embeddings of another width
        "opt",
        {
            "hidden_size": 64,
            "ffn_dim": 128,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "max_position_embeddings": 128,
            "word_embed_proj_dim": 32,
            "do_layer_norm_before": False,
        },
    ),
    "bloom": ("bloom", {"hidden_size": 64, "n_layer": 2, "n_head": 4}),
    "gpt2": ("gpt2", _OLD),
    "gptj": ("gptj", _OLD | {"rotary_dim": 8}),
    "gpt_neox": ("gpt_neox", _NEW),
    "gpt_bigcode": ("gpt_bigcode", _OLD),
    "codegen": ("codegen", _OLD | {"rotary_dim": 8}),
    "llama": ("llama", _NEW),
    "mistral": ("mistral", _NEW | {"sliding_window": 16}),
    "qwen2": ("qwen2", _NEW),
    "qwen3": ("qwen3", _NEW | {"head_dim": 16}),
    "gemma": ("gemma", _NEW | {"head_dim": 16}),
    "gemma2": ("gemma2", _NEW | {"head_dim": 16, "sliding_window": 16}),
    "gemma3": ("gemma3_text", _NEW | {"head_dim": 16, "sliding_window": 16}),
    "phi": ("phi", _NEW),
    "phi3": ("phi3", _NEW | {"pad_token_id": 0}),
    "falcon": (
        "falcon",
        {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4},
    ),
    "falcon-40b": (  # two norms, grouped keys
        "falcon",
        {
            "hidden_size": 64,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "num_kv_heads": 2,
            "new_decoder_architecture": True,
        },
    ),
    "mpt": ("mpt", {"d_model": 64, "n_heads": 4, "n_layers": 2, "max_seq_len": 128}),
    "stablelm": ("stablelm", _NEW),
    "starcoder2": ("starcoder2", _NEW),
    "olmo2": ("olmo2", _NEW),
}
MIXTURES: dict[str, tuple[str, dict]] = {
    "mixtral": ("mixtral", _NEW | {"num_local_experts": 4}),
    "qwen3_moe": ("qwen3_moe", _NEW | {"num_experts": 4, "moe_intermediate_size": 32}),
}


def family_config(row: str, **changes: object) -> PretrainedConfig:
    """Return the config of a row of two layers, with changes."""
    kind, options = (FAMILIES | MIXTURES)[row]
    return AutoConfig.for_model(kind, **(_TOKENS | options | changes))


def save_pico(
    folder: Path,
    row: str,
    *,
    dtype: torch.dtype = torch.float32,
    shard_size: str = "50GB",
    **changes: object,
) -> Path:
    """Write a random model of a family to disk, with the bundled tokenizer."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(family_config(row, **changes)).to(dtype)
    model.save_pretrained(folder, max_shard_size=shard_size)
    AutoTokenizer.from_pretrained(BUNDLED).save_pretrained(folder)
    return folder
