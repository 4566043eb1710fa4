"""Everything that a page or card says, as plain values."""

from collections.abc import Iterator
from dataclasses import asdict, dataclass
from math import isfinite
from typing import Any, Generic, TypeVar

from halve.errors import CheckpointError
from halve.records import (
    BenchRecord,
    ComparisonRecord,
    PackRecord,
    PerplexityRecord,
    PruneRecord,
    RecoverRecord,
    SamplesRecord,
    TasksRecord,
)
from halve.records.measurement import Measurement, Result

Kind = TypeVar("Kind", bound=Result)


@dataclass(frozen=True)
class Parts:
    """Bytes of a model by what they are for.

    Attributes:
        embeddings: Embeddings, output head and other matrices outside of the blocks.
        matrices: The prunable matrices.
        rest: Everything else: norms, biases, matrices of blocks that are left alone.
    """

    embeddings: int
    matrices: int
    rest: int

    @property
    def total(self) -> int:
        """Bytes of all tensors."""
        return self.embeddings + self.matrices + self.rest


@dataclass(frozen=True)
class Sizes:
    """Bytes and numbers of weights.

    Attributes:
        stored: Bytes in the files of the output.
        dense: Bytes of the same tensors when dense; None if that is not known.
        prunable: Number of weights in the prunable matrices.
    """

    stored: Parts
    dense: Parts | None
    prunable: int


@dataclass(frozen=True)
class Measured(Generic[Kind]):
    """A measurement with its result.

    Attributes:
        by: Where, when and with what it was measured.
        result: The result.
    """

    by: Measurement
    result: Kind


@dataclass(frozen=True)
class Facts:
    """What is known of an output.

    Attributes:
        name: Name of its folder.
        record_sha256: SHA-256 of its `halve.json`.
        files: Number of other files that were compared with their SHA-256.
        pruned: How it was pruned; None if that is not recorded.
        packed: How it was packed or unpacked after that; None if it was not.
        sizes: Bytes of its tensors.
        measurements: What was measured of it, in the order in which it was kept.
        license: Licence that the dense model's card names; empty if there is none.
        recovered: How it was recovered after pruning; None if it was not.
    """

    name: str
    record_sha256: str
    files: int
    pruned: PruneRecord | None
    packed: PackRecord | None
    sizes: Sizes
    measurements: tuple[Measurement, ...] = ()
    license: str = ""
    recovered: RecoverRecord | None = None

    def __post_init__(self) -> None:
        if not all(isfinite(number) for number in _numbers(self.to_dict())):
            raise CheckpointError(
                f"A record or measurement of {self.name} holds a number that is not "
                "finite.",
                "Make the output again, and measure it again.",
            )

    def to_dict(self) -> dict[str, Any]:
        """Return the facts as dictionaries, tuples and scalars."""
        return asdict(self)

    @property
    def comparison(self) -> Measured[ComparisonRecord] | None:
        """The last comparison with the dense model."""
        return self._last(ComparisonRecord)

    @property
    def perplexity(self) -> Measured[PerplexityRecord] | None:
        """The last evaluation without a reference."""
        return self._last(PerplexityRecord)

    @property
    def bench(self) -> Measured[BenchRecord] | None:
        """The last benchmark."""
        return self._last(BenchRecord)

    @property
    def samples(self) -> Measured[SamplesRecord] | None:
        """The last texts for reading."""
        return self._last(SamplesRecord)

    @property
    def tasks(self) -> Measured[TasksRecord] | None:
        """The last results of lm-evaluation-harness."""
        return self._last(TasksRecord)

    def of_kind(self, kind: type[Kind]) -> list[Measured[Kind]]:
        """Return all measurements of a kind, in their order."""
        return [
            Measured(measurement, result)
            for measurement in self.measurements
            if isinstance(result := measurement.result, kind)
        ]

    def _last(self, kind: type[Kind]) -> Measured[Kind] | None:
        return (self.of_kind(kind) or [None])[-1]


def dense_name(pruned: PruneRecord | None) -> str:
    """Return the name of the dense model, as it was given; "" if it is not known."""
    return pruned.model.name if pruned is not None and pruned.model is not None else ""


def _numbers(value: Any) -> Iterator[float]:  # noqa: ANN401
    """Yield all numbers in nested dictionaries and sequences."""
    if isinstance(value, float):
        yield value
    elif isinstance(value, dict):
        for inner in value.values():
            yield from _numbers(inner)
    elif isinstance(value, list | tuple):
        for inner in value:
            yield from _numbers(inner)
