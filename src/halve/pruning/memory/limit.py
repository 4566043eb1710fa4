"""How a run is to live within a limit on its memory."""

from dataclasses import dataclass

from halve.calibration import default_activation_memory
from halve.errors import HalveError
from halve.plan import Plan
from halve.pruning.memory.forecast import Forecast, forecast_run

# What is kept free of a limit where it can be: a tenth, since runs have taken up to a
# tenth more than was foretold (docs/log.md).
_SPARE = 10


@dataclass(frozen=True)
class MemoryPlan:
    """Where a run keeps things; nothing here changes the result.

    Attributes:
        activations: Bytes of hidden states and dense inputs that may live in memory.
        deferred: Whether inputs wider than hidden states go to a mapped file, to be summed
            once the other groups of their block are solved. The widest Gram matrix of a
            block then lies beside no other, and beside nothing that runs.
    """

    activations: int
    deferred: bool = False


def plan_memory(
    plan: Plan, memory: int | None, activations: int | None, processes: int = 1
) -> MemoryPlan:
    """Choose where a run keeps things.

    Args:
        plan: The run.
        memory: Bytes that the whole process may take; None where that is not limited.
            A tenth is kept free, for what the forecast does not know of, unless the
            run fits only without.
        activations: Bytes that were given; None for what the rest leaves, or for a
            quarter of the machine's where nothing is limited.
        processes: That share this machine.

    Raises:
        HalveError: The rest alone takes more than may be taken.
    """
    own = (
        default_activation_memory() // processes if activations is None else activations
    )
    if memory is None:
        return MemoryPlan(own)
    aimed = memory - memory // _SPARE
    needed, apart = (forecast_run(plan, 0, deferred) for deferred in (False, True))
    deferred = needed.peak > aimed and apart.peak < needed.peak
    if deferred:  # it takes disk rather than memory
        needed = apart
    if needed.peak > memory:
        raise _too_little(needed, memory)
    left = max(aimed - needed.peak, 0)
    return MemoryPlan(left if activations is None else min(left, activations), deferred)


def _too_little(needed: Forecast, memory: int) -> HalveError:
    largest = needed.largest
    parts = {"the process itself": needed.process} | largest.parts
    part = max(parts, key=lambda name: parts[name])
    return HalveError(
        f"At least {needed.peak / 2**30:.2f} GiB of memory are needed, and "
        f"{memory / 2**30:.2f} GiB were given: while {largest.name}, "
        f"{parts[part] / 2**30:.2f} GiB go to {part}.",
        "Give more (--memory), or choose a --solver that holds less: sparsegpt "
        "does, and wanda hardly anything.",
    )
