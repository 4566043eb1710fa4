"""The checksum in `halve.json`: its last member, over all bytes before it.

The record lists the SHA-256 of every other file of an output; the checksum covers the
record itself. It detects damage. It does not authenticate: whoever can change the file
can compute a new checksum.
"""

import hashlib
from typing import Any

from halve.records.codec import to_json

# The JSON key.
CHECKSUM = "checksum"
_SEPARATOR = f',\n  "{CHECKSUM}": '


def to_json_with_checksum(fields: dict[str, Any]) -> str:
    """Return a non-empty dictionary as JSON, with a checksum as the last member.

    The checksum is the SHA-256, in hexadecimal, of the UTF-8 bytes that precede the
    comma before its key.
    """
    body = to_json(fields).removesuffix("\n}")
    return body + _last_member(body.encode())


def has_valid_checksum(record: bytes) -> bool:
    """Whether the bytes of a `halve.json` are exactly those that were written."""
    body, separator, rest = record.rpartition(_SEPARATOR.encode())
    return separator + rest == _last_member(body).encode()


def _last_member(body: bytes) -> str:
    return f'{_SEPARATOR}"{hashlib.sha256(body).hexdigest()}"\n}}\n'
