"""Inputs of a module of experts: kept in one pass, then observed expert after expert.

The module is called once a batch, with the hidden states of all tokens and the experts
of each. Both are kept, and the pass ends there. Each expert's inputs are then rows of
the hidden states, and those of its last matrix follow from them, so no expert needs a
pass of its own, and one expert's Gram matrices are in memory at a time.

An expert that few tokens are sent to has an ill-conditioned Gram matrix, or none. Its
statistic is therefore shrunk towards that of all tokens of the block:

    X_e^T X_e + a * columns * X^T X / tokens,

as if the router had sent it a tokens more for each column, of the average kind. With
many tokens of its own that changes nothing. Inputs of an expert's last matrix differ
more from those of other tokens: a is smaller there (`benchmarks/rare_experts.py`).

The router's weights are kept as well: whole experts are scored by them
(`select.experts`), and rows can be weighed by them (`Weighting`).
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

# Tokens of the block whose inner activations, in one expert, make up the mean that its
# last matrix is shrunk towards, as a multiple of the columns.
_INNER_TOKENS = 8
# Rows that are gathered at once.
_ROWS = 4096
# Held-out tokens below which candidates for an expert are compared on those of the
# whole block, and how many of these are taken.
_FEW_HELD_OUT, _SHARED_HELD_OUT = 64, 1024


@dataclass(frozen=True)
class Weighting:
    """How an expert's statistics are made of its tokens and of those of the block.

    The output of an expert is multiplied by the router's weight g of each token, and so
    is the error of its last matrix. With X = diag(g) X_e that is what solvers minimize;
    g is divided by its root mean square, so that sums keep their size.

    Attributes:
        pseudo_tokens: Tokens of the block's mean that are added to the inputs of all
            layers but the last, as a multiple of the columns; 0 for an expert's own
            tokens alone.
        inner_pseudo_tokens: The same for the last layer.
        first: Whether inputs of all layers but the last are multiplied by g.
        last: Whether inputs of the last layer are.
    """

    pseudo_tokens: float = 0.3
    inner_pseudo_tokens: float = 0.1
    first: bool = False
    last: bool = False


# Experts of each token, [tokens, k], int64, and the router's weights, float32.
_Routes = tuple[Tensor, Tensor]
# What every run uses. `benchmarks/experts.py` compares others with it.
WEIGHTING = Weighting()


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
class Sent:
    """Tokens that a router sends to an expert.

    Attributes:
        tokens: Their indices, [tokens], int64.
        weights: What the expert's outputs are multiplied by, [tokens], float32.
    """

    tokens: Tensor
    weights: Tensor

    def split(self) -> Iterator["Sent"]:
        """Yield parts whose rows are gathered at once."""
        parts = self.tokens.split(_ROWS), self.weights.split(_ROWS)
        for tokens, weights in zip(*parts, strict=True):
            yield Sent(tokens, weights)

    def scaled(self, factor: float) -> "Sent":
        """Return the tokens with weights multiplied by a factor."""
        return Sent(self.tokens, self.weights * factor)


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
        weights: The router's weight of each entry of `order`, float32.
        starts: [experts + 1]: where each expert's tokens start in `order`.
        tokens: [experts], tokens of all processes that each expert is fitted to.
        held_out: [experts], held-out tokens of all processes.
    """

    state: BlockState
    group: RoutedGroup
    hidden: Tensor
    dense: Tensor | None
    order: Tensor
    weights: Tensor
    starts: list[int]
    tokens: tuple[int, ...]
    held_out: tuple[int, ...]

    @property
    def first_held_out(self) -> int:
        """First held-out token; those before it are fitted to."""
        stream = self.state.stream
        return (len(stream.windows) - stream.held_out) * stream.windows.shape[1]

    def sent_to(self, number: int) -> tuple[Sent, Sent]:
        """Return the tokens that an expert is fitted to, and those held out."""
        own = slice(self.starts[number], self.starts[number + 1])
        tokens, weights = self.order[own], self.weights[own]
        is_fitted = tokens < self.first_held_out
        return (
            Sent(tokens[is_fitted], weights[is_fitted]),
            Sent(tokens[~is_fitted], weights[~is_fitted]),
        )

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
        for part in tokens.split(_ROWS):
            yield self.gather(part)

    def gather(self, tokens: Tensor) -> tuple[Tensor, Tensor | None]:
        """Return inputs of some tokens, as `rows` yields them, all at once."""
        device = self.state.stream.model.device
        dense = None if self.dense is None else _gather(self.dense, tokens, device)
        return _gather(self.hidden, tokens, device), dense


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
    routes: list[_Routes] = []
    flags: list[tuple[slice, Tensor]] = []
    for part in stream.one_pass():
        hidden, index, weights = _called_with(state, group, part)
        cache.put(leader, 0, part, hidden)
        routes.append((index.cpu(), weights.cpu()))
        flags.append((part, finite_flag(hidden)))
    for part, flag in flags:
        if not flag:
            inputs = cache.inputs(leader, 0, part)
            name = f"{state.planned.name}.{leader}"
            raise not_finite(name, inputs, stream.numbers[part])
    own_dense = None if dense is None else dense.places[leader][0]
    return _sorted(state, group, (cache.places[leader][0], own_dense), routes)


def _called_with(
    state: BlockState, group: RoutedGroup, part: slice
) -> tuple[Tensor, Tensor, Tensor]:
    """Return what the module is called with in one batch.

    Returns:
        Inputs, [tokens, width]; experts, [tokens, k], int64; and their weights,
        [tokens, k], float32.
    """
    stream, index = state.stream, state.planned.index
    args = stream.call_of(state.block, index, group.leader, part)
    tokens = stream.windows[part].numel()
    tensors = [x for x in args[:3] if isinstance(x, Tensor) and len(flat(x)) == tokens]
    is_known = len(tensors) == 3 and tensors[1].shape == tensors[2].shape  # noqa: PLR2004
    if not is_known:
        shapes = [list(x.shape) for x in args if isinstance(x, Tensor)]
        raise UnsupportedModelError(
            f"{state.planned.name}.{group.leader} is called with {shapes or 'nothing'} "
            f"for {tokens} tokens, where their hidden states, the numbers of their "
            "experts and the weights of these were expected.",
            "Open an issue that names the model.",
        )
    hidden, index, weights = map(flat, tensors)
    return hidden, index.long(), weights.float()


def _sorted(
    state: BlockState,
    group: RoutedGroup,
    hidden: tuple[Tensor, Tensor | None],
    routes: list[_Routes],
) -> RoutedInputs:
    """Sort the tokens by expert, and count them."""
    index, weights = (torch.cat(parts) for parts in zip(*routes, strict=True))
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
        weights=weights.flatten()[order],
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
    pseudo_tokens = WEIGHTING.pseudo_tokens * routed.group.columns
    prior = Prior(shared, pseudo_tokens / max(tokens, 1))
    for number in range(len(routed.group.experts)):
        expert = _Expert(routed, statistic, number)
        first = expert.first(prior)
        if routed.dense is None:
            yield [first, expert.last()]
        else:
            yield [first]
            yield [expert.last()]


def _weighed(
    sent: Sent, inputs: Tensor, dense: Tensor | None
) -> tuple[Tensor, Tensor | None]:
    """Return rows of tokens multiplied by the tokens' weights."""
    weights = sent.weights.to(inputs.device)[:, None]
    return inputs * weights, None if dense is None else dense * weights


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
        fitted, held_out = routed.sent_to(number)
        scale = self._weight_scale(fitted)
        self.fitted = fitted.scaled(scale)
        self.held_out = self._compared_on(held_out.scaled(scale))

    def _weight_scale(self, fitted: Sent) -> float:
        """Return what router weights are multiplied by, so that their mean square is 1.

        Of all processes' tokens.
        """
        if not (WEIGHTING.first or WEIGHTING.last):
            return 1.0
        squares = float(fitted.weights.double().square().sum())
        ranks = self.routed.state.stream.ranks
        squares, tokens = ranks.all_sum(squares, len(fitted.tokens))
        return (tokens / squares) ** 0.5 if squares else 1.0

    def _compared_on(self, own: Sent) -> Sent:
        """Return this process's held-out tokens on which candidates are compared."""
        if self.routed.held_out[self.number] >= _FEW_HELD_OUT:
            return own
        start = self.routed.first_held_out
        every = torch.arange(start, len(self.routed.hidden))
        tokens, _ = self.routed.thinned(every, _SHARED_HELD_OUT)
        return Sent(tokens, torch.ones(len(tokens)))  # they have no weight for it

    def first(self, prior: Prior) -> GroupInputs:
        """Return what is known of the inputs of all matrices but the last."""
        observed = self._empty(self.matrices[:-1], prior)
        for sent, is_held_out in ((self.fitted, False), (self.held_out, True)):
            for part in sent.split():
                inputs, dense = self.routed.gather(part.tokens)
                if WEIGHTING.first:
                    inputs, dense = _weighed(part, inputs, dense)
                observed.add(inputs, dense, is_held_out)
        return self._checked(observed)

    def last(self) -> GroupInputs:
        """Return what is known of the inputs of the last matrix."""
        observed = self._empty(self.matrices[-1:], self._inner_prior())
        for sent, is_held_out in ((self.fitted, False), (self.held_out, True)):
            for part in sent.split():
                inputs, dense = self.routed.gather(part.tokens)
                inner = self._between(self.layers, inputs)
                if dense is not None:
                    dense = self._between(self.dense_layers, dense)
                if WEIGHTING.last:
                    inner, dense = _weighed(part, inner, dense)
                observed.add(inner, dense, is_held_out)
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
        pseudo_tokens = WEIGHTING.inner_pseudo_tokens * group.inner
        return Prior(statistic, pseudo_tokens / max(count, 1))

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
