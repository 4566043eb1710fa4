"""Random models of well-known sizes, to measure speed without a download."""

from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM

from halve.errors import HalveError
from halve.models import build_skeleton, prunable_matrices

# Widths, inner widths, blocks and heads of the published models of these sizes.
_SIZES = {
    "llama": {
        "110m": (768, 2048, 12, 12),
        "1.2b": (2048, 5632, 22, 32),
        "7b": (4096, 11008, 32, 32),
    },
    "opt": {
        "125m": (768, 3072, 12, 12),
        "1.3b": (2048, 8192, 24, 32),
        "6.7b": (4096, 16384, 32, 32),
    },
}
_CONTEXT = 2048


@torch.no_grad()
def write_random_model(
    folder: Path, family: str, size: str, sparsity: float, seed: int = 0
) -> None:
    """Write a random bfloat16 checkpoint whose prunable matrices have random zeros.

    Args:
        folder: An empty folder.
        family: `llama` or `opt`.
        size: Such as `1.2b`.
        sparsity: Share of the weights of each prunable matrix that are zero.
        seed: Of the weights.

    Raises:
        HalveError: A size that is not in the table.

    Cost:
        Memory and disk for the dense model; for 1.2 billion weights half a minute.
    """
    torch.manual_seed(seed)
    config = _config(family, size)
    model: Any = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    config.save_pretrained(folder)
    skeleton = build_skeleton(folder)
    for index, block in enumerate(skeleton.blocks):
        for matrix in prunable_matrices(block, skeleton.path):
            path = f"{skeleton.path}.{index}.{matrix.path}"
            weight = model.get_submodule(path).weight
            weight.masked_fill_(torch.rand(weight.shape) < sparsity, 0)
    model.save_pretrained(folder, max_shard_size="1GB")


def _config(family: str, size: str) -> Any:  # noqa: ANN401
    sizes = _SIZES[family]
    if size.lower() not in sizes:
        raise HalveError(
            f"There is no random {family} of size {size!r}.",
            f"Choose one of {', '.join(sizes)}.",
        )
    width, inner, blocks, heads = sizes[size.lower()]
    own = {
        "llama": {"intermediate_size": inner},
        "opt": {"ffn_dim": inner, "word_embed_proj_dim": width},
    }
    return AutoConfig.for_model(
        family,
        hidden_size=width,
        num_hidden_layers=blocks,
        num_attention_heads=heads,
        max_position_embeddings=_CONTEXT,
        tie_word_embeddings=True,
        **own[family],
    )
