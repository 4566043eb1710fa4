"""The format of `halve.json`, and its comparison when one is read."""

from typing import Any

from halve.errors import RecordError
from halve.records.checksum import CHECKSUM
from halve.untrusted import parse_json

# Raised with every change to the fields of PruneRecord or PackRecord, or to how they
# are written. 2: the key of the checksum is `checksum`. 3: errors of blocks by token,
# BOS of windows, mixes; model, machine and memory of a pruning run.
RECORD_FORMAT = 3


def check_format(fields: dict[str, Any]) -> None:
    """Check that this version of Halve reads the format of a record.

    Args:
        fields: The members of a `halve.json`.

    Raises:
        RecordError: The record has another format.
        ValueError: There is no format, or it is not a number: this is no record.
    """
    found = fields.get("format")
    if not isinstance(found, int) or isinstance(found, bool):
        raise ValueError("a record without a format")  # noqa: TRY004
    if found != RECORD_FORMAT:
        raise RecordError(
            f"The record has format {str(found)[:20]}, and this version of Halve reads "
            f"format {RECORD_FORMAT}.",
            "Use the version of Halve that wrote it, or make the output again.",
        )


def parse_fields(text: str) -> dict[str, Any]:
    """Return the members of a `halve.json`, without the checksum.

    Raises:
        RecordError: The record has another format.
        ValueError, TypeError, RecursionError: It is not a JSON object, too large, or
            without a format.
    """
    fields = dict(parse_json(text))
    check_format(fields)
    fields.pop(CHECKSUM, None)
    return fields
