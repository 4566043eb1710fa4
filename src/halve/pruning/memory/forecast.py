"""What a run will take, worked out from the plan before a weight is read.

Memory is told phase by phase. A phase holds the process itself, the hidden states that
live in memory, and its own parts; the largest phase is the peak.
"""

import os
import resource
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import reduce
from math import prod
from operator import or_
from pathlib import Path

from halve.calibration import default_activation_memory
from halve.calibration_stats import MAX_TILE, GramMatrix
from halve.layout import PlannedBlock, PlannedMatrix
from halve.numerics.matmul import HALF_DTYPES, MAX_CONVERTED
from halve.plan import Plan
from halve.pruning.observe.activation_cache import is_wide
from halve.pruning.observe.collect import HELD_OUT_TOKENS
from halve.pruning.select.candidates import candidates
from halve.runtime.blockwise_model import BATCH_TOKENS
from halve.solvers import Needs, Solver
from halve.solvers.hessian import preparation_operations, scratch_size, state_size

_FLOAT = 4
# Groups of matrices as wide as hidden states: into attention, out of it, feed-forward.
_OWN_GROUPS = 3
# Of those, how many share a pass where targets are corrected (`groups.stages`).
_IN_A_PASS = 2
# Strips that a sum over inputs takes for a while: terms, and what rounds off of them.
_STRIPS = 3
# Activations of one token while a block runs, in widths of its own and inner states:
# the stream before and after, a norm's output, queries, keys, values and their result;
# the inner state before and after its function, or an attention's scores.
_OWN_STATES, _INNER_STATES = 8, 3
# With what is kept for a backward pass, and gradients.
_TUNED = 3
# Copies of a block's parameters that refining holds: values, gradients, two moments,
# the first and the best.
_REFINING_COPIES = 6
# What the libraries load and allocate once a run is under way (kernels of BLAS and
# oneDNN, tokenizer, text), measured: benchmarks/memory.py.
_LIBRARIES = 80 * 2**20


@dataclass(frozen=True)
class Phase:
    """What is in memory at one time.

    Attributes:
        name: Of the phase.
        parts: What -> bytes.
    """

    name: str
    parts: dict[str, int]

    @property
    def bytes(self) -> int:
        """All of it."""
        return sum(self.parts.values())


@dataclass(frozen=True)
class Forecast:
    """Memory and disk of a run.

    Attributes:
        process: Bytes of the interpreter with its libraries.
        activations: Bytes of each set of hidden states and of kept dense inputs, and
            into how many parts the budget is cut before one part is that set's.
        budget: Bytes of them that may live in memory.
        deferred: Bytes of inputs in mapped files that are summed later.
        phases: What else is in memory, in turn.
        output: Bytes of the output.
        operations: Multiplications and additions of the whole run.
        width: Of hidden states.
    """

    process: int
    activations: tuple[tuple[int, int], ...]
    budget: int
    deferred: int
    phases: tuple[Phase, ...]
    output: int
    operations: int
    width: int

    @property
    def resident(self) -> int:
        """Bytes of activations in memory."""
        return sum(n for n, parts in self.activations if n <= self.budget // parts)

    @property
    def mapped(self) -> int:
        """Bytes of activations in mapped files."""
        return sum(n for n, _ in self.activations) - self.resident + self.deferred

    @property
    def largest(self) -> Phase:
        """The phase that makes the peak."""
        return max(self.phases, key=lambda phase: phase.bytes)

    @property
    def peak(self) -> int:
        """Bytes of memory at most. Mapped files are not counted."""
        return self.process + self.resident + self.largest.bytes

    def by_name(self) -> dict[str, dict[str, int]]:
        """Return of each kind of phase the largest, by its parts."""
        ordered = sorted(self.phases, key=lambda phase: phase.bytes)
        return {phase.name: phase.parts for phase in ordered}

    @property
    def disk(self) -> int:
        """Bytes of disk at most: the output, and mapped files while it runs."""
        return self.output + self.mapped


def forecast_run(
    plan: Plan, budget: int | None = None, deferred: bool = False
) -> Forecast:
    """Work out what a plan will take.

    Args:
        plan: The run.
        budget: Bytes of activations that may live in memory; None for a quarter of the
            machine's.
        deferred: As in `MemoryPlan`.
    """
    ways = candidates(plan.options, plan.layout.dtype)
    estimate = _Estimate(plan, [way.solver for way in ways], deferred)
    return Forecast(
        process=_resident() + _LIBRARIES,
        activations=tuple(estimate.activations()),
        budget=default_activation_memory() if budget is None else budget,
        deferred=estimate.deferred_bytes(),
        phases=tuple(estimate.phases()),
        output=plan.layout.output_bytes,
        operations=estimate.operations(),
        width=plan.width,
    )


def _resident() -> int:
    """Return the bytes of this process that are in memory now."""
    status = Path("/proc/self/statm")
    if status.is_file():
        return int(status.read_text("ascii").split()[1]) * os.sysconf("SC_PAGE_SIZE")
    # Where there is no /proc: the peak so far, which macOS tells in bytes.
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


@dataclass(frozen=True)
class _Estimate:
    """The arithmetic behind `forecast_run`; numbers, not bytes, but for phases."""

    plan: Plan
    solvers: list[Solver]
    deferred: bool

    @property
    def needs(self) -> Needs:
        needs = reduce(or_, (solver.needs for solver in self.solvers))
        return needs | Needs.FACTOR if self.corrects else needs

    @property
    def corrects(self) -> bool:
        return self.plan.options.corrects

    @property
    def sums_grams(self) -> bool:
        return self.corrects or self.needs.statistic is GramMatrix

    @property
    def runs_text(self) -> bool:
        options = self.plan.options
        return options.has_dense or bool(self.needs) or options.held_out > 0

    def activations(self) -> Iterator[tuple[int, int]]:
        """Yield the bytes of hidden states and kept inputs, and their parts' number."""
        options, token = self.plan.options, _FLOAT * self.plan.tokens
        if self.runs_text:
            for _ in range(1 + options.has_dense):
                yield token * self.plan.width, options.activation_parts
        if self.corrects:
            groups = max(map(_groups, self.blocks), key=lambda g: sum(g.elements()))
            for columns in groups.elements():
                yield token * columns, options.activation_parts * groups.total()

    def deferred_bytes(self) -> int:
        """Return the bytes of inputs that are set aside in one block."""
        token = max(sum(self._wide(_groups(block))) for block in self.blocks)
        return _FLOAT * self.plan.tokens * token

    @property
    def blocks(self) -> tuple[PlannedBlock, ...]:
        return self.plan.layout.blocks

    def operations(self) -> int:
        """Return the multiplications and additions of all blocks."""
        return sum(self._passes(b) + self._solvers(b) for b in self.blocks)

    def _passes(self, block: PlannedBlock) -> int:
        """Return the operations of all that is done with every token."""
        options = self.plan.options
        if not self.runs_text:
            return 0
        # Up to the last inputs, and through the pruned block. Where targets are
        # corrected, through the dense one as well, and a part for a second stage.
        passes = 2 + 1.25 * self.corrects + options.refine * _TUNED * options.epochs
        forward = 2 * sum(matrix.elements for matrix in block.matrices)
        sums = sum(n * self._summing(block, c) for c, n in _groups(block).items())
        return int(self.plan.tokens * (passes * forward + sums))

    def _summing(self, block: PlannedBlock, columns: int) -> float:
        """Return the operations that sum one token's inputs of a group."""
        gram = 1.25 * columns**2 * self.sums_grams  # 5/8 of a product
        drift = _drift(block, columns)
        products = 2 * drift if drift == columns**2 else 4 * drift
        return gram + products * self.corrects

    def _solvers(self, block: PlannedBlock) -> int:
        """Return the operations that do not depend on the number of tokens."""
        preparation = sum(
            groups * preparation_operations(columns, self.needs)
            for columns, groups in _groups(block).items()
        )
        return preparation + sum(
            solver.cost(*matrix.matrix.shape).operations
            for matrix in block.matrices
            for solver in self.solvers
        )

    def phases(self) -> Iterator[Phase]:
        """Yield what is in memory, block after block."""
        yield _phase("embedding", embeddings=self._outside())
        for block in self.blocks:
            weights = self._weights(block)
            batch = self._batch(block) if self.runs_text else 0
            yield _phase(
                "collecting",
                weights=weights,
                as_float32=min(MAX_CONVERTED, max(map(self._widened, block.matrices))),
                grams=self._first_sums(block),
                activations=batch,
            )
            for columns in sorted(self._wide(_groups(block))):
                yield _phase(
                    "summing",
                    weights=weights,
                    grams=self._sums(block, columns, running=True),
                    activations=self._batch_tokens * columns,
                )
            for matrix in {m.matrix.shape: m for m in block.matrices}.values():
                yield self._solving(block, matrix)
            if self.plan.options.refine:
                yield _phase(
                    "refining",
                    weights=weights,
                    masks=self._masks(block),
                    copies=_REFINING_COPIES * self._size(self._names(block)),
                    activations=_TUNED * batch,
                )
            yield _phase("writing", weights=weights, files=self._stored(block))

    def _solving(self, block: PlannedBlock, matrix: PlannedMatrix) -> Phase:
        """Return what is in memory while a matrix is solved."""
        rows, columns = matrix.matrix.shape
        solving = max(solver.cost(rows, columns).peak for solver in self.solvers)
        solutions = (len(self.solvers) + self.corrects) * rows * columns
        preparing = scratch_size(columns, self.needs)
        return _phase(
            "solving",
            weights=self._weights(block),
            as_float32=self._beside(matrix),
            grams=self._sums(block, columns, running=False),
            factors=state_size(columns, self.needs),
            matrices=max(solving + solutions, preparing),
        )

    def _wide(self, groups: Counter[int]) -> list[int]:
        """Return the columns of groups whose inputs are set aside."""
        if not self.deferred or self.corrects or not self.sums_grams:
            return []
        return [c for c in groups.elements() if is_wide(c, self.plan.width)]

    def _first_sums(self, block: PlannedBlock) -> int:
        """Return the sums over inputs while a block runs."""
        groups = _groups(block)
        now = groups - Counter(self._wide(groups))
        return max((self._sums(block, c, running=True) for c in now), default=0)

    def _sums(self, block: PlannedBlock, columns: int, running: bool) -> int:
        """Return the sums over inputs that are kept once a group is reached.

        Where targets are corrected, those of its own pass; else those of all groups
        that are not solved yet, of which the widest come last. One whose inputs are
        set aside has no other beside it.

        Args:
            block: Whose groups they are.
            columns: Of the group.
            running: Whether they are added to still, and so hold what was rounded off.
        """
        groups = _groups(block)
        if not self.sums_grams:
            return 0
        strip = running * columns * min(columns, MAX_TILE)
        if not self.corrects:
            wide = self._wide(groups)
            rest = (c for c in (groups - Counter(wide)).elements() if c >= columns)
            together = [columns] if columns in wide else rest
            return sum(c**2 for c in together) + _STRIPS * strip
        options = self.plan.options
        held_out = min(HELD_OUT_TOKENS, options.held_out * (options.seq_len or 0))
        drift = (1 + running) * _drift(block, columns)
        group = columns**2 + strip + drift + 2 * held_out * columns
        return min(groups[columns], _IN_A_PASS) * group + _STRIPS * strip

    def _outside(self) -> int:
        """Return what the largest tensor outside the blocks takes.

        As it is stored, and beside that as it is computed with, if it is.
        """
        layout = self.plan.layout
        own = {block.shard for block in self.blocks}
        names = (n for f, ns in layout.shards.items() if f not in own for n in ns)
        return max(
            (
                layout.tensors[n].nbytes // _FLOAT
                + (n not in layout.unread) * self._size([n])
                for n in names
            ),
            default=0,
        )

    def _names(self, block: PlannedBlock) -> tuple[str, ...]:
        return self.plan.layout.shards[block.shard]

    def _weights(self, block: PlannedBlock) -> int:
        """Return what a block's weights take as they lie in memory."""
        narrow = sum(map(self._widened, block.matrices))
        return self._size(self._names(block)) - narrow // 2

    def _widened(self, planned: PlannedMatrix) -> int:
        """Return what a matrix takes in float32 beside itself; 0 if it is so."""
        narrow = self.plan.layout.tensors[planned.tensor].dtype in HALF_DTYPES
        return (narrow and planned.matrix.plain) * planned.elements

    def _beside(self, planned: PlannedMatrix) -> int:
        """Return what a matrix takes in float32 beside itself while it is solved."""
        # A corrected target is a matrix of its own, and in float32.
        widens = not self.corrects and any(solver.widens for solver in self.solvers)
        return widens * self._widened(planned)

    def _stored(self, block: PlannedBlock) -> int:
        """Return what a block takes as it is stored, and as it is read back."""
        tensors = self.plan.layout.tensors
        return 2 * sum(tensors[name].nbytes for name in self._names(block)) // _FLOAT

    def _masks(self, block: PlannedBlock) -> int:
        """Return what the masks of a block take; a byte for each weight."""
        return sum(matrix.elements for matrix in block.matrices) // _FLOAT

    def _size(self, names: Iterable[str]) -> int:
        return sum(prod(self.plan.layout.tensors[name].shape) for name in names)

    @property
    def _batch_tokens(self) -> int:
        length = self.plan.options.seq_len or 1
        return min(max(BATCH_TOKENS // length, 1) * length, self.plan.tokens)

    def _batch(self, block: PlannedBlock) -> int:
        """Return the activations of one batch on its way through a block."""
        length = self.plan.options.seq_len or 1
        scores = self.plan.scored_heads * length
        inner = max(scores, *(max(m.matrix.shape) for m in block.matrices))
        token = _OWN_STATES * self.plan.width + _INNER_STATES * inner
        return self._batch_tokens * token


def _phase(name: str, **parts: int) -> Phase:
    return Phase(name, {part: _FLOAT * numbers for part, numbers in parts.items()})


def _groups(block: PlannedBlock) -> Counter[int]:
    """Return columns -> groups of that width; a guess, since no block is run."""
    found = Counter(m.matrix.shape[1] for m in block.matrices)
    return Counter({c: min(count, _OWN_GROUPS) for c, count in found.items()})


def _drift(block: PlannedBlock, columns: int) -> int:
    """Return the size of the drift of a group (`statistics.CrossGram`)."""
    shapes = [matrix.matrix.shape for matrix in block.matrices]
    rows = sum(height for height, width in shapes if width == columns)
    return min(rows, columns) * columns if 2 * rows < columns else columns**2
