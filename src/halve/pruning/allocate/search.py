"""Search for an allocation of sparsity to the blocks.

The first trial prunes all blocks to the same sparsity and measures each block's error;
the following ones spread the sparsity by those errors with increasing strength, for as
long as the divergence falls.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from halve.layout import PlannedBlock
from halve.patterns import parse_pattern
from halve.pruning.allocate.exact_counts import exact_patterns
from halve.pruning.allocate.spread import spread_sparsity
from halve.pruning.allocate.trials import Trials, mean_divergence
from halve.pruning.block_options import BlockOptions
from halve.pruning.observe.block_state import Streams
from halve.pruning.prune_block import prune_block
from halve.pruning.select.candidates import trial_candidate
from halve.records import AllocationRecord, TrialRecord
from halve.runtime.hidden_states import place_hidden
from halve.runtime.stream import Stream

# Strengths that are tried after 0, in this order, as fractions of the model's density
# 1 - S.
_STRENGTHS = (0.1, 0.2, 0.4)


@dataclass(frozen=True)
class AllocationSearch:
    """Tries allocations on the whole model.

    Attributes:
        trials: The model and the windows.
    """

    trials: Trials

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
        dense = self.trials.dense()
        uniform, errors = self._uniform_trial(dense)
        trials = [uniform]
        for strength in _STRENGTHS if len(set(errors)) > 1 else ():
            trials.append(self._trial(strength * (1 - self._sparsity), errors, dense))
            if trials[-1].divergence >= trials[-2].divergence:
                break
        best = min(trials, key=lambda trial: trial.divergence)
        return AllocationRecord(
            best.strength, best.sparsities, tuple(errors), tuple(trials)
        )

    @property
    def _sparsity(self) -> float:
        return parse_pattern(self.trials.plan.options.sparsity).sparsity

    def _uniform_trial(self, dense: Stream) -> tuple[TrialRecord, list[float]]:
        """Prune all blocks to the same sparsity; return each block's error as well."""
        sparsities = (self._sparsity,) * len(self.trials.plan.layout.blocks)
        stream = self.trials.start()
        errors: list[float] = []
        for planned, options in self._blocks(0.0, sparsities):
            before = self._outputs(stream, planned)
            prune_block(self.trials.model, Streams(stream), planned, options)
            errors.append(_relative_error(before, stream))
        return TrialRecord(0.0, sparsities, mean_divergence(dense, stream)), errors

    def _trial(
        self, strength: float, errors: list[float], dense: Stream
    ) -> TrialRecord:
        """Prune the blocks to sparsities spread by their errors, and score the result.

        Args:
            strength: See `spread_sparsity`.
            errors: The blocks' errors at a uniform sparsity.
            dense: The held-out windows' hidden states behind the dense model.
        """
        blocks = self.trials.plan.layout.blocks
        weights = [sum(m.elements for m in block.matrices) for block in blocks]
        sparsities = spread_sparsity(errors, weights, self._sparsity, strength)
        stream = self.trials.start()
        for planned, options in self._blocks(strength, sparsities):
            prune_block(self.trials.model, Streams(stream), planned, options)
        return TrialRecord(strength, sparsities, mean_divergence(dense, stream))

    def _blocks(
        self, strength: float, sparsities: tuple[float, ...]
    ) -> Iterator[tuple[PlannedBlock, BlockOptions]]:
        """Yield the blocks with the patterns of their matrices."""
        plan = self.trials.plan
        [(pattern, _)] = plan.options.pairs
        # Trials do not quantize: it hardly depends on the sparsity what that costs.
        candidate = trial_candidate(plan.options, (pattern, None), plan.layout.dtype)
        every = [
            {tensor: (replace(candidate, pattern=p),) for tensor, p in patterns.items()}
            for patterns in exact_patterns(plan, sparsities)
        ]
        phase = f"trying allocations, strength {strength:.3g}"
        return self.trials.blocks(phase, every)

    def _outputs(self, stream: Stream, planned: PlannedBlock) -> Tensor:
        """Return the dense block's outputs for the held-out windows of a trial.

        Returns:
            [samples, length, width], on the GPU, in memory or in a memory-mapped file.
        """
        trials = self.trials
        shape = (stream.held_out, *stream.hidden.shape[1:])
        outputs = place_hidden(trials.model, shape, trials.budget, trials.folder)
        with trials.model.block(planned.index) as block:
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
