"""Measurements that are kept beside an output: the contents of `measurements.json`."""

from dataclasses import asdict, dataclass
from typing import Any

from halve.records.bench import BenchRecord
from halve.records.checksum import to_json_with_checksum
from halve.records.codec import from_dict
from halve.records.evaluation import ComparisonRecord, PerplexityRecord
from halve.records.origin import MachineRecord
from halve.records.samples import SamplesRecord
from halve.records.tasks import TasksRecord
from halve.untrusted import parse_json

# Raised with every change to the fields of a measurement or its record.
MEASUREMENTS_FORMAT = 1

# What a measurement may hold.
Result = PerplexityRecord | ComparisonRecord | BenchRecord | SamplesRecord | TasksRecord
# Kind of a measurement -> the kinds of its record.
RESULTS: dict[str, tuple[type, ...]] = {
    "eval": (ComparisonRecord, PerplexityRecord),
    "bench": (BenchRecord,),
    "samples": (SamplesRecord,),
    "tasks": (TasksRecord,),
}


def kind_of(result: Result) -> str:
    """Return the kind of a measurement that holds a result."""
    return next(kind for kind, types in RESULTS.items() if isinstance(result, types))


@dataclass(frozen=True)
class Measurement:
    """One result about one output.

    Attributes:
        kind: `eval`, `bench`, `samples` or `tasks`.
        of: SHA-256 of the `halve.json` of the output that was measured.
        reference: Name of the model it was compared with; empty if there was none.
        reference_sha256: Digest of that model's config and of its tensors' names and
            sizes; not of their values.
        data_sha256: Digest of the token ids that were evaluated; empty for `bench` and
            `tasks`.
        record: The result as a dictionary.
        versions: Versions of Halve, torch and transformers.
        machine: Where it was measured.
        finished: When, ISO 8601, UTC.
    """

    kind: str
    of: str
    reference: str
    reference_sha256: str
    data_sha256: str
    record: dict[str, Any]
    versions: dict[str, str]
    machine: MachineRecord
    finished: str

    def __post_init__(self) -> None:
        if not any(_fits(kind, self.record) for kind in RESULTS.get(self.kind, ())):
            raise ValueError(f"a measurement of kind {self.kind[:20]!r}")

    @property
    def result(self) -> Result:
        """The record as one of the classes above."""
        kinds = RESULTS[self.kind]
        kind = next(kind for kind in kinds if _fits(kind, self.record))
        return from_dict(kind, self.record)


def _fits(kind: type, record: dict[str, Any]) -> bool:
    try:
        from_dict(kind, record)
    except ValueError:
        return False
    return True


def measurements_to_json(measurements: tuple[Measurement, ...]) -> str:
    """Return the text of `measurements.json`."""
    listed = [asdict(measurement) for measurement in measurements]
    return to_json_with_checksum(
        {"format": MEASUREMENTS_FORMAT, "measurements": listed}
    )


def parse_measurements(text: str) -> tuple[Measurement, ...]:
    """Parse what `measurements_to_json` returns.

    Raises:
        ValueError, TypeError, LookupError, RecursionError: It is something else, or of
            another format.
    """
    fields = dict(parse_json(text))
    if fields["format"] != MEASUREMENTS_FORMAT:
        raise ValueError(f"measurements of format {str(fields['format'])[:20]}")
    return tuple(from_dict(Measurement, each) for each in fields["measurements"])
