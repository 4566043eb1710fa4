"""Replacing the linear layers of a transformers model by packed ones, and back."""

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from torch import nn
from transformers.pytorch_utils import Conv1D

from halve.checkpoint import Checkpoint, TensorInfo
from halve.errors import CheckpointError
from halve.models import key_renamer
from halve.runtime.cpu.layers import LAYERS
from halve.runtime.cpu.packed_linear import PackedLinear


def install_packed_layers(model: Any, paths: Iterable[str | Path]) -> None:  # noqa: ANN401
    """Replace every linear layer whose weight is packed in the files.

    The new layers have no data yet: their tensors are on the meta device, of the shapes
    in the files. Values have the model's dtype, to which transformers converts what it
    loads.

    Args:
        model: A transformers model, parameters on the meta device.
        paths: Its safetensors files. Only headers and layouts are read.

    Raises:
        CheckpointError: A packed tensor is not a linear layer of the model, or has
            another shape.
    """
    checkpoint = Checkpoint.of_files([Path(path) for path in paths])
    rename = key_renamer(model)
    for info in checkpoint.tensors.values():
        if info.format is not None:
            path, _, leaf = rename(info.name).rpartition(".")
            layer = _linear(model, path if leaf == "weight" else "", info)
            packed = checkpoint.describe_packed(info.name).to(layer.weight.dtype)
            model.set_submodule(path, LAYERS[info.format](packed, layer.bias))


def _linear(model: nn.Module, path: str, info: TensorInfo) -> Any:  # noqa: ANN401
    """Return the linear layer that a packed tensor belongs to."""
    layer = dict(model.named_modules()).get(path)
    if not isinstance(layer, nn.Linear | Conv1D):
        raise CheckpointError(
            f"{info.name} is packed, but {type(model).__name__} has no linear layer of "
            "that name.",
            "Use the config.json that belongs to this checkpoint.",
        )
    if tuple(layer.weight.shape) != info.shape:
        raise CheckpointError(
            f"{info.name} is packed with the shape {list(info.shape)}, but the config "
            f"asks for {list(layer.weight.shape)}.",
            "Use the config.json that belongs to this checkpoint.",
        )
    return layer


def packed_layers(model: nn.Module) -> Iterator[tuple[str, PackedLinear]]:
    """Yield path and layer for every packed layer of a model."""
    for path, module in model.named_modules():
        if isinstance(module, PackedLinear):
            yield path, module


def check_layers(model: nn.Module) -> None:
    """Check what was loaded, before any kernel reads it.

    Raises:
        CheckpointError: The parts of a packed matrix are inconsistent.
    """
    for path, layer in packed_layers(model):
        layer.packed.check(f"{path}.weight")
        # transformers makes every parameter that it loads trainable.
        layer.weight.requires_grad_(False)


def make_dense(model: nn.Module) -> None:
    """Replace all packed layers by dense ones."""
    for path, layer in list(packed_layers(model)):
        model.set_submodule(path, layer.to_dense())
