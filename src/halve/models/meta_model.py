"""A causal language model of transformers without its weights.

The model is built by transformers' own classes, with every parameter on the meta
device.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate import init_empty_weights
from torch import nn
from torch.overrides import TorchFunctionMode
from transformers import AutoConfig, AutoModelForCausalLM

from halve._compat.torch import buffer_slots
from halve._compat.transformers import (
    call_linear_layers,
    causal_classes,
    computes_all_scores,
    has_masked_model,
)
from halve.errors import (
    CalibrationError,
    CheckpointError,
    HalveError,
    UnsupportedModelError,
)
from halve.formats import (
    ENTRIES,
    METHOD,
    check_readable,
    check_version,
    declared_entry,
)
from halve.models.blocks import find_blocks
from halve.models.config_limits import check_config_limits, check_model_size
from halve.untrusted import is_inside, read_json, truncated

# The sequence length of the papers, where a config gives no maximum (BLOOM).
_PAPER_LENGTH = 2048
# Model types whose perplexities the papers of the field give, of windows without BOS.
_PAPER_FAMILIES = frozenset({"opt", "bloom", "gpt2"})
_SUPPORTED = "Use a GPT-family model: OPT, BLOOM, GPT-2, Llama, Mistral, Qwen ..."
# Names under which configs give the number of experts of a token.
_EXPERTS_PER_TOKEN = (
    "num_experts_per_tok",
    "top_k_experts",
    "moe_topk",
    "moe_k",
    "moe_num_active_primary_experts",
)


@dataclass(frozen=True)
class MetaModel:
    """A model whose parameters have shapes but no values.

    Attributes:
        config: The configuration, of one of transformers' classes.
        model: The model in evaluation mode, with its parameters on the meta device.
        blocks: The decoder blocks.
        path: The name of `blocks` within the model, such as `model.layers`.
        dtype: The dtype of the stored weights according to the config; float32 where
            it gives none.
    """

    config: Any
    model: Any
    blocks: nn.ModuleList
    path: str
    dtype: torch.dtype

    @property
    def longest_sequence(self) -> int | None:
        """The maximum sequence length in tokens; None where the config gives none."""
        return longest_sequence(self.config)

    @property
    def vocabulary(self) -> int:
        """The number of tokens in the model's vocabulary."""
        return self.config.get_text_config().vocab_size

    @property
    def width(self) -> int:
        """The numbers in the hidden states of one token.

        Gemma 3n runs several versions of them side by side ("AltUp").
        """
        text = self.config.get_text_config()
        return text.hidden_size * getattr(text, "altup_num_inputs", 1)

    @property
    def experts_per_token(self) -> int | None:
        """The number of experts of a token; None where the config gives none."""
        text = self.config.get_text_config()
        found = (getattr(text, name, None) for name in _EXPERTS_PER_TOKEN)
        return next((k for k in found if isinstance(k, int) and k > 0), None)

    @property
    def scored_heads(self) -> int:
        """The number of heads whose [length, length] scores are in memory at once.

        0 where attention is fused, and computes its scores piece by piece.
        """
        heads = getattr(self.config.get_text_config(), "num_attention_heads", 0)
        is_fused = not computes_all_scores(self.config)
        return 0 if is_fused or not isinstance(heads, int) else heads

    @property
    def lookup_embedding(self) -> nn.Embedding | None:
        """The input embedding, if it does nothing but look up rows.

        None where it is of a class of the model's, which may scale the rows.
        """
        embedding = self.model.get_input_embeddings()
        return embedding if type(embedding) is nn.Embedding else None

    def parameter_names(self, module: nn.Module | None) -> set[str]:
        """Return all names of a module's parameters, under every path it is used at."""
        named = self.model.named_modules(remove_duplicate=False)
        paths = [path for path, candidate in named if candidate is module]
        names = [name for name, _ in module.named_parameters()] if module else []
        return {f"{path}.{name}" for path in paths for name in names}

    @property
    def default_length(self) -> int:
        """The papers' sequence length, or the model's maximum if that is shorter."""
        return min(_PAPER_LENGTH, self.longest_sequence or _PAPER_LENGTH)

    @property
    def is_of_the_papers(self) -> bool:
        """Whether the papers of the field judge models of this family.

        Their code tokenizes a text once and cuts it, so that windows have no BOS token.
        """
        return self.config.model_type in _PAPER_FAMILIES

    def check_length(self, length: int) -> None:
        """Raise CalibrationError if a sequence is longer than the model supports."""
        longest = self.longest_sequence
        if longest is not None and length > longest:
            raise CalibrationError(
                f"Sequences of {length} tokens were requested, but the model supports "
                f"at most {longest}.",
                f"Pass --seq-len {longest} or less.",
            )


def longest_sequence(config: Any) -> int | None:  # noqa: ANN401
    """Return a model's maximum sequence length; None where its config gives none."""
    text = config.get_text_config()
    for name in ("max_position_embeddings", "max_seq_len", "n_positions"):
        if isinstance(length := getattr(text, name, None), int) and length > 0:
            return length
    return None


def build_meta_model(
    folder: Path,
    trust_remote_code: bool = False,
    changes: Mapping[str, int] | None = None,
) -> MetaModel:
    """Build the model of a folder from its config alone.

    Args:
        folder: Where config.json is.
        trust_remote_code: Allow Python code that comes with the model to run.
        changes: Entries of the language model's config -> other values.

    Raises:
        CheckpointError: The config is damaged.
        UnsupportedModelError: It is not a causal language model of transformers; it
            needs remote code, which was not allowed; it is quantized; or it has no
            decoder blocks.
    """
    config = load_config(folder, trust_remote_code)
    try:
        for name, value in (changes or {}).items():
            setattr(config.get_text_config(), name, value)
        return _build(folder, config, trust_remote_code)
    except HalveError:
        raise
    # A wrong value in the config may break anything in the model's code.
    except Exception as error:
        raise _unsupported(folder, error) from error


def _build(folder: Path, config: Any, trust_remote_code: bool) -> MetaModel:  # noqa: ANN401
    _check_causal(folder, config)
    stored = config.dtype  # read first: building the model overwrites it
    dtype = stored if isinstance(stored, torch.dtype) else torch.float32

    def build() -> Any:  # noqa: ANN401
        return AutoModelForCausalLM.from_config(
            config, trust_remote_code=trust_remote_code, dtype=torch.float32
        )

    # Remote code may compute with its buffers, which the meta device does not allow.
    if not trust_remote_code:
        check_model_size(folder, build)
    with init_empty_weights(include_buffers=False), _UnfilledOnMeta():
        model = build()
    model.tie_weights()
    model.eval().requires_grad_(False)
    call_linear_layers(model)
    path, blocks = find_blocks(model)
    _share_equal_buffers(blocks)
    meta_model = MetaModel(config, model, blocks, path, dtype)
    if not isinstance(meta_model.vocabulary, int):
        raise TypeError(f"its vocab_size is {meta_model.vocabulary}")
    if not isinstance(meta_model.width, int):
        raise TypeError(f"its hidden_size is {config.get_text_config().hidden_size}")
    return meta_model


class _UnfilledOnMeta(TorchFunctionMode):
    """Put tensors that are created without values on the meta device.

    accelerate moves a parameter there once it exists. That of all experts of a block of
    DeepSeek-V3 takes 30 GB, which may be more than can be allocated at all.
    """

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Any,  # noqa: ANN401  (torch's signature)
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:  # noqa: ANN401
        """Create on the meta device what `torch.empty` would leave unfilled."""
        options = dict(kwargs or {})
        if func is torch.empty:
            options["device"] = "meta"
        return func(*args, **options)


def load_config(folder: Path, trust_remote_code: bool = False) -> Any:  # noqa: ANN401
    """Load transformers' configuration of a folder.

    Raises:
        CheckpointError: The config is damaged.
        UnsupportedModelError: There is none; transformers does not know it; or it
            describes a quantized model that is not read, or an adapter.
    """
    if not (folder / "config.json").is_file():
        raise UnsupportedModelError(
            f"There is no config.json in {folder}, so it holds no model of "
            "transformers.",
            "Use the folder of a complete checkpoint.",
        )
    entries = _read_entries(folder)
    is_foreign = _check_quantized(folder, entries)
    check_config_limits(folder, entries)
    _refuse_adapter(folder)
    try:
        config = AutoConfig.from_pretrained(folder, trust_remote_code=trust_remote_code)
    except Exception as error:  # validators and remote code may raise anything
        raise _unsupported(folder, error) from error
    if is_foreign:
        _describe_dense(config)
    return config


def _read_entries(folder: Path) -> dict[str, Any]:
    """Read config.json, and check that it is an object: transformers assumes that."""
    path = folder / "config.json"
    if not is_inside(folder, path):
        raise CheckpointError(
            f"{path} is a link out of the folder.",
            "Copy the file itself into the folder.",
        )
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
    """Refuse an adapter: transformers would load the other model that it names."""
    if (folder / "adapter_config.json").exists():
        raise UnsupportedModelError(
            f"{folder} holds an adapter (adapter_config.json), not a whole model.",
            "Merge the adapter into its model first.",
        )


def _check_quantized(folder: Path, entries: dict[str, Any]) -> bool:
    """Refuse quantized weights that are not read.

    Returns:
        Whether weights are quantized, but not packed by Halve.
    """
    entry = declared_entry(entries)
    if entry is None:
        return False
    if entry.get("quant_method") == METHOD:
        check_version(folder, entry)
        return False
    check_readable(folder, entry)
    return True


def _describe_dense(config: Any) -> None:  # noqa: ANN401
    """Remove from a config what it says of quantized weights: they are seen dense."""
    for part in (config, config.get_text_config()):
        for name in ENTRIES:
            if hasattr(part, name):
                delattr(part, name)


def _unsupported(folder: Path, error: Exception) -> UnsupportedModelError:
    reason = " ".join(str(error).split())
    if "trust_remote_code" in reason:
        return UnsupportedModelError(
            f"The model in {folder} needs the Python code that comes with it, which is "
            "not run by default.",
            "Read that code, then pass --trust-remote-code.",
        )
    return UnsupportedModelError(
        f"{folder} is not a causal language model that transformers can build "
        f"({type(error).__name__}: {reason[:200].rstrip('. ')}).",
        _SUPPORTED,
    )


def _check_causal(folder: Path, config: Any) -> None:  # noqa: ANN401
    """Refuse encoders, which transformers would build with a causal head."""
    known = causal_classes()  # base models too: checkpoints on the Hub may name those
    names = getattr(config, "architectures", None) or []
    names = names if isinstance(names, list) else [names]
    custom = bool(getattr(config, "auto_map", None))
    if names and not custom and not any(str(name) in known for name in names):
        raise UnsupportedModelError(
            f"The architecture in the config of {folder} is {truncated(names[0])}, "
            "which is not a causal language model.",
            _SUPPORTED,
        )
    if getattr(config, "is_encoder_decoder", False):
        raise UnsupportedModelError(
            f"The model in {folder} has an encoder and a decoder.", _SUPPORTED
        )
    is_decoder = getattr(config, "is_decoder", False)
    if has_masked_model(config.model_type) and not is_decoder:
        raise UnsupportedModelError(
            f"The model in {folder} is an encoder ({config.model_type}) and not a "
            "causal language model.",
            _SUPPORTED,
        )


def _share_equal_buffers(blocks: nn.ModuleList) -> None:
    """Store buffers that are equal in all blocks once (GPT-2's causal mask, say).

    Otherwise memory would grow with the depth of the model.
    """
    first = dict(blocks[0].named_modules())
    for block in list(blocks)[1:]:
        for path, module in block.named_modules():
            slots = buffer_slots(module)
            for name, buffer in slots.items():
                other = buffer_slots(first[path]).get(name) if path in first else None
                if _equal(buffer, other):
                    slots[name] = other


def _equal(a: torch.Tensor | None, b: torch.Tensor | None) -> bool:
    return a is not None and b is not None and a.dtype == b.dtype and torch.equal(a, b)
