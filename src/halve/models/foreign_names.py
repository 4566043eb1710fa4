"""Why the names of a checkpoint are not those of its model, where that can be told.

Training code wraps models, and saves what it wraps under longer names. Such checkpoints
are refused like any that lack a tensor; what is said here is what to do about it.
"""

from collections.abc import Collection, Iterable
from dataclasses import dataclass


@dataclass(frozen=True)
class _Wrapper:
    """Something that renames the parameters of a model.

    Attributes:
        name: What wraps it.
        prefix: What it puts in front of names.
        remedy: How to save the model without it.
    """

    name: str
    prefix: str
    remedy: str


# The longest prefix first.
_WRAPPERS = (
    _Wrapper(
        "PEFT",
        "base_model.model.",
        "Merge the adapter (model.merge_and_unload()) and save the model again.",
    ),
    _Wrapper(
        "torch.compile",
        "_orig_mod.",
        "Save model._orig_mod with save_pretrained again.",
    ),
    _Wrapper(
        "DistributedDataParallel",
        "module.",
        "Save model.module with save_pretrained again.",
    ),
)
_PARTS = {
    ("_orig", "_mask"): (
        "torch.nn.utils.prune",
        "Call torch.nn.utils.prune.remove on each pruned module, and save the model "
        "again.",
    ),
    ("qweight", "qzeros"): (
        "a quantized checkpoint (GPTQ or AWQ)",
        "Use the checkpoint that it was made from.",
    ),
    ("lora_A.weight", "lora_B.weight"): (
        "PEFT",
        "Merge the adapter (model.merge_and_unload()) and save the model again.",
    ),
}


def explain_names(
    names: Iterable[str], expected: Collection[str]
) -> tuple[str, str] | None:
    """Return what gave tensors their names, and what to do about it.

    Args:
        names: Of the tensors in a checkpoint.
        expected: Of the model's parameters.

    Returns:
        None if the names tell nothing.
    """
    stored = list(names)
    for ends, explanation in _PARTS.items():
        if all(any(name.endswith(end) for name in stored) for end in ends):
            return explanation
    for wrapper in _WRAPPERS:
        wrapped = (name for name in stored if wrapper.prefix in name)
        if any(name.replace(wrapper.prefix, "", 1) in expected for name in wrapped):
            return wrapper.name, wrapper.remedy
    return None
