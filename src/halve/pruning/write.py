"""Write shards: what a block's shard holds, its verification, and its record.

A shard is read back from disk before it is committed. The record of a block therefore
describes the bytes in the file, not the tensors that were meant to be written.
"""

from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from halve.checkpoint import Checkpoint, Workspace
from halve.errors import TargetMissedError
from halve.grids import QuantParams
from halve.layout import (
    PlannedBlock,
    PlannedMatrix,
    group_by_tensor,
    pack_tensor,
)
from halve.pruning.plan import Plan
from halve.pruning.prune_block import PrunedBlock
from halve.pruning.quantize_head import quantize_heads
from halve.pruning.select.selection import Selected
from halve.records import BlockRecord, MatrixRecord
from halve.runtime.blockwise_model import BlockwiseModel


def write_outside_blocks(
    plan: Plan, model: BlockwiseModel, workspace: Workspace
) -> None:
    """Commit the shards that hold no block, unless committed already.

    They are unchanged, except for an embedding and a head that are quantized.

    Raises:
        NumericalError: A tensor contains NaN or infinity.
    """
    block_shards = {block.shard for block in plan.layout.blocks}
    for shard, names in plan.layout.shards.items():
        if shard not in block_shards and shard not in workspace.committed:
            tensors = model.checkpoint.read(names)
            for name, tensor in tensors.items():
                model.check_finite(name, tensor)
            heads = quantize_heads(plan, tensors)
            workspace.commit(shard, tensors, lambda path, h=heads: {"heads": h})


def write_block(
    plan: Plan,
    model: BlockwiseModel,
    workspace: Workspace,
    planned: PlannedBlock,
    pruned: PrunedBlock,
) -> None:
    """Write the shard of a pruned block, verify it, and commit it with its record.

    Raises:
        TargetMissedError: A matrix in the file does not satisfy its pattern or its
            quantization grid. Nothing is committed then.
    """
    names = plan.layout.shards[planned.shard]
    unchanged = [name for name in names if name not in pruned.tensors]
    tensors = model.checkpoint.read(unchanged)
    tensors |= _stored_tensors(planned, pruned, plan.options.packed)
    workspace.commit(
        planned.shard, tensors, lambda path: _verify(planned, pruned, path)
    )


def _stored_tensors(
    planned: PlannedBlock, pruned: PrunedBlock, packed: bool
) -> dict[str, Tensor]:
    """Return the changed tensors of a block as its file holds them, packed if asked."""
    tensors = dict(pruned.tensors)

    def params(matrix: PlannedMatrix, weight: Tensor) -> QuantParams | None:
        return _params_for(pruned.selected_by_name[matrix.name], weight)

    if packed:
        for name, matrices in group_by_tensor(planned.matrices).items():
            tensors |= pack_tensor(tensors.pop(name), matrices, params)
    return tensors


def _params_for(selected: Selected, weight: Tensor) -> QuantParams | None:
    """Return the grid of a solution on the device of the weights to be read or stored.

    Solvers leave it where they ran, which may be a GPU; files are read to the CPU.
    """
    params = selected.solution.quant_params
    return params and params.to(weight.device)


def _verify(planned: PlannedBlock, pruned: PrunedBlock, path: Path) -> dict[str, Any]:
    """Read a written shard back and return the block's record as JSON values.

    Raises:
        TargetMissedError: See `write_block`.
    """
    written = Checkpoint.of_files([path])
    records: dict[str, MatrixRecord] = {}
    for tensor, matrices in group_by_tensor(planned.matrices).items():
        records |= _checked_records(written, tensor, matrices, pruned)
    refined = pruned.refined and (pruned.refined.before, pruned.refined.after)
    record = BlockRecord(
        name=planned.name,
        matrices=tuple(records[matrix.name] for matrix in planned.matrices),
        error=pruned.error and pruned.error.overall,
        token_error=pruned.error and pruned.error.by_token,
        seconds=pruned.seconds,
        refined=refined,
        expert_tokens=pruned.expert_tokens,
    )
    return asdict(record)


def _checked_records(
    written: Checkpoint,
    tensor: str,
    matrices: list[PlannedMatrix],
    pruned: PrunedBlock,
) -> dict[str, MatrixRecord]:
    """Read a tensor back, check its matrices, and return their records by name.

    The tensor may be all experts of a block; it is released before the next is read.
    """
    value = written.read([tensor])[tensor]
    path = written.folder / written.tensors[tensor].shard
    return {
        matrix.name: _checked_record(
            path,
            matrix,
            pruned.selected_by_name[matrix.name],
            matrix.as_rows(value),
        )
        for matrix in matrices
    }


def _checked_record(
    path: Path, matrix: PlannedMatrix, selected: Selected, weight: Tensor
) -> MatrixRecord:
    """Check a matrix, given as read back, [rows, columns]; return its record."""
    if (shortfall := _shortfall(selected, weight)) is not None:
        raise TargetMissedError(
            f"{matrix.name} in {path} misses its target: {shortfall}.",
            "This is a bug in Halve; report it with the name of the model.",
        )
    rows, columns = matrix.matrix.shape
    sparsity = (weight.numel() - int(weight.count_nonzero())) / weight.numel()
    grid = selected.candidate.grid
    return MatrixRecord(
        tensor=matrix.name,
        rows=rows,
        columns=columns,
        sparsity=sparsity,
        error=selected.outcome.error,
        damping=selected.outcome.damping,
        solver=selected.candidate.name,
        held_out=selected.held_out,
        runner_up=selected.runner_up,
        grid=grid and asdict(grid),
        bits=grid and grid.bits_per_weight(sparsity),
        pattern=str(selected.candidate.pattern),
    )


def _shortfall(selected: Selected, weight: Tensor) -> str | None:
    """Return how a stored matrix, [rows, columns], misses its target; None if not."""
    quant_params = _params_for(selected, weight)
    if quant_params is not None and not torch.equal(
        quant_params.fake_quantize_kept(weight.float()), weight.float()
    ):
        return "some values are not on its quantization grid"
    return selected.candidate.pattern.shortfall(weight)
