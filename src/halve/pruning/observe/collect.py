"""What is known of a group's inputs when its matrices are pruned.

The statistic and the drift are sums over the windows that are fitted to; of the windows
kept apart, inputs themselves are held, since they judge every candidate.
"""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field

from torch import Tensor

from halve.calibration_stats import CrossGram, Statistic
from halve.distributed import Ranks
from halve.errors import NumericalError
from halve.numerics.finite import is_finite
from halve.numerics.matmul import linear
from halve.pruning.observe.activation_cache import ActivationCache
from halve.pruning.observe.block_state import BlockState
from halve.pruning.observe.input_groups import Group

# Tokens of held-out inputs that are kept for each group; more hardly move a choice.
HELD_OUT_TOKENS = 4096


@dataclass
class HeldOut:
    """Inputs that no candidate was fitted to.

    Attributes:
        pairs: Batches of inputs as they are now, and as they are in the dense model,
            each [tokens, columns]; the same tensor where that is not known.
        step: One token in so many is kept.
    """

    pairs: list[tuple[Tensor, Tensor]] = field(default_factory=list)
    step: int = 1

    @classmethod
    def of(cls, tokens: int) -> "HeldOut":
        """Return room for some of so many tokens."""
        return cls(step=max(-(-tokens // HELD_OUT_TOKENS), 1))

    def add(self, inputs: Tensor, dense: Tensor) -> None:
        """Keep a batch, thinned."""
        self.pairs.append((inputs[:: self.step].clone(), dense[:: self.step].clone()))

    def join(self, ranks: Ranks, wanted: bool) -> None:
        """Hold the batches of all ranks; none where they are not wanted."""
        inputs = ranks.all_gather_tensors([pair[0] for pair in self.pairs], wanted)
        dense = ranks.all_gather_tensors([pair[1] for pair in self.pairs], wanted)
        self.pairs = list(zip(inputs, dense, strict=True))

    def errors(self, weight: Tensor, solutions: Sequence[Tensor]) -> list[float]:
        """Return ||X_dense W^T - X Z^T||^2 / ||X_dense W^T||^2 of each solution Z.

        Args:
            weight: W, dense, [rows, columns].
            solutions: Z, [rows, columns] each.
        """
        lost, kept = [0.0] * len(solutions), 0.0
        for inputs, dense in self.pairs:
            wanted = linear(dense, weight)
            kept += float(wanted.square().sum())
            for index, solution in enumerate(solutions):
                lost[index] += float((wanted - linear(inputs, solution)).square().sum())
        return [own / kept if kept else float(own > 0) for own in lost]


@dataclass
class GroupInputs:
    """All that is known of a group's inputs.

    Attributes:
        group: The matrices.
        statistic: Of their inputs.
        drift: How those differ from the dense model's; None where that is not wanted.
        held_out: Inputs kept apart; empty where no window is.
    """

    group: Group
    statistic: Statistic
    drift: CrossGram | None
    held_out: HeldOut = field(default_factory=HeldOut)

    def add(self, inputs: Tensor, dense: Tensor | None, held_out: bool) -> None:
        """Take in one batch, [tokens, columns].

        Args:
            inputs: As they are.
            dense: As they are in the dense model, if that is known.
            held_out: Whether the batch is held out.
        """
        if held_out:
            self.held_out.add(inputs, inputs if dense is None else dense)
            return
        self.statistic.add(inputs)
        if self.drift is not None and dense is not None:
            self.drift.add(inputs, dense)

    def finish(self, ranks: Ranks, wanted: bool) -> None:
        """Take in what all ranks know, in place; no batch can be added afterwards.

        Args:
            ranks: All of them; each must do so.
            wanted: Whether this one needs the inputs kept apart; sums it gets anyhow.
        """
        self.statistic.finish(ranks.all_reduce_)
        if self.drift is not None:
            self.drift.finish(ranks.all_reduce_)
        self.held_out.join(ranks, wanted)


def collect(
    state: BlockState,
    groups: list[Group],
    kind: type[Statistic],
    dense: ActivationCache | None = None,
    deferred: ActivationCache | None = None,
) -> list[GroupInputs]:
    """Run all windows through the block as it is now, up to the groups' inputs.

    Args:
        state: The block.
        groups: Whose inputs are wanted.
        kind: Of statistic.
        dense: What they are in the dense model, where that is asked.
        deferred: Room for the inputs of some groups, for `accumulate_deferred`.

    Returns:
        What is known of the others.

    Raises:
        NumericalError: An input is not finite; names block, matrix and sample.
    """
    later = set() if deferred is None else deferred.places.keys()
    found = {
        group.leader: _nothing_yet(state, group, kind, dense is not None)
        for group in groups
        if group.leader not in later
    }
    for part in state.stream.batches():
        _Batch(state, part, found, dense, deferred).run(groups)
    return list(found.values())


def accumulate_deferred(
    state: BlockState, group: Group, kind: type[Statistic], deferred: ActivationCache
) -> GroupInputs:
    """Return what `collect` would have of a group, from the inputs it set aside.

    They are freed. Raises NumericalError as it does.
    """
    group_inputs, path = (
        _nothing_yet(state, group, kind, with_drift=False),
        group.leader,
    )
    for part in state.stream.batches():
        batch = _Batch(state, part, {path: group_inputs})
        for call in range(group.calls):
            inputs = deferred.inputs(path, call, part)
            batch.take(path, inputs.to(state.stream.model.device))
    del deferred.places[path]
    return group_inputs


def _nothing_yet(
    state: BlockState, group: Group, kind: type[Statistic], with_drift: bool
) -> GroupInputs:
    device = state.stream.model.device
    weights = [state.weight(matrix) for matrix in group.matrices]
    drift = CrossGram(weights) if with_drift else None
    held_out = HeldOut.of(state.stream.all_held_out * state.stream.windows.shape[1])
    return GroupInputs(group, kind(group.columns, device), drift, held_out)


@dataclass
class _Batch:
    """One batch on its way into the evidence."""

    state: BlockState
    part: slice
    found: dict[str, GroupInputs]
    dense: ActivationCache | None = None
    deferred: ActivationCache | None = None
    calls: Counter[str] = field(default_factory=Counter)

    def run(self, groups: list[Group]) -> None:
        self.state.each_input(self.part, groups, self._meet)

    def _meet(self, path: str, inputs: Tensor) -> None:
        call = self.calls[path]
        self.calls[path] += 1
        if path not in self.found:
            assert self.deferred is not None, "all groups are summed"
            self.deferred.keep(path, call, self.part, inputs)
            return
        dense = None
        if self.dense is not None:
            dense = self.dense.inputs(path, call, self.part).to(inputs.device)
        self.take(path, inputs, dense)

    def take(self, path: str, inputs: Tensor, dense: Tensor | None = None) -> None:
        held_out = self.state.stream.is_held_out(self.part)
        self.found[path].add(inputs, dense, held_out)
        sound = inputs if held_out else self.found[path].statistic
        if not _is_finite(sound):
            numbers = self.state.stream.numbers[self.part]
            _report(f"{self.state.planned.name}.{path}", inputs, numbers)


def _is_finite(known: Tensor | Statistic) -> bool:
    if isinstance(known, Statistic):
        return known.is_finite()
    return is_finite(known)


def _report(name: str, inputs: Tensor, numbers: Sequence[int]) -> None:
    finite = inputs.isfinite().reshape(len(numbers), -1).all(dim=1)
    bad = (~finite).nonzero()
    sample = numbers[int(bad[0]) if len(bad) else 0]
    raise NumericalError(
        f"The inputs of {name} are not finite, or too large to square, in sample "
        f"{sample}.",
        "Check the checkpoint and the calibration text.",
    )
