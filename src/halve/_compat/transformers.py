"""Private or undocumented parts of transformers and tokenizers.

Tested with transformers 5.10 to 5.23. Each function imports what it needs, so that one
part that has moved breaks nothing else.
"""

# ruff: noqa: PLC0415

from collections.abc import Collection
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Conversions:
    """How transformers turns tensors of a checkpoint into parameters on loading.

    Attributes:
        renamings: Change names only.
        converters: Make parameters of several tensors, or several of one; the names of
            their results contain one of their `target_patterns`.
    """

    renamings: list[Any]
    converters: list[Any]


def tokenizer_parts(backend: Any) -> list[dict[str, Any]]:  # noqa: ANN401
    """Return the normalizer and the pre-tokenizer of a tokenizer, as tokenizer.json.

    Undocumented: the state that tokenizers pickles is JSON. When it breaks: parse the
    members `normalizer` and `pre_tokenizer` of `backend.to_str()`, which is slow for
    large vocabularies.

    Args:
        backend: A tokenizer of the tokenizers library.

    Returns:
        Those that it has; for one that is written in Python, only the type `Custom`.
    """
    parts = (backend.normalizer, backend.pre_tokenizer)
    return [_described(part) for part in parts if part is not None]


def _described(part: Any) -> dict[str, Any]:  # noqa: ANN401
    import json

    try:
        return json.loads(part.__getstate__())
    except Exception:  # noqa: BLE001  (tokenizers raises plain Exceptions)
        return {"type": "Custom"}


def weight_conversions(model: Any) -> Conversions:  # noqa: ANN401
    """Return what is done to a model's checkpoint on loading.

    Undocumented: `conversion_mapping.get_model_conversion_mapping`, and the two classes
    of its results in `core_model_loading`, since transformers 5.0. When it breaks:
    follow `PreTrainedModel.from_pretrained` to where it converts names.
    """
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import WeightConverter, WeightRenaming

    entries = get_model_conversion_mapping(model)
    return Conversions(
        [entry for entry in entries if isinstance(entry, WeightRenaming)],
        [entry for entry in entries if isinstance(entry, WeightConverter)],
    )


def rename_key(
    name: str,
    conversions: Conversions,
    prefix: str,
    state: dict[str, Any],
) -> tuple[str, str | None]:
    """Return a parameter's name for that of a tensor in a checkpoint.

    Undocumented: `core_model_loading.rename_source_key`, since transformers 5.0. When
    it breaks: as `weight_conversions`.

    Args:
        name: The tensor's name in the checkpoint.
        conversions: Those of the model.
        prefix: The model's `base_model_prefix`, which checkpoints may leave out.
        state: The model's state dict.

    Returns:
        The parameter's name, and, where a converter makes it of this tensor, which of
        the converter's `sources` matched; else None. A name that no conversion matches
        is returned as it is.
    """
    from transformers.core_model_loading import rename_source_key

    return rename_source_key(
        name, conversions.renamings, conversions.converters, prefix, state
    )


@dataclass(frozen=True)
class Merging:
    """What a converter makes of several tensors.

    Attributes:
        sources: Patterns of the tensors' names, in the order in which they are merged.
        targets: Patterns of the parameters' names.
        operations: Names of the classes of its operations, in order.
    """

    sources: tuple[str, ...]
    targets: tuple[str, ...]
    operations: tuple[str, ...]


def describe_merging(converter: Any) -> Merging:  # noqa: ANN401
    """Return what a converter of `weight_conversions` does.

    Undocumented: `source_patterns`, `target_patterns` and `operations` of
    `core_model_loading.WeightConverter`, since transformers 5.0. When it breaks: as
    `weight_conversions`.
    """
    return Merging(
        tuple(converter.source_patterns),
        # Some escape the dots of a name, which are dots in a target anyway.
        tuple(p.replace("\\", "") for p in converter.target_patterns),
        tuple(type(operation).__name__ for operation in converter.operations),
    )


@dataclass(frozen=True)
class ExpertsTraits:
    """How a module computes the experts whose weights it holds.

    Attributes:
        has_gate: Whether the first layers' output is gated; else an activation follows.
        has_bias: Whether each layer has a bias.
        is_transposed: Whether matrices are stored as [inputs, outputs].
        has_norm: Whether a norm follows the last layer.
    """

    has_gate: bool
    has_bias: bool
    is_transposed: bool
    has_norm: bool


def call_linear_layers(model: Any) -> None:  # noqa: ANN401
    """Let a model call its linear layers where it would read their weights.

    Private: `_is_quantized` of configs, by which models know that weights cannot be
    read. Otherwise Jamba multiplies by `dt_proj.weight` itself, whose inputs no hook
    sees. When it breaks: such models are refused, since the layer is not used.
    """
    for module in model.modules():
        if hasattr(module, "config"):
            module.config._is_quantized = True


def experts_traits(module: Any) -> ExpertsTraits | None:  # noqa: ANN401
    """Return how a module computes experts; None where it holds none.

    Undocumented: the attributes that `integrations.moe.use_experts_implementation`, the
    decorator of nearly all classes of experts, leaves on a module, since transformers
    5.0. When it breaks: read that decorator; without them mixtures are refused.
    """
    names = ("has_gate", "has_bias", "is_transposed")
    if not all(isinstance(getattr(module, name, None), bool) for name in names):
        return None
    # transformers 5.10 knows no norm after an expert, and no model of it has one.
    has_norm = bool(getattr(module, "has_post_expert_norm", False))
    return ExpertsTraits(**{n: getattr(module, n) for n in names}, has_norm=has_norm)


def gate_experts(module: Any, joined: Any) -> Any:  # noqa: ANN401
    """Return what an expert's last layer gets, for the output of its first layers.

    Private: `_apply_gate`, a method that the same decorator gives to classes without
    their own. When it breaks: as `experts_traits`.

    Args:
        module: A module for which `experts_traits` are known, with a gate.
        joined: Outputs of the gate and of the up projection, [tokens, 2 * inner], in
            the order in which the module holds their rows.
    """
    return module._apply_gate(joined)


def ignored_tensors(model: Any) -> Collection[str]:  # noqa: ANN401
    """Return patterns of tensors that a model's checkpoints hold and it does not use.

    Private: `PreTrainedModel._keys_to_ignore_on_load_unexpected`, a list of regular
    expressions or None. When it breaks: return (); checkpoints with layers for
    multi-token prediction are refused then.
    """
    return model._keys_to_ignore_on_load_unexpected or ()


def computes_all_scores(config: Any) -> bool:  # noqa: ANN401
    """Whether attention computes its whole matrix of scores ("eager").

    Private: `PreTrainedConfig._attn_implementation`, which transformers sets to what it
    chose when the model was built. When it breaks: return True; forecasts of memory are
    too high then.
    """
    return getattr(config, "_attn_implementation", "eager") == "eager"


def attention_name(config: Any) -> str:  # noqa: ANN401
    """Return the name of the attention function that a model uses.

    Private: `PreTrainedConfig._attn_implementation`, as in `computes_all_scores`. When
    it breaks: return "", and models decode as transformers has them decode.
    """
    return getattr(config, "_attn_implementation", None) or ""


def can_choose_attention(model: Any) -> bool:  # noqa: ANN401
    """Whether `set_attn_implementation` has an effect on a model.

    Private: `PreTrainedModel._can_set_attn_implementation`, which the public method
    asks before it warns and does nothing. When it breaks: return False, and models
    decode as transformers has them decode.
    """
    return model._can_set_attn_implementation()


def has_default_cache(model: Any) -> bool:  # noqa: ANN401
    """Whether `generate` makes a `DynamicCache` for a model.

    Private: `GenerationMixin._supports_default_dynamic_cache`. When it breaks: return
    False, and models decode as transformers has them decode.
    """
    return model._supports_default_dynamic_cache()


def can_compile(model: Any) -> bool:  # noqa: ANN401
    """Whether a model's forward pass of one token is the same kernels every time.

    Private: `PreTrainedModel._can_compile_fullgraph`, by which model classes tell that
    they support a static cache. When it breaks: return False, and tokens are decoded on
    GPUs without CUDA graphs.
    """
    return getattr(model, "_can_compile_fullgraph", False)


def causal_classes() -> set[str]:
    """Return the names of all causal language models and of their base models.

    Undocumented: `MODEL_FOR_CAUSAL_LM_MAPPING_NAMES` and `MODEL_MAPPING_NAMES` of
    `models.auto.modeling_auto`, type of model -> name(s) of classes. When it breaks:
    look for what `AutoModelForCausalLM` maps.
    """
    from transformers.models.auto.modeling_auto import (
        MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
        MODEL_MAPPING_NAMES,
    )

    classes = set(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values())
    for model_type in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES:
        names = MODEL_MAPPING_NAMES.get(model_type, ())
        classes.update([names] if isinstance(names, str) else names)
    return classes


def has_masked_model(model_type: str) -> bool:
    """Whether models of a type may be encoders, trained on masked tokens.

    Undocumented: `MODEL_FOR_MASKED_LM_MAPPING_NAMES`, as in `causal_classes`.
    """
    from transformers.models.auto.modeling_auto import MODEL_FOR_MASKED_LM_MAPPING_NAMES

    return model_type in MODEL_FOR_MASKED_LM_MAPPING_NAMES


def is_rust_panic(error: BaseException) -> bool:
    """Whether an exception is a panic of a Rust extension such as tokenizers.

    Undocumented: PyO3 raises panics as `pyo3_runtime.PanicException`, a BaseException
    in a module that cannot be imported, so it is recognised by its name. Tested with
    tokenizers 0.22 and 0.23. When it breaks: a damaged tokenizer.json ends in a
    traceback; take the new name from that.
    """
    kind = type(error)
    return (kind.__module__, kind.__name__) == ("pyo3_runtime", "PanicException")
