"""How a matrix is pruned: one algorithm a file.

A solver is one row of `SOLVERS`; its tests come from the same table.
"""

from halve.solvers.interface import Outcome, Solution, Solver
from halve.solvers.magnitude import Magnitude
from halve.solvers.sparsegpt import SparseGPT
from halve.solvers.wanda import Wanda

SOLVERS: dict[str, type[Solver]] = {
    "magnitude": Magnitude,
    "wanda": Wanda,
    "sparsegpt": SparseGPT,
}

__all__ = [
    "SOLVERS",
    "Magnitude",
    "Outcome",
    "Solution",
    "Solver",
    "SparseGPT",
    "Wanda",
]
