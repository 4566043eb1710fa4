"""What the solvers of a run take, summed over the candidates; `Solver.work` knows each.

This is the only part of the forecast that asks solvers.
"""

from dataclasses import dataclass

from halve.layout import PlannedBlock, PlannedMatrix
from halve.pruning.observe.input_groups import expected_groups
from halve.solvers import Solver, SolverCost

_FLOAT = 4


@dataclass(frozen=True)
class SolvingCost:
    """Bytes that solving a matrix takes beside the weights and the statistics.

    Attributes:
        factors: What the solvers prepared for the group, such as Cholesky factors.
        matrices: Temporaries of the largest solver, and all solutions.
    """

    factors: int
    matrices: int


def solving_cost(
    solvers: list[Solver], planned: PlannedMatrix, corrects: bool
) -> SolvingCost:
    """Return the memory for solving one matrix by every candidate.

    Args:
        solvers: Solvers of the candidates.
        planned: The matrix.
        corrects: Whether targets are corrected. Then a factor of the Gram matrix is
            held, which was made from a copy; and the target is one more matrix.
    """
    rows, columns = planned.matrix.shape
    costs = [solver.work(rows, columns) for solver in solvers]
    if corrects:
        costs.append(SolverCost(state=columns**2, peak=columns**2))
    solutions = (len(solvers) + corrects) * rows * columns
    return SolvingCost(
        factors=_FLOAT * sum(cost.state for cost in costs),
        matrices=_FLOAT * (max(cost.peak for cost in costs) + solutions),
    )


def solving_operations(solvers: list[Solver], block: PlannedBlock) -> int:
    """Return the operations of all solvers on a block, whatever the number of tokens.

    Preparing is done once in each group, and solving for each matrix.
    """
    once = each = 0
    for matrix in block.matrices:
        costs = [solver.work(*matrix.matrix.shape) for solver in solvers]
        each += sum(cost.each for cost in costs)
    for columns, groups in expected_groups(block).items():
        costs = [solver.work(1, columns) for solver in solvers]
        once += groups * sum(cost.once for cost in costs)
    return once + each
