"""Replacing a transformers model's modules of experts by packed ones, and back."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from torch import nn

from halve.checkpoint import Checkpoint
from halve.errors import CheckpointError, UnsupportedModelError
from halve.formats import PackedMatrix, StackedMatrices, slice_name
from halve.models import (
    ExpertLayer,
    ExpertLayers,
    Place,
    StoredTensor,
    TensorMap,
    experts_in,
    match_experts,
    unmerged_renamer,
)
from halve.runtime.cpu.layers import LAYERS
from halve.runtime.cpu.packed_experts import PackedExperts, packed_experts_in


def install_packed_experts(model: Any, checkpoint: Checkpoint) -> set[str]:  # noqa: ANN401
    """Replace every module of experts, if any has a packed matrix in the files.

    The others would be merged on loading by converters that apply to all or to none
    (`merges_experts`).

    Args:
        model: A transformers model, parameters on the meta device.
        checkpoint: Its files. Only headers and layouts are read.

    Returns:
        The names of the tensors that hold experts.

    Raises:
        CheckpointError: A matrix is missing, or does not fit the config.
        UnsupportedModelError: transformers renames it in a way that is not known.
    """
    families = experts_in(model)
    if not families:
        return set()
    found = match_experts(model, map(_stored, checkpoint.tensors.values()))
    names = {place.tensor for place in found.places.values()}
    if any(checkpoint.tensors[name].is_packed for name in names):
        installer = _Installer(checkpoint, found, unmerged_renamer(model))
        for path, layers in found.experts.items():
            experts = installer.build(path, families[path], layers)
            model.set_submodule(path, experts)
    return names


def _stored(info: Any) -> StoredTensor:  # noqa: ANN401
    return StoredTensor(info.name, info.shape, info.dtype)


@dataclass(frozen=True)
class _Installer:
    """Builds modules of packed experts.

    Attributes:
        checkpoint: The files.
        found: Where they hold the parameters of experts.
        rename: From names of tensors to names in the model.
    """

    checkpoint: Checkpoint
    found: TensorMap
    rename: Any

    def build(
        self, path: str, family: nn.Module, layers: ExpertLayers
    ) -> PackedExperts:
        """Return what takes the place of a module, its tensors on the meta device."""
        places = {
            x.name: self._places(path, x, layers, "weight") for x in layers.layers
        }
        stacked = [name for name, own in places.items() if own[0].index is not None]
        experts = PackedExperts(family, layers, stacked)
        for layer in layers.layers:
            own = places[layer.name]
            if layer.name in stacked:
                self._add_stack(path, experts, layer, own[0].tensor)
            else:
                self._add_each(path, experts, layer, own)
        return experts

    def _places(
        self, path: str, layer: ExpertLayer, layers: ExpertLayers, kind: str
    ) -> list[Place]:
        places = self.found.places
        return [places[f"{path}.{inner}.{kind}"] for inner in layers.paths(layer)]

    def _add_stack(
        self, path: str, experts: PackedExperts, layer: ExpertLayer, tensor: str
    ) -> None:
        """Add a layer whose matrices are slices of one tensor, packed or dense."""
        if layer.has_bias:
            experts.add_stack(f"{layer.fused}_bias")
        if not self.checkpoint.tensors[tensor].is_packed:
            experts.add_stack(layer.fused)
            return
        for number, (format, packed) in enumerate(self._slices(tensor)):
            name = f"{path}.{experts.layer_path(layer, number)}.weight"
            self._check(slice_name(tensor, number), name, layer, packed)
            matrix = packed.to(_dtype(experts, layer))
            experts.add_layer(layer, number, LAYERS[format](matrix))

    def _slices(self, tensor: str) -> Iterator[tuple[str, PackedMatrix]]:
        stack: StackedMatrices = self.checkpoint.describe_stack(tensor)
        yield from zip(stack.formats, stack.slices, strict=True)

    def _add_each(
        self, path: str, experts: PackedExperts, layer: ExpertLayer, own: list[Place]
    ) -> None:
        """Add a layer whose matrices have tensors of their own."""
        for number, place in enumerate(own):
            info = self.checkpoint.tensors[place.tensor]
            name = f"{path}.{experts.layer_path(layer, number)}.weight"
            dense: Any = layer.build().to(_dtype(experts, layer))
            module: nn.Module = dense
            packed = None
            if info.format is not None:
                packed = self.checkpoint.describe_packed(info.name)
                matrix = packed.to(_dtype(experts, layer))
                module = LAYERS[info.format](matrix, dense.bias)
            self._check(place.tensor, name, layer, packed)
            experts.add_layer(layer, number, module)

    def _check(
        self, tensor: str, name: str, layer: ExpertLayer, packed: PackedMatrix | None
    ) -> None:
        """Check that a matrix will be loaded where it belongs, and how it lies."""
        if self.rename(tensor) != name:
            raise UnsupportedModelError(
                f"transformers loads {tensor}, which is packed, as "
                f"{self.rename(tensor)}, but it belongs to {name}.",
                "Unpack the model with `halve unpack`, and open an issue that names "
                "it.",
            )
        if packed is not None and packed.transposed != layer.transposed:
            raise CheckpointError(
                f"{tensor} is packed with a transposed of {int(packed.transposed)}, "
                f"but the model's matrices need {int(layer.transposed)}.",
                "Pack the model again from its dense checkpoint.",
            )


def _dtype(experts: PackedExperts, layer: ExpertLayer) -> Any:  # noqa: ANN401
    """Return the dtype in which the model has the matrices of a layer."""
    return experts.family.get_parameter(layer.fused).dtype


def make_experts_dense(model: Any, unsupported: bool = False) -> None:  # noqa: ANN401
    """Put the family's own modules in the place of packed experts.

    Args:
        model: A transformers model.
        unsupported: Only where the device of a packed layer has no kernels for it.
    """
    for path, experts in packed_experts_in(model).items():
        if not unsupported or not experts.is_supported:
            model.set_submodule(path, experts.to_dense())
