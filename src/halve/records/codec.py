"""Dataclasses to JSON, and back: every value is checked against its annotation."""

import json
import math
from dataclasses import is_dataclass
from types import UnionType
from typing import Any, TypeVar, get_args, get_origin, get_type_hints

Record = TypeVar("Record")
# Exclusive. Counts in a record are bytes, weights or tokens; none needs 64 bits.
_MAX_COUNT = 2**63


def to_json(value: Any) -> str:  # noqa: ANN401
    """Return dictionaries, sequences and scalars as JSON, indented by two.

    JSON has no NaN and no infinity: they become null.
    """
    return json.dumps(_finite(value), indent=2, allow_nan=False)


def _finite(value: Any) -> Any:  # noqa: ANN401
    if isinstance(value, dict):
        return {name: _finite(inner) for name, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(inner) for inner in value]
    is_number = not isinstance(value, float) or math.isfinite(value)
    return value if is_number else None


def from_dict(kind: type[Record], fields: object) -> Record:
    """Build a dataclass from a dictionary, the inverse of `dataclasses.asdict`.

    Accepts the dictionary itself, and what it becomes when written to JSON and parsed
    again: lists in the place of tuples.

    Args:
        kind: The dataclass. Its annotations may be plain types, dataclasses, tuples,
            dictionaries with string keys, `Any`, or one of these and None.
        fields: Field name -> value.

    Raises:
        ValueError: A field is missing or unknown, or its value does not have the
            annotated type. Integers are counts and must not be negative.
    """
    return _decode(kind, fields)


def _decode(kind: Any, value: Any) -> Any:  # noqa: ANN401
    """Return a JSON value as the annotated type `kind`."""
    origin, arguments = get_origin(kind) or kind, get_args(kind)
    if kind is Any or (value is None and type(None) in arguments):
        return value
    if origin is UnionType:  # always `X | None` in records
        return _decode(arguments[0], value)
    if is_dataclass(kind) and isinstance(value, dict):
        return _decode_fields(kind, value)
    if origin is tuple and isinstance(value, list | tuple):
        is_homogeneous = arguments[-1] is Ellipsis
        kinds = arguments[:1] * len(value) if is_homogeneous else arguments
        return tuple(_decode(k, v) for k, v in zip(kinds, value, strict=True))
    if origin is dict and isinstance(value, dict):
        return {name: _decode(arguments[1], v) for name, v in value.items()}
    if _is_scalar(kind, value):
        return value
    raise ValueError(f"{str(value)[:80]} where {kind} was expected")


def _decode_fields(kind: Any, fields: dict[str, Any]) -> Any:  # noqa: ANN401
    hints = get_type_hints(kind)
    try:
        return kind(**{name: _decode(hints[name], v) for name, v in fields.items()})
    except (KeyError, TypeError) as error:
        raise ValueError(f"the fields are not those of {kind.__name__}") from error


def _is_scalar(kind: Any, value: object) -> bool:  # noqa: ANN401
    """Whether a string, boolean or number has the annotated type `kind`."""
    if kind is float and type(value) is int:
        return abs(value) < _MAX_COUNT
    if isinstance(value, int) and kind is int:
        return not isinstance(value, bool) and 0 <= value < _MAX_COUNT
    return isinstance(value, kind)
