"""Which tensor of a checkpoint fills which parameter of the model.

Names differ: checkpoints of OPT, GPT-2 and BLOOM on the Hub omit the prefix of the base
model, and old checkpoints use old names. transformers knows all of them, so its own
tables are used.
"""

import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from halve._compat.transformers import (
    ignored_tensors,
    rename_key,
    weight_conversions,
)
from halve.errors import CheckpointError, UnsupportedModelError
from halve.models.foreign_names import explain_names
from halve.models.meta_model import MetaModel

_WHAT_TO_USE = "Use the config.json that belongs to this checkpoint."


@dataclass(frozen=True)
class StoredTensor:
    """A tensor as the header of a checkpoint describes it.

    Attributes:
        name: Its name in the checkpoint.
        shape: Its shape as stored.
        dtype: Its dtype as stored; None where it is unknown.
    """

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype | None = None


def match_names(
    meta_model: MetaModel, stored: Iterable[StoredTensor]
) -> dict[str, str]:
    """Map each parameter or buffer of the model to its tensor in the checkpoint.

    Tied parameters map to the one tensor that is stored. Tensors that the model does
    not use (old masks, rotary frequencies) are left out.

    Raises:
        CheckpointError: A parameter has no tensor, one of another shape or one of
            integers; or there are tensors of more blocks than the model has.
        UnsupportedModelError: Tensors are merged on loading, as experts are.
    """
    state = meta_model.model.state_dict()
    rename = key_renamer(meta_model.model)
    names: dict[str, str] = {}
    stored = list(stored)
    for tensor in stored:
        target = rename(tensor.name)
        if target not in state:
            _check_unused(meta_model, tensor.name, target)
            continue
        _check_fits(tensor, state[target])
        names[target] = tensor.name
    try:
        return names | _tied_names(meta_model.model, names)
    except CheckpointError as error:
        found = explain_names((tensor.name for tensor in stored), state)
        if found is None:
            raise
        problem = f"{error.problem} Its names are those of {found[0]}."
        raise CheckpointError(problem, found[1]) from error


def expected_tensors(meta_model: MetaModel, dtype: torch.dtype) -> list[StoredTensor]:
    """Return the tensors that a checkpoint of a model's config would hold.

    Args:
        meta_model: The model that the config describes.
        dtype: The dtype of everything that is floating-point.

    Returns:
        One entry per tensor, with the model's own names; checkpoints on the Hub may
        omit a prefix.

    Raises:
        UnsupportedModelError: Some are merged with others on loading, as experts are.
    """
    unique: dict[int, tuple[str, torch.Tensor]] = {}
    for name, value in meta_model.model.state_dict(keep_vars=True).items():
        unique.setdefault(id(value), (name, value))  # tied ones are stored once
    for converter in weight_conversions(meta_model.model).converters:
        for name, _ in unique.values():
            if any(pattern in name for pattern in converter.target_patterns):
                raise _merging_unsupported(meta_model.model, name)
    return [
        StoredTensor(name, tuple(v.shape), dtype if v.is_floating_point() else v.dtype)
        for name, v in unique.values()
    ]


def _check_fits(tensor: StoredTensor, parameter: torch.Tensor) -> None:
    expected = tuple(parameter.shape)
    if tensor.shape != expected:
        raise CheckpointError(
            f"Tensor {tensor.name} has the shape {list(tensor.shape)}, but the "
            f"config asks for {list(expected)}.",
            _WHAT_TO_USE,
        )
    is_integer = tensor.dtype is not None and not tensor.dtype.is_floating_point
    if is_integer and parameter.is_floating_point():
        raise CheckpointError(
            f"Tensor {tensor.name} holds {tensor.dtype} where floating-point numbers "
            "were expected.",
            "If the checkpoint is quantized, use the one that it was made from.",
        )


def _check_unused(meta_model: MetaModel, name: str, target: str) -> None:
    """Refuse a tensor of a block past the last: it would silently stay dense."""
    ignored = ignored_tensors(meta_model.model)
    base = meta_model.model.base_model_prefix
    for full in (target, f"{base}.{target}"):
        index = full.removeprefix(meta_model.path + ".").partition(".")[0]
        inside = full.startswith(meta_model.path + ".") and index.isdecimal()
        known = any(re.search(pattern, full) for pattern in ignored)
        if inside and int(index) >= len(meta_model.blocks) and not known:
            raise CheckpointError(
                f"Tensor {name} belongs to block {index}, but the config asks for "
                f"{len(meta_model.blocks)} blocks.",
                _WHAT_TO_USE,
            )


def _tied_names(model: nn.Module, stored: dict[str, str]) -> dict[str, str]:
    """Map the other names of parameters that are stored under one name.

    Args:
        model: The model, its tied parameters being one object each.
        stored: Parameter -> tensor of the checkpoint, for names that are stored.
    """
    aliases: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        aliases.setdefault(id(parameter), []).append(name)
    tied: dict[str, str] = {}
    for names in aliases.values():
        source = next((stored[name] for name in names if name in stored), None)
        if source is None:
            raise CheckpointError(
                f"The checkpoint has no tensor for {names[0]}, which the config asks "
                "for.",
                f"{_WHAT_TO_USE[:-1]}, or download the missing shard.",
            )
        tied |= {name: source for name in names if name not in stored}
    return tied


def key_renamer(model: Any) -> Callable[[str], str]:  # noqa: ANN401
    """Return a function from tensor names in a checkpoint to the model's names.

    Args:
        model: A model of transformers; its parameters may be on the meta device.

    Returns:
        A function that raises UnsupportedModelError for a tensor that is merged with
        others on loading, and returns names that it does not know unchanged.
    """
    conversions = weight_conversions(model)
    state = model.state_dict()

    def rename(name: str) -> str:
        target, is_converted = rename_key(
            name, conversions, model.base_model_prefix, state
        )
        if is_converted:
            raise _merging_unsupported(model, name)
        return target

    return rename


def _merging_unsupported(model: nn.Module, name: str) -> UnsupportedModelError:
    return UnsupportedModelError(
        f"{type(model).__name__} joins the tensor {name} with others on loading, as "
        "transformers does for some models, which is not supported yet.",
        "Use another model; support is planned.",
    )
