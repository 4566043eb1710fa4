"""A block at work: its weights, what enters it, and what its matrices are given."""

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from halve.distributed import SINGLE_PROCESS, Ranks
from halve.layout import PlannedBlock, PlannedMatrix
from halve.pruning.observe.input_groups import Group, find_groups, hooks
from halve.runtime.stream import Stream


@dataclass(frozen=True)
class Streams:
    """The hidden states of the same windows on their two ways through a model.

    Attributes:
        pruned: Through pruned blocks.
        dense: Through the dense ones; None where no one asks what they give.
    """

    pruned: Stream
    dense: Stream | None = None


class _AllSeen(Exception):  # noqa: N818  (no error: the rest of the block is not needed)
    pass


@dataclass(frozen=True)
class BlockState:
    """A block whose weights are exchanged one after the other.

    Attributes:
        block: The module, as `BlockwiseModel.block` lends it.
        planned: What it is.
        streams: What enters it; None where there is no text.
        changed: Parameters that were exchanged.
        solved: Matrices that were pruned -> whether their zeros are to stay zeros.
        quant_params: Matrices that were rounded -> what to.
    """

    block: nn.Module
    planned: PlannedBlock
    streams: Streams | None
    changed: set[str] = field(default_factory=set)
    solved: dict[str, bool] = field(default_factory=dict)
    quant_params: dict[str, Callable[[Tensor], Tensor]] = field(default_factory=dict)

    @property
    def stream(self) -> Stream:
        """The hidden states that enter the block, by way of pruned blocks."""
        assert self.streams is not None, "there is no text"
        return self.streams.pruned

    @property
    def dense_stream(self) -> Stream:
        """The hidden states of the dense model."""
        assert self.streams is not None, "there is no text"
        assert self.streams.dense is not None, "the dense model does not run beside"
        return self.streams.dense

    @property
    def ranks(self) -> Ranks:
        """Who has the other windows; none where there is no text."""
        return SINGLE_PROCESS if self.streams is None else self.streams.pruned.ranks

    @property
    def width(self) -> int:
        """Numbers in the hidden state of a token."""
        return self.stream.hidden.shape[-1]

    @property
    def has_dense(self) -> bool:
        """Whether the dense model runs beside."""
        return self.streams is not None and self.streams.dense is not None

    def groups(self) -> list[Group]:
        """Return the block's groups, in the order in which data meets them."""
        return find_groups(self.stream, self.block, self.planned)

    def weight(self, planned: PlannedMatrix) -> Tensor:
        """Return a matrix as it is, [rows, columns], in the dtype that it has here."""
        stored = self.block.get_parameter(weight_path(planned))
        return planned.matrix.as_rows(stored.data)

    def release(self, path: str) -> None:
        """Free a parameter's value, which is about to be exchanged."""
        parameter = self.block.get_parameter(path)
        parameter.data = parameter.data.new_empty(0)

    def exchange(self, path: str, value: Tensor) -> None:
        """Put a value, rounded to what is stored, in the place of a parameter."""
        parameter = self.block.get_parameter(path)
        parameter.data = value.to(parameter.dtype)
        self.changed.add(path)

    @torch.no_grad()
    def each_input(
        self, part: slice, groups: list[Group], take: Callable[[str, Tensor], None]
    ) -> None:
        """Run a batch up to the last input of the groups.

        Args:
            part: The batch.
            groups: Whose inputs are wanted.
            take: Given a group's leader and its inputs, [tokens, columns], right when
                they are met: what runs later may change them.
        """
        left = sum(group.calls for group in groups)

        def count(path: str, inputs: Tensor) -> None:
            nonlocal left
            take(path, flat(inputs))
            left -= 1
            if not left:
                raise _AllSeen

        with hooks(self.block, [group.leader for group in groups], count):
            try:
                self.stream.run(self.block, self.planned.index, part)
            except _AllSeen:
                return

    def first_outputs(self) -> Tensor | None:
        """Return what the block as it is makes of the first batch, if there is text."""
        if self.streams is None:
            return None
        part = next(self.stream.batches())
        return self.stream.run(self.block, self.planned.index, part)

    def advance(self, before: Tensor | None) -> float | None:
        """Carry the stream, if there is one, through the block as it is.

        Args:
            before: Outputs of the first batch when the block was dense.

        Returns:
            ||Y - Y'|| / ||Y|| of those and what they are now.
        """
        if self.streams is None or before is None:
            return None
        errors: list[float] = []

        def compare(part: slice, states: Tensor) -> None:
            if part.start == 0:
                errors.append(float((states - before).norm() / before.norm()))

        self.stream.advance(self.block, self.planned.index, compare)
        return errors[0]


def weight_path(planned: PlannedMatrix) -> str:
    """Return the name of a matrix's parameter within its block."""
    return f"{planned.matrix.path}.weight"


def flat(inputs: Tensor) -> Tensor:
    """Return inputs as [tokens, columns]."""
    return inputs.reshape(-1, inputs.shape[-1])
