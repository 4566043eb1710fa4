"""How a matrix is pruned: one algorithm a file.

A solver is one row of `SOLVERS`; its tests run over the same table.
"""

from halve.solvers.admm import ADMM
from halve.solvers.hessian import Hessian, Needs
from halve.solvers.interface import Outcome, Solution, Solver, SolverCost
from halve.solvers.magnitude import Magnitude
from halve.solvers.quantized import Quantized, RoundToNearest
from halve.solvers.refit import Refitted
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
    "Hessian",
    "Magnitude",
    "Needs",
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
