"""Trying allocations: the whole model is pruned cheaply, in memory, and judged.

A trial walks through the blocks with SparseGPT and writes nothing. It is judged by how
far its predictions diverge from the dense model's on windows kept apart. The first
prunes all blocks alike and measures how much each suffers; the next ones spread the
sparsity by those errors, more and more, for as long as that helps.
"""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from halve.calibration import allocate_hidden
from halve.distributed import SINGLE_PROCESS, Ranks
from halve.errors import NumericalError
from halve.layout import PlannedBlock
from halve.patterns import Patterns, parse_pattern
from halve.pruning.allocate.exact_counts import exact_patterns
from halve.pruning.allocate.spread import spread_sparsity
from halve.pruning.memory.limit import MemoryPlan
from halve.pruning.observe.block_state import Streams
from halve.pruning.plan import Plan
from halve.pruning.prune_block import BlockOptions, prune_block
from halve.pruning.select.selection import Candidate
from halve.records import AllocationRecord, TrialRecord
from halve.runtime.blockwise_model import BlockwiseModel
from halve.runtime.stream import Stream, held_out_logits
from halve.solvers import SparseGPT

# What is tried, in this order, in shares of what the model keeps: a block keeps so much
# more, and another so much less.
_STEPS = (0.1, 0.2, 0.4)
# Streams that live at the same time: a trial's, and for the windows that judge the
# dense model's and a block's dense outputs.
_STREAMS = 3


@dataclass(frozen=True)
class AllocationSearch:
    """What all trials of a model share.

    Attributes:
        plan: Of the run.
        model: Holds the dense weights.
        windows: [samples, length]; the last `plan.options.allocation_held_out` of them judge.
        memory_plan: Where hidden states may live.
        folder: Where mapped files lie past that.
        report: Told of each block: its index, and which trial it is.
        ranks: Who shares the windows.
    """

    plan: Plan
    model: BlockwiseModel
    windows: Tensor
    memory_plan: MemoryPlan
    folder: Path | None
    report: Callable[[int, str], None]
    ranks: Ranks = SINGLE_PROCESS

    @torch.no_grad()
    def choose(self) -> AllocationRecord:
        """Return the allocation that lost least; the uniform one if none lost less.

        Raises:
            NumericalError: As in a run; or predictions that are not finite.

        Cost:
            A dense pass of the windows that judge, and for each trial what a run with
            SparseGPT costs. No trial follows one that lost more than the one before:
            two where spreading does not help, four at most.
        """
        dense = self._dense()
        errors: list[float] = []
        trials = [self._try(0.0, dense, errors)]
        sparsity = parse_pattern(self.plan.options.sparsity).sparsity
        for step in _STEPS if len(set(errors)) > 1 else ():
            trials.append(self._try(step * (1 - sparsity), dense, errors))
            if trials[-1].divergence >= trials[-2].divergence:
                break
        best = min(trials, key=lambda trial: trial.divergence)
        return AllocationRecord(
            best.strength, best.sparsities, tuple(errors), tuple(trials)
        )

    def _dense(self) -> Stream:
        """Carry the windows that judge through the dense model."""
        held_out = self.plan.options.allocation_held_out
        stream = self._start(self.windows[-held_out:])
        for planned in self.plan.layout.blocks:
            self.report(planned.index, "running the dense model")
            with self.model.block(planned.index) as block:
                stream.advance(block, planned.index)
        return stream

    def _start(self, windows: Tensor) -> Stream:
        held_out, where = (
            self.plan.options.allocation_held_out,
            (self._budget, self.folder),
        )
        return Stream.start(self.model, windows, *where, held_out, self.ranks)

    @property
    def _budget(self) -> int:
        return self.memory_plan.activations // _STREAMS

    def _try(self, strength: float, dense: Stream, errors: list[float]) -> TrialRecord:
        """Prune by one strength and judge that; without one measure errors as well."""
        sparsities = self._sparsities(strength, errors)
        stream = self._start(self.windows)
        every = exact_patterns(self.plan, sparsities)
        for planned, patterns in zip(self.plan.layout.blocks, every, strict=True):
            self.report(planned.index, f"trying allocations, strength {strength:.3g}")
            before = None if strength else self._outputs(stream, planned)
            prune_block(self.model, Streams(stream), planned, self._task(patterns))
            if before is not None:
                errors.append(_distance(before, stream))
        return TrialRecord(strength, sparsities, _divergence(dense, stream))

    def _sparsities(self, strength: float, errors: list[float]) -> tuple[float, ...]:
        blocks = self.plan.layout.blocks
        weights = [sum(m.elements for m in block.matrices) for block in blocks]
        sparsity = parse_pattern(self.plan.options.sparsity).sparsity
        return spread_sparsity(
            errors or [0.0] * len(blocks), weights, sparsity, strength
        )

    def _task(self, patterns: Patterns) -> BlockOptions:
        options = self.plan.options
        solver = SparseGPT(options.damping, options.block_size)
        pattern = parse_pattern(options.sparsity)
        return BlockOptions(
            candidates=(Candidate("sparsegpt", solver, pattern),),
            correction=None,
            refining=None,
            budget=self._budget,
            folder=self.folder,
            report=lambda _: None,
            patterns=patterns,
            deferred=self.memory_plan.deferred,
        )

    def _outputs(self, stream: Stream, planned: PlannedBlock) -> Tensor:
        """Return what the dense block makes of the windows that judge.

        Returns:
            [samples, length, width], in memory or in a mapped file.
        """
        _, length, width = stream.hidden.shape
        shape = (stream.held_out, length, width)
        found = allocate_hidden(shape, self._budget, self.folder)
        with self.model.block(planned.index) as block:
            for part, own in _judging(stream):
                found[own] = stream.run(block, planned.index, part).cpu()
        return found


def _judging(stream: Stream) -> Iterator[tuple[slice, slice]]:
    """Yield the batches of windows kept apart: among all windows, and among those."""
    first = len(stream.windows) - stream.held_out
    for part in stream.batches():
        if stream.is_held_out(part):
            yield part, slice(part.start - first, part.stop - first)


def _distance(before: Tensor, stream: Stream) -> float:
    """Return ||Y - Y'|| / ||Y|| of the windows kept apart, Y being from before."""
    lost = kept = 0.0
    for part, own in _judging(stream):
        lost += float((stream.hidden[part] - before[own]).square().sum())
        kept += float(before[own].square().sum())
    lost, kept = stream.ranks.all_sum(lost, kept)
    return (lost / kept) ** 0.5 if kept else float(lost > 0)


def _divergence(dense: Stream, stream: Stream) -> float:
    """Return the mean KL(dense || pruned) of a token in the windows kept apart, nats.

    Raises:
        NumericalError: It is not finite.
    """
    total, tokens = 0.0, 0
    for theirs, ours in held_out_logits(dense, stream):
        # One window at a time: two more vocabularies of log-probabilities each.
        for wanted, found in zip(theirs, ours, strict=True):
            log_p, log_q = wanted.log_softmax(-1), found.log_softmax(-1)
            total += float((log_p.exp() * (log_p - log_q)).sum(-1).double().sum())
            tokens += len(wanted)
    total, tokens = stream.ranks.all_sum(total, tokens)
    if not math.isfinite(total):
        raise NumericalError(
            "The model's predictions are not finite when it is pruned on trial.",
            "Check the checkpoint, or pass --allocation uniform.",
        )
    return total / tokens
