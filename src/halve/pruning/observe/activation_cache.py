"""Inputs of a block's groups that are stored in one pass over the windows, for later.

There are two uses. Targets that are corrected for the error of the layers before need
the inputs that matrices get in the dense model. And where memory is limited, the inputs
of the widest group are stored, so that its Gram matrix is computed last, when no other
one is in memory.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from torch import Tensor

from halve.errors import UnsupportedModelError
from halve.pruning.observe.block_state import BlockState, flat
from halve.pruning.observe.input_groups import hooks
from halve.runtime.experts_in_turn import experts_in_turn
from halve.runtime.hidden_states import place_hidden
from halve.runtime.stream import Stream


class InputSource(Protocol):
    """What gets inputs that can be stored: a group, or a module of experts."""

    @property
    def leader(self) -> str:
        """Path of the module within the block whose first argument is stored."""
        ...

    @property
    def calls(self) -> int:
        """How often it is called in one forward pass."""
        ...

    @property
    def columns(self) -> int:
        """Width of the inputs."""
        ...


def is_wide(columns: int, width: int) -> bool:
    """Return whether inputs of so many columns are deferred where memory is limited.

    Those wider than hidden states are. In most models that is one group of a block (the
    second matrix of the feed-forward network), which has the largest Gram matrix.
    """
    return columns > width


@dataclass
class ActivationCache:
    """Inputs of groups for all windows of a stream, in float32.

    Attributes:
        block: Name of the block, for error messages.
        length: Tokens in a window.
        places: Path of a group's leader -> its inputs, [calls, tokens, columns], on the
            GPU, in memory or in a memory-mapped file (`place_hidden`).
    """

    block: str
    length: int
    places: dict[str, Tensor]

    @classmethod
    def allocate(
        cls,
        stream: Stream,
        block: str,
        groups: Iterable[InputSource],
        budget: int,
        folder: Path | None,
    ) -> "ActivationCache":
        """Allocate an uninitialized cache.

        Args:
            stream: The windows whose inputs will be stored.
            block: Name of the block.
            groups: Groups whose inputs will be stored.
            budget: Bytes of each group's inputs up to which they stay in memory.
            folder: Where memory-mapped files are created beyond that.

        Raises:
            OutputError: There is not enough space on the disk.
        """
        samples, length = stream.windows.shape
        places = {
            group.leader: place_hidden(
                stream.model,
                (group.calls, samples * length, group.columns),
                budget,
                folder,
            )
            for group in groups
        }
        return cls(block, length, places)

    @staticmethod
    def nbytes(tokens: int, columns: int) -> int:
        """Return the bytes of one group's inputs, if it is called once in a pass."""
        return 4 * tokens * columns

    def put(self, path: str, call: int, part: slice, inputs: Tensor) -> None:
        """Store the inputs of one call in one batch, [tokens, columns].

        Raises:
            UnsupportedModelError: The number of inputs is not that of the tokens.
        """
        place = self.inputs(path, call, part)
        if inputs.shape != place.shape:
            raise UnsupportedModelError(
                f"{self.block}.{path} is called with {len(inputs)} inputs for "
                f"{len(place)} tokens.",
                "Pass --no-sequential, and no --memory or a larger one.",
            )
        # Into page-locked memory in the order of the GPU's work. Nothing reads it on
        # the CPU: it is copied back in the same order.
        place.copy_(inputs, non_blocking=inputs.is_cuda and place.is_pinned())

    def inputs(self, path: str, call: int, part: slice) -> Tensor:
        """Return the inputs of one call in one batch, [tokens, columns]."""
        tokens = slice(part.start * self.length, part.stop * self.length)
        return self.places[path][call, tokens]


def cache_dense_inputs(
    state: BlockState, groups: Sequence[InputSource], budget: int, folder: Path | None
) -> ActivationCache:
    """Carry the dense stream through the block, and store the groups' inputs.

    Args:
        state: The block, which still has its dense weights.
        groups: Groups whose inputs are stored.
        budget: Bytes of all these inputs that may stay in memory.
        folder: Where memory-mapped files are created beyond that.

    Raises:
        UnsupportedModelError: See `ActivationCache.put`.
        OutputError: There is not enough space on the disk.
    """
    stream, each = state.dense_stream, budget // max(len(groups), 1)
    cache = ActivationCache.allocate(stream, state.planned.name, groups, each, folder)
    seen: dict[str, list[Tensor]] = {group.leader: [] for group in groups}

    def note(path: str, inputs: Tensor) -> None:
        # Cloned, since modules that run later may change the tensor in place.
        seen[path].append(flat(inputs).clone())

    def put(part: slice, _: Tensor) -> None:
        for path, calls in seen.items():
            for call, inputs in enumerate(calls):
                cache.put(path, call, part, inputs)
            calls.clear()

    block, index = state.block, state.planned.index
    # Outside the hooks, which are for the pass that ends at the block's output.
    with experts_in_turn(stream, block, index), hooks(block, seen, note):
        stream.advance(block, index, put)
    return cache
