"""A whole model in memory, to generate text, as for `self` calibration."""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, GenerationConfig

from halve.checkpoint import resolve_model
from halve.errors import CheckpointError, HalveError, UnsupportedModelError
from halve.models import cache_width, longest_sequence
from halve.runtime.blockwise_model import BlockwiseModel
from halve.runtime.cpu.quantized_linear import set_activations
from halve.runtime.cpu.quantized_operators import activation_mode
from halve.untrusted import truncated

_TOKENS = ("bos_token_id", "eos_token_id", "pad_token_id")
_MAX_TOKEN_ID = 2**31
# Windows that are sampled together: as many as this, if their keys and values take no
# more bytes than that. Neither depends on the machine, so that windows do not.
_SAMPLED_TOGETHER, _CACHE_NBYTES = 32, 2**31


def load(
    model: str | Path,
    device: str = "auto",
    trust_remote_code: bool = False,
    activations: str = "int16",
) -> Any:  # noqa: ANN401  (one of transformers' model classes)
    """Return a transformers model in evaluation mode; a packed one stays packed.

    Args:
        model: A folder, dense or packed, or a name on the Hub.
        device: `cpu`, `cuda` or `auto`.
        trust_remote_code: Whether Python code that comes with the model may run.
        activations: How inputs are multiplied with packed codes: as integers of 16
            bits, which lose less than bfloat16 inputs do, or of 8, which are faster
            and change results by about 0.6 %. `int16` or `int8`.

    Raises:
        SourceError: The model does not exist, or the Hub cannot be reached.
        UnsupportedModelError: It is not a causal language model.
        CheckpointError: Its files are damaged or contradict its config.
        HalveError: `activations` is neither, or int8 for a model without packed codes.
    """
    activation_mode(activations)  # an invalid name is reported first
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
    except Exception as error:  # of files that only transformers reads, such as
        # generation_config.json; it may be of any class
        raise CheckpointError(
            f"transformers cannot load the model in {folder} "
            f"({type(error).__name__}: {truncated(' '.join(str(error).split()))}).",
            "Check its generation_config.json, or download the model again.",
        ) from error
    set_activations(loaded, activations)
    return loaded.eval()


def check_whole(folder: Path, device: str, trust_remote_code: bool) -> BlockwiseModel:
    """Reject a model that transformers would fill with random numbers or crash on.

    Raises:
        UnsupportedModelError: It is not a causal language model, or it is quantized,
            but not packed by Halve.
        CheckpointError: Its files are damaged or contradict its config, or they are
            packed and the config does not say so.
    """
    opened = BlockwiseModel.open(folder, device, trust_remote_code)
    _refuse_quantized(opened)
    declared = getattr(opened.meta_model.config, "quantization_config", None)
    if opened.checkpoint.is_packed and declared is None:
        raise CheckpointError(
            f"The files in {folder} are packed, but its config.json has no "
            "quantization_config that says so.",
            "Use the config.json that was written with them, or pack the model again.",
        )
    return opened


def _refuse_quantized(opened: BlockwiseModel) -> None:
    """Refuse weights that only their own runtime, or a dense copy, can multiply with.

    transformers would unpack some and fail on others; what is measured or generated
    would depend on packages that Halve does not know.
    """
    infos = opened.checkpoint.tensors.values()
    foreign = next((i for i in infos if i.found is not None and not i.is_packed), None)
    if foreign is not None:
        raise UnsupportedModelError(
            f"The model in {opened.checkpoint.folder} is quantized ({foreign.label}); "
            "Halve runs models that are dense or in its own format.",
            "Make it dense with `halve unpack`, or prune it with `halve prune --pack`.",
        )


def with_plain_decoding(model: Any) -> Any:  # noqa: ANN401
    """Return a model whose generation_config.json is ignored except for its tokens.

    The rest would change which tokens are chosen, and is untrusted: it may ask for a
    million beams.
    """
    original = model.generation_config
    tokens = {name: getattr(original, name, None) for name in _TOKENS}
    model.generation_config = GenerationConfig(
        **{name: value for name, value in tokens.items() if _are_token_ids(value)}
    )
    return model


def _are_token_ids(value: object) -> bool:
    values = value if isinstance(value, list) else [value]
    return all(isinstance(v, int) and 0 <= v < _MAX_TOKEN_ID for v in values)


def check_context(model: Any, prompt: int, generated: int) -> None:  # noqa: ANN401
    """Raise HalveError if prompt and new tokens do not fit into a model's context."""
    if prompt == 0:
        raise HalveError("The prompt is empty.", "Pass at least one word.")
    longest = longest_sequence(model.config)
    if longest is not None and prompt + generated > longest:
        raise HalveError(
            f"A prompt of {prompt} tokens and {generated} new ones are more than the "
            f"{longest} that the model takes.",
            "Shorten the prompt, or pass fewer --max-new-tokens.",
        )


def windows_at_once(window_nbytes: int) -> int:
    """Return how many windows are sampled together, given a window's keys and values.

    32, or as many as take two gigabytes; one if a single window takes more.
    """
    return max(min(_SAMPLED_TOGETHER, _CACHE_NBYTES // max(window_nbytes, 1)), 1)


@torch.no_grad()
def sample_windows(
    folder: Path,
    samples: int,
    length: int,
    seed: int,
    trust_remote_code: bool = False,
    *,
    bos: int | None = None,
) -> Tensor:
    """Sample calibration windows from the model itself.

    Each begins with a random token, after BOS if there is one, and the rest is sampled
    from the model's full distribution at temperature 1.

    The text is sampled on the CPU, whatever device prunes: a GPU has another generator
    and rounds otherwise, and would sample another text from the same seed. No other
    generator of the process is seeded or advanced.

    Cost:
        Memory for the whole model, and for keys and values (`windows_at_once`).

    Returns:
        [samples, length], int64; the same seed gives the same windows.
    """
    model = with_plain_decoding(load(folder, "cpu", trust_remote_code))
    generator = torch.Generator().manual_seed(seed)
    vocabulary = model.config.get_text_config().vocab_size
    first = torch.randint(vocabulary, (samples, 1), generator=generator)
    if bos is not None:
        first = torch.cat((torch.full_like(first, bos), first), dim=1)[:, :length]
    parts = []
    with torch.random.fork_rng(devices=[]):
        # Unlike `torch.manual_seed`, which seeds the generators of all GPUs as well.
        torch.default_generator.manual_seed(seed)
        window = length * cache_width(model.config) * model.dtype.itemsize
        for batch in first.split(windows_at_once(window)):
            parts.append(_sample(model, batch, length))
    return torch.cat(parts)


def _sample(model: Any, first: Tensor, length: int) -> Tensor:  # noqa: ANN401
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
