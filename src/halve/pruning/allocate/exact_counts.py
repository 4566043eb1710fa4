"""The budget of a whole model: exact patterns for its matrices, and the final count."""

from collections.abc import Iterable, Sequence

from halve.errors import TargetMissedError
from halve.patterns import Exact, Patterns, parse_pattern
from halve.pruning.allocate.spread import apportion_zeros
from halve.pruning.plan import Plan
from halve.records import BlockRecord


def budget(plan: Plan) -> int:
    """Return how many weights the whole model loses."""
    return parse_pattern(plan.options.sparsity).count(plan.layout.prunable)


def exact_patterns(plan: Plan, sparsities: Sequence[float]) -> list[Patterns]:
    """Return what the matrices of each block shall obey, so that the budget is met.

    Args:
        plan: Of the run.
        sparsities: Of the blocks.
    """
    blocks = [[m.elements for m in block.matrices] for block in plan.layout.blocks]
    zeros = apportion_zeros(budget(plan), sparsities, blocks)
    return [
        {
            m.tensor: Exact(count, m.elements)
            for m, count in zip(block.matrices, counts, strict=True)
        }
        for block, counts in zip(plan.layout.blocks, zeros, strict=True)
    ]


def check_total(plan: Plan, blocks: Iterable[BlockRecord]) -> None:
    """Raise TargetMissedError where the files hold fewer zeros than the budget."""
    found = sum(block.zeros for block in blocks)
    if found < budget(plan):
        raise TargetMissedError(
            f"{found} of {plan.layout.prunable} weights are zero in the whole model, "
            f"not {budget(plan)}.",
            "Report this as a defect of Halve, with the model's name.",
        )
