"""Which tensor of a checkpoint fills which parameter of the model.

Names differ: hub checkpoints of OPT, GPT-2 and BLOOM leave out the prefix of the base
model, old ones use old names. transformers knows all of that; its own tables are asked.
"""

from collections.abc import Iterable
from dataclasses import dataclass

from torch import nn
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import (
    WeightConverter,
    WeightRenaming,
    rename_source_key,
)

from halve.errors import CheckpointError, UnsupportedModelError
from halve.models.skeleton import Skeleton


@dataclass(frozen=True)
class Stored:
    """A tensor as a checkpoint describes it: its name and shape."""

    name: str
    shape: tuple[int, ...]


def match_names(skeleton: Skeleton, stored: Iterable[Stored]) -> dict[str, str]:
    """Return parameter or buffer of the model -> tensor of the checkpoint.

    Tied parameters lead to the one tensor that is stored. Tensors that the model does
    not know (old masks, rotary frequencies) are left out.

    Raises:
        CheckpointError: A parameter has no tensor, or one of another shape.
        UnsupportedModelError: Tensors are merged on loading, as experts are.
    """
    wanted = skeleton.model.state_dict()
    rename = _renamer(skeleton)
    found: dict[str, str] = {}
    for tensor in stored:
        target = rename(tensor.name)
        if target not in wanted:
            continue
        expected = tuple(wanted[target].shape)
        if tensor.shape != expected:
            raise CheckpointError(
                f"Tensor {tensor.name} has the shape {list(tensor.shape)}, but the "
                f"config asks for {list(expected)}.",
                "Use the config.json that belongs to this checkpoint.",
            )
        found[target] = tensor.name
    return found | _tied(skeleton.model, found)


def _tied(model: nn.Module, found: dict[str, str]) -> dict[str, str]:
    """Return the names that share a parameter with one that was found."""
    names: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        names.setdefault(id(parameter), []).append(name)
    tied: dict[str, str] = {}
    for aliases in names.values():
        source = next((found[name] for name in aliases if name in found), None)
        if source is None:
            raise CheckpointError(
                f"The checkpoint has no tensor for {aliases[0]}, which the config asks "
                "for.",
                "Use the config.json that belongs to this checkpoint, or download the "
                "missing shard.",
            )
        tied |= {name: source for name in aliases if name not in found}
    return tied


def _renamer(skeleton: Skeleton):  # noqa: ANN202  (a closure over transformers' types)
    model = skeleton.model
    conversions = get_model_conversion_mapping(model)
    renamings = [c for c in conversions if isinstance(c, WeightRenaming)]
    converters = [c for c in conversions if isinstance(c, WeightConverter)]
    wanted = model.state_dict()

    def rename(name: str) -> str:
        target, merged_by = rename_source_key(
            name, renamings, converters, model.base_model_prefix, wanted
        )
        if merged_by is not None:
            raise UnsupportedModelError(
                f"{type(model).__name__} merges the tensor {name} with others on "
                "loading, as mixtures of experts do, and those are not supported yet.",
                "Name a model without experts; support for them is planned.",
            )
        return target

    return rename
