"""Statistics of the inputs of experts, one expert after the other.

They are summed over rows that `routing` has kept, so one expert's Gram matrices are in
memory at a time.

An expert that few tokens are sent to has an ill-conditioned Gram matrix, or none. Its
statistic is therefore shrunk towards that of all tokens of the block:

    X_e^T X_e + a * columns * X^T X / tokens,

as if the router had sent it a tokens more for each column, of the average kind. With
many tokens of its own that changes nothing. Inputs of an expert's last matrix differ
more from those of other tokens: a is smaller there (`benchmarks/rare_experts.py`).
"""

from collections.abc import Iterator
from copy import deepcopy
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from halve.calibration_stats import CrossGram, GramMatrix, Statistic
from halve.errors import NumericalError
from halve.layout import PlannedMatrix
from halve.models import Experts
from halve.pruning.observe.collect import GroupInputs, Prior
from halve.pruning.observe.held_out import HeldOut
from halve.pruning.observe.input_groups import Group, RoutedGroup
from halve.pruning.observe.routing import RoutedInputs, Sent

# Tokens of the block whose inner activations, in one expert, make up the mean that its
# last matrix is shrunk towards, as a multiple of the columns.
_INNER_TOKENS = 8
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


# What every run uses. `benchmarks/experts.py` compares others with it.
WEIGHTING = Weighting()


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
