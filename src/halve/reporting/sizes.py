"""Bytes of the tensors of an output, counted in the headers of its files."""

import re
from collections import Counter
from collections.abc import Iterator
from math import prod
from pathlib import Path

from safetensors import SafetensorError, safe_open

from halve.errors import CheckpointError
from halve.records import OutputRecord, PackRecord, PruneRecord, RecoverRecord
from halve.records.stored import REMEDY
from halve.reporting.facts import Parts, Sizes

_BITS = re.compile(r"[A-Z]+(\d+)")
# Of names of tensors: the number of a block; an expert's place in a tensor of many.
_IN_BLOCK = re.compile(r"(^|\.)\d+\.")
_SLICE = re.compile(r"\[\d+\]")


def measure_sizes(
    folder: Path, record: OutputRecord, pruned: PruneRecord | None
) -> Sizes:
    """Count the bytes of an output, and of the same model when dense.

    Args:
        folder: The output.
        record: Its record.
        pruned: How it was pruned, if that is recorded.

    Raises:
        CheckpointError: A header cannot be read.
    """
    stored = _stored(folder, record)
    prunable = sum(m.rows * m.columns for m in record.all_matrices)
    dense = (
        _dense_of_packed(stored, record)
        if isinstance(record, PackRecord | RecoverRecord)
        else _dense_of_pruned(stored, record, prunable)
    )
    return Sizes(stored, dense, prunable)


def _stored(folder: Path, record: OutputRecord) -> Parts:
    matrices = {_SLICE.sub("", m.tensor) for m in record.all_matrices}
    heads = {m.tensor for m in record.heads}
    counts: Counter[str] = Counter()
    for shard in record.shards:
        for name, shape, dtype in _headers(folder / shard):
            part = _part(name, len(shape), matrices, heads)
            counts[part] += prod(shape) * _bits(dtype) // 8
    return Parts(counts["embeddings"], counts["matrices"], counts["rest"])


def _part(name: str, dimensions: int, matrices: set[str], heads: set[str]) -> str:
    """Return which of the `Parts` a tensor belongs to.

    A packed matrix P consists of P itself and of tensors P_mask, P_scales ...
    """
    names = {name, name.rpartition("_")[0]}
    if names & matrices:
        return "matrices"
    outside = dimensions > 1 and not _IN_BLOCK.search(name)
    return "embeddings" if outside or names & heads else "rest"


def _headers(path: Path) -> Iterator[tuple[str, list[int], str]]:
    """Yield name, shape and dtype of every tensor in a file."""
    try:
        with safe_open(path, framework="numpy") as file:
            for name in file.keys():  # noqa: SIM118  (it is no dictionary)
                view = file.get_slice(name)
                yield name, view.get_shape(), view.get_dtype()
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"{path} cannot be read ({error}).", REMEDY) from error


def _bits(dtype: str) -> int:
    match = _BITS.match(dtype)
    return int(match[1]) if match else 8  # BOOL takes a byte


def _dense_of_packed(stored: Parts, record: PackRecord | RecoverRecord) -> Parts:
    heads = sum(m.dense_bytes - m.stored_bytes for m in record.heads)
    return Parts(stored.embeddings + heads, record.dense_bytes, stored.rest)


def _dense_of_pruned(stored: Parts, record: PruneRecord, prunable: int) -> Parts | None:
    """Return the sizes of the dense model, if it has one dtype or its files are dense.

    Pruning keeps dtypes, so an output that is not packed has the dense model's sizes.
    """
    if not record.identity.get("packed"):
        return stored
    model = record.model
    if model is None or not model.bytes or model.bytes % model.parameters:
        return None
    matrices = prunable * (model.bytes // model.parameters)
    return Parts(model.bytes - matrices - stored.rest, matrices, stored.rest)
