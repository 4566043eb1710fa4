"""The stored tensors of one layer of vLLM, collected until its matrices are complete.

vLLM fuses layers, such as q, k and v, and calls a weight loader with each stored tensor
of each of them, in any order. Nothing here imports vLLM.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from halve.errors import CheckpointError
from halve.formats import FORMATS, PackedMatrix

# What vLLM calls one of the matrices of a fused layer; None for the only one.
ShardId = str | int | None
# Order in which the outputs of fused layers follow each other, beside numbers.
_ORDER = {"q": 0, "k": 1, "v": 2}


def _place(id: ShardId) -> int:
    return _ORDER[id] if isinstance(id, str) else id or 0


@dataclass(frozen=True)
class Shard:
    """One of the matrices that a layer of vLLM fuses, or its only one.

    Attributes:
        id: `q`, `k`, `v`, a number, or None for the only one.
        format: Key of `halve.formats.FORMATS`; "" for a dense matrix.
        matrix: The matrix, packed or dense.
    """

    id: ShardId
    format: str
    matrix: PackedMatrix | Tensor

    def dense(self) -> Tensor:
        """Return the matrix as [outputs, inputs], dense."""
        if isinstance(self.matrix, Tensor):
            return self.matrix
        weight = self.matrix.unpack()
        return weight.T if self.matrix.transposed else weight


@dataclass
class Parts:
    """Stored tensors of one layer.

    Attributes:
        name: Name of the layer, for messages.
        tensors: Shard -> suffix -> tensor.
    """

    name: str
    tensors: dict[ShardId, dict[str, Tensor]] = field(default_factory=dict)

    def loader(self, suffix: str) -> Callable[..., None]:
        """Return a weight loader for the tensors whose names end in a suffix."""

        def load(parameter: Any, tensor: Tensor, shard: ShardId = None) -> None:  # noqa: ANN401
            self.tensors.setdefault(shard, {})[suffix] = tensor

        return load

    def shards(self) -> list[Shard]:
        """Return the matrices, in the order of their outputs in the layer.

        Raises:
            CheckpointError: Parts are missing, or inconsistent.
        """
        order = sorted(self.tensors, key=_place)
        return [self._joined(id, self.tensors[id]) for id in order]

    def _joined(self, id: ShardId, parts: dict[str, Tensor]) -> Shard:
        name = self.name if id is None else f"{self.name}, {id}"
        by_name = {name + suffix: tensor for suffix, tensor in parts.items()}
        for key, format in FORMATS.items():
            if format.recognizes(name, by_name):
                needed = {name + suffix for suffix in format.suffixes(name, by_name)}
                self._check_complete(name, needed - by_name.keys())
                packed = format.join(name, by_name)
                packed.check(name)
                return Shard(id, key, packed)
        self._check_complete(name, {name} - by_name.keys())
        if len(by_name) > 1:
            self._check_complete(name, {"those by which its format is known"})
        return Shard(id, "", parts[""])

    def _check_complete(self, name: str, missing: set[str]) -> None:
        if missing:
            raise CheckpointError(
                f"{name} lacks parts of its packed matrix: "
                f"{', '.join(sorted(missing))[:200]}.",
                "Pack the model again from its dense checkpoint, or download it again.",
            )
