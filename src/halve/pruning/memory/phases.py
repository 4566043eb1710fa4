"""Memory of a run, phase by phase.

Every formula belongs to the class or function that takes the memory; here they are only
added up. A phase lists what is in memory beside the process itself and the hidden
states between blocks.
"""

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, replace

from halve.calibration_stats import CrossGram, GramMatrix
from halve.layout import PlannedBlock, PlannedMatrix
from halve.numerics.matmul import widening_nbytes
from halve.pruning.importance import importance_nbytes
from halve.pruning.memory.solving import solving_cost
from halve.pruning.memory.weights import (
    codes_nbytes,
    count_elements,
    cut_nbytes,
    narrow_elements,
    outside_blocks,
    outside_nbytes,
    stored_nbytes,
    weights_nbytes,
)
from halve.pruning.memory.workload import Workload
from halve.pruning.observe.activation_cache import ActivationCache
from halve.pruning.observe.expert_statistics import routed_nbytes
from halve.pruning.observe.held_out import HeldOut
from halve.pruning.observe.input_groups import (
    MAX_GROUPS_PER_STAGE,
    RoutedGroup,
    expected_groups,
    routed_groups,
)
from halve.pruning.observe.routing import rows_nbytes
from halve.pruning.plan import Plan
from halve.pruning.tune.block_reconstruction import tuning_nbytes
from halve.runtime.blockwise_model import loaded_dtype
from halve.runtime.prediction_gradient import GRADIENT_COPIES, GRADIENT_TOKENS
from halve.runtime.stream import Stream

# The only use of memory that is the host's where a GPU computes.
FILES = "files"


@dataclass(frozen=True)
class Phase:
    """What is in memory at one time.

    Attributes:
        name: Name of the phase.
        parts: Use of the memory -> bytes.
        has_activations: Whether hidden states and cached inputs are in memory as well.
        activations: Those of the phase, where it has others than the rest of the run;
            see `Forecast.activations`.
    """

    name: str
    parts: dict[str, int]
    has_activations: bool = True
    activations: tuple[tuple[int, int], ...] | None = None

    @property
    def bytes(self) -> int:
        """Bytes of all parts."""
        return sum(self.parts.values())


def all_phases(work: Workload) -> Iterator[Phase]:
    """Yield the phases of a run in turn, block after block."""
    yield Phase("embedding", {"embeddings": outside_nbytes(work.plan)})
    yield from _choosing_experts(work)
    yield from _weighing_rows(work)
    for block in work.blocks:
        yield from _reading(work, block)
        yield _collecting(work, block)
        for columns in sorted(work.deferred_groups(block)):
            yield _summing(work, block, columns)
        for matrix in {m.matrix.shape: m for m in block.outside_experts}.values():
            yield _solving(work, block, matrix)
        for group in routed_groups(block):
            yield _observing_expert(work, block, group)
            for matrix in {m.matrix.shape: m for m in group.experts[0]}.values():
                yield _solving_expert(work, block, group, matrix)
        if work.plan.options.refine:
            yield _refining(work, block)
        yield _writing(work, block)


def host_phases(plan: Plan) -> Iterator[Phase]:
    """Yield what a run on a GPU takes of the host's memory, block after block.

    Everything is computed on the GPU. The host holds a block as it was read, on its way
    to the GPU; and its shard on the way back, serialised, and read back to verify it.
    """
    yield Phase("embedding", {"embeddings": outside_nbytes(plan)})
    for block in plan.input_layout.blocks if plan.dropping else ():
        yield Phase("reading", {"weights": stored_nbytes(plan.before_dropping, block)})
    for block in plan.layout.blocks:
        stored = stored_nbytes(plan, block)
        codes = codes_nbytes(plan, block)
        yield Phase("reading", {"weights": stored, FILES: codes})
        yield Phase("writing", {FILES: 3 * stored})


def _choosing_experts(work: Workload) -> Iterator[Phase]:
    """Yield the phases in which the experts that a block keeps are chosen."""
    if work.plan.dropping is None:
        return
    whole = replace(work, plan=work.plan.before_dropping)
    for block, fewer in zip(whole.blocks, work.blocks, strict=True):
        rows = (rows_nbytes(g, work.plan.tokens, False) for g in routed_groups(block))
        options = work.plan.options
        held_out = options.held_out * (options.seq_len or 0)
        yield Phase(
            "choosing experts",
            {
                "weights": weights_nbytes(whole, block),
                FILES: codes_nbytes(whole.plan, block),
                "kept experts": cut_nbytes(work.plan, fewer),
                "activations": whole.batch_nbytes(block) + max(rows, default=0),
                "held-out outputs": Stream.nbytes(held_out, work.plan.width),
            },
        )


def _reading(work: Workload, block: PlannedBlock) -> Iterator[Phase]:
    """Yield the phase in which a block is read, if its matrices are quantized.

    Codes and scales of a matrix are in memory as well until it is dense.
    """
    if codes := codes_nbytes(work.plan, block):
        weights = weights_nbytes(work, block)
        yield Phase("reading", {"weights": weights, FILES: codes})


def _collecting(work: Workload, block: PlannedBlock) -> Phase:
    """Return the phase in which windows run through the block."""
    narrow = max(narrow_elements(work.plan, m) for m in block.matrices)
    groups = expected_groups(block)
    together = groups - Counter(work.deferred_groups(block))
    grams = (_statistics_nbytes(work, block, c, running=True) for c in together)
    return Phase(
        "collecting",
        {
            "weights": weights_nbytes(work, block),
            "float32 copy": widening_nbytes(narrow),
            "grams": max(grams, default=0),
            "activations": work.batch_nbytes(block),
        },
    )


def _weighing_rows(work: Workload) -> Iterator[Phase]:
    """Yield the phases in which the importance of rows is measured."""
    options = work.plan.options
    if not options.row_samples or work.plan.layout.has_experts or not work.runs_text:
        return
    plan, parts = work.plan, work.plan.activation_parts
    tokens = min(options.row_samples, options.samples) * (options.seq_len or 0)
    nbytes, depth = Stream.nbytes(tokens, plan.width), len(work.blocks)
    kept = ((nbytes, parts), *((nbytes, parts * depth) for _ in work.blocks))
    yield Phase(
        "predicting",
        {
            "embeddings": sum(info.nbytes for info in outside_blocks(plan)),
            # Of the head, which autograd keeps.
            "float32 copies": 4 * plan.vocabulary * plan.width,
            "logits": 4 * GRADIENT_COPIES * GRADIENT_TOKENS * plan.vocabulary,
            "gradients": nbytes,
        },
        activations=kept,
    )
    for block in work.blocks:
        narrow = sum(narrow_elements(plan, m) for m in block.matrices)
        uses = importance_nbytes(narrow, work.batch_nbytes(block))
        uses |= {"weights": weights_nbytes(work, block), "gradients": nbytes}
        yield Phase("weighing rows", uses, activations=kept)


def _summing(work: Workload, block: PlannedBlock, columns: int) -> Phase:
    """Return the phase in which deferred inputs are summed, a batch at a time."""
    return Phase(
        "summing",
        {
            "weights": weights_nbytes(work, block),
            "grams": _statistics_nbytes(work, block, columns, running=True),
            "activations": ActivationCache.nbytes(work.batch_tokens, columns),
        },
    )


def _solving(work: Workload, block: PlannedBlock, planned: PlannedMatrix) -> Phase:
    """Return the phase in which one matrix is solved."""
    cost = solving_cost(work.solvers, work.needs, planned, work.corrects)
    # A solver widens a matrix of 16 bits as a whole. Corrected targets are computed in
    # float32 in any case, and counted by `solving_cost`.
    widens = not work.corrects and any(solver.widens for solver in work.solvers)
    columns = planned.matrix.shape[1]
    return Phase(
        "solving",
        {
            "weights": weights_nbytes(work, block),
            "float32 copy": 4 * widens * narrow_elements(work.plan, planned),
            "grams": _statistics_nbytes(work, block, columns, running=False),
            "factors": cost.factors,
            "matrices": cost.matrices,
        },
    )


def _observing_expert(work: Workload, block: PlannedBlock, group: RoutedGroup) -> Phase:
    """Return the phase in which the inputs of one expert are summed."""
    narrow = max(narrow_elements(work.plan, m) for m in group.experts[0])
    grams = routed_nbytes(group, True, work.corrects) * work.needs_grams
    return Phase(
        "observing an expert",
        {
            "weights": weights_nbytes(work, block),
            "float32 copy": widening_nbytes(narrow),
            "grams": grams + work.adding_nbytes(max(group.columns, group.inner)),
            "activations": work.runs_text
            * rows_nbytes(group, work.plan.tokens, work.corrects),
        },
    )


def _solving_expert(
    work: Workload, block: PlannedBlock, group: RoutedGroup, planned: PlannedMatrix
) -> Phase:
    """Return the phase in which one matrix of an expert is solved."""
    cost = solving_cost(work.solvers, work.needs, planned, work.corrects)
    widens = not work.corrects and any(solver.widens for solver in work.solvers)
    return Phase(
        "solving an expert",
        {
            "weights": weights_nbytes(work, block),
            "float32 copy": 4 * widens * narrow_elements(work.plan, planned),
            "grams": routed_nbytes(group, False, work.corrects) * work.needs_grams,
            "factors": cost.factors,
            "matrices": cost.matrices,
        },
    )


def _refining(work: Workload, block: PlannedBlock) -> Phase:
    """Return the phase of block reconstruction."""
    parts = tuning_nbytes(
        parameters=count_elements(work.plan, work.plan.layout.shards[block.shard]),
        weights=sum(matrix.elements for matrix in block.matrices),
        batch=work.batch_nbytes(block),
    )
    return Phase("refining", {"weights": weights_nbytes(work, block), **parts})


def _writing(work: Workload, block: PlannedBlock) -> Phase:
    """Return the phase in which a shard is written, and read back to verify it.

    Tensors are in memory once more where they are converted or packed. They are read
    back one at a time.
    """
    layout = work.plan.layout
    plain = {m.tensor for m in block.matrices if m.matrix.plain}
    stored = {name: layout.tensors[name] for name in layout.shards[block.shard]}
    copied = sum(
        info.nbytes
        for name, info in stored.items()
        if work.plan.options.packed
        or loaded_dtype(info.dtype, widen=name not in plain) != info.dtype
    )
    files = copied + max(info.nbytes for info in stored.values())
    return Phase("writing", {"weights": weights_nbytes(work, block), FILES: files})


def _statistics_nbytes(
    work: Workload, block: PlannedBlock, columns: int, running: bool
) -> int:
    """Return the bytes of all statistics in memory when a group is summed or solved.

    Args:
        work: The run.
        block: The block.
        columns: Columns of the group.
        running: Whether batches are still added.
    """
    if not work.needs_grams:
        return 0
    adding = running * work.adding_nbytes(columns)
    if work.corrects:
        return _stage_nbytes(work, block, columns, running) + adding
    # Statistics are freed once their group is solved. The widest group is usually the
    # last one, so those that are at least as wide are in memory; a deferred group is
    # alone. The temporaries in `adding` are an upper bound that covers the low parts of
    # the diagonal tiles as well.
    wide = work.deferred_groups(block)
    rest = (expected_groups(block) - Counter(wide)).elements()
    together = [columns] if columns in wide else [c for c in rest if c >= columns]
    return sum(GramMatrix.nbytes(c, running=False) for c in together) + adding


def _stage_nbytes(
    work: Workload, block: PlannedBlock, columns: int, running: bool
) -> int:
    """Return the bytes of the statistics of a stage of groups of this width."""
    options = work.plan.options
    held_out = options.held_out * (options.seq_len or 0)
    shapes = [matrix.matrix.shape for matrix in block.outside_experts]
    rows = sum(height for height, width in shapes if width == columns)
    group = (
        GramMatrix.nbytes(columns, running)
        + CrossGram.nbytes(rows, columns, running)
        + HeldOut.nbytes(held_out, columns)
    )
    return min(expected_groups(block)[columns], MAX_GROUPS_PER_STAGE) * group
