"""Mixes: what each matrix gets, so that the model takes a number of bits a weight.

Either all matrices get the same pair of sparsity and grid, or none gets zeros and some
get a finer grid than the rest. Those are either the ones with the largest errors in a
trial, since a finer grid divides the error of any matrix by about the same factor; or
those of the first and last blocks, to which SmolLM2-135M was found to be most sensitive
(docs/log.md). The divergence of the whole model decides.
"""

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass

import torch

from halve.grids import QuantScheme, grids_around
from halve.patterns import Pattern, Unstructured
from halve.pruning.allocate.trials import Trials, mean_divergence
from halve.pruning.observe.block_state import Streams
from halve.pruning.plan import Plan
from halve.pruning.prune_block import prune_block
from halve.pruning.select.candidates import trial_candidate
from halve.records import MixRecord, MixTrialRecord, PairRecord
from halve.runtime.stream import Stream


@dataclass(frozen=True)
class Mix:
    """Pairs of pattern and grid for the matrices of a model.

    Attributes:
        name: As records show it.
        pairs: The pair of each matrix, in the order of the plan's blocks.
    """

    name: str
    pairs: tuple[tuple[Pattern, QuantScheme], ...]

    def bits(self, elements: Sequence[int]) -> float:
        """Return the bits per weight of all matrices together, when packed.

        Args:
            elements: Number of weights of each matrix.
        """
        total = sum(
            grid.bits_per_weight(pattern.sparsity) * count
            for (pattern, grid), count in zip(self.pairs, elements, strict=True)
        )
        return total / sum(elements)


@dataclass(frozen=True)
class MixSearch:
    """Tries mixes on the whole model.

    Attributes:
        trials: The model and the windows.
    """

    trials: Trials

    @torch.no_grad()
    def choose(self) -> MixRecord:
        """Return the mix with the smallest divergence, of equal ones the first.

        Raises:
            NumericalError: See `prune_block`; or predictions are not finite.

        Cost:
            A pass of the held-out windows through the dense model, and for each trial a
            run with SparseGPT: one for each pair that takes the bits (at most five),
            and two for blends of grids.
        """
        plan, dense = self.trials.plan, self.trials.dense()
        tried = [self._try(mix, dense) for mix in uniform_mixes(plan)]
        errors = _best(tried).errors
        tried += [self._try(mix, dense) for mix in blends(plan, errors)]
        return _record(tried, elements(plan))

    def _try(self, mix: Mix, dense: Stream) -> "_Tried":
        """Prune the model to a mix, and judge it."""
        trials, plan = self.trials, self.trials.plan
        options, dtype = plan.options, plan.layout.dtype
        pairs = iter(mix.pairs)
        every = [
            {
                m.name: (trial_candidate(options, next(pairs), dtype),)
                for m in block.matrices
            }
            for block in plan.layout.blocks
        ]
        stream, errors = trials.start(), []
        for planned, block_options in trials.blocks(f"trying {mix.name}", every):
            pruned = prune_block(trials.model, Streams(stream), planned, block_options)
            for matrix in planned.matrices:
                outcome = pruned.selected_by_name[matrix.name].outcome
                errors.append(outcome.error or 0.0)
        return _Tried(mix, mean_divergence(dense, stream), errors)


@dataclass(frozen=True)
class _Tried:
    """A mix, its divergence, and the relative squared error of each matrix."""

    mix: Mix
    divergence: float
    errors: Sequence[float]


def _best(tried: Sequence[_Tried]) -> _Tried:
    return min(tried, key=lambda trial: trial.divergence)


def elements(plan: Plan) -> list[int]:
    """Return the number of weights of each matrix."""
    return [m.elements for block in plan.layout.blocks for m in block.matrices]


def uniform_mixes(plan: Plan) -> Iterator[Mix]:
    """Yield the mixes in which all matrices get the same pair."""
    count = len(elements(plan))
    for pattern, grid in plan.options.pairs:
        assert grid is not None, "pairs for a number of bits have grids"
        yield Mix(_pair_name(pattern, grid), ((pattern, grid),) * count)


def blends(plan: Plan, errors: Sequence[float]) -> Iterator[Mix]:
    """Yield mixes of the two grids around the number of bits, without zeros.

    Matrices get the finer grid in turn while bits are left: in one mix those with the
    largest error per weight first, in the other those of the first and last blocks.

    Args:
        plan: The run.
        errors: Relative squared error of each matrix in a trial.
    """
    options, sizes = plan.options, elements(plan)
    assert options.target_bits is not None, "there is nothing to mix for"
    grids = grids_around(options.target_bits, options.group_size, options.symmetric)
    if grids is None:
        return
    coarse, fine = (grid.bits_per_weight(0) for grid in grids)
    left = (options.target_bits - coarse) / (fine - coarse) * sum(sizes)
    orders = {
        "by error": [e / n for e, n in zip(errors, sizes, strict=True)],
        "by place": _distances_from_the_middle(plan),
    }
    for order, worth in orders.items():
        chosen = _fill(worth, sizes, left)
        pairs = tuple(
            (Unstructured(0.0), grids[index in chosen]) for index in range(len(sizes))
        )
        yield Mix(f"{grids[0]} and {grids[1]} {order}", pairs)


def _distances_from_the_middle(plan: Plan) -> list[float]:
    """Return how far the block of each matrix is from the middle of the model."""
    blocks = plan.layout.blocks
    middle = (len(blocks) - 1) / 2
    return [abs(block.index - middle) for block in blocks for _ in block.matrices]


def _fill(worth: Sequence[float], sizes: Sequence[int], room: float) -> set[int]:
    """Return the indices of greatest worth whose sizes fit into a room together."""
    chosen: set[int] = set()
    for index in sorted(range(len(sizes)), key=lambda i: -worth[i]):
        if sizes[index] <= room:
            chosen.add(index)
            room -= sizes[index]
    return chosen


def _pair_name(pattern: Pattern, grid: QuantScheme) -> str:
    return f"{pattern} zeros, {grid}" if pattern.sparsity else str(grid)


def _record(tried: Sequence[_Tried], sizes: Sequence[int]) -> MixRecord:
    mix = _best(tried).mix
    distinct = list(dict.fromkeys(mix.pairs))
    return MixRecord(
        name=mix.name,
        bits=mix.bits(sizes),
        pairs=tuple(PairRecord(p.sparsity, asdict(grid)) for p, grid in distinct),
        matrices=tuple(distinct.index(pair) for pair in mix.pairs),
        trials=tuple(
            MixTrialRecord(trial.mix.name, trial.mix.bits(sizes), trial.divergence)
            for trial in tried
        ),
    )
