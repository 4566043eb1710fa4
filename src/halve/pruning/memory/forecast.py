"""Forecast of the memory, disk and operations of a run, before a weight is read.

The peak is the process itself, the hidden states that stay in memory, and the largest
phase (`phases`).
"""

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

from halve.calibration import default_activation_memory
from halve.calibration_stats import CrossGram, GramMatrix
from halve.devices import choose_device
from halve.layout import PlannedBlock, PlannedMatrix
from halve.pruning.importance import importance_passes
from halve.pruning.memory.phases import Phase, all_phases, host_phases
from halve.pruning.memory.solving import solving_operations
from halve.pruning.memory.text import text_phases
from halve.pruning.memory.workload import Workload
from halve.pruning.observe.activation_cache import ActivationCache
from halve.pruning.observe.input_groups import (
    RoutedGroup,
    expected_groups,
    routed_groups,
)
from halve.pruning.observe.routing import kept_columns
from halve.pruning.plan import Plan
from halve.pruning.select.candidates import candidates
from halve.pruning.tune.block_reconstruction import tuning_passes
from halve.runtime.stream import Stream
from halve.system import resident_memory

# What libraries load and allocate once a run is under way (kernels of BLAS and oneDNN,
# tokenizer, text), measured: benchmarks/memory.py.
_LIBRARIES = 80 * 2**20
# The same for the libraries of CUDA: an estimate, not measured yet.
_CUDA_LIBRARIES = 2**30
# Forward passes of all windows through a block: one to collect statistics, and one
# through the pruned block.
_PASSES = 2
# Further passes where targets are corrected: one through the dense block, and for the
# second stage of groups part of another one.
_PASSES_TO_CORRECT = 1.25
# Passes of all windows through a block whose experts are chosen: one through all of its
# experts, and one through those that stay.
_PASSES_TO_CHOOSE = 2


Activations = tuple[tuple[int, int], ...]


@dataclass(frozen=True)
class Forecast:
    """Memory and disk of a run.

    Attributes:
        process: Bytes of the interpreter with its libraries.
        activations: For each stream and each group's cached dense inputs, its bytes and
            the number of parts into which `budget` is divided; it stays in memory if it
            is not larger than one part.
        budget: Bytes of activations that may stay in memory.
        deferred: Bytes of deferred inputs, in memory-mapped files.
        spilled: Bytes of spilled experts, and of their inputs and outputs, in such
            files.
        phases: What else is in memory, in turn.
        output: Bytes of the output, before packing.
        written: Bytes of disk while it is written.
        operations: Multiplications and additions of the whole run.
        width: Width of hidden states.
        blocks: Number of blocks.
    """

    process: int
    activations: Activations
    budget: int
    deferred: int
    spilled: int
    phases: tuple[Phase, ...]
    output: int
    written: int
    operations: int
    width: int
    blocks: int

    @property
    def resident(self) -> int:
        """Bytes of activations in memory."""
        return self._resident(self.activations)

    @property
    def mapped(self) -> int:
        """Bytes of activations and weights in memory-mapped files, at most."""
        own = [phase.activations for phase in self.phases if phase.activations]
        return max(
            self._mapped(self.activations) + self.deferred + self.spilled,
            *map(self._mapped, own),
            0,
        )

    def _resident(self, activations: Activations) -> int:
        return sum(n for n, parts in activations if n <= self.budget // parts)

    def _mapped(self, activations: Activations) -> int:
        return sum(n for n, _ in activations) - self._resident(activations)

    @property
    def largest(self) -> Phase:
        """The phase that determines the peak."""
        return max(self.phases, key=self.bytes_while)

    @property
    def peak(self) -> int:
        """Peak bytes of memory, without the page cache of memory-mapped files."""
        return self.process + max(map(self.bytes_while, self.phases))

    def bytes_while(self, phase: Phase) -> int:
        """Return what is in memory during a phase, beside the process itself.

        Text is read before there are hidden states.
        """
        if phase.activations is not None:
            return phase.bytes + self._resident(phase.activations)
        return phase.bytes + self.resident * phase.has_activations

    @property
    def peak_beside_activations(self) -> int:
        """Peak bytes while there are activations, without those."""
        beside = (phase.bytes for phase in self.phases if phase.has_activations)
        return self.process + max(beside)

    def by_name(self) -> dict[str, dict[str, int]]:
        """Return the parts of the largest phase of each name."""
        ordered = sorted(self.phases, key=lambda phase: phase.bytes)
        return {phase.name: phase.parts for phase in ordered}

    @property
    def disk(self) -> int:
        """Peak bytes of disk: the output, and memory-mapped files during the run."""
        return self.written + self.mapped


def forecast_run(
    plan: Plan,
    budget: int | None = None,
    deferred: bool = False,
    spilled: bool = False,
) -> Forecast:
    """Predict the memory, disk and operations of a run.

    Args:
        plan: The run.
        budget: Bytes of activations that may stay in memory; None for a quarter of the
            machine's memory.
        deferred: See `MemoryPlan`.
        spilled: See `MemoryPlan`.
    """
    work = _workload(plan, deferred, spilled)
    return Forecast(
        process=resident_memory() + _LIBRARIES,
        activations=tuple(_activations(work)),
        budget=default_activation_memory() if budget is None else budget,
        deferred=work.deferred_nbytes(),
        spilled=max(work.spilled_nbytes(block) for block in work.blocks),
        phases=tuple(all_phases(work)),
        output=plan.layout.output_bytes,
        written=plan.layout.disk_bytes,
        operations=sum(_operations(work, block) for block in work.blocks)
        + _choosing_operations(work),
        width=plan.width,
        blocks=len(work.blocks),
    )


def forecast_host(
    plan: Plan,
    budget: int | None = None,
    deferred: bool = False,
    spilled: bool = False,
) -> Forecast:
    """Predict what a run takes of the host, text included, wherever it computes.

    Args:
        plan: The run.
        budget: As for `forecast_run`.
        deferred: As for `forecast_run`.
        spilled: As for `forecast_run`.
    """
    forecast = forecast_run(plan, budget, deferred, spilled)
    if choose_device(plan.options.device).type == "cuda":
        forecast = replace(
            forecast,
            process=forecast.process + _CUDA_LIBRARIES,
            phases=tuple(host_phases(plan)),
        )
    if not _workload(plan, deferred, spilled).runs_text:
        return forecast
    return replace(forecast, phases=(*text_phases(plan), *forecast.phases))


def _workload(plan: Plan, deferred: bool, spilled: bool) -> Workload:
    solvers = [c.solver for c in candidates(plan.options, plan.layout.dtype)]
    return Workload(plan, solvers, deferred, spilled)


def _activations(work: Workload) -> Iterator[tuple[int, int]]:
    """Yield bytes of activations, and the parts of the budget; see `Forecast`."""
    plan = work.plan
    parts = plan.activation_parts
    if work.runs_text:
        for _ in range(1 + plan.options.has_dense):
            yield Stream.nbytes(plan.tokens, plan.width), parts
    if work.runs_text and (kept := max(map(kept_columns, work.blocks))):
        yield ActivationCache.nbytes(plan.tokens, kept), parts
    if work.corrects:
        every = [_stored_groups(block) for block in work.blocks]
        groups = max(every, key=lambda counter: sum(counter.elements()))
        for columns in groups.elements():
            nbytes = ActivationCache.nbytes(plan.tokens, columns)
            yield nbytes, parts * groups.total()


def _stored_groups(block: PlannedBlock) -> Counter[int]:
    """Return columns -> number of groups whose dense inputs are cached."""
    routed = Counter(group.columns for group in routed_groups(block))
    return expected_groups(block) + routed


def _operations(work: Workload, block: PlannedBlock) -> int:
    """Return the multiplications and additions of everything done with a block."""
    return _token_operations(work, block) + solving_operations(
        work.solvers, work.needs, block
    )


def _choosing_operations(work: Workload) -> int:
    """Return the operations by which the experts that stay are chosen."""
    if work.plan.dropping is None:
        return 0
    blocks = work.plan.input_layout.blocks
    every = sum(_forward_operations(work, block) for block in blocks)
    return _PASSES_TO_CHOOSE * work.plan.tokens * every


def _forward_operations(work: Workload, block: PlannedBlock) -> int:
    """Return the operations of one token in a block."""
    forward = 2 * sum(matrix.elements for matrix in block.outside_experts)
    for group in routed_groups(block):
        experts = work.experts_per_token(group)  # each token's
        forward += 2 * experts * sum(matrix.elements for matrix in group.experts[0])
    return forward


def _token_operations(work: Workload, block: PlannedBlock) -> int:
    """Return the operations that are done for every token, for all tokens."""
    options = work.plan.options
    if not work.runs_text or options.only_drops_experts:
        return 0
    passes = _PASSES + _PASSES_TO_CORRECT * work.corrects
    passes += options.refine * tuning_passes(options.epochs)
    if not work.plan.layout.has_experts:
        passes += importance_passes(options.row_samples, options.samples)
    forward = _forward_operations(work, block)
    groups = expected_groups(block).items()
    outside = block.outside_experts
    sums = sum(n * _statistics_operations(work, outside, c) for c, n in groups)
    for group in routed_groups(block):
        experts = work.experts_per_token(group)
        sums += _routed_operations(work, group, experts)
    return int(work.plan.tokens * (passes * forward + sums))


def _routed_operations(work: Workload, group: RoutedGroup, experts: int) -> float:
    """Return the operations that add one token to the statistics of its experts."""
    shared = GramMatrix.operations(group.columns) * work.needs_grams
    *first, last = group.experts[0]
    each = _statistics_operations(work, first, group.columns)
    return shared + experts * (each + _statistics_operations(work, [last], group.inner))


def _statistics_operations(
    work: Workload, matrices: Sequence[PlannedMatrix], columns: int
) -> float:
    """Return the operations that add one token to the statistics of a group."""
    rows = sum(m.matrix.shape[0] for m in matrices if m.matrix.shape[1] == columns)
    gram = GramMatrix.operations(columns) * work.needs_grams
    return gram + CrossGram.operations(rows, columns) * work.corrects
