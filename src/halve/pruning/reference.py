"""What a block's groups are given in the dense model, kept from its one dense pass."""

from dataclasses import dataclass, field
from pathlib import Path

from torch import Tensor

from halve.calibration import allocate_hidden
from halve.errors import UnsupportedModelError
from halve.pruning.groups import Group, hooks
from halve.pruning.site import Site, flat


@dataclass
class Reference:
    """Inputs of groups in the dense model.

    Attributes:
        length: Tokens in a window.
        kept: Leader -> its inputs, [calls, tokens, columns], in memory or in a mapped
            file.
    """

    length: int
    kept: dict[str, Tensor] = field(default_factory=dict)

    @classmethod
    def record(
        cls, site: Site, groups: list[Group], budget: int, folder: Path | None
    ) -> "Reference":
        """Carry the dense stream through the block, which is dense still.

        Args:
            site: The block.
            groups: Whose inputs are kept.
            budget: Bytes of them that may live in memory.
            folder: Where mapped files lie past that.

        Raises:
            UnsupportedModelError: A module is not given one input for each token.
            OutputError: The disk has no room.
        """
        samples, length = site.dense_stream.windows.shape
        own = cls(length)
        for group in groups:
            shape = (group.calls, samples * length, group.columns)
            own.kept[group.leader] = allocate_hidden(
                shape, budget // len(groups), folder
            )
        met: dict[str, list[Tensor]] = {group.leader: [] for group in groups}

        def note(path: str, inputs: Tensor) -> None:
            met[path].append(flat(inputs).clone())  # what runs later may change them

        def keep(part: slice, _: Tensor) -> None:
            own._keep(part, met, site.planned.name)

        with hooks(site.block, met, note):
            site.dense_stream.advance(site.block, site.planned.index, keep)
        return own

    def _keep(self, part: slice, met: dict[str, list[Tensor]], block: str) -> None:
        for path, calls in met.items():
            for call, inputs in enumerate(calls):
                place = self.kept[path][call, self._tokens(part)]
                if inputs.shape != place.shape:
                    raise UnsupportedModelError(
                        f"{block}.{path} is given {len(inputs)} inputs for "
                        f"{len(place)} tokens.",
                        "Pass --no-sequential.",
                    )
                place.copy_(inputs)
            calls.clear()

    def _tokens(self, part: slice) -> slice:
        return slice(part.start * self.length, part.stop * self.length)

    def inputs(self, path: str, call: int, part: slice) -> Tensor:
        """Return the inputs of one call in one batch, [tokens, columns]."""
        return self.kept[path][call, self._tokens(part)]
