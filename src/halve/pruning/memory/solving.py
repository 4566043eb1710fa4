"""What solving takes: a group's `Hessian` once, and all candidates for each matrix.

This is the only part of the forecast that asks solvers.
"""

from dataclasses import dataclass

from halve.layout import PlannedBlock, PlannedMatrix
from halve.pruning.observe.input_groups import expected_groups, routed_groups
from halve.solvers import Hessian, Needs, Solver

_FLOAT = 4


@dataclass(frozen=True)
class SolvingCost:
    """Bytes that solving a matrix takes beside the weights and the statistics.

    Attributes:
        factors: What the group's `Hessian` holds beside X^T X.
        matrices: Temporaries, and all solutions and targets.
    """

    factors: int
    matrices: int


def solving_cost(
    solvers: list[Solver], needs: Needs, planned: PlannedMatrix, corrects: bool
) -> SolvingCost:
    """Return the memory for solving one matrix by every candidate.

    Args:
        solvers: Solvers of the candidates.
        needs: What solvers and corrections together read of the inputs.
        planned: The matrix.
        corrects: Whether targets are corrected: each is one more matrix.
    """
    rows, columns = planned.matrix.shape
    largest = max(solver.cost(rows, columns).peak for solver in solvers)
    solutions = (len(solvers) + corrects) * rows * columns
    # The Hessian is prepared before there is a solution.
    preparing = Hessian.scratch_nbytes(columns, needs)
    return SolvingCost(
        factors=Hessian.nbytes(columns, needs),
        matrices=max(_FLOAT * (largest + solutions), preparing),
    )


def solving_operations(solvers: list[Solver], needs: Needs, block: PlannedBlock) -> int:
    """Return the operations of all solvers on a block, whatever the tokens."""
    preparing = sum(
        groups * Hessian.operations(columns, needs)
        for columns, groups in expected_groups(block).items()
    )
    for group in routed_groups(block):
        each = sum(Hessian.operations(c, needs) for c in (group.columns, group.inner))
        preparing += len(group.experts) * each
    return preparing + sum(
        solver.cost(*matrix.matrix.shape).operations
        for matrix in block.matrices
        for solver in solvers
    )
