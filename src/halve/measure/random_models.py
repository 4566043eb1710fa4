"""Random models in the sizes of published ones, to measure speed without a download."""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM

from halve.errors import HalveError
from halve.models import build_meta_model, prunable_matrices
from halve.patterns import NM, Pattern

# Hidden size, intermediate size, blocks and heads of published models.
_SIZES = {
    "llama": {
        "110m": (768, 2048, 12, 12),
        "1.2b": (2048, 5632, 22, 32),
        "7b": (4096, 11008, 32, 32),
        "8b": (4096, 14336, 32, 32),
    },
    "opt": {
        "125m": (768, 3072, 12, 12),
        "1.3b": (2048, 8192, 24, 32),
        "6.7b": (4096, 16384, 32, 32),
    },
}
# What else differs from the defaults: Llama 3 shares keys and values among four heads,
# and has a larger vocabulary and a head of its own.
_OTHERS: dict[tuple[str, str], dict[str, Any]] = {
    ("llama", "8b"): {
        "num_key_value_heads": 8,
        "vocab_size": 128256,
        "tie_word_embeddings": False,
    },
}
_CONTEXT = 2048


@torch.no_grad()
def write_random_model(
    folder: Path,
    family: str,
    size: str,
    pattern: Pattern,
    seed: int = 0,
    device: str = "cpu",
) -> None:
    """Write a random bfloat16 checkpoint whose prunable matrices have random zeros.

    Args:
        folder: An empty folder.
        family: `llama` or `opt`.
        size: A size of the family, such as `1.2b`.
        pattern: Pattern of the zeros of each prunable matrix. An unstructured one is
            met on average only.
        seed: Seed of weights and zeros.
        device: Where random numbers are drawn: `cpu`, or `cuda`, which draws others,
            in a fraction of the time.

    Raises:
        HalveError: The family has no such size.

    Cost:
        Memory and disk for the dense model; for 1.2 billion weights half a minute.
    """
    torch.manual_seed(seed)
    config = _config(family, size)
    with torch.device(device):
        model: Any = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    config.save_pretrained(folder)
    meta_model = build_meta_model(folder)
    for index, block in enumerate(meta_model.blocks):
        for matrix in prunable_matrices(block, meta_model.path):
            path = f"{meta_model.path}.{index}.{matrix.path}"
            weight = model.get_submodule(path).weight
            weight.masked_fill_(_random_mask(weight, pattern), 0)
    model.save_pretrained(folder, max_shard_size="1GB")


def _random_mask(weight: Tensor, pattern: Pattern) -> Tensor:
    scores = torch.rand(weight.shape, device=weight.device)
    if isinstance(pattern, NM):
        return pattern.mask(scores)
    return scores < pattern.sparsity


def _config(family: str, size: str) -> Any:  # noqa: ANN401
    sizes = _SIZES[family]
    if size.lower() not in sizes:
        raise HalveError(
            f"There is no random {family} of size {size!r}.",
            f"Choose one of {', '.join(sizes)}.",
        )
    width, inner, blocks, heads = sizes[size.lower()]
    inner_sizes = {
        "llama": {"intermediate_size": inner},
        "opt": {"ffn_dim": inner, "word_embed_proj_dim": width},
    }
    options = {
        "hidden_size": width,
        "num_hidden_layers": blocks,
        "num_attention_heads": heads,
        "max_position_embeddings": _CONTEXT,
        "tie_word_embeddings": True,
    }
    others = _OTHERS.get((family, size.lower()), {})
    return AutoConfig.for_model(family, **(options | inner_sizes[family] | others))
