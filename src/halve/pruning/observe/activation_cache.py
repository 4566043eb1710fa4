"""Inputs of a block's groups, kept from one pass over all windows for later use."""

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from halve.calibration import allocate_hidden
from halve.errors import UnsupportedModelError
from halve.pruning.observe.input_groups import Group
from halve.runtime.stream import Stream


def is_wide(columns: int, width: int) -> bool:
    """Say whether inputs of so many columns are set aside where memory is tight.

    Those wider than hidden states are: one group of a block, as a rule, whose Gram
    matrix is the largest.
    """
    return columns > width


@dataclass
class ActivationCache:
    """Inputs of groups, in float32.

    Attributes:
        block: Name of the block, for errors.
        length: Tokens in a window.
        places: Leader -> its inputs, [calls, tokens, columns], in memory or in a mapped
            file.
    """

    block: str
    length: int
    places: dict[str, Tensor]

    @classmethod
    def memory_plan(
        cls,
        stream: Stream,
        block: str,
        groups: Iterable[Group],
        budget: int,
        folder: Path | None,
    ) -> "ActivationCache":
        """Return room for what some groups are given when a stream passes.

        Args:
            stream: Whose windows they are.
            block: Its name.
            groups: Whose inputs are kept.
            budget: Bytes of each that may live in memory.
            folder: Where mapped files lie past that.

        Raises:
            OutputError: The disk has no room.
        """
        samples, length = stream.windows.shape
        places = {
            group.leader: allocate_hidden(
                (group.calls, samples * length, group.columns), budget, folder
            )
            for group in groups
        }
        return cls(block, length, places)

    def keep(self, path: str, call: int, part: slice, inputs: Tensor) -> None:
        """Keep the inputs of one call in one batch, [tokens, columns].

        Raises:
            UnsupportedModelError: There is not one of them for each token.
        """
        place = self.inputs(path, call, part)
        if inputs.shape != place.shape:
            raise UnsupportedModelError(
                f"{self.block}.{path} is given {len(inputs)} inputs for {len(place)} "
                "tokens.",
                "Pass --no-sequential, and no --memory or a larger one.",
            )
        place.copy_(inputs)

    def inputs(self, path: str, call: int, part: slice) -> Tensor:
        """Return the inputs of one call in one batch, [tokens, columns]."""
        tokens = slice(part.start * self.length, part.stop * self.length)
        return self.places[path][call, tokens]
