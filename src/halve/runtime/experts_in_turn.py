"""Run a block's experts one after the other, each on the tokens of all windows.

Batch after batch would read the weights of nearly all experts for each batch. Where
they are spilled, that is from the disk, so here each is read once: a first pass ends at
the experts' call and keeps its arguments, then each expert adds its outputs, and in the
pass of the whole block these are taken in the experts' place. Products and sums are
those of batch after batch, and so are their bits.

Cost: two passes of what precedes the experts, and twice the hidden states on the disk.
"""

from collections.abc import Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from halve.calibration import allocate_hidden
from halve.models import Experts
from halve.runtime.blockwise_model import BlockwiseModel


class Batches(Protocol):
    """Windows that run through a model batch by batch: a `Stream`."""

    model: BlockwiseModel
    windows: Tensor

    def batches(self) -> Iterator[slice]:
        """Yield the samples of each batch."""
        ...

    def call_of(
        self, block: nn.Module, index: int, path: str, part: slice
    ) -> tuple[Any, ...]:
        """Run a batch up to the call of a module; return its positional arguments."""
        ...

    def computing(self) -> AbstractContextManager[None]:
        """Compute as the model does."""
        ...


@contextmanager
def experts_in_turn(stream: Batches, block: nn.Module, index: int) -> Iterator[None]:
    """Replace spilled experts of a block by their outputs for a stream, for a while.

    Within the context, all batches of the stream run through the block once, in order.
    Nothing is replaced where no experts are spilled.

    Args:
        stream: Hidden states that enter the block.
        block: The block, with its weights.
        index: Its index in the model.

    Raises:
        OutputError: The disk has no space for inputs and outputs of the experts.
    """
    with ExitStack() as stack:
        if stream.model.spill is not None:
            for path, module in list(block.named_modules()):
                if isinstance(module, Experts):
                    outputs = _outputs(_Calls.of(stream, block, index, path), module)
                    block.set_submodule(path, _Computed(outputs))
                    stack.callback(block.set_submodule, path, module)
        yield


@dataclass(frozen=True)
class _Calls:
    """What a module of experts is called with in all windows.

    Attributes:
        stream: Its windows.
        parts: Tokens of each batch.
        hidden: [tokens, width], in a memory-mapped file.
        index: [tokens, k], the experts of each token.
        weights: [tokens, k].
    """

    stream: Batches
    parts: list[slice]
    hidden: Tensor
    index: Tensor
    weights: Tensor

    @classmethod
    def of(cls, stream: Batches, block: nn.Module, index: int, path: str) -> "_Calls":
        """Run all batches up to the experts."""
        length = stream.windows.shape[1]
        parts: list[slice] = []
        hidden = torch.empty(0)
        numbers, weights = [], []
        for part in stream.batches():
            states, top_k_index, top_k_weights = stream.call_of(
                block, index, path, part
            )
            if not parts:
                shape = (stream.windows.numel(), states.shape[-1])
                hidden = allocate_hidden(shape, 0, stream.model.spill)
            parts.append(slice(part.start * length, part.stop * length))
            hidden[parts[-1]] = states
            numbers.append(top_k_index)
            weights.append(top_k_weights)
        return cls(stream, parts, hidden, torch.cat(numbers), torch.cat(weights))


def _outputs(calls: _Calls, experts: Experts) -> Tensor:
    """Return the outputs of all experts together, [tokens, width], in a mapped file."""
    shape = tuple(calls.hidden.shape)
    outputs = allocate_hidden(shape, 0, calls.stream.model.spill).zero_()
    with calls.stream.computing():
        for number in range(experts.layers.count):
            for part in calls.parts:
                arguments = calls.hidden[part], calls.index[part], calls.weights[part]
                experts.add(number, outputs[part], *arguments)
    return outputs


class _Computed(nn.Module):
    """Returns outputs that were computed before, in the order of the batches."""

    def __init__(self, outputs: Tensor) -> None:
        super().__init__()
        self._outputs, self._next = outputs, 0

    def forward(self, hidden_states: Tensor, *_: Tensor) -> Tensor:
        part = slice(self._next, self._next + len(hidden_states))
        self._next = part.stop % len(self._outputs)
        return self._outputs[part].clone()
