"""Forecast of the memory that a run takes of its GPU.

The phases are those of a run on the CPU (`phases`), with the batches and tiles of a
GPU, and without files. Nothing is refused: batches are halved where memory is exhausted
(`oom_backoff`), and the forecast has not been compared with many GPUs.
"""

import warnings
from dataclasses import dataclass, replace

import torch

from halve.calibration_stats import max_tile
from halve.devices import choose_device
from halve.errors import HalveWarning
from halve.pruning.memory.phases import FILES, Phase, all_phases
from halve.pruning.memory.workload import Workload
from halve.pruning.plan import Plan
from halve.pruning.select.candidates import candidates
from halve.runtime.batch_size import batch_tokens_within
from halve.runtime.stream import Stream

# What the context of CUDA and its libraries take: an estimate, not measured yet.
_CONTEXT = 600 * 2**20
_GPU = torch.device("cuda")
# One in so many parts of the memory is lost to fragments.
_MARGIN = 10


@dataclass(frozen=True)
class GpuForecast:
    """Memory of a GPU during a run.

    Attributes:
        name: Name of the card.
        total: Bytes of memory that it has.
        taken: Bytes that other processes hold, and the context of CUDA.
        hidden: Bytes of the hidden states of all streams.
        phases: What is in its memory, in turn, beside hidden states.
    """

    name: str
    total: int
    taken: int
    hidden: int
    phases: tuple[Phase, ...]

    @property
    def largest(self) -> Phase:
        """The phase that determines the peak."""
        return max(self.phases, key=lambda phase: phase.bytes)

    @property
    def keeps_hidden(self) -> bool:
        """Whether hidden states stay on the GPU between blocks."""
        need = self.taken + self.hidden + self.largest.bytes
        return need + self.total // _MARGIN <= self.total

    @property
    def peak(self) -> int:
        """Peak bytes."""
        return self.taken + self.largest.bytes + self.keeps_hidden * self.hidden

    @property
    def fits(self) -> bool:
        """Whether the memory suffices."""
        return self.peak <= self.total


def forecast_gpu(plan: Plan, batch_limit: int | None = None) -> GpuForecast | None:
    """Predict the memory that a run takes of its GPU; None if it runs on the CPU.

    Args:
        plan: The run.
        batch_limit: Tokens in a batch, unless one window has more; None for the usual
            number.
    """
    device = choose_device(plan.options.device)
    if device.type != "cuda":
        return None
    free, total = torch.cuda.mem_get_info(device)
    own = torch.cuda.memory_reserved(device)
    return forecast_memory(
        plan,
        GpuForecast(
            name=torch.cuda.get_device_name(device),
            total=total,
            taken=max(total - free - own, _CONTEXT),
            hidden=0,
            phases=(),
        ),
        batch_limit,
    )


def forecast_memory(
    plan: Plan, gpu: GpuForecast, batch_limit: int | None = None
) -> GpuForecast:
    """Fill in what a run takes of a GPU of which the rest is known.

    Args:
        plan: The run.
        gpu: The card, without hidden states and phases.
        batch_limit: As for `forecast_gpu`.
    """
    solvers = [c.solver for c in candidates(plan.options, plan.layout.dtype)]
    work = Workload(plan, solvers, deferred=False)
    usual = batch_tokens_within(gpu.total, work.token_nbytes())
    limit = usual if batch_limit is None else batch_limit
    work = replace(work, batch_limit=limit, tile=max_tile(_GPU))
    streams = work.runs_text * (1 + plan.options.has_dense)
    return replace(
        gpu,
        hidden=streams * Stream.nbytes(plan.tokens, plan.width),
        phases=tuple(_on_gpu(phase) for phase in all_phases(work)),
    )


def _on_gpu(phase: Phase) -> Phase:
    parts = {name: count for name, count in phase.parts.items() if name != FILES}
    return Phase(phase.name, parts)


def check_gpu(plan: Plan) -> None:
    """Warn if a run is predicted to exhaust its GPU even by one window in a batch.

    Warns:
        HalveWarning: As said.
    """
    forecast = forecast_gpu(plan, batch_limit=1)
    if forecast is None or forecast.fits:
        return
    parts = forecast.largest.parts
    part = max(parts, key=lambda name: parts[name])
    warnings.warn(
        f"The run may need {forecast.peak / 2**30:.2f} GiB of the memory of "
        f"{forecast.name}, which has {forecast.total / 2**30:.2f} GiB; while "
        f"{forecast.largest.name}, {parts[part] / 2**30:.2f} GiB go to {part}. If it "
        "fails, choose a --solver that needs less, or pass --device cpu.",
        HalveWarning,
        stacklevel=3,
    )
