"""Integer grids: the few values that a weight may take when it is stored in few bits.

A row of a matrix is cut into groups of consecutive inputs. Each group has a scale and
a zero point, and a weight of it is (code - zero) * scale for a signed code of `bits`
bits. Zero is a value of every grid, exactly, so that a pruned weight stays pruned.

Signed codes reach one further down than up. Where there is no zero point to balance
that, a scale may be negative: the code that has no counterpart goes to the side of the
largest weight (ggml's 4-bit blocks do the same), which costs nothing and in few bits
gains nearly what zero points do. This package has the grids and the choice of scales;
solvers choose the codes.
"""

from halve.grids.bit_budget import grids_around, schemes_for_bits
from halve.grids.check import grid_shortfall
from halve.grids.fit import fit_quant_params
from halve.grids.params import QuantParams
from halve.grids.recover import recover_quant_params
from halve.grids.scheme import BITS, QuantScheme, parse_scheme, recorded_scheme

__all__ = [
    "BITS",
    "QuantParams",
    "QuantScheme",
    "fit_quant_params",
    "grid_shortfall",
    "grids_around",
    "parse_scheme",
    "recorded_scheme",
    "recover_quant_params",
    "schemes_for_bits",
]
