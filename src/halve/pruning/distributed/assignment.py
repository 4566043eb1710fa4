"""Assignment of matrices to ranks, where several processes prune together.

Each rank runs its part of the windows. Statistics of a group are summed over all ranks,
and ranks that solve one of its matrices also get the held-out inputs of all. Solutions
are broadcast. A single process solves everything itself.
"""

from dataclasses import replace

import torch
from torch import Tensor

from halve.distributed import Ranks
from halve.grids import QuantParams
from halve.layout import PlannedMatrix
from halve.pruning.observe.collect import GroupInputs
from halve.pruning.select.selection import Selected

# `PlannedMatrix.name` -> the rank that solves it.
Owners = dict[str, int]


def assign_matrices(stage: list[GroupInputs], ranks: Ranks) -> Owners:
    """Assign each matrix of a stage to one rank, the costliest first."""
    matrices = [m for group_inputs in stage for m in group_inputs.group.matrices]
    owners = ranks.assign([_cost(matrix) for matrix in matrices])
    return {m.name: owner for m, owner in zip(matrices, owners, strict=True)}


def _cost(planned: PlannedMatrix) -> float:
    """Return operations up to a factor: a Cholesky factor, and a sweep over rows."""
    rows, columns = planned.matrix.shape
    return float((rows + columns) * columns**2)


def reduce_to_owners(
    stage: list[GroupInputs], owners: Owners, ranks: Ranks
) -> list[GroupInputs]:
    """Combine a stage's statistics; return the groups in which this rank solves some.

    Args:
        stage: The groups with this rank's statistics. Emptied, so that groups of which
            this rank solves no matrix are freed.
        owners: Matrix -> the rank that solves it.
        ranks: All processes; each of them must call this.
    """
    to_solve: list[GroupInputs] = []
    while stage:
        group_inputs = stage.pop(0)
        is_owner = any(
            owners[m.name] == ranks.rank for m in group_inputs.group.matrices
        )
        group_inputs.finish(ranks, needs_held_out=is_owner)
        if is_owner:
            to_solve.append(group_inputs)
    return to_solve


def broadcast_selected(
    selected: Selected | None, dtype: torch.dtype, owner: int, ranks: Ranks
) -> Selected:
    """Broadcast the solution that one rank selected for a matrix.

    Args:
        selected: The solution on the owner; None on the other ranks.
        dtype: Dtype in which the matrix will be stored, and is sent.
        owner: The rank that solved the matrix.
        ranks: All processes; each of them must call this.
    """
    if ranks.size == 1 and selected is not None:
        return selected
    rest = ranks.broadcast_object(lambda: _without_tensors(selected), owner)
    sent = ranks.broadcast_tensors(_tensors(selected, dtype), owner)
    if selected is not None:
        return selected
    quant_params = rest.solution.quant_params
    if quant_params is not None:
        quant_params = QuantParams(quant_params.grid, sent["scale"], sent["zero"])
    weight = sent["weight"].float()
    return replace(
        rest, solution=replace(rest.solution, weight=weight, quant_params=quant_params)
    )


def _without_tensors(selected: Selected | None) -> Selected:
    assert selected is not None, "the owner has solved the matrix"
    none, quant_params = torch.empty(0), selected.solution.quant_params
    quant_params = quant_params and QuantParams(quant_params.grid, none, none)
    solution = replace(selected.solution, weight=none, quant_params=quant_params)
    return replace(selected, solution=solution)


def _tensors(selected: Selected | None, dtype: torch.dtype) -> dict[str, Tensor] | None:
    if selected is None:
        return None
    tensors = {"weight": selected.solution.weight.to(dtype)}
    if (quant_params := selected.solution.quant_params) is not None:
        tensors |= {"scale": quant_params.scale, "zero": quant_params.zero}
    return tensors
