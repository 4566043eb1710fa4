"""Trials: prune the whole model cheaply, in memory, and judge what comes out.

A trial walks through the blocks with SparseGPT and writes nothing. It is judged by the
KL divergence of its predictions from the dense model's on held-out windows.
"""

import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

from torch import Tensor

from halve.distributed import SINGLE_PROCESS, Ranks
from halve.errors import NumericalError
from halve.layout import PlannedBlock
from halve.pruning.block_options import BlockOptions
from halve.pruning.memory.limit import MemoryPlan
from halve.pruning.plan import Plan
from halve.pruning.select.candidates import trial_candidate
from halve.pruning.select.selection import OwnCandidates
from halve.runtime.blockwise_model import BlockwiseModel
from halve.runtime.predictions import held_out_logits
from halve.runtime.stream import Stream

# Sets of hidden states that exist at the same time: a trial's; and of the held-out
# windows, the dense model's and the dense outputs of one block.
_STREAMS = 3


@dataclass(frozen=True)
class Trials:
    """What all trials of a model have in common.

    Attributes:
        plan: The run.
        model: The dense model.
        windows: [samples, length]; the last `plan.options.trial_held_out` of them are
            held out.
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

    @property
    def budget(self) -> int:
        """Bytes in memory allowed for each set of hidden states."""
        # And the kept inputs of a block's experts, where there are any.
        parts = _STREAMS + self.plan.layout.has_experts
        return self.memory_plan.activations // parts

    def dense(self) -> Stream:
        """Return the held-out windows' hidden states behind the dense model."""
        stream = self._start(self.windows[-self.plan.options.trial_held_out :])
        for planned in self.plan.layout.blocks:
            self.report(planned.index, "running the dense model")
            with self.model.block(planned.index) as block:
                stream.advance(block, planned.index)
        return stream

    def start(self) -> Stream:
        """Return the hidden states of all windows before the first block."""
        return self._start(self.windows)

    def blocks(
        self, phase: str, every: Iterable[OwnCandidates]
    ) -> Iterator[tuple[PlannedBlock, BlockOptions]]:
        """Yield the blocks with what a trial does to each, and report each.

        Args:
            phase: What is reported.
            every: Ways to prune the matrices of each block.
        """
        options = self._options()
        for planned, own in zip(self.plan.layout.blocks, every, strict=True):
            self.report(planned.index, phase)
            yield planned, replace(options, own=own)

    def _start(self, windows: Tensor) -> Stream:
        held_out = self.plan.options.trial_held_out
        return Stream.start(
            self.model, windows, self.budget, self.folder, held_out, self.ranks
        )

    def _options(self) -> BlockOptions:
        """Return what a trial does alike to every block."""
        options = self.plan.options
        candidate = trial_candidate(options, options.pairs[0], self.plan.layout.dtype)
        return BlockOptions(
            candidates=(candidate,),
            damping=options.damping,
            ridge=0.0,  # sparsegpt as published, in place of its Gram matrices
            corrects=False,
            refining=None,
            budget=self.budget,
            folder=self.folder,
            report=lambda _: None,
            deferred=self.memory_plan.deferred,
        )


def mean_divergence(dense: Stream, pruned: Stream) -> float:
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
            "Check the checkpoint, or choose sparsity and grid yourself (--allocation "
            "uniform, --quantize).",
        )
    return total / tokens
