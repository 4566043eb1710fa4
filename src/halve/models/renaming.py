"""How transformers renames the tensors of a checkpoint, and merges those of experts."""

from collections.abc import Callable
from typing import Any

from torch import nn

from halve._compat.transformers import (
    Conversions,
    Merging,
    describe_merging,
    rename_key,
    weight_conversions,
)
from halve.errors import UnsupportedModelError

# Operations by which transformers makes one parameter of the matrices of all experts:
# stacked, and those of gate and up joined.
_STACKED, _JOINED = ("MergeModulelist",), ("MergeModulelist", "Concatenate")


def key_renamer(model: Any) -> Callable[[str], str]:  # noqa: ANN401
    """Return a function from tensor names in a checkpoint to the model's names.

    Args:
        model: A model of transformers; its parameters may be on the meta device.

    Returns:
        A function that raises UnsupportedModelError for a tensor that is merged with
        others on loading, and returns names that it does not know unchanged.
    """
    convert = converting_renamer(model, model.state_dict())

    def rename(name: str) -> str:
        target, merging = convert(name)
        if merging is not None:
            raise merging_unsupported(model, name, merging[1])
        return target

    return rename


def unmerged_renamer(model: Any) -> Callable[[str], str]:  # noqa: ANN401
    """Return a function from tensor names in a checkpoint to names in the model.

    As if nothing were merged on loading: the matrices of experts keep names of their
    own.
    """
    conversions = Conversions(weight_conversions(model).renamings, [])
    state = model.state_dict()
    prefix = model.base_model_prefix
    return lambda name: rename_key(name, conversions, prefix, state)[0]


def converting_renamer(
    model: Any,  # noqa: ANN401
    state: dict[str, Any],
) -> Callable[[str], tuple[str, tuple[int, Merging] | None]]:
    """Return a function from tensor names in a checkpoint to the model's names.

    Returns:
        A function that returns the parameter; and, where transformers makes it of
        several tensors, of which, and the position of this one among them.
    """
    conversions = weight_conversions(model)
    merged = [describe_merging(c) for c in conversions.converters]
    by_source = {source: m for m in reversed(merged) for source in m.sources}

    def rename(name: str) -> tuple[str, tuple[int, Merging] | None]:
        target, source = rename_key(name, conversions, model.base_model_prefix, state)
        if target not in state and name in state:
            # As transformers does: DeepSeek-V4's renaming of other norms would take the
            # last one away, where the checkpoint has the model's own name of it.
            return name, None
        if source is None:
            return target, None
        merging = by_source[source]
        return target, (merging.sources.index(source), merging)

    return rename


def merges_experts(converter: Any) -> bool:  # noqa: ANN401
    """Whether a converter of transformers makes a parameter of all experts' matrices.

    Only those that Halve knows, which do nothing else.
    """
    return is_of_experts(describe_merging(converter))


def is_of_experts(merging: Merging) -> bool:
    """Whether a merging makes a parameter of all experts' matrices, and no more."""
    return merging.operations in (_STACKED, _JOINED)


def merging_unsupported(
    model: nn.Module, name: str, merging: Merging
) -> UnsupportedModelError:
    """Return the error for a tensor that is merged in a way that is not known."""
    return UnsupportedModelError(
        f"{type(model).__name__} makes the tensor {name} into a parameter by "
        f"{', '.join(merging.operations)} on loading, of "
        f"{' and '.join(merging.sources)}; of merged tensors Halve knows the matrices "
        "of experts only, stacked (MergeModulelist) and joined (Concatenate).",
        "Open an issue that names the model.",
    )
