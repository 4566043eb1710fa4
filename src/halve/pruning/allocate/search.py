"""Search for an allocation: prune the whole model cheaply, in memory, and evaluate it.

A trial walks through the blocks with SparseGPT and writes nothing. It is scored by the
KL divergence of its predictions from the dense model's on held-out windows. The first
trial prunes all blocks to the same sparsity and measures each block's error; the
following ones spread the sparsity by those errors with increasing strength, for as long
as the score improves.
"""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from halve.distributed import SINGLE_PROCESS, Ranks
from halve.errors import NumericalError
from halve.layout import PlannedBlock
from halve.patterns import Patterns, parse_pattern
from halve.pruning.allocate.exact_counts import exact_patterns
from halve.pruning.allocate.spread import spread_sparsity
from halve.pruning.block_options import BlockOptions
from halve.pruning.memory.limit import MemoryPlan
from halve.pruning.observe.block_state import Streams
from halve.pruning.plan import Plan
from halve.pruning.prune_block import prune_block
from halve.pruning.select.selection import Candidate
from halve.records import AllocationRecord, TrialRecord
from halve.runtime.blockwise_model import BlockwiseModel
from halve.runtime.hidden_states import place_hidden
from halve.runtime.stream import Stream, held_out_logits
from halve.solvers import SparseGPT

# Strengths that are tried after 0, in this order, as fractions of the model's density
# 1 - S.
_STRENGTHS = (0.1, 0.2, 0.4)
# Sets of hidden states that exist at the same time: a trial's; and of the held-out
# windows, the dense model's and the dense outputs of one block.
_STREAMS = 3


@dataclass(frozen=True)
class AllocationSearch:
    """What all trials of a model have in common.

    Attributes:
        plan: The run.
        model: The dense model.
        windows: [samples, length]; the last `plan.options.allocation_held_out` of them
            are held out.
        memory_plan: What may stay in memory.
        folder: Where memory-mapped files are created; None for the system's default.
        report: Called with a block's index and what is done to it.
        ranks: The processes that share the windows.
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
        """Return the allocation with the smallest divergence, of equal ones the first.

        Raises:
            NumericalError: See `prune_block`; or predictions are not finite.

        Cost:
            A pass of the held-out windows through the dense model, and for each trial a
            run with SparseGPT. The search ends after the first trial that does not
            improve on the one before: after two where spreading does not help, and
            after four at the latest.
        """
        dense = self._dense()
        uniform, errors = self._uniform_trial(dense)
        trials = [uniform]
        density = 1 - parse_pattern(self.plan.options.sparsity).sparsity
        for strength in _STRENGTHS if len(set(errors)) > 1 else ():
            trials.append(self._trial(strength * density, errors, dense))
            if trials[-1].divergence >= trials[-2].divergence:
                break
        best = min(trials, key=lambda trial: trial.divergence)
        return AllocationRecord(
            best.strength, best.sparsities, tuple(errors), tuple(trials)
        )

    def _dense(self) -> Stream:
        """Return the held-out windows' hidden states behind the dense model."""
        held_out = self.plan.options.allocation_held_out
        stream = self._start(self.windows[-held_out:])
        for planned in self.plan.layout.blocks:
            self.report(planned.index, "running the dense model")
            with self.model.block(planned.index) as block:
                stream.advance(block, planned.index)
        return stream

    def _start(self, windows: Tensor) -> Stream:
        """Return the hidden states of windows before the first block."""
        held_out = self.plan.options.allocation_held_out
        return Stream.start(
            self.model, windows, self._budget, self.folder, held_out, self.ranks
        )

    @property
    def _budget(self) -> int:
        return self.memory_plan.activations // _STREAMS

    def _uniform_trial(self, dense: Stream) -> tuple[TrialRecord, list[float]]:
        """Prune all blocks to the same sparsity; return each block's error as well."""
        sparsity = parse_pattern(self.plan.options.sparsity).sparsity
        sparsities = (sparsity,) * len(self.plan.layout.blocks)
        stream = self._start(self.windows)
        errors: list[float] = []
        for planned, patterns in self._blocks(0.0, sparsities):
            before = self._outputs(stream, planned)
            prune_block(self.model, Streams(stream), planned, self._options(patterns))
            errors.append(_relative_error(before, stream))
        return TrialRecord(0.0, sparsities, _divergence(dense, stream)), errors

    def _trial(
        self, strength: float, errors: list[float], dense: Stream
    ) -> TrialRecord:
        """Prune the blocks to sparsities spread by their errors, and score the result.

        Args:
            strength: See `spread_sparsity`.
            errors: The blocks' errors at a uniform sparsity.
            dense: The held-out windows' hidden states behind the dense model.
        """
        blocks = self.plan.layout.blocks
        weights = [sum(m.elements for m in block.matrices) for block in blocks]
        sparsity = parse_pattern(self.plan.options.sparsity).sparsity
        sparsities = spread_sparsity(errors, weights, sparsity, strength)
        stream = self._start(self.windows)
        for planned, patterns in self._blocks(strength, sparsities):
            prune_block(self.model, Streams(stream), planned, self._options(patterns))
        return TrialRecord(strength, sparsities, _divergence(dense, stream))

    def _blocks(
        self, strength: float, sparsities: tuple[float, ...]
    ) -> Iterator[tuple[PlannedBlock, Patterns]]:
        """Yield the blocks with the patterns of their matrices, and report each."""
        every = exact_patterns(self.plan, sparsities)
        for planned, patterns in zip(self.plan.layout.blocks, every, strict=True):
            self.report(planned.index, f"trying allocations, strength {strength:.3g}")
            yield planned, patterns

    def _options(self, patterns: Patterns) -> BlockOptions:
        options = self.plan.options
        solver = SparseGPT(options.block_size)
        pattern = parse_pattern(options.sparsity)
        return BlockOptions(
            candidates=(Candidate("sparsegpt", solver, pattern),),
            damping=options.damping,
            corrects=False,
            refining=None,
            budget=self._budget,
            folder=self.folder,
            report=lambda _: None,
            patterns=patterns,
            deferred=self.memory_plan.deferred,
        )

    def _outputs(self, stream: Stream, planned: PlannedBlock) -> Tensor:
        """Return the dense block's outputs for the held-out windows of a trial.

        Returns:
            [samples, length, width], on the GPU, in memory or in a memory-mapped file.
        """
        _, length, width = stream.hidden.shape
        shape = (stream.held_out, length, width)
        outputs = place_hidden(self.model, shape, self._budget, self.folder)
        with self.model.block(planned.index) as block:
            for part, held_out in _held_out_batches(stream):
                outputs[held_out] = stream.run(block, planned.index, part)
        return outputs


def _held_out_batches(stream: Stream) -> Iterator[tuple[slice, slice]]:
    """Yield held-out batches: as slices of all windows, and of the held-out ones."""
    first = len(stream.windows) - stream.held_out
    for part in stream.batches():
        if stream.is_held_out(part):
            yield part, slice(part.start - first, part.stop - first)


def _relative_error(dense: Tensor, stream: Stream) -> float:
    """Return ||Y - Y'|| / ||Y|| over the held-out windows of all ranks.

    Args:
        dense: Y, outputs of the dense block, [held-out samples, length, width].
        stream: Hidden states behind the pruned block; Y' is their held-out part.
    """
    error = energy = 0.0  # ||Y - Y'||^2 and ||Y||^2
    for part, held_out in _held_out_batches(stream):
        before = dense[held_out].to(stream.hidden.device)
        error += float((stream.hidden[part] - before).square().sum())
        energy += float(before.square().sum())
    error, energy = stream.ranks.all_sum(error, energy)
    return (error / energy) ** 0.5 if energy else float(error > 0)


def _divergence(dense: Stream, pruned: Stream) -> float:
    """Return the mean of KL(dense || pruned) over the tokens of held-out windows, nats.

    Raises:
        NumericalError: It is not finite.
    """
    total, tokens = 0.0, 0
    for dense_batch, pruned_batch in held_out_logits(dense, pruned):
        # One window at a time: each holds two more tensors of log-probabilities,
        # [length, vocabulary].
        for p, q in zip(dense_batch, pruned_batch, strict=True):
            log_p, log_q = p.log_softmax(-1), q.log_softmax(-1)
            # sum_v p_v (log p_v - log q_v) for each token
            total += float((log_p.exp() * (log_p - log_q)).sum(-1).double().sum())
            tokens += len(p)
    total, tokens = pruned.ranks.all_sum(total, tokens)
    if not math.isfinite(total):
        raise NumericalError(
            "The pruned model's predictions are not finite in a trial.",
            "Check the checkpoint, or pass --allocation uniform.",
        )
    return total / tokens
