"""Packed and quantized matrices seen as the dense matrices that they stand for.

Opening a checkpoint reads headers only, and the layout tensors of such matrices, a few
integers each, without which their dense shapes would be unknown.
"""

from collections.abc import Iterable, Mapping
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from halve.checkpoint.shard import read_tensors
from halve.checkpoint.tensor_info import TensorInfo
from halve.errors import CheckpointError
from halve.formats import (
    FORMATS,
    MAX_LAYOUT,
    STACK,
    Found,
    Reader,
    StoredMatrix,
)

# Dtypes of codes, which are no weights without the scales that belong to them.
_CODES = (torch.float8_e4m3fn, torch.float8_e5m2, torch.float8_e8m0fnu)


def fold_packed(
    folder: Path,
    tensors: Mapping[str, TensorInfo],
    readers: Iterable[Reader] = (),
) -> dict[str, TensorInfo]:
    """Replace the parts of every packed matrix by one header of the dense matrix.

    Args:
        folder: Where the shards are.
        tensors: Name -> header of every stored tensor.
        readers: What finds matrices in addition to the packed formats.

    Raises:
        CheckpointError: A part is missing, a layout is invalid, shapes and dtypes of
            the parts are inconsistent, or there are codes without scales.
        UnsupportedModelError: A matrix is stored in a way that is not read.
    """
    every = [STACK, *FORMATS.values(), *readers]
    packed = {
        found.parts[0]: _with_parts(folder, tensors, found)
        for stored in tensors
        if (found := _find(stored, tensors, every)) is not None
    }
    hidden = _hidden(packed.values())
    packed = {stored: seen for stored, seen in packed.items() if stored not in hidden}
    layouts = _read_layouts(folder, packed.values())
    folded: dict[str, TensorInfo] = {}
    for stored, info in tensors.items():
        if stored in hidden:
            continue
        seen = packed.get(stored)
        dense = info if seen is None else _with_dense_shape(seen, layouts)
        _check_dense(folder, dense, folded)
        folded[dense.name] = dense
    return folded


def describe_packed(folder: Path, info: TensorInfo) -> StoredMatrix:
    """Return a packed matrix on the meta device; only its layout is read."""
    return _on_meta(info, _read_layouts(folder, [info]))


def read_packed(folder: Path, info: TensorInfo) -> StoredMatrix:
    """Return a packed matrix, checked, in newly allocated memory.

    Raises:
        CheckpointError: A shard cannot be read, or the parts are inconsistent.
    """
    assert info.found is not None
    tensors = read_tensors(folder, info.parts)
    packed = info.found.reader.join(info.name, tensors)
    packed.check(info.name)
    return packed


def _find(
    stored: str, tensors: Mapping[str, TensorInfo], readers: Iterable[Reader]
) -> Found | None:
    matches = (reader.find(stored, tensors) for reader in readers)
    return next((found for found in matches if found is not None), None)


def _with_parts(
    folder: Path, tensors: Mapping[str, TensorInfo], found: Found
) -> TensorInfo:
    first = tensors[found.parts[0]]
    parts = tuple(_part(folder, tensors, name) for name in found.parts)
    return replace(first, name=found.name, found=found, parts=parts)


def _part(folder: Path, tensors: Mapping[str, TensorInfo], name: str) -> TensorInfo:
    if name not in tensors:
        raise CheckpointError(
            f"{folder} holds a packed matrix whose part {name} is missing.",
            "Download the checkpoint again.",
        )
    return tensors[name]


def _hidden(packed: Iterable[TensorInfo]) -> set[str]:
    """Return the names of stored tensors that the dense checkpoint does not have."""
    founds = [info.found for info in packed if info.found is not None]
    return {n for found in founds for n in (*found.parts[1:], *found.unused)}


def _read_layouts(folder: Path, packed: Iterable[TensorInfo]) -> dict[str, Tensor]:
    """Return the layout tensors of packed matrices, without those that are too large.

    A format rejects the latter when it finds them without data.
    """
    layouts = [
        part
        for info in packed
        for part in info.parts
        if info.found is not None
        and part.name in info.found.layout
        and part.elements <= MAX_LAYOUT
    ]
    return read_tensors(folder, layouts)


def _on_meta(info: TensorInfo, layouts: dict[str, Tensor]) -> StoredMatrix:
    """Return a packed matrix whose tensors have no data, except for its layout."""
    assert info.found is not None
    parts = {
        part.name: torch.empty(part.shape, dtype=part.dtype, device="meta")
        for part in info.parts
    }
    known = {name: layouts[name] for name in parts if name in layouts}
    return info.found.reader.join(info.name, parts | known)


def _with_dense_shape(info: TensorInfo, layouts: dict[str, Tensor]) -> TensorInfo:
    packed = _on_meta(info, layouts)
    packed.check_shapes(info.name)
    return replace(info, shape=packed.shape, dtype=packed.dtype, label=packed.label)


def _check_dense(
    folder: Path, info: TensorInfo, others: Mapping[str, TensorInfo]
) -> None:
    """Reject a matrix that is stored twice, and codes without scales."""
    if info.name in others:
        raise CheckpointError(
            f"{folder} holds the tensor {info.name} twice, dense and packed.",
            "Download the checkpoint again, into an empty folder.",
        )
    if info.dtype in _CODES:
        kind = str(info.dtype).removeprefix("torch.")
        raise CheckpointError(
            f"Tensor {info.name} of {folder / info.shard} has the dtype {kind}, and no "
            "scales beside it that config.json announces.",
            "Convert the checkpoint to bfloat16 first.",
        )
