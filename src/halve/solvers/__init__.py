"""How a matrix is pruned: one algorithm a file.

A solver is one row of `SOLVERS`; its tests come from the same table.
"""

from halve.solvers.admm import ADMM
from halve.solvers.interface import Outcome, Solution, Solver, SolverCost
from halve.solvers.magnitude import Magnitude
from halve.solvers.refit import Refitted
from halve.solvers.rounding import Quantized, RoundToNearest
from halve.solvers.sparsegpt import SparseGPT
from halve.solvers.wanda import Wanda

SOLVERS: dict[str, type[Solver]] = {
    "magnitude": Magnitude,
    "wanda": Wanda,
    "sparsegpt": SparseGPT,
    "admm": ADMM,
}

__all__ = [
    "ADMM",
    "SOLVERS",
    "Magnitude",
    "Outcome",
    "Quantized",
    "Refitted",
    "RoundToNearest",
    "Solution",
    "Solver",
    "SolverCost",
    "SparseGPT",
    "Wanda",
]
