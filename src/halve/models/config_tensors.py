"""The tensors of a checkpoint that does not exist, as its config describes them."""

from collections.abc import Iterator

import torch
from torch import Tensor, nn

from halve._compat.transformers import (
    Merging,
    describe_merging,
    weight_conversions,
)
from halve.models.experts import ExpertLayers, fused_parameters
from halve.models.meta_model import MetaModel
from halve.models.names import StoredTensor
from halve.models.renaming import is_of_experts, merging_unsupported


def expected_tensors(meta_model: MetaModel, dtype: torch.dtype) -> list[StoredTensor]:
    """Return the tensors that a checkpoint of a model's config would hold.

    Args:
        meta_model: The model that the config describes.
        dtype: The dtype of everything that is floating-point.

    Returns:
        One entry per tensor, with the model's own names; checkpoints on the Hub may
        omit a prefix. Experts have a tensor for each matrix where transformers would
        merge those on loading.

    Raises:
        UnsupportedModelError: Tensors are merged in a way that is not known.
    """
    model = meta_model.model
    unique: dict[int, tuple[str, torch.Tensor]] = {}
    for name, value in model.state_dict(keep_vars=True).items():
        unique.setdefault(id(value), (name, value))  # tied ones are stored once
    merged = [describe_merging(c) for c in weight_conversions(model).converters]
    stored: list[StoredTensor] = []
    for name, value in unique.values():
        merging = next((m for m in merged if _makes(m, name)), None)
        tensors = [(name, tuple(value.shape))]
        if merging is not None:
            tensors = list(_unmerged(model, name, value, merging))
        own = dtype if value.is_floating_point() else value.dtype
        stored += [StoredTensor(inner, shape, own) for inner, shape in tensors]
    return stored


def _makes(merging: Merging, name: str) -> bool:
    return any(name.endswith(target) for target in merging.targets)


def _unmerged(
    model: nn.Module, name: str, value: Tensor, merging: Merging
) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Yield name and shape of the tensors that are merged into a parameter."""
    owner, _, leaf = name.rpartition(".")
    module = model.get_submodule(owner)
    known = is_of_experts(merging)
    if not known or leaf not in fused_parameters(module):
        raise merging_unsupported(model, name, merging)
    parts = [source.split(".")[-2] for source in merging.sources]
    for layer in ExpertLayers.of(module, {leaf: parts}).layers:
        if layer.fused == leaf:
            for number in range(len(value)):
                yield f"{owner}.{number}.{layer.name}.weight", layer.stored_shape
