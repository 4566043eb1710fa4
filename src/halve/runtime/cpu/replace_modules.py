"""A model of transformers whose packed matrices become sparse layers."""

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from halve.checkpoint import Checkpoint, TensorInfo
from halve.errors import CheckpointError
from halve.formats import Packed
from halve.models import key_renamer
from halve.runtime.cpu.layers import SparseLinear


def install_sparse_layers(model: Any, paths: Iterable[str | Path]) -> None:  # noqa: ANN401
    """Put a sparse layer in the place of every linear layer that is packed in files.

    Args:
        model: One of transformers' models, parameters on the meta device.
        paths: Its safetensors files; only headers are read.

    Raises:
        CheckpointError: A packed tensor that is no linear layer of the model, or of
            another shape.
    """
    checkpoint = Checkpoint.of_files([Path(path) for path in paths])
    rename = key_renamer(model)
    for info in checkpoint.tensors.values():
        if info.parts:
            path, _, leaf = rename(info.name).rpartition(".")
            layer = _linear(model, path if leaf == "weight" else "", info)
            model.set_submodule(path, _sparse(layer, info))


def _linear(model: nn.Module, path: str, info: TensorInfo) -> Any:  # noqa: ANN401
    found = dict(model.named_modules()).get(path)
    if not isinstance(found, nn.Linear | Conv1D):
        raise CheckpointError(
            f"{info.name} is packed, but {type(model).__name__} has no linear layer of "
            "that name.",
            "Use the config.json that belongs to this checkpoint.",
        )
    if tuple(found.weight.shape) != info.shape:
        raise CheckpointError(
            f"{info.name} is packed with the shape {list(info.shape)}, but the config "
            f"asks for {list(found.weight.shape)}.",
            "Use the config.json that belongs to this checkpoint.",
        )
    return found


def _sparse(layer: Any, info: TensorInfo) -> SparseLinear:  # noqa: ANN401
    """Return a sparse layer without data, of the shapes that the files promise.

    Its values are of the model's dtype: what is loaded is converted to that.
    """
    kept, words, starts = (part.shape for part in info.parts[:3])
    values = torch.empty(kept, dtype=layer.weight.dtype, device="meta")
    mask = torch.empty(words, dtype=torch.uint64, device="meta")
    offsets = torch.empty(starts, dtype=info.parts[2].dtype, device="meta")
    transposed = isinstance(layer, Conv1D)
    columns = info.shape[0 if transposed else 1]
    packed = Packed(values, mask, offsets, columns, transposed)
    return SparseLinear(packed, layer.bias)


def sparse_layers(model: nn.Module) -> Iterator[tuple[str, SparseLinear]]:
    """Yield the sparse layers of a model with their names."""
    for name, module in model.named_modules():
        if isinstance(module, SparseLinear):
            yield name, module


def check_layers(model: nn.Module) -> None:
    """Check what was loaded, before any kernel sees it.

    Raises:
        CheckpointError: The parts of a packed matrix contradict each other.
    """
    for name, layer in sparse_layers(model):
        layer.packed.check(f"{name}.weight")
        layer.weight.requires_grad_(False)


def dense_layer(sparse: SparseLinear) -> nn.Module:
    """Return the layer of transformers that a sparse one took the place of."""
    rows, columns = sparse.out_features, sparse.in_features
    with torch.device("meta"):
        dense = Conv1D(rows, columns) if sparse.transposed else nn.Linear(columns, rows)
    dense.weight = nn.Parameter(sparse.packed.unpack(), requires_grad=False)
    dense.register_parameter("bias", sparse.bias)
    return dense


def make_dense(model: nn.Module) -> None:
    """Put dense layers in the place of all sparse ones."""
    for name, sparse in list(sparse_layers(model)):
        model.set_submodule(name, dense_layer(sparse))
