"""The bitmask format, written as plainly as possible: weight by weight, bit by bit.

Converts the bytes of a matrix to the bytes of its parts, following docs/format.md and
not the code. Slow; for small matrices only.
"""

import struct

import torch
from torch import Tensor


def pack(weight: Tensor, transposed: bool = False) -> dict[str, bytes]:
    """Return suffix of each part -> its bytes."""
    rows, columns = reversed(weight.shape) if transposed else weight.shape
    size = weight.element_size()
    data = weight.contiguous().flatten().view(torch.uint8).numpy().tobytes()
    values, mask, offsets = b"", b"", [0]
    for row in range(rows):
        words = [0] * ((columns + 63) // 64)
        for column in range(columns):
            index = column * rows + row if transposed else row * columns + column
            bits = data[index * size : (index + 1) * size]
            if any(bits):
                values += bits
                words[column // 64] |= 1 << (column % 64)
        mask += b"".join(struct.pack("<Q", word) for word in words)
        offsets.append(len(values) // size)
    return {
        "": values,
        "_mask": mask,
        "_offsets": b"".join(struct.pack("<I", offset) for offset in offsets),
        "_layout": struct.pack("<qqq", rows, columns, transposed),
    }
