"""A packed matrix as plainly as it can be written: one weight, one bit at a time.

From the bytes of a matrix to the bytes of its parts, by docs/format.md and not by the
code. Slow; for small matrices only.
"""

import struct

import torch
from torch import Tensor


def pack(weight: Tensor, transposed: bool = False) -> dict[str, bytes]:
    """Return the bytes of each part, by what follows the parameter's name."""
    rows, columns = reversed(weight.shape) if transposed else weight.shape
    size = weight.element_size()
    data = weight.contiguous().flatten().view(torch.uint8).numpy().tobytes()
    values, mask, offsets = b"", b"", [0]
    for row in range(rows):
        words = [0] * ((columns + 63) // 64)
        for column in range(columns):
            place = column * rows + row if transposed else row * columns + column
            bits = data[place * size : (place + 1) * size]
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
