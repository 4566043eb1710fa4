"""Embedding and output head in few bits: rounded to nearest, outside the blocks.

In a small model they are most of the bytes. No inputs are collected for them: a lookup
has none, and the rows of a head are as many as the tokens of the vocabulary.
"""

from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from halve.checkpoint import Workspace, parse_note
from halve.formats import store
from halve.grids import QuantParams, QuantScheme, fit_quant_params, parse_scheme
from halve.options import PruneOptions
from halve.pruning.plan import Plan
from halve.records import MatrixRecord

# Weights rounded at once: bounds the float32 copies.
_SLAB = 2**20


@dataclass(frozen=True)
class _HeadNote:
    """What the ledger holds for a shard outside the blocks."""

    heads: tuple[MatrixRecord, ...] = ()


def quantize_heads(plan: Plan, tensors: dict[str, Tensor]) -> list[dict[str, Any]]:
    """Quantize embedding and head among some tensors, in place.

    Returns:
        Their records, as JSON values.
    """
    records: list[dict[str, Any]] = []
    for name in [name for name in tensors if name in plan.layout.heads]:
        weight = tensors[name]
        scheme = _scheme(plan.options, weight.dtype)
        if scheme is None:
            continue
        params = _round_to_nearest(scheme, weight)
        records.append(asdict(_head_record(name, weight, scheme)))
        if plan.options.packed:
            del tensors[name]
            tensors |= store(name, weight, quant_params=params)
    return records


def _head_record(name: str, weight: Tensor, scheme: QuantScheme) -> MatrixRecord:
    rows, columns = weight.shape
    zeros = weight.numel() - int(weight.count_nonzero())
    sparsity = zeros / weight.numel()
    return MatrixRecord(
        tensor=name,
        rows=rows,
        columns=columns,
        sparsity=sparsity,
        solver="round to nearest",
        grid=asdict(scheme),
        bits=scheme.bits_per_weight(sparsity),
    )


def head_records(plan: Plan, workspace: Workspace) -> tuple[MatrixRecord, ...]:
    """Return the records of a quantized embedding and head from the ledger."""
    block_shards = {block.shard for block in plan.layout.blocks}
    notes = [
        workspace.committed[shard].note
        for shard in plan.layout.shards
        if shard not in block_shards
    ]
    parsed = (parse_note(workspace.folder, _HeadNote, note) for note in notes)
    return tuple(record for note in parsed for record in note.heads)


def _scheme(options: PruneOptions, dtype: torch.dtype) -> QuantScheme | None:
    """Return the grid of embedding and head, None if they are not quantized."""
    if (name := options.head_grid) is None:
        return None
    return parse_scheme(name, options.group_size).exact_in(dtype)


def _round_to_nearest(scheme: QuantScheme, weight: Tensor) -> QuantParams:
    """Round a matrix, in place, to a grid with the least rounding error.

    Args:
        scheme: Bits and groups.
        weight: [rows, columns], of any dtype.

    Cost:
        Some 20 bytes for each of 2^20 weights.
    """
    parts: list[QuantParams] = []
    for rows in weight.split(max(_SLAB // weight.shape[1], 1)):
        parts.append(fit_quant_params(scheme, rows.float()))
        rows.copy_(parts[-1].fake_quantize(rows.float()))
    scale = torch.cat([part.scale for part in parts])
    zero = torch.cat([part.zero for part in parts])
    return QuantParams(scheme, scale, zero)
