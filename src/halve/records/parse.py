"""Read a `halve.json` whose kind is not known in advance."""

import json
from typing import Any

from halve.records.pack import PackRecord
from halve.records.prune import PruneRecord
from halve.records.recover import RecoverRecord
from halve.records.version import parse_fields

# The record of an output, by any verb that writes one.
OutputRecord = PruneRecord | PackRecord | RecoverRecord
# Kind -> record; all others are those of packing and unpacking.
_KINDS = {"prune": PruneRecord, "recover": RecoverRecord}


def parse_record(text: str) -> OutputRecord:
    """Parse the `halve.json` of a pruned, packed, unpacked or recovered model.

    Raises:
        RecordError: The record has another format.
        ValueError, TypeError, LookupError: It is no such record.
    """
    kind = parse_fields(text)["kind"]
    return _KINDS.get(kind, PackRecord).from_json(text)


def recorded_grids(source: dict[str, Any] | None) -> dict[str, Any]:
    """Return tensor name -> quantization grid, from the record of a model.

    Args:
        source: The fields of its `halve.json`; None where it has none.

    Returns:
        The grids of the matrices that were quantized; none where the fields are not
        those of a record.

    Raises:
        RecordError: The record has another format.
    """
    try:
        record = parse_record(json.dumps(source))
    except (ValueError, TypeError, LookupError, RecursionError):
        return {}
    quantized = (*record.all_matrices, *record.heads)
    return {matrix.tensor: matrix.grid for matrix in quantized if matrix.grid}
