"""A whole model in memory, to write text: `halve generate`, `self` calibration."""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, GenerationConfig

from halve.calibration import load_tokenizer
from halve.checkpoint import resolve_model
from halve.errors import CheckpointError, HalveError
from halve.models import longest_sequence
from halve.runtime.blockwise_model import BlockwiseModel
from halve.untrusted import truncated

_TOKENS = ("bos_token_id", "eos_token_id", "pad_token_id")
_MAX_TOKENS = 2**31


def load(
    model: str | Path, device: str = "auto", trust_remote_code: bool = False
) -> Any:  # noqa: ANN401  (one of transformers' model classes)
    """Return a model of transformers, whole, in evaluation mode; packed, it runs so.

    Args:
        model: A folder, dense or packed, or a name on the hub.
        device: `cpu`, `cuda` or `auto`.
        trust_remote_code: Whether Python code that comes with the model may run.

    Raises:
        SourceError: No such model, or no way to the hub.
        UnsupportedModelError: Not a causal language model.
        CheckpointError: Damaged files, or tensors that contradict the config.
    """
    opened = check_whole(resolve_model(model), device, trust_remote_code)
    folder = opened.checkpoint.folder
    try:
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            folder,
            dtype="auto",
            device_map={"": opened.device},
            trust_remote_code=trust_remote_code,
        )
    except HalveError:
        raise
    except Exception as error:  # of the side files that only transformers reads
        raise CheckpointError(
            f"transformers cannot load the model in {folder} "
            f"({type(error).__name__}: {truncated(' '.join(str(error).split()))}).",
            "Check its generation_config.json, or download the model again.",
        ) from error
    return loaded.eval()


def check_whole(folder: Path, device: str, trust_remote_code: bool) -> BlockwiseModel:
    """Refuse with a sentence what transformers would fill at random or trip over.

    Raises:
        UnsupportedModelError: Not a causal language model.
        CheckpointError: Damaged files, tensors that contradict the config, or packed
            ones of which the config says nothing.
    """
    opened = BlockwiseModel.open(folder, device, trust_remote_code)
    packed = any(info.parts for info in opened.checkpoint.tensors.values())
    if (
        packed
        and getattr(opened.meta_model.config, "quantization_config", None) is None
    ):
        raise CheckpointError(
            f"The files in {folder} are packed, but its config.json has no "
            "quantization_config that says so.",
            "Take the config.json that was written with them, or pack the model again.",
        )
    return opened


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
    loaded = _plain(load(model, device, trust_remote_code))
    tokenizer = load_tokenizer(resolve_model(model), trust_remote_code)
    inputs = tokenizer(prompt, return_tensors="pt", verbose=False).to(loaded.device)
    _check_room(loaded, inputs["input_ids"].shape[1], max_new_tokens)
    ids = loaded.generate(
        inputs["input_ids"],
        attention_mask=inputs["attention_mask"],
        max_new_tokens=max_new_tokens,
        do_sample=False,
    )
    return tokenizer.decode(ids[0], skip_special_tokens=True)


def _plain(loaded: Any) -> Any:  # noqa: ANN401
    """Let nothing of generation_config.json count but the tokens that end a text.

    The rest would choose other tokens than the likeliest, and take memory for that: a
    million beams, say.
    """
    said = loaded.generation_config
    tokens = {name: getattr(said, name, None) for name in _TOKENS}
    loaded.generation_config = GenerationConfig(
        **{name: value for name, value in tokens.items() if _are_tokens(value)}
    )
    return loaded


def _are_tokens(value: object) -> bool:
    values = value if isinstance(value, list) else [value]
    return all(isinstance(v, int) and 0 <= v < _MAX_TOKENS for v in values)


def _check_room(model: Any, prompt: int, more: int) -> None:  # noqa: ANN401
    if prompt == 0:
        raise HalveError(
            "The prompt is empty.", "Give at least one word to go on from."
        )
    longest = longest_sequence(model.config)
    if longest is not None and prompt + more > longest:
        raise HalveError(
            f"A prompt of {prompt} tokens and {more} new ones are more than the "
            f"{longest} that the model takes.",
            "Shorten the prompt, or pass fewer --max-new-tokens.",
        )


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
    model = _plain(load(folder, "cpu", trust_remote_code))
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
