"""How a run stays within a limit on its memory (`--memory`)."""

from dataclasses import dataclass, replace

from halve.calibration import default_activation_memory
from halve.distributed import Ranks
from halve.errors import HalveError
from halve.pruning.memory.forecast import Forecast, forecast_host
from halve.pruning.memory.gpu import check_gpu
from halve.pruning.memory.text import SAMPLING
from halve.pruning.plan import Plan

# A tenth of a limit is left free where possible: runs have taken up to a tenth more
# than predicted (docs/log.md).
_MARGIN = 10

_LESS_MEMORY = (
    "Raise --memory, or choose a --solver that needs less: sparsegpt does, and wanda "
    "needs hardly any."
)
_FROM_TEXT = (
    "Raise --memory, or let the model sample no windows (--self-samples 0, and another "
    "--calibration than self)."
)


@dataclass(frozen=True)
class MemoryPlan:
    """Where a run stores activations; does not change the result.

    Attributes:
        activations: Bytes of hidden states and cached dense inputs that may stay in
            memory.
        deferred: Whether inputs that are wider than hidden states go to a memory-mapped
            file, and are summed once the other groups of their block are solved. The
            largest Gram matrix of a block is then in memory without any other, and
            without the activations of a forward pass.
        spilled: Whether weights of experts lie in memory-mapped files, and experts run
            one after the other, so that a block may be larger than memory.
    """

    activations: int
    deferred: bool = False
    spilled: bool = False


def plan_memory(
    plan: Plan, memory: int | None, activations: int | None, processes: int = 1
) -> MemoryPlan:
    """Choose where a run stores activations, and look whether its GPU is large enough.

    Args:
        plan: The run.
        memory: Bytes of the host's memory that the process may take; None for no limit.
            A tenth of it is left free for what the forecast misses, unless the run only
            fits without.
        activations: Bytes of activations that may stay in memory. None for what the
            limit leaves; without a limit, for this process's part of a quarter of the
            machine's memory.
        processes: Number of processes of the run on this machine.

    Raises:
        HalveError: The run needs more memory even with all activations on disk.

    Warns:
        HalveWarning: It is predicted to need more memory than its GPU has.
    """
    check_gpu(plan)
    if memory is None:
        default = default_activation_memory() // processes
        return MemoryPlan(default if activations is None else activations)
    target = memory - memory // _MARGIN
    way, forecast = _cheapest(plan, target)
    if forecast.peak > memory:
        raise _too_little(forecast, memory)
    left = max(target - forecast.peak_beside_activations, 0)
    return MemoryPlan(left if activations is None else min(left, activations), *way)


def agree(own: MemoryPlan, ranks: Ranks) -> MemoryPlan:
    """Return the plan of a process that defers and spills where one of them has to.

    Processes exchange sums and read tensors in an order that depends on both.
    """
    every = ranks.all_gather(own)
    deferred = any(other.deferred for other in every)
    return replace(own, deferred=deferred, spilled=any(p.spilled for p in every))


def _cheapest(plan: Plan, target: int) -> tuple[tuple[bool, bool], Forecast]:
    """Return what is deferred and spilled, and the forecast, with no activations.

    Both take disk space and time, so only where it is needed and helps.
    """
    has_experts = any(block.experts for block in plan.layout.blocks)
    spills = (False, True) if has_experts else (False,)
    ways = [(deferred, spilled) for spilled in spills for deferred in (False, True)]
    forecasts = {way: forecast_host(plan, 0, *way) for way in ways}
    fitting = (way for way in ways if forecasts[way].peak <= target)
    chosen = next(fitting, min(ways, key=lambda way: forecasts[way].peak))
    return chosen, forecasts[chosen]


def _too_little(forecast: Forecast, memory: int) -> HalveError:
    """Return the error for a limit below the peak, with the largest use of memory."""
    phase = forecast.largest
    uses = f"{forecast.process / 2**30:.2f} GiB go to the process itself"
    if phase.parts:
        part = max(phase.parts, key=lambda name: phase.parts[name])
        uses += f" and {phase.parts[part] / 2**30:.2f} GiB to {part}"
    return HalveError(
        f"The run needs at least {forecast.peak / 2**30:.2f} GiB of memory, but the "
        f"limit is {memory / 2**30:.2f} GiB; while {phase.name}, {uses}.",
        _FROM_TEXT if phase.name == SAMPLING else _LESS_MEMORY,
    )
