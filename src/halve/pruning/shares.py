"""Who solves which matrix, where several processes prune together.

Each has seen its own windows. What they know of a group is brought together with those
that solve one of its matrices; solutions are given to all. Alone, all is one's own.
"""

from dataclasses import replace

import torch
from torch import Tensor

from halve.distributed import Ranks
from halve.grids import Levels
from halve.plan import PlannedMatrix
from halve.pruning.choice import Choice
from halve.pruning.evidence import Evidence

# Tensor -> the rank that solves it.
Owners = dict[str, int]


def deal_out(stage: list[Evidence], ranks: Ranks) -> Owners:
    """Return who solves what; whole matrices, the costliest first."""
    matrices = [m for evidence in stage for m in evidence.group.matrices]
    owners = ranks.deal([_cost(matrix) for matrix in matrices])
    return {m.tensor: owner for m, owner in zip(matrices, owners, strict=True)}


def _cost(planned: PlannedMatrix) -> float:
    rows, columns = planned.matrix.shape
    return float((rows + columns) * columns**2)


def bring_together(
    stage: list[Evidence], owners: Owners, ranks: Ranks
) -> list[Evidence]:
    """Finish what is known of a stage; return the groups of this rank's matrices.

    Args:
        stage: What this rank knows; emptied, so that what it has no use for is freed.
        owners: Who solves what.
        ranks: All of them.
    """
    kept: list[Evidence] = []
    while stage:
        evidence = stage.pop(0)
        is_own = any(owners[m.tensor] == ranks.rank for m in evidence.group.matrices)
        evidence.finish(ranks, wanted=is_own)
        if is_own:
            kept.append(evidence)
    return kept


def share_choice(
    choice: Choice | None, dtype: torch.dtype, owner: int, ranks: Ranks
) -> Choice:
    """Return everywhere what one rank has chosen for a matrix.

    Args:
        choice: Of the owner; None elsewhere.
        dtype: In which it will be stored, and travels.
        owner: Who has chosen.
        ranks: All of them.
    """
    if ranks.size == 1 and choice is not None:
        return choice
    rest = ranks.share(lambda: _without_tensors(choice), owner)
    sent = ranks.share_tensors(_tensors(choice, dtype), owner)
    if choice is not None:
        return choice
    levels = rest.solution.levels
    if levels is not None:
        levels = Levels(levels.grid, sent["scale"], sent["zero"])
    weight = sent["weight"].float()
    return replace(rest, solution=replace(rest.solution, weight=weight, levels=levels))


def _without_tensors(choice: Choice | None) -> Choice:
    assert choice is not None, "the owner has solved the matrix"
    none, levels = torch.empty(0), choice.solution.levels
    levels = levels and Levels(levels.grid, none, none)
    solution = replace(choice.solution, weight=none, levels=levels)
    return replace(choice, solution=solution)


def _tensors(choice: Choice | None, dtype: torch.dtype) -> dict[str, Tensor] | None:
    if choice is None:
        return None
    tensors = {"weight": choice.solution.weight.to(dtype)}
    if (levels := choice.solution.levels) is not None:
        tensors |= {"scale": levels.scale, "zero": levels.zero}
    return tensors
