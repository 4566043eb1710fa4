"""A plan as the forecast sees it: what follows from it for memory and operations."""

from dataclasses import dataclass
from functools import reduce
from operator import or_

from halve.calibration_stats import MAX_TILE, GramMatrix, adding_nbytes
from halve.layout import PlannedBlock
from halve.pruning.observe.activation_cache import ActivationCache, is_wide
from halve.pruning.observe.input_groups import RoutedGroup, expected_groups
from halve.pruning.observe.routing import kept_columns
from halve.pruning.plan import Plan
from halve.runtime.batch_size import BATCH_TOKENS, windows_per_batch
from halve.runtime.stream import Stream
from halve.solvers import Needs, Solver
from halve.solvers.hessian import all_needs


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
        return self.plan.options.uses_text or bool(self.needs)

    @property
    def batch_tokens(self) -> int:
        """Tokens in one batch."""
        length = self.plan.options.seq_len or 1
        windows = windows_per_batch(length, self.batch_limit)
        return min(windows * length, self.plan.tokens)

    def batch_nbytes(self, block: PlannedBlock) -> int:
        """Return the bytes of activations while a batch runs through the block."""
        if not self.runs_text:
            return 0
        scores = self.plan.scored_heads * (self.plan.options.seq_len or 1)
        inner = max(scores, *(max(m.matrix.shape) for m in block.matrices))
        return Stream.batch_nbytes(self.batch_tokens, self.plan.width, inner)

    def token_nbytes(self) -> int:
        """Return a token's bytes of activations, in the block that has the most."""
        return max(map(self.batch_nbytes, self.blocks)) // self.batch_tokens

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
