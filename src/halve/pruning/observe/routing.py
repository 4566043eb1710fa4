"""Inputs of a module of experts, kept in one pass.

The module is called once a batch, with the hidden states of all tokens and the experts
of each. Both are kept, and the pass ends there. Each expert's inputs are then rows of
the hidden states, and those of its last matrix follow from them, so no expert needs a
pass of its own (`expert_statistics`).

The router's weights are kept as well: whole experts are scored by them
(`select.experts`), and rows can be weighed by them (`expert_statistics.Weighting`).
"""

from collections.abc import Iterator
from dataclasses import dataclass
from math import gcd
from pathlib import Path

import torch
from torch import Tensor

from halve.errors import UnsupportedModelError
from halve.layout import PlannedBlock
from halve.numerics.finite import finite_flag
from halve.pruning.observe.activation_cache import ActivationCache
from halve.pruning.observe.block_state import BlockState, flat
from halve.pruning.observe.collect import not_finite
from halve.pruning.observe.input_groups import RoutedGroup, routed_groups

# Rows that are gathered at once.
_ROWS = 4096
# Experts of each token, [tokens, k], int64, and the router's weights, float32.
_Routes = tuple[Tensor, Tensor]


def kept_columns(planned: PlannedBlock) -> int:
    """Return the columns of the inputs that a block's modules of experts keep."""
    return sum(group.columns for group in routed_groups(planned))


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
