"""Replacing the linear layers of a transformers model by packed ones, and back."""

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from halve.checkpoint import Checkpoint, TensorInfo
from halve.errors import CheckpointError
from halve.formats import PackedMatrix
from halve.models import key_renamer
from halve.numerics.threads import single_threaded
from halve.runtime.cpu.layers import EMBEDDINGS, LAYERS
from halve.runtime.cpu.packed_linear import PackedEmbedding, PackedLinear
from halve.runtime.cpu.replace_experts import (
    install_packed_experts,
    make_experts_dense,
)


def install_packed_layers(model: Any, paths: Iterable[str | Path]) -> None:  # noqa: ANN401
    """Replace every linear layer whose weight is packed in the files.

    Experts are replaced module by module; see `install_packed_experts`.

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
    of_experts = install_packed_experts(model, checkpoint)
    for info in checkpoint.tensors.values():
        if info.format is not None and info.name not in of_experts:
            path, _, leaf = rename(info.name).rpartition(".")
            layer = _replaceable(model, path if leaf == "weight" else "", info)
            packed = checkpoint.describe_packed(info.name).to(layer.weight.dtype)
            model.set_submodule(path, _packed_layer(info.format, packed, layer))
            if isinstance(layer, nn.Embedding):
                _install_tied_head(model, info.format, packed)


def _packed_layer(
    format: str, packed: PackedMatrix, layer: nn.Module
) -> PackedLinear | PackedEmbedding:
    if isinstance(layer, nn.Embedding):
        return EMBEDDINGS[format](packed)
    return LAYERS[format](packed, layer.bias)


def _install_tied_head(model: Any, format: str, packed: PackedMatrix) -> None:  # noqa: ANN401
    """Replace an output head that shares the matrix of the embedding.

    Its buffers are in no file, so they are not persistent: transformers would fill them
    with random numbers. `share_tied_heads` sets them when the embedding is loaded.
    """
    if not model.config.get_text_config().tie_word_embeddings:
        return
    head = model.get_output_embeddings()
    path = next(path for path, module in model.named_modules() if module is head)
    tied = LAYERS[format](packed, head.bias)
    for name, _ in list(tied.named_buffers()):
        tied.register_buffer(name, None, persistent=False)
    model.set_submodule(path, tied)


def share_tied_heads(model: Any) -> None:  # noqa: ANN401
    """Let a head that was tied to a packed embedding share its tensors.

    To be called when they are loaded.
    """
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    tied = model.config.get_text_config().tie_word_embeddings
    if tied and isinstance(embedding, PackedEmbedding):
        head.weight = embedding.weight
        for name, buffer in embedding.named_buffers():
            head.register_buffer(name, buffer, persistent=False)


def _replaceable(model: nn.Module, path: str, info: TensorInfo) -> Any:  # noqa: ANN401
    """Return the layer that a packed tensor belongs to."""
    layer: Any = dict(model.named_modules()).get(path)
    is_lookup = type(layer) is nn.Embedding and info.format in EMBEDDINGS
    if not (isinstance(layer, nn.Linear | Conv1D) or is_lookup):
        raise CheckpointError(
            f"{info.name} is packed, but {type(model).__name__} has no linear layer "
            "or embedding of that name that could be packed.",
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
    """Yield path and layer for every packed linear layer of a model."""
    for path, module in model.named_modules():
        if isinstance(module, PackedLinear):
            yield path, module


def packed_modules(
    model: nn.Module,
) -> Iterator[tuple[str, PackedLinear | PackedEmbedding]]:
    """Yield path and module for every packed layer and embedding of a model."""
    for path, module in model.named_modules():
        if isinstance(module, PackedLinear | PackedEmbedding):
            yield path, module


def check_layers(model: nn.Module) -> None:
    """Check what was loaded, before any kernel reads it.

    A process may load a model and then fork, so no thread may be left behind.

    Raises:
        CheckpointError: The parts of a packed matrix are inconsistent.
    """
    share_tied_heads(model)
    with single_threaded():
        for path, layer in packed_modules(model):
            _checkable(layer.packed).check(f"{path}.weight")
            # transformers makes every parameter that it loads trainable.
            layer.weight.requires_grad_(False)


def _checkable(packed: PackedMatrix) -> PackedMatrix:
    """Return a matrix in a dtype that files have: float64 was converted on loading."""
    return packed.to(torch.float32) if packed.dtype == torch.float64 else packed


def make_dense(model: Any) -> None:  # noqa: ANN401
    """Replace all packed layers by dense ones, tied as before."""
    make_experts_dense(model)
    _unpack(model, list(packed_modules(model)))


def use_device_kernels(model: Any) -> bool:  # noqa: ANN401
    """Prepare packed layers for the kernels of their devices; unpack the others.

    The layers on a GPU whose kernels cannot run become dense, with a HalveWarning.

    Args:
        model: A transformers model whose weights have been checked.

    Returns:
        Whether packed layers are left on the CPU, which has kernels of its own.
    """
    for _, layer in packed_modules(model):
        layer.prepare_device()
    make_experts_dense(model, unsupported=True)
    layers = packed_modules(model)
    _unpack(model, [(path, layer) for path, layer in layers if not layer.is_supported])
    return any(layer.weight.device.type == "cpu" for _, layer in packed_modules(model))


def _unpack(
    model: Any,  # noqa: ANN401
    layers: list[tuple[str, PackedLinear | PackedEmbedding]],
) -> None:
    for path, layer in layers:
        model.set_submodule(path, layer.to_dense())
    if layers:
        model.tie_weights()
