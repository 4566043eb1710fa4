"""Codes of few bits as strings of bits, lowest bit first."""

import torch
from torch import Tensor
from torch.nn.functional import pad

_CODES = 8  # so many codes of b bits take b bytes, whatever b


def byte_count(codes: int, bits: int) -> int:
    """Return the bytes that so many codes take."""
    return -(-codes * bits // 8)


def byte_counts(codes: Tensor, bits: int) -> Tensor:
    """Return the bytes that some numbers of codes take, int64."""
    return (codes * bits + 7) // 8


def pack_codes(codes: Tensor, bits: int) -> Tensor:
    """Return the bits of codes, row by row.

    Args:
        codes: [rows, count], uint8, each below 2^bits.
        bits: 2, 3, 4 or 8.

    Returns:
        [rows, ceil(count * bits / 8)], uint8. Code i of a row is at the bits
        [bits * i, bits * (i + 1)); those after the last code are 0.
    """
    if bits == _CODES:
        return codes.clone()
    rows, count = codes.shape
    eights = pad(codes, (0, -count % _CODES)).view(rows, -1, _CODES).long()
    # Eight codes side by side in one integer, whose lowest bytes are the result.
    joined = (eights << _shifts(_CODES, bits, codes.device)).sum(-1)
    octets = joined[..., None] >> _shifts(bits, 8, codes.device) & 0xFF
    return octets.to(torch.uint8).flatten(1)[:, : -(-count * bits // 8)].contiguous()


def unpack_codes(octets: Tensor, bits: int) -> Tensor:
    """Return the codes in rows of bits: the inverse of `pack_codes`.

    Args:
        octets: [rows, size], uint8.
        bits: 2, 3, 4 or 8.

    Returns:
        [rows, at least 8 * size // bits], uint8; codes past the last bit are 0.
    """
    if bits == _CODES:
        return octets
    rows, size = octets.shape
    groups = pad(octets, (0, -size % bits)).view(rows, -1, bits).long()
    joined = (groups << _shifts(bits, 8, octets.device)).sum(-1)
    codes = joined[..., None] >> _shifts(_CODES, bits, octets.device) & (1 << bits) - 1
    return codes.to(torch.uint8).flatten(1)


def _shifts(count: int, step: int, device: torch.device) -> Tensor:
    return step * torch.arange(count, device=device)
