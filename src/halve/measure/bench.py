"""Runs all measurements of `halve bench`: memory, bandwidth, speed."""

import platform
from collections.abc import Callable
from pathlib import Path

import torch

from halve.checkpoint import Checkpoint, TensorInfo
from halve.errors import HalveError
from halve.measure.footprint import footprint
from halve.measure.speed import (
    HALVE_DENSE,
    PACKED,
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

# Prompt and generated tokens that llama-bench measures by default.
_PROMPT = 512
_GENERATED = 128


def run_bench(bench: BenchOptions, progress: Callable[[str], None]) -> BenchRecord:
    """Measure footprints, bandwidth and speed; see `halve bench`.

    Args:
        bench: What to measure.
        progress: Called with a line of text before each measurement.

    Raises:
        HalveError: Nothing is to be timed, or a test needs more tokens than the model
            takes.

    Cost:
        Memory for the model dense and packed at once.
    """
    cases = _cases(bench)
    progress("measuring memory")
    footprints = {
        "dense": footprint(bench.dense, bench.trust_remote_code),
        "packed": footprint(bench.packed, bench.trust_remote_code),
    }
    loaded = kernels()
    dense, packed = _tensors(bench.dense), _tensors(bench.packed)
    return BenchRecord(
        model=bench.name,
        parameters=sum(info.elements for info in dense),
        sizes={
            TORCH: sum(info.stored_bytes for info in dense),
            HALVE_DENSE: sum(info.stored_bytes for info in dense),
            PACKED: sum(info.stored_bytes for info in packed),
        },
        cpu=_cpu(),
        threads=torch.get_num_threads(),
        kernel=loaded.name if loaded else NO_KERNEL,
        bandwidth=read_bandwidth(),
        results=tuple(
            measure_speed(
                bench.packed,
                cases,
                bench.rounds,
                progress,
                bench.trust_remote_code,
            )
        ),
        footprints=footprints,
    )


def _cases(bench: BenchOptions) -> list[BenchCase]:
    config = load_config(bench.dense, bench.trust_remote_code)
    longest = longest_sequence(config) or max(_PROMPT, _GENERATED + 1)
    prompt, generated = bench.prompt, bench.generated
    if prompt == 0 and generated == 0:
        raise HalveError(
            "With no prompt and no generated tokens there is nothing to time.",
            "Leave out --pp 0 or --tg 0.",
        )
    prompt = min(_PROMPT, longest) if prompt is None else prompt
    generated = min(_GENERATED, longest - 1) if generated is None else generated
    if max(prompt, generated + 1) > longest:
        raise HalveError(
            f"{bench.name} takes {longest} tokens, fewer than a test needs.",
            f"Pass --pp {longest} and --tg {longest - 1}, or less.",
        )
    return bench_cases(prompt, generated, bench.batches)


def _tensors(folder: Path) -> list[TensorInfo]:
    return list(Checkpoint.open(folder).tensors.values())


def _cpu() -> str:
    """Return the name of the CPU, or its architecture if the system does not say."""
    try:
        lines = Path("/proc/cpuinfo").read_text("utf-8").splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    names = [line.partition(":")[2].strip() for line in lines if "model name" in line]
    return names[0] if names else platform.machine()
