"""Quantization schemes: bits, groups and symmetry, without any values."""

import math
import re
from dataclasses import dataclass, replace
from typing import Any

import torch

from halve.errors import QuantizationError

BITS = (8, 4, 3, 2)
# Scales are stored in float16, which has 11 significant bits.
_SCALE_BITS, _PRECISION = 16, 11
# With more bits the half step matters too little to support it.
_MIDRISE_BITS = 4


@dataclass(frozen=True)
class QuantScheme:
    """How many bits a weight has, and how many weights share a scale.

    Attributes:
        bits: 8, 4, 3 or 2.
        group_size: Consecutive weights of a row with one scale; the last group of a
            row may be shorter.
        symmetric: Whether there are no zero points: 0 is the code 0 everywhere, or
            midway between two codes.
        precision: Significant bits of a scale, 11 at most: those of a float16.
        midrise: Whether 0 is midway between the codes -1 and 0, so that kept weights
            take values of (code + 1/2) * scale and never 0. Both sides then have
            equally many values, which helps where there are few.

    Raises:
        QuantizationError: Other bits, a group size that is not positive, or a midrise
            grid of 8 bits or with zero points.
    """

    bits: int
    group_size: int = 128
    symmetric: bool = True
    precision: int = _PRECISION
    midrise: bool = False

    def __post_init__(self) -> None:
        if self.midrise and (self.bits > _MIDRISE_BITS or not self.symmetric):
            raise QuantizationError(
                f"A midrise grid has no zero points and at most {_MIDRISE_BITS} bits.",
                "Choose symmetric grids of 2, 3 or 4 bits for it.",
            )
        if self.bits not in BITS:
            raise QuantizationError(
                f"There is no grid of {self.bits} bits.",
                f"Choose one of {_names()}.",
            )
        if self.group_size < 1:
            raise QuantizationError(
                f"The group size is {self.group_size}, which is not positive.",
                "Pass 1 or more weights that share a scale, such as 128.",
            )

    def __str__(self) -> str:
        return f"int{self.bits}" + ("m" if self.midrise else "")

    @property
    def lowest(self) -> int:
        """The lowest code."""
        return -(2 ** (self.bits - 1))

    @property
    def highest(self) -> int:
        """The highest code."""
        return 2 ** (self.bits - 1) - 1

    def without_zero(self) -> "QuantScheme":
        """Return the grid on which a matrix without zeros loses least.

        In 2 bits that is a midrise grid: on the bundled model it lowers the divergence
        by a fifth; in 3 and 4 bits it gains nothing (docs/log.md).
        """
        gains = self.bits == min(BITS) and self.symmetric
        return replace(self, midrise=True) if gains else self

    def exact_in(self, dtype: torch.dtype) -> "QuantScheme":
        """Return this scheme with scales so short that its values are exact in a dtype.

        A value has as many significant bits as scale and code have together.

        Raises:
            QuantizationError: None are left for the scale.
        """
        significant = 1 - round(math.log2(torch.finfo(dtype).eps))
        # A symmetric code is at most 2^(bits - 1) in magnitude, and that is a power of
        # two. A midrise value is an odd multiple of half a scale, up to 2^bits - 1.
        signed = self.symmetric and not self.midrise
        left = significant - (self.bits - 1 if signed else self.bits)
        if left < 1:
            raise QuantizationError(
                f"{str(dtype).removeprefix('torch.')} has {significant} significant "
                f"bits, too few for the values of an asymmetric {self} grid.",
                "Choose a symmetric grid, or fewer bits.",
            )
        return replace(self, precision=min(left, _PRECISION))

    def groups(self, columns: int) -> int:
        """Return how many groups a row has."""
        return -(-columns // self.group_size)

    def bits_per_weight(self, sparsity: float) -> float:
        """Return the bits of a packed matrix, divided by the number of its weights.

        All codes, or a bit of mask and the codes of the kept weights, whichever is
        less; and the scale and zero point of each group.

        Args:
            sparsity: Fraction of weights that are zero, in [0, 1].
        """
        shared = _SCALE_BITS + (0 if self.symmetric else self.bits)
        masked = 1 + (1 - sparsity) * self.bits
        dense = self.bits if not self.midrise or sparsity == 0 else masked
        codes = min(dense, masked)
        return codes + shared / self.group_size


def parse_scheme(
    text: str, group_size: int = 128, symmetric: bool = True
) -> QuantScheme:
    """Parse the name of a grid: `int8`, `int4`, `int3` or `int2`.

    Raises:
        QuantizationError: The text is none of these, or the group size is not positive.
    """
    match = re.fullmatch(r"int(\d)", text.strip())
    if match is None:
        raise QuantizationError(
            f"{text!r} is not a grid.", f"Choose one of {_names()}."
        )
    return QuantScheme(int(match[1]), group_size, symmetric)


def recorded_scheme(fields: dict[str, Any] | None) -> QuantScheme | None:
    """Return the grid that a record names; None if it names none that exists.

    Args:
        fields: The fields of a `QuantScheme`, untrusted, or None.
    """
    try:
        return QuantScheme(**fields) if fields else None
    except (TypeError, QuantizationError):
        return None


def _names() -> str:
    return ", ".join(f"int{bits}" for bits in BITS)
