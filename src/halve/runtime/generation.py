"""A whole model in memory, to write text: `halve generate`, `self` calibration."""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

from halve.checkpoint import Checkpoint, locate
from halve.models import build_skeleton
from halve.runtime.streamed import choose_device


def load(
    model: str | Path, device: str = "auto", trust_remote_code: bool = False
) -> Any:  # noqa: ANN401  (one of transformers' model classes)
    """Return a model of transformers, whole, in evaluation mode.

    Args:
        model: A folder, dense or pruned, or a name on the hub.
        device: `cpu`, `cuda` or `auto`.
        trust_remote_code: Whether Python code that comes with the model may run.

    Raises:
        SourceError: No such model, or no way to the hub.
        UnsupportedModelError: Not a causal language model.
        CheckpointError: Damaged files.
    """
    folder = locate(model)
    build_skeleton(folder, trust_remote_code)  # refuses with a sentence what cannot be
    Checkpoint.open(folder)
    loaded: Any = AutoModelForCausalLM.from_pretrained(
        folder, dtype="auto", trust_remote_code=trust_remote_code
    )
    return loaded.eval().to(choose_device(device))


@torch.no_grad()
def generate(
    model: str | Path,
    prompt: str,
    *,
    max_new_tokens: int = 64,
    device: str = "auto",
    trust_remote_code: bool = False,
) -> str:
    """Return a prompt and what the model adds to it, choosing the likeliest token.

    Args:
        model: A folder or a name on the hub.
        prompt: Text to go on from.
        max_new_tokens: Stops after so many.
        device: `cpu`, `cuda` or `auto`.
        trust_remote_code: Whether Python code that comes with the model may run.
    """
    loaded = load(model, device, trust_remote_code)
    tokenizer = AutoTokenizer.from_pretrained(
        locate(model), trust_remote_code=trust_remote_code
    )
    inputs = tokenizer(prompt, return_tensors="pt").to(loaded.device)
    ids = loaded.generate(
        inputs["input_ids"],
        attention_mask=inputs["attention_mask"],
        max_new_tokens=max_new_tokens,
        do_sample=False,
    )
    return tokenizer.decode(ids[0], skip_special_tokens=True)


@torch.no_grad()
def sample_windows(
    folder: Path, samples: int, length: int, seed: int, trust_remote_code: bool = False
) -> Tensor:
    """Let a model write its own calibration text, for when there is none.

    Each window begins with a random token and goes on by sampling from the model's
    whole distribution. The model is held in memory whole.

    Returns:
        [samples, length], int64; the same seed gives the same windows.
    """
    model = load(folder, "cpu", trust_remote_code)
    generator = torch.Generator().manual_seed(seed)
    vocabulary = model.config.get_text_config().vocab_size
    first = torch.randint(vocabulary, (samples, 1), generator=generator)
    parts = []
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        for batch in first.split(32):
            parts.append(_continue(model, batch, length))
    return torch.cat(parts)


def _continue(model: Any, first: Tensor, length: int) -> Tensor:  # noqa: ANN401
    return model.generate(
        first,
        attention_mask=torch.ones_like(first),
        min_length=length,
        max_length=length,
        do_sample=True,
        top_k=0,
        top_p=1.0,
        temperature=1.0,
    )
