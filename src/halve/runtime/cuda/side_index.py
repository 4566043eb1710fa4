"""What a bitmask matrix needs on a GPU beside the tensors of its file.

For each mask word, the number of stored values of its row before it: 16 bits for 64
weights, a quarter of a bit a weight. With it any lane finds its values alone, so that
kernels need no scan over a row and may divide a row anywhere.
"""

import torch
from torch import Tensor
from torch.nn.functional import pad

# Kernels may read so many values past the last stored one (`ptx.OVERREAD`, rounded up).
SLACK = 16
# Columns of a tile, of which the first is a multiple of this.
TILE_COLUMNS = 256
# Rows longer than this need wider starts.
_MAX_COLUMNS_16 = 2**16


def word_starts(mask: Tensor) -> Tensor:
    """Count the stored values of each row before each of its mask words.

    Args:
        mask: [rows, words], uint64, contiguous, on any device.

    Returns:
        [rows, words], uint16; int32 if a row has more than 2^16 columns.

    Cost:
        One pass over the mask; memory of about three times its size. No
        synchronization.
    """
    counts = _bits_of_words(mask)
    starts = counts.cumsum(1, dtype=torch.int32).sub_(counts)
    return starts.to(torch.uint16) if 64 * mask.shape[1] <= _MAX_COLUMNS_16 else starts


def tile_kept(mask: Tensor) -> int:
    """Return the most values that any row stores in a tile of `TILE_COLUMNS` columns.

    A kernel that copies the values of tiles to shared memory needs so much of it.

    Args:
        mask: [rows, words], uint64, contiguous, on any device.

    Cost:
        As `word_starts`, and one synchronization.
    """
    if not mask.numel():
        return 0
    words = TILE_COLUMNS // 64
    counts = pad(_bits_of_words(mask), (0, -mask.shape[1] % words))
    return int(counts.view(len(mask), -1, words).sum(-1).max())


def _bits_of_words(mask: Tensor) -> Tensor:
    """Count the bits of each word, [rows, words], int32; see `mask.bits_set`."""
    octets = mask.view(torch.uint8).view(*mask.shape, 8)
    pairs = octets - (octets >> 1 & 0x55)
    fours = (pairs & 0x33) + (pairs >> 2 & 0x33)
    return (fours + (fours >> 4) & 0x0F).sum(dim=-1, dtype=torch.int32)


def has_slack(values: Tensor) -> bool:
    """Whether `SLACK` more values may be read behind a contiguous tensor."""
    end = values.storage_offset() + values.numel() + SLACK
    return end * values.element_size() <= values.untyped_storage().nbytes()


def with_slack(values: Tensor) -> Tensor:
    """Return the same values, [kept], in a storage that is longer by `SLACK`.

    The tensor itself, if its storage is.
    """
    if has_slack(values):
        return values
    padded = values.new_zeros(values.numel() + SLACK)
    padded[: values.numel()].copy_(values)
    return padded[: values.numel()]
