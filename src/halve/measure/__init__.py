"""What a model's files contain, whether they are intact, and how fast they run."""

from halve.measure.bench import run_bench
from halve.measure.inspection import inspect_model
from halve.measure.random_models import write_random_model
from halve.measure.speed import TORCH, bench_cases, measure_speed
from halve.measure.verification import verify_output

__all__ = [
    "TORCH",
    "bench_cases",
    "inspect_model",
    "measure_speed",
    "run_bench",
    "verify_output",
    "write_random_model",
]
