"""A matrix as a bit mask and its kept values: one bit a weight beside what is kept.

Each row has one bit for each column, in 64-bit words, the first column in the lowest
bit; the values of the bits that are set follow each other, row after row. Offsets say
where each row's values begin. Everything here is plain torch and works on any device;
it is the twin that the kernels are measured against.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from halve.errors import CheckpointError

# What stands beside the values, which bear the parameter's own name.
COMPANIONS = ("_mask", "_offsets", "_layout")
# Bits of a weight, by dtype. A weight is dropped only where all of them are zero, so
# that minus zero comes back.
DTYPES = {
    torch.bfloat16: torch.int16,
    torch.float16: torch.int16,
    torch.float32: torch.int32,
}
_WORD = 64
# Numbers of a layout that are looked at; three are right.
MAX_LAYOUT = 1024
# Weights handled at once, so that bits widened to bytes stay small.
_CHUNK = 2**24
# A row is handled at once, so it may not be longer; the widest matrices have 2**16.
_MAX_COLUMNS = 2**24
_REMEDY = "Pack the model again from its dense checkpoint, or download the file again."


@dataclass(frozen=True)
class Packed:
    """A packed matrix.

    Attributes:
        values: The kept weights, [kept], in row order; a dtype of `DTYPES`.
        mask: [rows, words], uint64; words = columns / 64, rounded up.
        offsets: Where each row's values begin, [rows + 1], uint32, or uint64 where
            there are 2^32 values or more.
        columns: Inputs.
        transposed: Whether the dense matrix is stored as [columns, rows].
    """

    values: Tensor
    mask: Tensor
    offsets: Tensor
    columns: int
    transposed: bool = False

    @property
    def rows(self) -> int:
        """Outputs."""
        return self.mask.shape[0]

    @property
    def shape(self) -> tuple[int, int]:
        """Of the dense matrix as a checkpoint stores it."""
        rows, columns = self.rows, self.columns
        return (columns, rows) if self.transposed else (rows, columns)

    @property
    def layout(self) -> Tensor:
        """What the other parts do not say: [rows, columns, transposed], int64."""
        return torch.tensor([self.rows, self.columns, int(self.transposed)])

    @property
    def nbytes(self) -> int:
        """Bytes of all parts."""
        return packed_bytes(
            self.rows, self.columns, self.values.numel(), self.values.element_size()
        )

    def check(self, name: str) -> None:
        """Raise CheckpointError where the parts contradict each other.

        Args:
            name: Of the parameter, for the message.

        Cost:
            One pass over the mask; the values are not read.
        """
        self.check_shapes(name)
        offsets = self.offsets.to(torch.int64)
        if int(offsets[0]) != 0 or int(offsets[-1]) != self.values.numel():
            raise CheckpointError(
                f"The rows of {name} begin at value {int(offsets[0])} and end at "
                f"{int(offsets[-1])}, but it has {self.values.numel()} values.",
                _REMEDY,
            )
        for rows in self._chunks():
            counts = _bits_set(self.mask[rows])
            promised = offsets[1:][rows] - offsets[:-1][rows]
            if bool((wrong := counts != promised).any()):
                row = int(wrong.nonzero()[0])
                raise CheckpointError(
                    f"Row {rows.start + row} of {name} has {int(promised[row])} values "
                    f"by its offsets and {int(counts[row])} by its mask.",
                    _REMEDY,
                )
        self._check_padding(name)

    def check_shapes(self, name: str) -> None:
        """Raise CheckpointError where the shapes or dtypes of the parts disagree.

        Needs no data: the parts may lie on the meta device.
        """
        mask, offsets, words = self.mask, self.offsets, _words(self.columns)
        fits = (
            0 < self.columns <= _MAX_COLUMNS
            and (mask.dtype, mask.dim()) == (torch.uint64, 2)
            and mask.shape[1] == words
            and offsets.dtype in {torch.uint32, torch.uint64}
            and tuple(offsets.shape) == (self.rows + 1,)
            and self.values.dim() == 1
            and self.values.dtype in DTYPES
        )
        if not fits:
            raise CheckpointError(
                f"{name} is packed with {self.columns} columns, a mask of "
                f"{_brief(mask)}, offsets of {_brief(offsets)} and values of "
                f"{_brief(self.values)}, which do not belong together.",
                _REMEDY,
            )

    def _check_padding(self, name: str) -> None:
        tail = self.columns % _WORD
        if tail and bool((self.mask[:, -1].view(torch.int64) >> tail).any()):
            raise CheckpointError(
                f"The mask of {name} marks columns past its {self.columns}.", _REMEDY
            )

    def unpack(self) -> Tensor:
        """Return the dense matrix as a checkpoint stores it, bit for bit.

        `pack(m).unpack() == m`. Parts that contradict each other must have been
        refused by `check` before.
        """
        dense = self.values.new_zeros(self.rows, self.columns)
        offsets = self.offsets.to(torch.int64)
        for rows in self._chunks():
            values = self.values[offsets[rows.start] : offsets[rows.stop]]
            dense[rows].masked_scatter_(self._kept(rows), values)
        return dense.T.contiguous() if self.transposed else dense

    def _kept(self, rows: slice) -> Tensor:
        """Return some rows of the mask as booleans, [rows, columns]."""
        octets = self.mask[rows].view(torch.uint8).unsqueeze(-1)
        bits = octets.bitwise_and(_powers(octets.device)) != 0
        return bits.flatten(1)[:, : self.columns]

    def _chunks(self) -> Iterator[slice]:
        return _chunks(self.rows, self.columns)


def pack(weight: Tensor, transposed: bool = False) -> Packed:
    """Pack a matrix.

    Args:
        weight: As a checkpoint stores it, of a dtype of `DTYPES`; not empty.
        transposed: Whether that is [columns, rows], as in GPT-2's Conv1D.

    Cost:
        Memory for what is packed, and a few bytes for each of 2^24 weights.
    """
    weight = weight.T.contiguous() if transposed else weight
    rows, columns = weight.shape
    mask = weight.new_empty(rows, 8 * _words(columns), dtype=torch.uint8)
    counts = weight.new_zeros(rows + 1, dtype=torch.int64)
    values = []
    for part in _chunks(rows, columns):
        kept = kept_weights(weight[part])
        mask[part] = _octets(kept)
        counts[1:][part] = kept.sum(dim=1)
        values.append(weight[part][kept])
    offsets = counts.cumsum(0)
    offsets = offsets.to(torch.uint32 if offsets[-1] < 2**32 else torch.uint64)
    kept_values = torch.cat(values) if values else weight.new_empty(0)
    return Packed(kept_values, mask.view(torch.uint64), offsets, columns, transposed)


def kept_weights(weight: Tensor) -> Tensor:
    """Return where a matrix of a dtype of `DTYPES` has a bit set, as booleans."""
    return weight.view(DTYPES[weight.dtype]) != 0


def store(name: str, weight: Tensor, transposed: bool = False) -> dict[str, Tensor]:
    """Return the tensors that a file holds for a matrix: packed where that is smaller.

    Args:
        name: Of the parameter.
        weight: As a checkpoint stores it, of any dtype.
        transposed: Whether that is [columns, rows].
    """
    if weight.dtype not in DTYPES or not weight.numel():
        return {name: weight}
    packed = pack(weight, transposed)
    return split(name, packed) if packed.nbytes < weight.nbytes else {name: weight}


def packed_bytes(rows: int, columns: int, kept: int, itemsize: int) -> int:
    """Return the bytes that a matrix takes when packed.

    Args:
        rows: Outputs.
        columns: Inputs.
        kept: Weights that are not zero.
        itemsize: Bytes of a weight.
    """
    wide = 8 if kept >= 2**32 else 4
    layout = 3 * 8
    return kept * itemsize + 8 * rows * _words(columns) + wide * (rows + 1) + layout


def split(name: str, packed: Packed) -> dict[str, Tensor]:
    """Return the tensors that a file holds for a parameter: `join` turns them back."""
    parts = (packed.mask, packed.offsets, packed.layout)
    companions = zip(COMPANIONS, parts, strict=True)
    return {name: packed.values} | {name + end: part for end, part in companions}


def join(name: str, tensors: Mapping[str, Tensor]) -> Packed:
    """Return the packed matrix of a parameter from a file's tensors, not yet checked.

    Raises:
        CheckpointError: Its layout is not one of this version of the format.
    """
    mask, offsets, layout = (tensors[name + end] for end in COMPANIONS)
    # Numbers of Python's take five times the room of a tensor's.
    small = layout.dtype == torch.int64 and layout.numel() <= MAX_LAYOUT
    numbers = layout.tolist() if small else []
    match numbers:
        case [rows, columns, 0 | 1 as transposed] if [rows] == list(mask.shape[:1]):
            return Packed(tensors[name], mask, offsets, columns, bool(transposed))
    raise CheckpointError(
        f"The layout of {name} is {str(numbers)[:80]} beside a mask of {_brief(mask)}; "
        "rows, columns and whether it is transposed were expected.",
        _REMEDY,
    )


def _brief(tensor: Tensor) -> str:
    return f"{list(tensor.shape)} {str(tensor.dtype).removeprefix('torch.')}"


def _words(columns: int) -> int:
    return -(-columns // _WORD)


def _chunks(rows: int, columns: int) -> Iterator[slice]:
    size = max(_CHUNK // max(columns, 1), 1)
    for start in range(0, rows, size):
        yield slice(start, min(start + size, rows))


def _powers(device: torch.device) -> Tensor:
    return 2 ** torch.arange(8, device=device, dtype=torch.uint8)


def _octets(kept: Tensor) -> Tensor:
    """Return booleans [rows, columns] as bits, [rows, 8 * words], uint8."""
    rows, columns = kept.shape
    padded = torch.nn.functional.pad(
        kept.to(torch.uint8), (0, _words(columns) * _WORD - columns)
    )
    bits = padded.view(rows, -1, 8) * _powers(kept.device)
    return bits.sum(dim=-1, dtype=torch.uint8)


def _bits_set(mask: Tensor) -> Tensor:
    """Count the bits of each row of [rows, words] by adding neighbours, int64."""
    octets = mask.view(torch.uint8)
    pairs = octets - (octets >> 1 & 0x55)
    fours = (pairs & 0x33) + (pairs >> 2 & 0x33)
    return (fours + (fours >> 4) & 0x0F).sum(dim=1, dtype=torch.int64)
