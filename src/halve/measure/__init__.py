"""What a model's files contain, whether they are intact, and how fast they run."""

from halve.measure.bench import BenchModels, run_bench
from halve.measure.inspection import inspect_model
from halve.measure.lm_eval import read_task_scores
from halve.measure.measurements import check_keepable, keep_measurement
from halve.measure.random_models import write_random_model
from halve.measure.speed import TORCH, bench_cases, measure_speed
from halve.measure.tasks import find_tasks, score_tasks
from halve.measure.verification import verify_output

__all__ = [
    "TORCH",
    "BenchModels",
    "bench_cases",
    "check_keepable",
    "find_tasks",
    "inspect_model",
    "keep_measurement",
    "measure_speed",
    "read_task_scores",
    "run_bench",
    "score_tasks",
    "verify_output",
    "write_random_model",
]
