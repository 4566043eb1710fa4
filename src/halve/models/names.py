"""Which tensor of a checkpoint fills which parameter of the model.

Names differ: hub checkpoints of OPT, GPT-2 and BLOOM leave out the prefix of the base
model, old ones use old names. transformers knows all of that; its own tables are asked.
"""

import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import (
    WeightConverter,
    WeightRenaming,
    rename_source_key,
)

from halve.errors import CheckpointError, UnsupportedModelError
from halve.models.meta_model import MetaModel

_WHAT_TO_USE = "Use the config.json that belongs to this checkpoint."


@dataclass(frozen=True)
class StoredTensor:
    """A tensor as a checkpoint describes it; the dtype where it is known."""

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype | None = None


def match_names(
    meta_model: MetaModel, stored: Iterable[StoredTensor]
) -> dict[str, str]:
    """Return parameter or buffer of the model -> tensor of the checkpoint.

    Tied parameters lead to the one tensor that is stored. Tensors that the model does
    not know (old masks, rotary frequencies) are left out.

    Raises:
        CheckpointError: A parameter has no tensor, one of another shape or of
            integers; or there are tensors of more blocks than the model has.
        UnsupportedModelError: Tensors are merged on loading, as experts are.
    """
    wanted = meta_model.model.state_dict()
    rename = key_renamer(meta_model.model)
    found: dict[str, str] = {}
    for tensor in stored:
        target = rename(tensor.name)
        if target not in wanted:
            _check_stray(meta_model, tensor.name, target)
            continue
        _check_fits(tensor, wanted[target])
        found[target] = tensor.name
    return found | _tied(meta_model.model, found)


def expected_tensors(meta_model: MetaModel, dtype: torch.dtype) -> list[StoredTensor]:
    """Return the tensors that a checkpoint of a config would hold.

    Args:
        meta_model: Of the config.
        dtype: Of all that is no whole number.

    Returns:
        They have the model's own names; hub checkpoints may leave out a prefix.

    Raises:
        UnsupportedModelError: They are merged with others on loading, as experts are.
    """
    own: dict[int, tuple[str, torch.Tensor]] = {}
    for name, value in meta_model.model.state_dict(keep_vars=True).items():
        own.setdefault(id(value), (name, value))  # tied ones are stored once
    for converter in _converters(meta_model.model):
        for name, _ in own.values():
            if any(pattern in name for pattern in converter.target_patterns):
                raise _merged(meta_model.model, name)
    return [
        StoredTensor(name, tuple(v.shape), dtype if v.is_floating_point() else v.dtype)
        for name, v in own.values()
    ]


def _check_fits(tensor: StoredTensor, wanted: torch.Tensor) -> None:
    expected = tuple(wanted.shape)
    if tensor.shape != expected:
        raise CheckpointError(
            f"Tensor {tensor.name} has the shape {list(tensor.shape)}, but the "
            f"config asks for {list(expected)}.",
            _WHAT_TO_USE,
        )
    whole = tensor.dtype is not None and not tensor.dtype.is_floating_point
    if whole and wanted.is_floating_point():
        raise CheckpointError(
            f"Tensor {tensor.name} holds {tensor.dtype} where floating-point numbers "
            "were expected.",
            "Name the checkpoint that it was made from, if it is quantised.",
        )


def _check_stray(meta_model: MetaModel, name: str, target: str) -> None:
    """Refuse a tensor of a block past the last: it would silently be left dense."""
    ignored = meta_model.model._keys_to_ignore_on_load_unexpected or ()
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
                f"{_WHAT_TO_USE[:-1]}, or download the missing shard.",
            )
        tied |= {name: source for name in aliases if name not in found}
    return tied


def key_renamer(model: Any) -> Callable[[str], str]:  # noqa: ANN401
    """Return what turns a checkpoint's name into the model's.

    Args:
        model: One of transformers' models; parameters may lie on the meta device.

    Returns:
        A function of names, which raises UnsupportedModelError for a tensor that is
        merged with others on loading.
    """
    conversions = get_model_conversion_mapping(model)
    renamings = [c for c in conversions if isinstance(c, WeightRenaming)]
    converters = _converters(model)
    wanted = model.state_dict()

    def rename(name: str) -> str:
        target, merged_by = rename_source_key(
            name, renamings, converters, model.base_model_prefix, wanted
        )
        if merged_by is not None:
            raise _merged(model, name)
        return target

    return rename


def _converters(model: Any) -> list[WeightConverter]:  # noqa: ANN401
    """Return what makes one parameter of several tensors on loading."""
    conversions = get_model_conversion_mapping(model)
    return [c for c in conversions if isinstance(c, WeightConverter)]


def _merged(model: nn.Module, name: str) -> UnsupportedModelError:
    return UnsupportedModelError(
        f"{type(model).__name__} merges the tensor {name} with others on loading, as "
        "mixtures of experts do, and those are not supported yet.",
        "Name a model without experts; support for them is planned.",
    )
