"""Bytes of tensors: as a checkpoint stores them, and as they are in memory."""

from collections.abc import Iterable, Iterator
from math import prod

from halve.checkpoint import TensorInfo
from halve.layout import PlannedBlock, PlannedMatrix
from halve.numerics.matmul import HALF_DTYPES
from halve.pruning.memory.workload import Workload
from halve.pruning.plan import Plan
from halve.runtime.blockwise_model import loaded_dtype


def weights_nbytes(work: Workload, block: PlannedBlock) -> int:
    """Return the bytes of a block's weights as `BlockwiseModel.block` loads them.

    Of those that are spilled, one tensor is in memory at a time.
    """
    layout = work.plan.layout
    plain = {m.tensor for m in block.matrices if m.matrix.plain}
    spilled = work.spilled_tensors(block)

    def nbytes(name: str) -> int:
        info = layout.tensors[name]
        dtype = loaded_dtype(info.dtype, widen=name not in plain)
        return prod(info.shape) * dtype.itemsize

    held = sum(nbytes(n) for n in layout.shards[block.shard] if n not in spilled)
    return held + max(map(nbytes, spilled), default=0)


def stored_nbytes(plan: Plan, block: PlannedBlock) -> int:
    """Return the bytes of a block's shard."""
    names = plan.layout.shards[block.shard]
    return sum(plan.layout.tensors[name].nbytes for name in names)


def codes_nbytes(plan: Plan, block: PlannedBlock) -> int:
    """Return the bytes, as stored, of the largest quantized tensor of a block."""
    infos = (plan.input_layout.tensors[n] for n in plan.layout.shards[block.shard])
    return max((info.stored_bytes for info in infos if info.found), default=0)


def cut_nbytes(plan: Plan, block: PlannedBlock) -> int:
    """Return the bytes of a block's tensors that are cut out of larger ones.

    Those are in memory as well while they are read.
    """
    before, after = plan.input_layout.tensors, plan.layout.tensors
    names = plan.layout.shards[block.shard]
    return sum(after[n].nbytes for n in names if after[n].shape != before[n].shape)


def outside_nbytes(plan: Plan) -> int:
    """Return the bytes of the largest tensor outside the blocks.

    It is in memory as it is stored and, if it is computed with, in float32 as well; if
    it is quantized, as codes, which take half of it at most.
    """
    unread = plan.layout.unread
    heads = plan.layout.heads if plan.options.head_grid else ()
    return max(
        (
            info.nbytes
            + (info.name not in unread) * 4 * info.elements
            + (info.name in heads) * info.nbytes // 2
            for info in outside_blocks(plan)
        ),
        default=0,
    )


def outside_blocks(plan: Plan) -> Iterator[TensorInfo]:
    """Yield the headers of the tensors outside the blocks."""
    block_shards = {block.shard for block in plan.layout.blocks}
    for shard, names in plan.layout.shards.items():
        if shard not in block_shards:
            yield from (plan.layout.tensors[name] for name in names)


def narrow_elements(plan: Plan, planned: PlannedMatrix) -> int:
    """Return the weights of a matrix if it has 16 bits in memory; else 0."""
    narrow = plan.layout.tensors[planned.tensor].dtype in HALF_DTYPES
    return (narrow and planned.matrix.plain) * planned.elements


def count_elements(plan: Plan, names: Iterable[str]) -> int:
    """Return the numbers in tensors of the checkpoint."""
    return sum(prod(plan.layout.tensors[name].shape) for name in names)
