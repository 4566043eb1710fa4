"""Tables that tests are parametrized with: a new solver or family is one row here."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    PretrainedConfig,
)

from halve import sharding
from halve.grids import BITS, QuantScheme

BUNDLED = Path(__file__).parents[1] / "src/halve/data/pycode-opt"
VOCABULARY = 4096

SOLVERS = ("magnitude", "wanda", "sparsegpt", "admm")
PATTERNS = ("50%", "0.3", "0.9", "2:4", "4:8", "1:4")
# Group sizes that divide the tests' 160 columns, that do not, and that exceed them.
GRIDS = tuple(
    QuantScheme(bits, size, symmetric)
    for bits in BITS
    for size in (16, 48, 1000)
    for symmetric in (True, False)
) + tuple(
    QuantScheme(bits, size, midrise=True)
    for bits, size in ((2, 16), (3, 48), (4, 1000))
)

_TOKENS = {"vocab_size": VOCABULARY, "bos_token_id": 2, "eos_token_id": 2}
_LLAMA = {  # option names of Llama and the families that follow it
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
}
_GPT2 = {  # option names of GPT-2 and the families that follow it
    "n_embd": 64,
    "n_layer": 2,
    "n_head": 4,
    "n_positions": 128,
}

# Row -> (model type, options of its config).
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
    "opt-350m": (  # post-norm, embeddings narrower than the hidden states
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
    "gpt2": ("gpt2", _GPT2),
    "gptj": ("gptj", _GPT2 | {"rotary_dim": 8}),
    "gpt_neox": ("gpt_neox", _LLAMA),
    "gpt_bigcode": ("gpt_bigcode", _GPT2),
    "codegen": ("codegen", _GPT2 | {"rotary_dim": 8}),
    "llama": ("llama", _LLAMA),
    "mistral": ("mistral", _LLAMA | {"sliding_window": 16}),
    "qwen2": ("qwen2", _LLAMA),
    "qwen3": ("qwen3", _LLAMA | {"head_dim": 16}),
    "gemma": ("gemma", _LLAMA | {"head_dim": 16}),
    "gemma2": ("gemma2", _LLAMA | {"head_dim": 16, "sliding_window": 16}),
    "gemma3": ("gemma3_text", _LLAMA | {"head_dim": 16, "sliding_window": 16}),
    "phi": ("phi", _LLAMA),
    "phi3": ("phi3", _LLAMA | {"pad_token_id": 0}),
    "falcon": (
        "falcon",
        {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4},
    ),
    "falcon-40b": (  # two norms, grouped-query attention
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
    "stablelm": ("stablelm", _LLAMA),
    "starcoder2": ("starcoder2", _LLAMA),
    "olmo2": ("olmo2", _LLAMA),
}
# Small experts: matrices of 32 columns, so that every family costs a second.
_MOE = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "moe_intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "pad_token_id": 0,
    "num_experts_per_tok": 2,
}
_LATENT = _MOE | {  # DeepSeek's attention; the first block is dense
    "q_lora_rank": 16,
    "kv_lora_rank": 16,
    "qk_nope_head_dim": 8,
    "qk_rope_head_dim": 8,
    "v_head_dim": 8,
    "num_key_value_heads": 4,
    "first_k_dense_replace": 1,
    "n_routed_experts": 4,
    "n_group": 2,
    "topk_group": 1,
}
_MAMBA = {"mamba_d_state": 8, "mamba_d_conv": 4, "mamba_expand": 2}
# Mixtures of experts, each in the way in which its checkpoints hold it.
MIXTURES: dict[str, tuple[str, dict]] = {
    "mixtral": ("mixtral", _MOE | {"num_local_experts": 4}),
    "qwen2_moe": (
        "qwen2_moe",
        _MOE | {"num_experts": 4, "shared_expert_intermediate_size": 4},
    ),
    "qwen3_moe": (  # a dense block, and one of experts
        "qwen3_moe",
        _MOE | {"num_experts": 4, "head_dim": 8, "mlp_only_layers": [0]},
    ),
    "qwen3_next": (  # linear attention in the first block
        "qwen3_next",
        _MOE
        | {
            "num_experts": 4,
            "head_dim": 8,
            "shared_expert_intermediate_size": 32,
            "layer_types": ["linear_attention", "full_attention"],
            "linear_num_key_heads": 2,
            "linear_num_value_heads": 2,
            "linear_key_head_dim": 8,
            "linear_value_head_dim": 8,
        },
    ),
    "olmoe": ("olmoe", _MOE | {"num_experts": 4}),
    "deepseek_v3": ("deepseek_v3", _LATENT),
    "glm4_moe": (
        "glm4_moe",
        _MOE
        | {
            "head_dim": 8,
            "n_routed_experts": 4,
            "n_group": 1,
            "topk_group": 1,
            "first_k_dense_replace": 1,
        },
    ),
    "phimoe": ("phimoe", _MOE | {"num_local_experts": 4}),
    "ernie4_5_moe": (
        "ernie4_5_moe",
        _MOE
        | {
            "moe_num_experts": 4,
            "moe_k": 2,
            "moe_num_shared_experts": 1,
            "moe_layer_start_index": 1,
        },
    ),
    "nemotron_h": (  # Mamba, attention, experts without a gate
        "nemotron_h",
        _MOE
        | {
            "head_dim": 8,
            "layers_block_type": ["mamba", "attention", "moe"],
            "num_hidden_layers": 3,
            "n_routed_experts": 4,
            "n_group": 1,
            "topk_group": 1,
            "moe_shared_expert_intermediate_size": 32,
            "mamba_num_heads": 4,
            "mamba_head_dim": 8,
            "ssm_state_size": 8,
            "n_groups": 2,
        },
    ),
    "granitemoe": ("granitemoe", _MOE | {"num_local_experts": 4}),
    "gpt_oss": (
        "gpt_oss",
        _MOE | {"num_local_experts": 4, "head_dim": 8, "sliding_window": 16},
    ),
    "gemma4": (
        "gemma4_text",
        _MOE
        | {
            "num_experts": 4,
            "top_k_experts": 2,
            "head_dim": 8,
            "global_head_dim": 8,
            "num_global_key_value_heads": 2,
            "enable_moe_block": True,
            "sliding_window": 16,
            "hidden_size_per_layer_input": 0,
            "num_kv_shared_layers": 0,
        },
    ),
    "hunyuan_v1_moe": (
        "hunyuan_v1_moe",
        _MOE | {"num_experts": 4, "moe_topk": 2, "head_dim": 8},
    ),
    "jamba": (  # blocks of two classes
        "jamba",
        _MOE
        | _MAMBA
        | {
            "num_experts": 4,
            "attn_layer_period": 2,
            "attn_layer_offset": 1,
            "expert_layer_period": 2,
            "expert_layer_offset": 1,
            "mamba_dt_rank": 4,
            "use_mamba_kernels": False,
        },
    ),
    "lfm2_moe": (
        "lfm2_moe",
        _MOE
        | {
            "num_experts": 4,
            "num_dense_layers": 1,
            "layer_types": ["conv", "full_attention"],
        },
    ),
}
# Mixtures whose first block looks a token's experts up in a table, which holds zeros in
# a new model. Names of norms collide with that of the last one.
HASHED: dict[str, tuple[str, dict]] = {
    "deepseek_v4": (
        "deepseek_v4",
        _MOE
        | {
            "num_key_value_heads": 1,
            "head_dim": 16,
            "q_lora_rank": 16,
            "qk_rope_head_dim": 8,
            "partial_rotary_factor": 0.5,
            "o_groups": 2,
            "o_lora_rank": 16,
            "index_n_heads": 2,
            "index_head_dim": 8,
            "index_topk": 8,
            "hc_mult": 2,
            "sliding_window": 16,
            "n_routed_experts": 4,
            "layer_types": [
                "heavily_compressed_attention",
                "compressed_sparse_attention",
            ],
            "mlp_layer_types": ["hash_moe", "moe"],
            "compress_rates": {
                "compressed_sparse_attention": 4,
                "heavily_compressed_attention": 8,
            },
        },
    ),
}


def family_config(row: str, **changes: object) -> PretrainedConfig:
    """Return the two-layer config of a row, with some options changed."""
    kind, options = (FAMILIES | MIXTURES | HASHED)[row]
    return AutoConfig.for_model(kind, **(_TOKENS | options | changes))


def save_pico(
    folder: Path,
    row: str,
    *,
    dtype: torch.dtype = torch.float32,
    shard_size: str = "50GB",
    **changes: object,
) -> Path:
    """Save a random model of a family, with the bundled tokenizer."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(family_config(row, **changes)).to(dtype)
    model.save_pretrained(folder, max_shard_size=shard_size)
    AutoTokenizer.from_pretrained(BUNDLED).save_pretrained(folder)
    return folder


@contextmanager
def files_of_at_most(size: int) -> Iterator[None]:
    """Let outputs have files of at most so many bytes.

    With 0 each block has a file of its own, as in models with large blocks.
    """
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sharding, "_FILE_BYTES", size)
        yield
