"""Who solves which matrix, where several processes prune together.

Each has seen its own windows. What they know of a group is brought together with those
that solve one of its matrices; solutions are given to all. Alone, all is one's own.
"""

from dataclasses import replace

import torch
from torch import Tensor

from halve.distributed import Ranks
from halve.grids import QuantParams
from halve.layout import PlannedMatrix
from halve.pruning.observe.collect import GroupInputs
from halve.pruning.select.selection import Selected

# Tensor -> the rank that solves it.
Owners = dict[str, int]


def assign_matrices(stage: list[GroupInputs], ranks: Ranks) -> Owners:
    """Return who solves what; whole matrices, the costliest first."""
    matrices = [m for group_inputs in stage for m in group_inputs.group.matrices]
    owners = ranks.assign([_cost(matrix) for matrix in matrices])
    return {m.tensor: owner for m, owner in zip(matrices, owners, strict=True)}


def _cost(planned: PlannedMatrix) -> float:
    rows, columns = planned.matrix.shape
    return float((rows + columns) * columns**2)


def reduce_to_owners(
    stage: list[GroupInputs], owners: Owners, ranks: Ranks
) -> list[GroupInputs]:
    """Finish what is known of a stage; return the groups of this rank's matrices.

    Args:
        stage: What this rank knows; emptied, so that what it has no use for is freed.
        owners: Who solves what.
        ranks: All of them.
    """
    kept: list[GroupInputs] = []
    while stage:
        group_inputs = stage.pop(0)
        is_own = any(
            owners[m.tensor] == ranks.rank for m in group_inputs.group.matrices
        )
        group_inputs.finish(ranks, wanted=is_own)
        if is_own:
            kept.append(group_inputs)
    return kept


def broadcast_selected(
    selected: Selected | None, dtype: torch.dtype, owner: int, ranks: Ranks
) -> Selected:
    """Return everywhere what one rank has chosen for a matrix.

    Args:
        selected: Of the owner; None elsewhere.
        dtype: In which it will be stored, and travels.
        owner: Who has chosen.
        ranks: All of them.
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
