"""Bit masks: one bit for each weight, in 64-bit words; and the offsets of their rows.

Each row has words of 64 bits in which bit `i` of word `w` stands for column `64 w + i`.
"""

from collections.abc import Iterator

import torch
from torch import Tensor

from halve.errors import CheckpointError
from halve.formats.interface import REMEDY

WORD = 64
# From this many stored items on, offsets no longer fit into 32 bits.
WIDE = 2**32
# At least one row is processed at once, so this bounds the length of a row. The widest
# matrices of known models have 2^16 columns.
MAX_COLUMNS = 2**24
# Weights processed at once. Bounds the memory of bits that are expanded to bytes.
_CHUNK = 2**20


def words_of(columns: int) -> int:
    """Return the number of words in a row."""
    return -(-columns // WORD)


def row_chunks(rows: int, columns: int) -> Iterator[slice]:
    """Yield slices of rows of about 2^20 weights, and of at least one row."""
    size = max(_CHUNK // max(columns, 1), 1)
    for start in range(0, rows, size):
        yield slice(start, min(start + size, rows))


def mask_to_words(kept: Tensor) -> Tensor:
    """Return booleans [rows, columns] as words, [rows, words], uint64.

    The lowest bit of an octet is its first column. Little-endian words of eight octets
    then have column `64 w + i` in bit `i`.
    """
    rows, columns = kept.shape
    padded = torch.nn.functional.pad(kept.to(torch.uint8), (0, -columns % WORD))
    bits = padded.view(rows, 8 * words_of(columns), 8) * _powers(kept.device)
    return bits.sum(dim=-1, dtype=torch.uint8).view(torch.uint64)


def words_to_mask(words: Tensor, columns: int) -> Tensor:
    """Return words, [rows, words], as booleans, [rows, columns]."""
    octets = words.view(torch.uint8).unsqueeze(-1)
    bits = octets.bitwise_and(_powers(octets.device)) != 0
    return bits.flatten(1)[:, :columns]


def bits_set(words: Tensor) -> Tensor:
    """Count the bits of each row of [rows, words], int64.

    The usual population count, octet by octet: sums of two bits in fields of two, then
    of four in fields of four, then of all eight.
    """
    counts = torch.empty(len(words), dtype=torch.int64, device=words.device)
    for rows in row_chunks(len(words), WORD * words.shape[1]):
        octets = words[rows].view(torch.uint8)
        pairs = octets - (octets >> 1 & 0x55)
        fours = (pairs & 0x33) + (pairs >> 2 & 0x33)
        counts[rows] = (fours + (fours >> 4) & 0x0F).sum(dim=1, dtype=torch.int64)
    return counts


def check_padding(name: str, words: Tensor, columns: int) -> None:
    """Raise CheckpointError if a mask marks columns past the last one."""
    tail = columns % WORD
    if tail and bool((words[:, -1].view(torch.int64) >> tail).any()):
        raise CheckpointError(
            f"The mask of {name} marks columns past its {columns}.", REMEDY
        )


def check_offsets(
    name: str, offsets: Tensor, sizes: Tensor, stored: int, item: str
) -> None:
    """Raise CheckpointError if offsets are not those of rows of the given sizes.

    Args:
        name: Name of the parameter, for the message.
        offsets: [rows + 1], uint32 or uint64.
        sizes: What each row takes by its mask, [rows], int64.
        stored: Number of stored items.
        item: What one is, `value` or `byte`, for the message.
    """
    wide = offsets.to(torch.int64)
    if int(wide[0]) != 0 or int(wide[-1]) != stored:
        raise CheckpointError(
            f"The rows of {name} begin at {item} {int(wide[0])} and end at "
            f"{int(wide[-1])}, but it has {stored} {item}s.",
            REMEDY,
        )
    # A negative difference, of offsets that fall, equals no size either.
    differences = wide[1:] - wide[:-1]
    if bool((wrong := sizes != differences).any()):
        row = int(wrong.nonzero()[0])
        raise CheckpointError(
            f"Row {row} of {name} has {int(differences[row])} {item}s by its offsets "
            f"and {int(sizes[row])} by its mask.",
            REMEDY,
        )


def _powers(device: torch.device) -> Tensor:
    return 2 ** torch.arange(8, device=device, dtype=torch.uint8)
