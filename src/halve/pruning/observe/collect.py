"""Collect what solvers need to know of the inputs of a block's groups, in one pass.

Windows that are fitted to go into running sums: a statistic of the inputs, and their
difference from the dense model's inputs. Of held-out windows the inputs themselves are
stored, since every candidate is evaluated on them.
"""

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from halve.calibration_stats import CrossGram, Statistic
from halve.distributed import Ranks
from halve.errors import NumericalError
from halve.numerics.finite import finite_flag, is_finite
from halve.pruning.observe.activation_cache import ActivationCache
from halve.pruning.observe.block_state import BlockState
from halve.pruning.observe.held_out import HeldOut
from halve.pruning.observe.input_groups import Group
from halve.runtime.stream import checks_later


@dataclass(frozen=True)
class Prior:
    """Inputs of other tokens, which stand in for those that a group has too few of.

    Attributes:
        statistic: Their statistic, finished.
        scale: What it is multiplied by.
    """

    statistic: Statistic
    scale: float


@dataclass
class GroupInputs:
    """What is known of a group's inputs.

    Attributes:
        group: The matrices.
        statistic: Running summary of the inputs X in the pruned model.
        drift: Running sum of (X_dense - X)^T X; None where targets are not corrected.
        held_out: Inputs of held-out windows; empty where there are none.
        flags: Whether held-out inputs are finite, scalars on their device; only where
            they are not checked at once.
        prior: What the statistic is shrunk towards; None where it is used as it is.
    """

    group: Group
    statistic: Statistic
    drift: CrossGram | None
    held_out: HeldOut = field(default_factory=HeldOut)
    flags: list[Tensor] = field(default_factory=list)
    prior: Prior | None = None

    def is_finite(self) -> bool:
        """Whether all inputs are finite; waits for the device.

        A sum that was not finite once never is again, so it is enough to look at last.
        """
        return self.statistic.is_finite() and all(map(bool, self.flags))

    def add(self, inputs: Tensor, dense: Tensor | None, is_held_out: bool) -> None:
        """Add one batch.

        Args:
            inputs: X, [tokens, columns].
            dense: X_dense, [tokens, columns], if it is known.
            is_held_out: Whether the batch is held out.
        """
        if is_held_out:
            self.held_out.add(inputs, inputs if dense is None else dense)
            return
        self.statistic.add(inputs)
        if self.drift is not None and dense is not None:
            self.drift.add(inputs, dense)

    def finish(self, ranks: Ranks, needs_held_out: bool) -> None:
        """Combine the sums of all ranks, in place; no batch can be added afterwards.

        Args:
            ranks: All processes; each of them must call this.
            needs_held_out: Whether this rank solves a matrix of the group, and so needs
                the held-out inputs of all ranks.
        """
        self.statistic.finish(ranks.all_reduce_)
        if self.prior is not None:
            self.statistic.add_scaled(self.prior.statistic, self.prior.scale)
        if self.drift is not None:
            self.drift.finish(ranks.all_reduce_)
        self.held_out.gather(ranks, needs_held_out)


def collect(
    state: BlockState,
    groups: list[Group],
    kind: type[Statistic],
    dense: ActivationCache | None = None,
    deferred: ActivationCache | None = None,
) -> list[GroupInputs]:
    """Run all windows through the block as it is now, up to the last group's inputs.

    Args:
        state: The block.
        groups: Groups whose inputs are collected.
        kind: Statistic to compute.
        dense: Inputs of these groups in the dense model; None where targets are not
            corrected.
        deferred: Cache for the inputs of some of the groups. They are only stored, for
            `accumulate_deferred`.

    Returns:
        What is known of the groups that are not deferred.

    Raises:
        NumericalError: An input is not finite; names block, matrix and sample.
    """
    later = set() if deferred is None else deferred.places.keys()

    def one_pass(checks: bool) -> list[GroupInputs]:
        collected = {
            group.leader: _empty(state, group, kind, dense is not None)
            for group in groups
            if group.leader not in later
        }
        for part in state.stream.one_pass():
            _Batch(state, part, collected, dense, deferred, checks).run(groups)
        return list(collected.values())

    return _checked(one_pass, state.stream.model.device)


def _checked(
    one_pass: Callable[[bool], list[GroupInputs]], device: torch.device
) -> list[GroupInputs]:
    """Return the results of a pass, checked batch by batch or at the end.

    Args:
        one_pass: Collects inputs; called with whether to check each batch at once.
        device: The device that it waits for if it does.
    """
    if checks_later(device):
        collected = one_pass(False)
        if all(group_inputs.is_finite() for group_inputs in collected):
            return collected
        del collected  # freed before there are others
    # With checks at once, which name the first sample that is not finite.
    return one_pass(True)


def accumulate_deferred(
    state: BlockState, group: Group, kind: type[Statistic], deferred: ActivationCache
) -> GroupInputs:
    """Return what `collect` would have returned for a group whose inputs it stored.

    The stored inputs are freed.

    Raises:
        NumericalError: An input is not finite; names block, matrix and sample.
    """
    path, device = group.leader, state.stream.model.device

    def one_pass(checks: bool) -> list[GroupInputs]:
        group_inputs = _empty(state, group, kind, with_drift=False)
        for part in state.stream.batches():
            batch = _Batch(state, part, {path: group_inputs}, checks=checks)
            for call in range(group.calls):
                inputs = deferred.inputs(path, call, part)
                batch.add(path, inputs.to(device, non_blocking=True))
        return [group_inputs]

    (group_inputs,) = _checked(one_pass, device)
    del deferred.places[path]
    return group_inputs


def _empty(
    state: BlockState, group: Group, kind: type[Statistic], with_drift: bool
) -> GroupInputs:
    """Return sums without any inputs."""
    device = state.stream.model.device
    weights = [state.weight(matrix) for matrix in group.matrices]
    drift = CrossGram(weights) if with_drift else None
    held_out = HeldOut.of(state.stream.all_held_out * state.stream.windows.shape[1])
    return GroupInputs(group, kind(group.columns, device), drift, held_out)


@dataclass
class _Batch:
    """One batch of windows, whose inputs are added to the sums.

    Attributes:
        state: The block.
        part: The batch.
        collected: Path of a group's leader -> its sums.
        dense: Inputs in the dense model, if they are needed.
        deferred: Cache for groups that are not in `collected`.
        checks: Whether inputs are checked at once; else `GroupInputs.is_finite` tells.
        calls: Path of a leader -> how often it was called in this batch.
    """

    state: BlockState
    part: slice
    collected: dict[str, GroupInputs]
    dense: ActivationCache | None = None
    deferred: ActivationCache | None = None
    checks: bool = True
    calls: Counter[str] = field(default_factory=Counter)

    def run(self, groups: list[Group]) -> None:
        """Run the batch through the block."""
        self.state.each_input(self.part, groups, self._take)

    def _take(self, path: str, inputs: Tensor) -> None:
        """Store or add the inputs of one call."""
        call = self.calls[path]
        self.calls[path] += 1
        if path not in self.collected:
            assert self.deferred is not None, "only deferred groups have no sums"
            self.deferred.put(path, call, self.part, inputs)
            return
        dense = None
        if self.dense is not None:
            dense = self.dense.inputs(path, call, self.part)
            dense = dense.to(inputs.device, non_blocking=True)
        self.add(path, inputs, dense)

    def add(self, path: str, inputs: Tensor, dense: Tensor | None = None) -> None:
        """Add the inputs of one call, and check that they are finite, now or later."""
        is_held_out = self.state.stream.is_held_out(self.part)
        group_inputs = self.collected[path]
        group_inputs.add(inputs, dense, is_held_out)
        if not self.checks:
            group_inputs.flags += [finite_flag(inputs)] if is_held_out else []
            return
        # Of inputs that were summed the statistic is checked, which is smaller, and
        # finds squares that overflow, too.
        finite = (
            is_finite(inputs) if is_held_out else group_inputs.statistic.is_finite()
        )
        if not finite:
            name = f"{self.state.planned.name}.{path}"
            raise not_finite(name, inputs, self.state.stream.numbers[self.part])


def not_finite(name: str, inputs: Tensor, numbers: Sequence[int]) -> NumericalError:
    """Return the error for a batch of inputs.

    Args:
        name: Name of the matrix.
        inputs: [tokens, columns].
        numbers: Numbers of the batch's samples.
    """
    finite = inputs.isfinite().reshape(len(numbers), -1).all(dim=1)
    bad = (~finite).nonzero()
    # Where all are finite a square overflowed; the first sample stands for the batch.
    sample = numbers[int(bad[0]) if len(bad) else 0]
    return NumericalError(
        f"The inputs of {name} are not finite, or too large to square, in sample "
        f"{sample}.",
        "Check the checkpoint and the calibration text.",
    )
