"""Runs all measurements of `halve bench`: memory, bandwidth, speed."""

from dataclasses import dataclass
from pathlib import Path

import torch

from halve._compat.triton import has_triton
from halve.checkpoint import Checkpoint, TensorInfo
from halve.devices import choose_device
from halve.errors import HalveError
from halve.measure.footprint import footprint
from halve.measure.gpu_speed import copy_bandwidth
from halve.measure.speed import (
    HALVE_DENSE,
    PACKED,
    PACKED_INT8,
    TORCH,
    BenchCase,
    bench_cases,
    measure_speed,
    read_bandwidth,
)
from halve.models import load_config, longest_sequence
from halve.options import BenchOptions
from halve.records import BenchRecord
from halve.runtime.cpu.kernels import TORCH as NO_KERNEL
from halve.runtime.cpu.kernels import kernels
from halve.system import cpu_name

# Prompt and generated tokens that llama-bench measures by default.
_PROMPT = 512
_GENERATED = 128


@dataclass(frozen=True)
class BenchModels:
    """The model to measure, in both forms.

    Attributes:
        name: Its name, for the record.
        dense: Folder of the model, dense.
        packed: Folder of the same model, packed.
    """

    name: str
    dense: Path
    packed: Path


def run_bench(models: BenchModels, options: BenchOptions) -> BenchRecord:
    """Measure footprints, bandwidth and speed; see `halve.bench` for the contract.

    Args:
        models: The model, dense and packed.
        options: What to measure.

    Raises:
        HalveError: Nothing is to be timed, a test needs more tokens than the model
            takes, or packed and dense do not differ on this device.

    Cost:
        Memory for the model dense and packed at once.
    """
    cases = _cases(models, options)
    device = choose_device(options.device)
    options.progress("measuring memory")
    footprints = {
        kind: footprint(folder, options.trust_remote_code, str(device))
        for kind, folder in (("dense", models.dense), ("packed", models.packed))
    }
    dense, packed = _tensors(models.dense), _tensors(models.packed)
    return BenchRecord(
        model=models.name,
        parameters=sum(info.elements for info in dense),
        sizes={
            TORCH: sum(info.stored_bytes for info in dense),
            HALVE_DENSE: sum(info.stored_bytes for info in dense),
            PACKED: sum(info.stored_bytes for info in packed),
            # Listed even where it is not timed: the same files.
            PACKED_INT8: sum(info.stored_bytes for info in packed),
        },
        cpu=cpu_name(),
        threads=torch.get_num_threads(),
        kernel=_kernel(device),
        bandwidth=_bandwidth(device),
        results=tuple(measure_speed(models.packed, cases, options.rounds, options)),
        footprints=footprints,
        gpu=torch.cuda.get_device_name(device) if device.type == "cuda" else "",
    )


def _kernel(device: torch.device) -> str:
    """Return the name of what multiplies with packed weights."""
    if device.type == "cuda":
        return "triton" if has_triton(device) else NO_KERNEL
    loaded = kernels()
    return loaded.name if loaded else NO_KERNEL


def _bandwidth(device: torch.device) -> float:
    return copy_bandwidth(device) if device.type == "cuda" else read_bandwidth()


def _cases(models: BenchModels, options: BenchOptions) -> list[BenchCase]:
    config = load_config(models.dense, options.trust_remote_code)
    longest = longest_sequence(config) or max(_PROMPT, _GENERATED + 1)
    prompt, generated = options.prompt, options.generated
    if prompt == 0 and generated == 0:
        raise HalveError(
            "With no prompt and no generated tokens there is nothing to time.",
            "Set prompt or generated to more than 0 (--pp, --tg).",
        )
    prompt = min(_PROMPT, longest) if prompt is None else prompt
    generated = min(_GENERATED, longest - 1) if generated is None else generated
    if max(prompt, generated + 1) > longest:
        raise HalveError(
            f"{models.name} takes {longest} tokens, fewer than a test needs.",
            f"Set prompt (--pp) to {longest} and generated (--tg) to {longest - 1}, or "
            "less.",
        )
    return bench_cases(prompt, generated, options.batches)


def _tensors(folder: Path) -> list[TensorInfo]:
    return list(Checkpoint.open(folder).tensors.values())
