"""The block that is being pruned: its weights and the hidden states that enter it."""

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from halve.distributed import SINGLE_PROCESS, Ranks
from halve.layout import PlannedBlock, PlannedMatrix
from halve.pruning.observe.input_groups import Group, find_groups, hooks
from halve.pruning.observe.output_error import OutputDeviation
from halve.runtime.stream import Stream


@dataclass(frozen=True)
class Streams:
    """Hidden states of the same windows in the pruned and in the dense model.

    Attributes:
        pruned: Hidden states computed by the pruned blocks.
        dense: Hidden states computed by the dense blocks; None where neither corrected
            targets nor block reconstruction need them.
    """

    pruned: Stream
    dense: Stream | None = None


class _AllSeen(Exception):  # noqa: N818  (control flow, no error)
    """Stops a forward pass once the last input that is needed has been seen."""


@dataclass(frozen=True)
class BlockState:
    """A block whose matrices are replaced one after the other.

    Attributes:
        block: The module with its weights, from `BlockwiseModel.block`.
        planned: Its index, name and matrices.
        streams: Hidden states that enter the block; None in a run without text.
        changed: Paths of the parameters that were replaced.
        solved: Path of each pruned matrix -> whether its zeros must stay zeros.
        quant_params: Path of each quantized matrix -> function that rounds values, in
            the parameter's layout, to its quantization grid.
        expert_tokens: Path of each module of experts -> tokens that each expert was
            fitted to.
    """

    block: nn.Module
    planned: PlannedBlock
    streams: Streams | None
    changed: set[str] = field(default_factory=set)
    solved: dict[str, bool] = field(default_factory=dict)
    quant_params: dict[str, Callable[[Tensor], Tensor]] = field(default_factory=dict)
    expert_tokens: dict[str, tuple[int, ...]] = field(default_factory=dict)

    @property
    def stream(self) -> Stream:
        """The hidden states that enter the block in the pruned model."""
        assert self.streams is not None, "there is no text"
        return self.streams.pruned

    @property
    def dense_stream(self) -> Stream:
        """The hidden states of the dense model."""
        assert self.streams is not None, "there is no text"
        assert self.streams.dense is not None, "the dense stream is not run"
        return self.streams.dense

    @property
    def ranks(self) -> Ranks:
        """The processes that share the windows; only this one in a run without text."""
        return SINGLE_PROCESS if self.streams is None else self.streams.pruned.ranks

    @property
    def width(self) -> int:
        """Width of hidden states."""
        return self.stream.hidden.shape[-1]

    @property
    def has_dense(self) -> bool:
        """Whether the dense stream is run as well."""
        return self.streams is not None and self.streams.dense is not None

    def groups(self) -> list[Group]:
        """Return the block's groups, in the order in which they are computed."""
        return find_groups(self.stream, self.block, self.planned)

    def weight(self, planned: PlannedMatrix) -> Tensor:
        """Return a matrix as it is now, [rows, columns], in its current dtype."""
        stored = self.block.get_parameter(weight_path(planned))
        return planned.matrix.as_rows(stored.data)

    def release(self, path: str) -> None:
        """Free the value of a parameter that is about to be replaced."""
        parameter = self.block.get_parameter(path)
        parameter.data = parameter.data.new_empty(0)

    def exchange(self, path: str, value: Tensor) -> None:
        """Replace the value of a parameter.

        Args:
            path: Path of the parameter within the block.
            value: Already rounded to the dtype in which it will be stored.
        """
        parameter = self.block.get_parameter(path)
        parameter.data = value.to(parameter.dtype)
        self.changed.add(path)

    def overwrite(self, path: str, value: Tensor) -> None:
        """Write a new value of a parameter over the old one, as `exchange` does."""
        self.block.get_parameter(path).data.copy_(value)
        self.changed.add(path)

    @torch.no_grad()
    def each_input(
        self, part: slice, groups: list[Group], take: Callable[[str, Tensor], None]
    ) -> None:
        """Run a batch up to the last input of the groups.

        Args:
            part: The batch.
            groups: The groups whose inputs are needed.
            take: Called with the path of a group's leader and its inputs, [tokens,
                columns]. It must use or copy them at once, since modules that run later
                may change them in place.
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
        """Return the block's current outputs for a few samples; None without text."""
        if self.streams is None:
            return None
        part = self.stream.compared()
        return self.stream.run(self.block, self.planned.index, part)

    def advance(self, before: Tensor | None) -> OutputDeviation | None:
        """Carry the pruned stream, if there is one, through the block as it is now.

        Args:
            before: Y, outputs of the first samples (`Stream.compared`) with the dense
                weights; of the same inputs as now, which come from pruned blocks.

        Returns:
            The error of the outputs now; None without text.
        """
        if self.streams is None or before is None:
            return None
        errors: list[OutputDeviation] = []

        def compare(part: slice, states: Tensor) -> None:
            if part.start == 0:
                now = states[: len(before)]
                errors.append(OutputDeviation.of(now, before))

        self.stream.advance(self.block, self.planned.index, compare)
        return errors[0]


def weight_path(planned: PlannedMatrix) -> str:
    """Return the path of a matrix's parameter within its block."""
    return f"{planned.matrix.path}.weight"


def flat(inputs: Tensor) -> Tensor:
    """Return inputs of any shape [..., columns] as [tokens, columns]."""
    return inputs.reshape(-1, inputs.shape[-1])
