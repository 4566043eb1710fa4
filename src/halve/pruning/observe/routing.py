"""Inputs of a module of experts: kept in one pass, then observed expert after expert.

The module is called once a batch, with the hidden states of all tokens and the experts
of each. Both are kept, and the pass ends there. Each expert's inputs are then rows of
the hidden states, and those of its last matrix follow from them, so no expert needs a
pass of its own, and one expert's Gram matrices are in memory at a time.

An expert that few tokens are sent to has an ill-conditioned Gram matrix, or none. Its
statistic is therefore shrunk towards that of all tokens of the block:

    X_e^T X_e + columns * X^T X / tokens,

as if the router had sent it one more token for each column, of the average kind. With
many tokens of its own that changes nothing.
"""

from collections.abc import Iterator
from copy import deepcopy
from dataclasses import dataclass
from math import gcd
from pathlib import Path

import torch
from torch import Tensor, nn

from halve.calibration_stats import CrossGram, GramMatrix, Statistic
from halve.errors import NumericalError, UnsupportedModelError
from halve.layout import PlannedBlock, PlannedMatrix
from halve.models import Experts
from halve.numerics.finite import finite_flag
from halve.pruning.observe.activation_cache import ActivationCache
from halve.pruning.observe.block_state import BlockState, flat
from halve.pruning.observe.collect import GroupInputs, Prior, not_finite
from halve.pruning.observe.held_out import HeldOut
from halve.pruning.observe.input_groups import Group, RoutedGroup, routed_groups

# Pseudo-tokens of the block's mean, as a multiple of the columns.
_PSEUDO_TOKENS = 1
# Tokens of the block whose inner activations, in one expert, make up the mean that its
# last matrix is shrunk towards, as a multiple of the columns.
_INNER_TOKENS = 8
# Rows that are gathered at once.
_ROWS = 4096
# Held-out tokens below which candidates for an expert are compared on those of the
# whole block, and how many of these are taken.
_FEW_HELD_OUT, _SHARED_HELD_OUT = 64, 1024


def kept_columns(planned: PlannedBlock) -> int:
    """Return the columns of the inputs that a block's modules of experts keep."""
    return sum(group.columns for group in routed_groups(planned))


def routed_nbytes(group: RoutedGroup, running: bool, corrects: bool) -> int:
    """Return the bytes of all Gram matrices while one expert is observed or solved.

    Those are of all tokens and of its own, for its inputs and for its last matrix's.

    Args:
        group: The experts.
        running: Whether inputs are still added.
        corrects: Whether targets are corrected.
    """
    *first, last = group.experts[0]
    rows, outputs = sum(m.matrix.shape[0] for m in first), last.matrix.shape[0]
    return sum(
        GramMatrix.nbytes(columns, running=False)
        + GramMatrix.nbytes(columns, running)
        + corrects * CrossGram.nbytes(height, columns, running)
        for height, columns in ((rows, group.columns), (outputs, group.inner))
    )


def rows_nbytes(group: RoutedGroup, tokens: int, corrects: bool) -> int:
    """Return the bytes of the rows of an expert that are gathered at once, at most.

    Its inputs, what its first layers make of them, and what its last layer gets.

    Args:
        group: The experts.
        tokens: Tokens of all windows.
        corrects: Whether targets are corrected.
    """
    outputs = sum(m.matrix.shape[0] for m in group.experts[0][:-1])
    each = group.columns + 2 * outputs + group.inner
    return 4 * min(_ROWS, tokens) * each * (1 + corrects)


@dataclass(frozen=True)
class RoutedInputs:
    """What a module of experts gets in all windows of this process.

    Attributes:
        state: The block.
        group: The experts.
        hidden: [tokens, width], float32, where `ActivationCache` has put it.
        dense: The same in the dense model; None where targets are not corrected.
        order: Tokens in ascending order of their experts, int64; of each expert in the
            order of `hidden`. A token is there once for each of its experts.
        starts: [experts + 1]: where each expert's tokens start in `order`.
        tokens: [experts], tokens of all processes that each expert is fitted to.
        held_out: [experts], held-out tokens of all processes.
    """

    state: BlockState
    group: RoutedGroup
    hidden: Tensor
    dense: Tensor | None
    order: Tensor
    starts: list[int]
    tokens: tuple[int, ...]
    held_out: tuple[int, ...]

    @property
    def first_held_out(self) -> int:
        """First held-out token; those before it are fitted to."""
        stream = self.state.stream
        return (len(stream.windows) - stream.held_out) * stream.windows.shape[1]

    def tokens_of(self, number: int) -> tuple[Tensor, Tensor]:
        """Return the tokens that an expert is fitted to, and those held out."""
        own = self.order[self.starts[number] : self.starts[number + 1]]
        is_fitted = own < self.first_held_out
        return own[is_fitted], own[~is_fitted]

    def thinned(self, tokens: Tensor, wanted: int) -> tuple[Tensor, int]:
        """Return about so many of some tokens of all processes, evenly spread.

        Args:
            tokens: Tokens of this process.
            wanted: How many are wanted of all processes.

        Returns:
            Those of this process, and the number of those of all.
        """
        stream = self.state.stream
        length = stream.windows.shape[1]
        total = sum(stream.ranks.all_gather(len(tokens)))
        step = max(total // wanted, 1)
        while gcd(step, length) > 1:  # else always the same positions of a window
            step -= 1
        numbers = torch.tensor(list(stream.numbers), dtype=torch.int64)
        window, position = tokens // length, tokens % length
        taken = tokens[(numbers[window] * length + position) % step == 0]
        return taken, sum(stream.ranks.all_gather(len(taken)))

    def rows(self, tokens: Tensor) -> Iterator[tuple[Tensor, Tensor | None]]:
        """Yield inputs of some tokens, [rows, width], in the pruned and dense model."""
        device = self.state.stream.model.device
        for part in tokens.split(_ROWS):
            dense = None if self.dense is None else _gather(self.dense, part, device)
            yield _gather(self.hidden, part, device), dense


def _gather(hidden: Tensor, tokens: Tensor, device: torch.device) -> Tensor:
    return hidden[tokens.to(hidden.device)].to(device)


def keep_inputs(
    state: BlockState,
    group: RoutedGroup,
    budget: int,
    folder: Path | None,
    dense: ActivationCache | None = None,
) -> RoutedInputs:
    """Run all windows through the block as it is now, up to a module of experts.

    Args:
        state: The block.
        group: The experts.
        budget: Bytes of their inputs that may stay in memory.
        folder: Where the rest goes; None for the system's temporary folder.
        dense: Holds their inputs in the dense model, if targets are corrected.

    Raises:
        UnsupportedModelError: The module is not called with hidden states of all
            tokens and their experts.
        NumericalError: An input is not finite; names block and sample.
        OutputError: There is not enough space on the disk.
    """
    stream, leader = state.stream, group.leader
    cache = ActivationCache.allocate(
        stream, state.planned.name, [group], budget, folder
    )
    numbers: list[Tensor] = []
    flags: list[tuple[slice, Tensor]] = []
    for part in stream.one_pass():
        hidden, index = _called_with(state, group, part)
        cache.put(leader, 0, part, hidden)
        numbers.append(index.cpu())
        flags.append((part, finite_flag(hidden)))
    for part, flag in flags:
        if not flag:
            inputs = cache.inputs(leader, 0, part)
            name = f"{state.planned.name}.{leader}"
            raise not_finite(name, inputs, stream.numbers[part])
    own_dense = None if dense is None else dense.places[leader][0]
    return _sorted(state, group, (cache.places[leader][0], own_dense), numbers)


def _called_with(
    state: BlockState, group: RoutedGroup, part: slice
) -> tuple[Tensor, Tensor]:
    """Return what the module is called with in one batch: inputs, and experts.

    Returns:
        [tokens, width], and [tokens, k], int64.
    """
    stream, index = state.stream, state.planned.index
    args = stream.call_of(state.block, index, group.leader, part)
    tokens = stream.windows[part].numel()
    tensors = [x for x in args[:2] if isinstance(x, Tensor) and len(flat(x)) == tokens]
    if len(tensors) < 2:  # noqa: PLR2004
        shapes = [list(x.shape) for x in args if isinstance(x, Tensor)]
        raise UnsupportedModelError(
            f"{state.planned.name}.{group.leader} is called with {shapes or 'nothing'} "
            f"for {tokens} tokens, where their hidden states and the numbers of their "
            "experts were expected.",
            "Open an issue that names the model.",
        )
    return flat(tensors[0]), flat(tensors[1]).long()


def _sorted(
    state: BlockState,
    group: RoutedGroup,
    hidden: tuple[Tensor, Tensor | None],
    numbers: list[Tensor],
) -> RoutedInputs:
    """Sort the tokens by expert, and count them."""
    index = torch.cat(numbers)  # [tokens, k]
    count, experts = len(group.experts), index.flatten()
    order = experts.argsort(stable=True)
    # Numbers past the last expert, which stand for none, come last.
    starts = torch.searchsorted(experts[order].contiguous(), torch.arange(count + 1))
    stream = state.stream
    fitted = (len(stream.windows) - stream.held_out) * stream.windows.shape[1]
    counts = [
        torch.bincount(part.flatten(), minlength=count)[:count].double()
        for part in (index[:fitted], index[fitted:])
    ]
    both = torch.stack(counts).to(stream.model.device)
    stream.ranks.all_reduce_(both)
    tokens, held_out = (tuple(map(int, row)) for row in both.tolist())
    return RoutedInputs(
        state=state,
        group=group,
        hidden=hidden[0],
        dense=hidden[1],
        order=order // index.shape[1],
        starts=starts.tolist(),
        tokens=tokens,
        held_out=held_out,
    )


def observe_experts(
    routed: RoutedInputs, statistic: type[Statistic]
) -> Iterator[list[GroupInputs]]:
    """Yield each expert's groups, with statistics of their inputs.

    With corrected targets the last matrix of an expert is observed once the others are
    pruned; else both groups together.

    Args:
        routed: The inputs of all experts.
        statistic: What is computed of them.
    """
    every = torch.arange(routed.first_held_out)
    shared, tokens = _Sums(routed, statistic).of_hidden(every)
    prior = Prior(shared, _PSEUDO_TOKENS * routed.group.columns / max(tokens, 1))
    for number in range(len(routed.group.experts)):
        expert = _Expert(routed, statistic, number)
        first = expert.first(prior)
        if routed.dense is None:
            yield [first, expert.last()]
        else:
            yield [first]
            yield [expert.last()]


@dataclass(frozen=True)
class _Sums:
    """Statistics of inputs of some tokens that no group has for itself."""

    routed: RoutedInputs
    kind: type[Statistic]

    def of_hidden(self, tokens: Tensor) -> tuple[Statistic, int]:
        """Return the statistic of all processes' inputs, and the number of tokens."""
        stream = self.routed.state.stream
        statistic = self.kind(self.routed.group.columns, stream.model.device)
        for inputs, _ in self.routed.rows(tokens):
            statistic.add(inputs)
        statistic.finish(stream.ranks.all_reduce_)
        return statistic, sum(stream.ranks.all_gather(len(tokens)))


class _Expert:
    """One expert, whose groups are observed one after the other."""

    def __init__(
        self, routed: RoutedInputs, kind: type[Statistic], number: int
    ) -> None:
        self.routed, self.kind, self.number = routed, kind, number
        self.matrices = routed.group.experts[number]
        module = routed.state.block.get_submodule(routed.group.leader)
        assert isinstance(module, Experts), "the block is lent"
        self.experts, self.layers = module, module.first_layers(number)
        # Copied, since the layers are pruned before the dense ones were last used.
        corrects = routed.dense is not None
        self.dense_layers = deepcopy(self.layers) if corrects else self.layers
        self.fitted, held_out = routed.tokens_of(number)
        self.held_out = self._compared_on(held_out)

    def _compared_on(self, own: Tensor) -> Tensor:
        """Return this process's held-out tokens on which candidates are compared."""
        if self.routed.held_out[self.number] >= _FEW_HELD_OUT:
            return own
        start = self.routed.first_held_out
        every = torch.arange(start, len(self.routed.hidden))
        return self.routed.thinned(every, _SHARED_HELD_OUT)[0]

    def first(self, prior: Prior) -> GroupInputs:
        """Return what is known of the inputs of all matrices but the last."""
        observed = self._empty(self.matrices[:-1], prior)
        for inputs, dense in self.routed.rows(self.fitted):
            observed.add(inputs, dense, is_held_out=False)
        for inputs, dense in self.routed.rows(self.held_out):
            observed.add(inputs, dense, is_held_out=True)
        return self._checked(observed)

    def last(self) -> GroupInputs:
        """Return what is known of the inputs of the last matrix."""
        observed = self._empty(self.matrices[-1:], self._inner_prior())
        for tokens, is_held_out in ((self.fitted, False), (self.held_out, True)):
            for inputs, dense in self.routed.rows(tokens):
                inner = self._between(self.layers, inputs)
                inner_dense = (
                    None if dense is None else self._between(self.dense_layers, dense)
                )
                observed.add(inner, inner_dense, is_held_out)
        return self._checked(observed)

    def _inner_prior(self) -> Prior:
        """Return the inner activations that this expert would have for any token."""
        group, stream = self.routed.group, self.routed.state.stream
        every = torch.arange(self.routed.first_held_out)
        tokens, count = self.routed.thinned(every, _INNER_TOKENS * group.inner)
        statistic = self.kind(group.inner, stream.model.device)
        for inputs, _ in self.routed.rows(tokens):
            statistic.add(self._between(self.layers, inputs))
        statistic.finish(stream.ranks.all_reduce_)
        return Prior(statistic, _PSEUDO_TOKENS * group.inner / max(count, 1))

    @torch.no_grad()
    def _between(self, layers: nn.ModuleList, inputs: Tensor) -> Tensor:
        with self.routed.state.stream.computing():
            return self.experts.between(layers, inputs)

    def _empty(self, matrices: tuple[PlannedMatrix, ...], prior: Prior) -> GroupInputs:
        """Return sums without any inputs."""
        state, group = self.routed.state, Group(matrices)
        weights = [state.weight(matrix) for matrix in matrices]
        drift = None if self.routed.dense is None else CrossGram(weights)
        tokens = self.routed.held_out[self.number]
        held_out = HeldOut.of(max(tokens, 1))
        statistic = self.kind(group.columns, state.stream.model.device)
        return GroupInputs(group, statistic, drift, held_out, prior=prior)

    def _checked(self, observed: GroupInputs) -> GroupInputs:
        """Raise NumericalError if a sum is not finite."""
        if not observed.statistic.is_finite():
            name = f"{self.routed.state.planned.name}.{observed.group.leader}"
            raise NumericalError(
                f"The inputs of {name} are not finite, or too large to square.",
                "Check the checkpoint and the calibration text.",
            )
        return observed
