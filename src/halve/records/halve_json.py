"""What records of outputs have in common: each is the contents of a `halve.json`."""

from abc import ABC, abstractmethod
from dataclasses import asdict, dataclass
from typing import Self

from halve.records.checksum import to_json_with_checksum
from halve.records.codec import from_dict
from halve.records.version import parse_fields


@dataclass(frozen=True)
class HalveJson(ABC):
    """The record of an output, without its fields."""

    def to_json(self) -> str:
        """Return the text of `halve.json`."""
        return to_json_with_checksum(asdict(self))

    @classmethod
    def from_json(cls, text: str) -> Self:
        """Parse what `to_json` returns: `from_json(r.to_json()) == r`.

        Raises:
            RecordError: The record has another format.
            ValueError, TypeError, LookupError: It is not a record of this kind.
        """
        record = from_dict(cls, parse_fields(text))
        record._check()
        return record

    @abstractmethod
    def _check(self) -> None:
        """Raise ValueError if no output can have such a record."""
