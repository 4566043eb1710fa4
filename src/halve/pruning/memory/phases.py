"""Memory of a run, phase by phase.

Every formula belongs to the class or function that takes the memory; here they are only
added up. A phase lists what is in memory beside the process itself and the hidden
states between blocks.
"""

from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from functools import reduce
from math import prod
from operator import or_

from halve.calibration_stats import MAX_TILE, CrossGram, GramMatrix, adding_nbytes
from halve.checkpoint import TensorInfo
from halve.layout import PlannedBlock, PlannedMatrix
from halve.numerics.matmul import HALF_DTYPES, widening_nbytes
from halve.pruning.importance import importance_nbytes
from halve.pruning.memory.solving import solving_cost
from halve.pruning.observe.activation_cache import ActivationCache, is_wide
from halve.pruning.observe.held_out import HeldOut
from halve.pruning.observe.input_groups import (
    MAX_GROUPS_PER_STAGE,
    RoutedGroup,
    expected_groups,
    routed_groups,
)
from halve.pruning.observe.routing import kept_columns, routed_nbytes, rows_nbytes
from halve.pruning.plan import Plan
from halve.pruning.tune.block_reconstruction import tuning_nbytes
from halve.runtime.blockwise_model import (
    BATCH_TOKENS,
    loaded_dtype,
    windows_per_batch,
)
from halve.runtime.prediction_gradient import GRADIENT_COPIES, GRADIENT_TOKENS
from halve.runtime.stream import Stream
from halve.solvers import Needs, Solver
from halve.solvers.hessian import all_needs

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


@dataclass(frozen=True)
class Workload:
    """A plan, and what follows from it for memory and operations.

    Attributes:
        plan: The run.
        solvers: Solvers of the candidates.
        deferred: See `MemoryPlan`.
        spilled: See `MemoryPlan`.
        batch_limit: Tokens in a batch, unless one window has more.
        tile: Rows of the largest tile or strip that is added to a sum at once.
    """

    plan: Plan
    solvers: list[Solver]
    deferred: bool
    spilled: bool = False
    batch_limit: int = BATCH_TOKENS
    tile: int = MAX_TILE

    @property
    def blocks(self) -> tuple[PlannedBlock, ...]:
        """All blocks of the model."""
        return self.plan.layout.blocks

    @property
    def corrects(self) -> bool:
        """Whether targets are corrected, so that groups are solved stage by stage."""
        return self.plan.options.corrects

    def experts_per_token(self, group: RoutedGroup) -> int:
        """Return to how many experts of a group each token is sent."""
        return min(self.plan.experts_per_token or 1, len(group.experts))

    @property
    def needs(self) -> Needs:
        """What solvers and corrections together read of the inputs."""
        needs = reduce(or_, (solver.needs for solver in self.solvers))
        return all_needs(needs, self.corrects, self.plan.options.diagonal_ridge)

    @property
    def needs_grams(self) -> bool:
        """Whether Gram matrices are computed; vectors of norms count as nothing."""
        return self.needs.statistic is GramMatrix

    @property
    def runs_text(self) -> bool:
        """Whether windows run through the model at all."""
        options = self.plan.options
        return options.has_dense or options.held_out > 0 or bool(self.needs)

    @property
    def batch_tokens(self) -> int:
        """Tokens in one batch."""
        length = self.plan.options.seq_len or 1
        windows = windows_per_batch(length, self.batch_limit)
        return min(windows * length, self.plan.tokens)

    def adding_nbytes(self, columns: int) -> int:
        """Return the bytes that adding a batch to a sum takes for a while, at most.

        `calibration_stats.adding_nbytes` is for tiles of MAX_TILE rows.
        """
        usual = max(min(columns, MAX_TILE), 1)
        return adding_nbytes(columns) // usual * max(min(columns, self.tile), 1)

    def deferred_groups(self, block: PlannedBlock) -> list[int]:
        """Return the columns of each group whose inputs are deferred."""
        if not self.deferred or self.corrects or not self.needs_grams:
            return []
        columns = expected_groups(block).elements()
        return [c for c in columns if is_wide(c, self.plan.width)]

    def deferred_nbytes(self) -> int:
        """Return the bytes of deferred inputs in the block that has the most."""
        columns = max(sum(self.deferred_groups(block)) for block in self.blocks)
        return ActivationCache.nbytes(self.plan.tokens, columns)

    def spilled_tensors(self, block: PlannedBlock) -> set[str]:
        """Return the tensors of a block's experts if they are spilled."""
        if not self.spilled:
            return set()
        return {m.tensor for m in block.matrices if m.matrix.expert is not None}

    def spilled_nbytes(self, block: PlannedBlock) -> int:
        """Return the bytes of a block's spilled experts, and of what runs them in turn.

        That is their inputs and outputs for all windows.
        """
        tensors = self.plan.layout.tensors
        weights = sum(tensors[name].nbytes for name in self.spilled_tensors(block))
        kept = kept_columns(block) * bool(weights) * self.runs_text
        return weights + 2 * ActivationCache.nbytes(self.plan.tokens, kept)


def all_phases(work: Workload) -> Iterator[Phase]:
    """Yield the phases of a run in turn, block after block."""
    yield Phase("embedding", {"embeddings": _outside_nbytes(work.plan)})
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
    yield Phase("embedding", {"embeddings": _outside_nbytes(plan)})
    for block in plan.input_layout.blocks if plan.dropping else ():
        yield Phase("reading", {"weights": _stored_nbytes(plan.before_dropping, block)})
    for block in plan.layout.blocks:
        stored = _stored_nbytes(plan, block)
        codes = _codes_nbytes(plan, block)
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
                "weights": _weights_nbytes(whole, block),
                FILES: _codes_nbytes(whole.plan, block),
                "kept experts": _cut_nbytes(work.plan, fewer),
                "activations": _batch_nbytes(whole, block) + max(rows, default=0),
                "held-out outputs": Stream.nbytes(held_out, work.plan.width),
            },
        )


def _cut_nbytes(plan: Plan, block: PlannedBlock) -> int:
    """Return the bytes of a block's tensors that are cut out of larger ones.

    Those are in memory as well while they are read.
    """
    before, after = plan.input_layout.tensors, plan.layout.tensors
    names = plan.layout.shards[block.shard]
    return sum(after[n].nbytes for n in names if after[n].shape != before[n].shape)


def _reading(work: Workload, block: PlannedBlock) -> Iterator[Phase]:
    """Yield the phase in which a block is read, if its matrices are quantized.

    Codes and scales of a matrix are in memory as well until it is dense.
    """
    if codes := _codes_nbytes(work.plan, block):
        weights = _weights_nbytes(work, block)
        yield Phase("reading", {"weights": weights, FILES: codes})


def _codes_nbytes(plan: Plan, block: PlannedBlock) -> int:
    """Return the bytes, as stored, of the largest quantized tensor of a block."""
    infos = (plan.input_layout.tensors[n] for n in plan.layout.shards[block.shard])
    return max((info.stored_bytes for info in infos if info.found), default=0)


def _collecting(work: Workload, block: PlannedBlock) -> Phase:
    """Return the phase in which windows run through the block."""
    narrow = max(_narrow_elements(work.plan, m) for m in block.matrices)
    groups = expected_groups(block)
    together = groups - Counter(work.deferred_groups(block))
    grams = (_statistics_nbytes(work, block, c, running=True) for c in together)
    return Phase(
        "collecting",
        {
            "weights": _weights_nbytes(work, block),
            "float32 copy": widening_nbytes(narrow),
            "grams": max(grams, default=0),
            "activations": _batch_nbytes(work, block),
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
            "embeddings": sum(info.nbytes for info in _outside_blocks(plan)),
            # Of the head, which autograd keeps.
            "float32 copies": 4 * plan.vocabulary * plan.width,
            "logits": 4 * GRADIENT_COPIES * GRADIENT_TOKENS * plan.vocabulary,
            "gradients": nbytes,
        },
        activations=kept,
    )
    for block in work.blocks:
        narrow = sum(_narrow_elements(plan, m) for m in block.matrices)
        uses = importance_nbytes(narrow, _batch_nbytes(work, block))
        uses |= {"weights": _weights_nbytes(work, block), "gradients": nbytes}
        yield Phase("weighing rows", uses, activations=kept)


def _summing(work: Workload, block: PlannedBlock, columns: int) -> Phase:
    """Return the phase in which deferred inputs are summed, a batch at a time."""
    return Phase(
        "summing",
        {
            "weights": _weights_nbytes(work, block),
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
            "weights": _weights_nbytes(work, block),
            "float32 copy": 4 * widens * _narrow_elements(work.plan, planned),
            "grams": _statistics_nbytes(work, block, columns, running=False),
            "factors": cost.factors,
            "matrices": cost.matrices,
        },
    )


def _observing_expert(work: Workload, block: PlannedBlock, group: RoutedGroup) -> Phase:
    """Return the phase in which the inputs of one expert are summed."""
    narrow = max(_narrow_elements(work.plan, m) for m in group.experts[0])
    grams = routed_nbytes(group, True, work.corrects) * work.needs_grams
    return Phase(
        "observing an expert",
        {
            "weights": _weights_nbytes(work, block),
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
            "weights": _weights_nbytes(work, block),
            "float32 copy": 4 * widens * _narrow_elements(work.plan, planned),
            "grams": routed_nbytes(group, False, work.corrects) * work.needs_grams,
            "factors": cost.factors,
            "matrices": cost.matrices,
        },
    )


def _refining(work: Workload, block: PlannedBlock) -> Phase:
    """Return the phase of block reconstruction."""
    parts = tuning_nbytes(
        parameters=_elements(work.plan, work.plan.layout.shards[block.shard]),
        weights=sum(matrix.elements for matrix in block.matrices),
        batch=_batch_nbytes(work, block),
    )
    return Phase("refining", {"weights": _weights_nbytes(work, block), **parts})


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
    return Phase("writing", {"weights": _weights_nbytes(work, block), FILES: files})


def _stored_nbytes(plan: Plan, block: PlannedBlock) -> int:
    """Return the bytes of a block's shard."""
    names = plan.layout.shards[block.shard]
    return sum(plan.layout.tensors[name].nbytes for name in names)


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


def _outside_blocks(plan: Plan) -> Iterator[TensorInfo]:
    """Yield the headers of the tensors outside the blocks."""
    block_shards = {block.shard for block in plan.layout.blocks}
    for shard, names in plan.layout.shards.items():
        if shard not in block_shards:
            yield from (plan.layout.tensors[name] for name in names)


def _outside_nbytes(plan: Plan) -> int:
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
            for info in _outside_blocks(plan)
        ),
        default=0,
    )


def _weights_nbytes(work: Workload, block: PlannedBlock) -> int:
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


def _narrow_elements(plan: Plan, planned: PlannedMatrix) -> int:
    """Return the weights of a matrix if it has 16 bits in memory; else 0."""
    narrow = plan.layout.tensors[planned.tensor].dtype in HALF_DTYPES
    return (narrow and planned.matrix.plain) * planned.elements


def _elements(plan: Plan, names: Iterable[str]) -> int:
    """Return the numbers in tensors of the checkpoint."""
    return sum(prod(plan.layout.tensors[name].shape) for name in names)


def token_nbytes(work: Workload) -> int:
    """Return the bytes of activations of one token, in the block that has the most."""
    every = (_batch_nbytes(work, block) for block in work.blocks)
    return max(every) // work.batch_tokens


def _batch_nbytes(work: Workload, block: PlannedBlock) -> int:
    """Return the bytes of activations while a batch runs through the block."""
    if not work.runs_text:
        return 0
    scores = work.plan.scored_heads * (work.plan.options.seq_len or 1)
    inner = max(scores, *(max(m.matrix.shape) for m in block.matrices))
    return Stream.batch_nbytes(work.batch_tokens, work.plan.width, inner)
