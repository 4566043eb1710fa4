"""A causal language model of transformers without its weights.

The model is built by transformers' own classes with every parameter on the meta
device. Its decoder blocks are found by their shape, not by their name.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate import init_empty_weights
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    MODEL_FOR_MASKED_LM_MAPPING_NAMES,
    MODEL_MAPPING_NAMES,
)

from halve.errors import (
    CalibrationError,
    CheckpointError,
    HalveError,
    UnsupportedModelError,
)
from halve.formats import METHOD, check_version
from halve.models.config_limits import check_config_limits, check_size
from halve.untrusted import read_json, truncated

# Where a config says nothing of its longest sequence (BLOOM), the paper's length.
_PAPER_LENGTH = 2048
_WHAT_TO_NAME = "Name a GPT-family model: OPT, BLOOM, GPT-2, Llama, Mistral, Qwen ..."
# Entries of config.json by which quantised weights are known.
_QUANTISED = ("quantization_config", "compression_config")


@dataclass(frozen=True)
class MetaModel:
    """A model whose parameters have shapes and no values.

    Attributes:
        config: transformers' configuration.
        model: The model, in evaluation mode, parameters on the meta device.
        blocks: Its decoder blocks.
        path: The name of `blocks` within the model, such as `model.layers`.
        dtype: Of stored weights, as the config has it; float32 where it says nothing.
    """

    config: Any
    model: Any
    blocks: nn.ModuleList
    path: str
    dtype: torch.dtype

    @property
    def longest_sequence(self) -> int | None:
        """Tokens that the model can take; None where its config does not say."""
        return longest_sequence(self.config)

    @property
    def vocabulary(self) -> int:
        """Tokens that the model knows."""
        return self.config.get_text_config().vocab_size

    @property
    def scored_heads(self) -> int:
        """Attention heads whose scores, [length, length], are in memory all at once.

        0 where attention is fused and goes through them piece by piece.
        """
        fused = getattr(self.config, "_attn_implementation", "eager") != "eager"
        heads = getattr(self.config.get_text_config(), "num_attention_heads", 0)
        return 0 if fused or not isinstance(heads, int) else heads

    @property
    def table(self) -> nn.Embedding | None:
        """The input embedding, where rows are looked up in it and no more is done.

        None where it is of a class of its own, which may scale what it finds.
        """
        found = self.model.get_input_embeddings()
        return found if type(found) is nn.Embedding else None

    def names_of(self, module: nn.Module | None) -> set[str]:
        """Return the names of a module's parameters, wherever it is in the model."""
        named = self.model.named_modules(remove_duplicate=False)
        paths = [path for path, found in named if found is module]
        own = [name for name, _ in module.named_parameters()] if module else []
        return {f"{path}.{name}" for path in paths for name in own}

    @property
    def default_length(self) -> int:
        """The paper's sequence length, or the model's own if that is shorter."""
        return min(_PAPER_LENGTH, self.longest_sequence or _PAPER_LENGTH)

    def check_length(self, length: int) -> None:
        """Raise CalibrationError where a sequence is longer than the model can take."""
        longest = self.longest_sequence
        if longest is not None and length > longest:
            raise CalibrationError(
                f"Sequences of {length} tokens were asked for, but the model takes "
                f"{longest} at most.",
                f"Pass --seq-len {longest} or less.",
            )


def longest_sequence(config: Any) -> int | None:  # noqa: ANN401
    """Return the tokens that a model can take; None where its config does not say."""
    text = config.get_text_config()
    for name in ("max_position_embeddings", "max_seq_len", "n_positions"):
        if isinstance(length := getattr(text, name, None), int) and length > 0:
            return length
    return None


def build_meta_model(folder: Path, trust_remote_code: bool = False) -> MetaModel:
    """Build the model of a folder from its config alone.

    Raises:
        CheckpointError: The config is damaged.
        UnsupportedModelError: Not a causal language model of transformers; it needs
            code of its own and that was not allowed; it is quantised; or it has no
            blocks.
    """
    config = load_config(folder, trust_remote_code)
    try:
        return _built(folder, config, trust_remote_code)
    except HalveError:
        raise
    except Exception as error:  # what a wrong value breaks is up to the model's code
        raise _unsupported(folder, error) from error


def _built(folder: Path, config: Any, trust_remote_code: bool) -> MetaModel:  # noqa: ANN401
    _check_causal(folder, config)
    said = config.dtype  # which building overwrites
    dtype = said if isinstance(said, torch.dtype) else torch.float32

    def build() -> Any:  # noqa: ANN401
        return AutoModelForCausalLM.from_config(
            config, trust_remote_code=trust_remote_code, dtype=torch.float32
        )

    if not trust_remote_code:  # such code may not bear to be built without numbers
        check_size(folder, build)
    with init_empty_weights(include_buffers=False):
        model = build()
    model.tie_weights()
    model.eval().requires_grad_(False)
    path, blocks = _find_blocks(folder, model)
    _share_equal_buffers(blocks)
    meta_model = MetaModel(config, model, blocks, path, dtype)
    if not isinstance(meta_model.vocabulary, int):
        raise TypeError(f"its vocab_size is {meta_model.vocabulary}")
    return meta_model


def load_config(folder: Path, trust_remote_code: bool = False) -> Any:  # noqa: ANN401
    """Return transformers' configuration of a folder.

    Raises:
        CheckpointError: It is damaged.
        UnsupportedModelError: There is none, none that transformers knows, or that of
            a quantised model.
    """
    if not (folder / "config.json").is_file():
        raise UnsupportedModelError(
            f"There is no config.json in {folder}, so it holds no model of "
            "transformers.",
            "Name the folder of a complete checkpoint.",
        )
    entries = _entries(folder)
    _refuse_quantised(folder, entries)
    check_config_limits(folder, entries)
    _refuse_adapter(folder)
    try:
        return AutoConfig.from_pretrained(folder, trust_remote_code=trust_remote_code)
    except Exception as error:  # validators and remote code raise what they like
        raise _unsupported(folder, error) from error


def _entries(folder: Path) -> dict[str, Any]:
    """Return what is in config.json, which transformers takes for an object unseen."""
    path = folder / "config.json"
    try:
        entries = read_json(path, folder)
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(
            f"{path} cannot be read as JSON ({truncated(error)}).",
            "Download the file again.",
        ) from error
    if not isinstance(entries, dict):
        raise CheckpointError(
            f"{path} holds a {type(entries).__name__} where an object was expected.",
            "Download the file again.",
        )
    return entries


def _refuse_adapter(folder: Path) -> None:
    """Refuse what makes transformers load another model, named in that file."""
    if (folder / "adapter_config.json").exists():
        raise UnsupportedModelError(
            f"{folder} holds an adapter (adapter_config.json), not a whole model.",
            "Merge the adapter into its model first.",
        )


def _refuse_quantised(folder: Path, entries: dict[str, Any]) -> None:
    found = [entries[name] for name in _QUANTISED if entries.get(name) is not None]
    if found:
        entry = found[0] if isinstance(found[0], dict) else {}
        method = entry.get("quant_method")
        if method == METHOD:
            check_version(folder, entry)
            return
        raise UnsupportedModelError(
            f"The checkpoint in {folder} is quantised "
            f"({truncated(method or 'method unnamed')}); Halve prunes floating-point "
            "weights.",
            "Name the checkpoint that it was made from.",
        )


def _unsupported(folder: Path, error: Exception) -> UnsupportedModelError:
    reason = " ".join(str(error).split())
    if "trust_remote_code" in reason:
        return UnsupportedModelError(
            f"The model in {folder} needs Python code that comes with it, which is not "
            "run unasked.",
            "Read that code, then pass --trust-remote-code.",
        )
    return UnsupportedModelError(
        f"{folder} is not a causal language model that transformers can build "
        f"({type(error).__name__}: {reason[:200].rstrip('. ')}).",
        _WHAT_TO_NAME,
    )


def _check_causal(folder: Path, config: Any) -> None:  # noqa: ANN401
    """Refuse encoders, which transformers would build with a causal head."""
    known = {*MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values(), *_base_models()}
    names = getattr(config, "architectures", None) or []
    names = names if isinstance(names, list) else [names]
    custom = bool(getattr(config, "auto_map", None))
    if names and not custom and not any(str(name) in known for name in names):
        raise UnsupportedModelError(
            f"The config of {folder} says {truncated(names[0])}, which is not a causal "
            "language model.",
            _WHAT_TO_NAME,
        )
    if getattr(config, "is_encoder_decoder", False):
        raise UnsupportedModelError(
            f"The model in {folder} has an encoder and a decoder.", _WHAT_TO_NAME
        )
    masked = config.model_type in MODEL_FOR_MASKED_LM_MAPPING_NAMES
    if masked and not getattr(config, "is_decoder", False):
        raise UnsupportedModelError(
            f"The model in {folder} is an encoder ({config.model_type}) and not a "
            "causal language model.",
            _WHAT_TO_NAME,
        )


def _base_models() -> set[str]:
    """Return the base classes of causal models; hub checkpoints may name those."""
    found: set[str] = set()
    for family in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES:
        names = MODEL_MAPPING_NAMES.get(family, ())
        found.update([names] if isinstance(names, str) else names)
    return found


def _find_blocks(folder: Path, model: nn.Module) -> tuple[str, nn.ModuleList]:
    """Return the list of like modules that holds most parameters, and its name."""
    lists = [
        (sum(p.numel() for p in module.parameters()), name, module)
        for name, module in model.named_modules()
        if isinstance(module, nn.ModuleList)
        and len({type(block) for block in module}) == 1
    ]
    if not lists:
        raise UnsupportedModelError(
            f"{type(model).__name__} in {folder} has no decoder blocks: a ModuleList "
            "of modules of one class was looked for.",
            "Open an issue that names the model.",
        )
    _, path, blocks = max(lists, key=lambda item: item[0])
    return path, blocks


def _share_equal_buffers(blocks: nn.ModuleList) -> None:
    """Keep one copy of what all blocks hold alike (GPT-2's causal mask, say).

    Otherwise memory would grow with the depth of the model.
    """
    first = dict(blocks[0].named_modules())
    for block in list(blocks)[1:]:
        for path, module in block.named_modules():
            for name, buffer in module._buffers.items():
                other = first[path]._buffers.get(name) if path in first else None
                if _alike(buffer, other):
                    module._buffers[name] = other


def _alike(a: torch.Tensor | None, b: torch.Tensor | None) -> bool:
    return a is not None and b is not None and a.dtype == b.dtype and torch.equal(a, b)
