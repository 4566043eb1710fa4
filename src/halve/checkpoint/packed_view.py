"""Packed matrices seen as the dense matrices that they stand for.

Opening a checkpoint reads headers only, and the layout tensors of packed matrices, a
few integers each, without which their dense shapes would be unknown.
"""

from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from halve.checkpoint.shard import read_tensors
from halve.checkpoint.tensor_info import TensorInfo
from halve.errors import CheckpointError
from halve.formats import FORMATS, MAX_LAYOUT, PackedMatrix, recognize


def fold_packed(folder: Path, tensors: dict[str, TensorInfo]) -> dict[str, TensorInfo]:
    """Replace the parts of every packed matrix by one header of the dense matrix.

    Args:
        folder: Where the shards are.
        tensors: Name -> header of every stored tensor.

    Raises:
        CheckpointError: A part is missing, a layout is invalid, or shapes and dtypes of
            the parts are inconsistent.
    """
    packed: dict[str, TensorInfo] = {}
    for name, info in tensors.items():
        if (key := recognize(name, tensors)) is not None:
            ends = FORMATS[key].suffixes(name, tensors)
            parts = (_part(folder, tensors, name + end) for end in ends)
            packed[name] = replace(info, format=key, parts=tuple(parts))
    layouts = _read_layouts(folder, packed.values())
    companions = {part.name for info in packed.values() for part in info.parts[1:]}
    return {
        name: _with_dense_shape(packed[name], layouts) if name in packed else info
        for name, info in tensors.items()
        if name not in companions
    }


def describe_packed(folder: Path, info: TensorInfo) -> PackedMatrix:
    """Return a packed matrix on the meta device; only its layout is read."""
    return _on_meta(info, _read_layouts(folder, [info]))


def read_packed(folder: Path, info: TensorInfo) -> PackedMatrix:
    """Return a packed matrix, checked, in newly allocated memory.

    Raises:
        CheckpointError: A shard cannot be read, or the parts are inconsistent.
    """
    assert info.format is not None
    tensors = read_tensors(folder, info.parts)
    packed = FORMATS[info.format].join(info.name, tensors)
    packed.check(info.name)
    return packed


def _part(folder: Path, tensors: dict[str, TensorInfo], name: str) -> TensorInfo:
    if name not in tensors:
        raise CheckpointError(
            f"{folder} holds a packed matrix whose part {name} is missing.",
            "Download the checkpoint again.",
        )
    return tensors[name]


def _read_layouts(folder: Path, packed: Iterable[TensorInfo]) -> dict[str, Tensor]:
    """Return the layout tensors of packed matrices, without those that are too large.

    A format rejects the latter when it finds them without data.
    """
    layouts = [
        part
        for info in packed
        for part in info.parts
        if info.format is not None
        and part.name.removeprefix(info.name) in FORMATS[info.format].layout
        and part.elements <= MAX_LAYOUT
    ]
    return read_tensors(folder, layouts)


def _on_meta(info: TensorInfo, layouts: dict[str, Tensor]) -> PackedMatrix:
    """Return a packed matrix whose tensors have no data, except for its layout."""
    assert info.format is not None
    parts = {
        part.name: torch.empty(part.shape, dtype=part.dtype, device="meta")
        for part in info.parts
    }
    known = {name: layouts[name] for name in parts if name in layouts}
    return FORMATS[info.format].join(info.name, parts | known)


def _with_dense_shape(info: TensorInfo, layouts: dict[str, Tensor]) -> TensorInfo:
    packed = _on_meta(info, layouts)
    packed.check_shapes(info.name)
    return replace(info, shape=packed.shape, dtype=packed.dtype, label=packed.label)
