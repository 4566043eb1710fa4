"""Random changes to an input, as an attacker or a bad disk would make them."""

import random
import struct

_NUMBERS = (
    -(2**63),
    -1,
    0,
    1,
    63,
    64,
    65,
    2**16,
    2**31,
    2**32,
    2**40,
    2**62,
    2**63 - 1,
)
_TOKENS = (b'"', b"{", b"}", b"[", b"]", b",", b":", b"null", b"NaN", b"1e999", b"-1")
_DIGITS = b"0123456789"


def mutated(data: bytes, rng: random.Random) -> bytes:
    """Return an input with one, two or four random changes."""
    for _ in range(rng.choice((1, 1, 2, 4))):
        data = rng.choice(_CHANGES)(data, rng)
    return data


def _place(data: bytes, rng: random.Random) -> int:
    """Choose an offset: half of the time near the start, where headers are."""
    if not data:
        return 0
    end = len(data) if rng.random() < 0.5 else min(len(data), 512)
    return rng.randrange(end)


def _flip(data: bytes, rng: random.Random) -> bytes:
    place = _place(data, rng)
    flipped = bytes(octet ^ 1 << rng.randrange(8) for octet in data[place : place + 1])
    return data[:place] + flipped + data[place + 1 :]


def _write_number(data: bytes, rng: random.Random) -> bytes:
    place, number = _place(data, rng), struct.pack("<q", rng.choice(_NUMBERS))
    number = number[: rng.choice((1, 2, 4, 8))]
    return data[:place] + number + data[place + len(number) :]


def _write_digits(data: bytes, rng: random.Random) -> bytes:
    """Replace a decimal number in a text by another."""
    places = [n for n, octet in enumerate(data[:4096]) if octet in _DIGITS]
    if not places:
        return data
    begin = end = rng.choice(places)
    while end < len(data) and data[end] in _DIGITS:
        end += 1
    return data[:begin] + str(rng.choice(_NUMBERS)).encode() + data[end:]


def _put_token(data: bytes, rng: random.Random) -> bytes:
    place = _place(data, rng)
    return data[:place] + rng.choice(_TOKENS) + data[place + rng.randrange(2) :]


def _cut_out(data: bytes, rng: random.Random) -> bytes:
    place = _place(data, rng)
    return data[:place] + data[place + rng.choice((1, 2, 8, 64, 1024)) :]


def _cut_off(data: bytes, rng: random.Random) -> bytes:
    return data[: rng.randrange(len(data) + 1)]


def _repeat(data: bytes, rng: random.Random) -> bytes:
    place, length = _place(data, rng), rng.choice((1, 8, 64, 512))
    part = data[place : place + length] * rng.choice((1, 2, 100))
    return data[:place] + part + data[place:]


_CHANGES = (
    *(_flip, _write_number, _write_digits, _put_token, _cut_out, _cut_off, _repeat),
)
