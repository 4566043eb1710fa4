"""What a run would do and what it would take, without doing it."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from halve.checkpoint import resolve_model
from halve.devices import choose_device
from halve.options import PruneOptions, RunOptions
from halve.pruning.memory.duration import estimate_seconds
from halve.pruning.memory.forecast import Forecast, forecast_host
from halve.pruning.memory.gpu import GpuForecast, forecast_gpu
from halve.pruning.memory.limit import plan_memory
from halve.pruning.plan import Plan, make_plan


@dataclass(frozen=True)
class DryRun:
    """A run before it starts: its plan, and the forecast of what it will take.

    Attributes:
        plan: Model, options, and every tensor's place in the output.
        forecast: Peak memory of the host by phase, disk, and operations.
        seconds: Estimated duration on this machine; correct to about a factor of two.
        gpu: Memory of the GPU; None if the run is on the CPU.
    """

    plan: Plan
    forecast: Forecast
    seconds: float
    gpu: GpuForecast | None = None

    def __repr__(self) -> str:
        """Return a line; the fields of all tensors would be thousands of characters."""
        forecast = self.forecast
        return (
            f"DryRun({len(self.plan.layout.blocks)} blocks, peak memory "
            f"{forecast.peak:,} bytes, disk {forecast.disk:,} bytes, about "
            f"{self.seconds:.0f} s)"
        )

    def to_dict(self) -> dict[str, Any]:
        """Return what `halve prune --dry-run --json` prints."""
        layout, forecast = self.plan.layout, self.forecast
        return {
            "blocks": len(layout.blocks),
            "matrices": sum(len(block.matrices) for block in layout.blocks),
            "prunable_weights": layout.prunable,
            "sequence_length": self.plan.options.seq_len,
            "bytes_peak": forecast.peak,
            "bytes_process": forecast.process,
            "bytes_activations_in_memory": forecast.resident,
            "bytes_activations_mapped": forecast.mapped,
            "largest_phase": forecast.largest.name,
            "bytes_by_phase": forecast.by_name(),
            "bytes_output": forecast.output,
            "bytes_disk": forecast.disk,
            "seconds": self.seconds,
            "identity": self.plan.identity(),
        } | (self._experts_to_dict() | self._gpu_to_dict())

    def _experts_to_dict(self) -> dict[str, Any]:
        """Return what is added where experts are dropped."""
        dropping = self.plan.dropping
        if dropping is None:
            return {}
        return {"experts": dropping.total, "experts_kept": dropping.kept}

    def _gpu_to_dict(self) -> dict[str, Any]:
        """Return what is added for a run on a GPU."""
        if self.gpu is None:
            return {}
        return {
            "gpu": self.gpu.name,
            "gpu_bytes_total": self.gpu.total,
            "gpu_bytes_peak": self.gpu.peak,
            "gpu_bytes_hidden_states": self.gpu.keeps_hidden * self.gpu.hidden,
            "gpu_largest_phase": self.gpu.largest.name,
        }


def dry_run(
    model: str | Path, options: PruneOptions, run_options: RunOptions
) -> DryRun:
    """Plan a run and forecast its cost; see `halve.plan` for the contract."""
    folder = resolve_model(model, weights=False)
    trusted = run_options.trust_remote_code
    plan = make_plan(folder, options, trusted, needs_weights=False)
    memory = plan_memory(plan, run_options.memory, run_options.activation_memory)
    places = memory.activations, memory.deferred, memory.spilled
    forecast = forecast_host(plan, *places)
    gpu = forecast_gpu(plan)
    seconds = estimate_seconds(forecast, choose_device(options.device))
    return DryRun(plan, forecast, seconds, gpu)
