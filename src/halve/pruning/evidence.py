"""What is known of a group's inputs when its matrices are pruned.

The statistic and the drift are sums over the windows that are fitted to; of the windows
kept apart, inputs themselves are held, since they judge every candidate.
"""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field

from torch import Tensor

from halve.distributed import Ranks
from halve.errors import NumericalError
from halve.finite import is_finite
from halve.products import linear
from halve.pruning.groups import Group
from halve.pruning.kept import Kept
from halve.pruning.site import Site
from halve.statistics import Drift, Statistic

# Tokens of held-out inputs that are kept for each group; more hardly move a choice.
HELD_TOKENS = 4096


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
        return cls(step=max(-(-tokens // HELD_TOKENS), 1))

    def add(self, inputs: Tensor, dense: Tensor) -> None:
        """Keep a batch, thinned."""
        self.pairs.append((inputs[:: self.step].clone(), dense[:: self.step].clone()))

    def join(self, ranks: Ranks, wanted: bool) -> None:
        """Hold the batches of all ranks; none where they are not wanted."""
        inputs = ranks.exchange([pair[0] for pair in self.pairs], wanted)
        dense = ranks.exchange([pair[1] for pair in self.pairs], wanted)
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
class Evidence:
    """All that is known of a group's inputs.

    Attributes:
        group: The matrices.
        statistic: Of their inputs.
        drift: How those differ from the dense model's; None where that is not wanted.
        held: Inputs kept apart; empty where no window is.
    """

    group: Group
    statistic: Statistic
    drift: Drift | None
    held: HeldOut = field(default_factory=HeldOut)

    def add(self, inputs: Tensor, dense: Tensor | None, apart: bool) -> None:
        """Take in one batch, [tokens, columns].

        Args:
            inputs: As they are.
            dense: As they are in the dense model, if that is known.
            apart: Whether the batch is held out.
        """
        if apart:
            self.held.add(inputs, inputs if dense is None else dense)
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
        self.statistic.finish(ranks.add)
        if self.drift is not None:
            self.drift.finish(ranks.add)
        self.held.join(ranks, wanted)


def collect(
    site: Site,
    groups: list[Group],
    kind: type[Statistic],
    dense: Kept | None = None,
    aside: Kept | None = None,
) -> list[Evidence]:
    """Run all windows through the block as it is now, up to the groups' inputs.

    Args:
        site: The block.
        groups: Whose inputs are wanted.
        kind: Of statistic.
        dense: What they are in the dense model, where that is asked.
        aside: Room for the inputs of some groups, for `sum_up`.

    Returns:
        What is known of the others.

    Raises:
        NumericalError: An input is not finite; names block, matrix and sample.
    """
    later = set() if aside is None else aside.places.keys()
    found = {
        group.leader: _nothing_yet(site, group, kind, dense is not None)
        for group in groups
        if group.leader not in later
    }
    for part in site.stream.batches():
        _Batch(site, part, found, dense, aside).run(groups)
    return list(found.values())


def sum_up(site: Site, group: Group, kind: type[Statistic], aside: Kept) -> Evidence:
    """Return what `collect` would have of a group, from the inputs it set aside.

    They are freed. Raises NumericalError as it does.
    """
    evidence, path = _nothing_yet(site, group, kind, with_drift=False), group.leader
    for part in site.stream.batches():
        batch = _Batch(site, part, {path: evidence})
        for call in range(group.calls):
            inputs = aside.inputs(path, call, part)
            batch.take(path, inputs.to(site.stream.model.device))
    del aside.places[path]
    return evidence


def _nothing_yet(
    site: Site, group: Group, kind: type[Statistic], with_drift: bool
) -> Evidence:
    device = site.stream.model.device
    weights = [site.weight(matrix) for matrix in group.matrices]
    drift = Drift(weights) if with_drift else None
    held = HeldOut.of(site.stream.all_apart * site.stream.windows.shape[1])
    return Evidence(group, kind(group.columns, device), drift, held)


@dataclass
class _Batch:
    """One batch on its way into the evidence."""

    site: Site
    part: slice
    found: dict[str, Evidence]
    dense: Kept | None = None
    aside: Kept | None = None
    calls: Counter[str] = field(default_factory=Counter)

    def run(self, groups: list[Group]) -> None:
        self.site.each_input(self.part, groups, self._meet)

    def _meet(self, path: str, inputs: Tensor) -> None:
        call = self.calls[path]
        self.calls[path] += 1
        if path not in self.found:
            assert self.aside is not None, "all groups are summed"
            self.aside.keep(path, call, self.part, inputs)
            return
        dense = None
        if self.dense is not None:
            dense = self.dense.inputs(path, call, self.part).to(inputs.device)
        self.take(path, inputs, dense)

    def take(self, path: str, inputs: Tensor, dense: Tensor | None = None) -> None:
        apart = self.site.stream.is_apart(self.part)
        self.found[path].add(inputs, dense, apart)
        sound = inputs if apart else self.found[path].statistic
        if not _is_finite(sound):
            numbers = self.site.stream.numbers[self.part]
            _report(f"{self.site.planned.name}.{path}", inputs, numbers)


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
