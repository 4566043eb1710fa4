"""Dataclasses from JSON, held to what their fields are noted with; and sealed JSON."""

import hashlib
import json
from dataclasses import is_dataclass
from types import UnionType
from typing import Any, TypeVar, get_args, get_origin, get_type_hints

Record = TypeVar("Record")
_MAX_COUNT = 2**63

_SEAL = ',\n  "seal": '


def from_dict(kind: type[Record], fields: object) -> Record:
    """Read what `dataclasses.asdict` made of a record, and JSON of that.

    Raises:
        ValueError: A field is missing, unknown, or not of the type that it is noted
            with. Whole numbers are counts, so they are not negative.
    """
    return _read(kind, fields)


def _read(kind: Any, value: Any) -> Any:  # noqa: ANN401
    """Return a JSON value as what a field is noted with."""
    origin, inner = get_origin(kind) or kind, get_args(kind)
    if kind is Any or (value is None and type(None) in inner):
        return value
    if origin is UnionType:  # of one kind and None
        return _read(inner[0], value)
    if is_dataclass(kind) and isinstance(value, dict):
        return _read_fields(kind, value)
    if origin is tuple and isinstance(value, list | tuple):
        kinds = inner[:1] * len(value) if inner[-1] is Ellipsis else inner
        return tuple(_read(k, v) for k, v in zip(kinds, value, strict=True))
    if origin is dict and isinstance(value, dict):
        return {name: _read(inner[1], v) for name, v in value.items()}
    if _is_plain(kind, value):
        return value
    raise ValueError(f"{str(value)[:80]} where {kind} was expected")


def _read_fields(kind: Any, fields: dict[str, Any]) -> Any:  # noqa: ANN401
    hints = get_type_hints(kind)
    try:
        return kind(**{name: _read(hints[name], v) for name, v in fields.items()})
    except (KeyError, TypeError) as error:
        raise ValueError(f"these are no fields of {kind.__name__}") from error


def _is_plain(kind: Any, value: object) -> bool:  # noqa: ANN401
    """Whether a value is a text, a truth, a count, or a number where one is noted."""
    if kind is float and type(value) is int:
        return abs(value) < _MAX_COUNT
    if isinstance(value, int) and kind is int:
        return not isinstance(value, bool) and 0 <= value < _MAX_COUNT
    return isinstance(value, kind)


def sealed(fields: dict[str, Any]) -> str:
    """Return JSON whose last member is the SHA-256 of all that stands before it.

    So a record vouches for itself as it does for the other files.
    """
    body = json.dumps(fields, indent=2).removesuffix("\n}")
    return body + _seal(body.encode())


def _seal(body: bytes) -> str:
    return f'{_SEAL}"{hashlib.sha256(body).hexdigest()}"\n}}\n'


def is_sealed(record: bytes) -> bool:
    """Whether a `halve.json` is, to the last byte, what was written."""
    body, found, rest = record.rpartition(_SEAL.encode())
    return found + rest == _seal(body).encode()
