"""The verbs of Halve as functions, whose docstrings are their contracts.

Options are declared in `halve.options` alone. `prune`, `plan`, `perplexity`,
`compare`, `evaluate_tasks`, `recover`, `bench`, `generate` and `report` accept an
options object, or its fields as keywords, or both; then the keywords override the
object's fields.

The modules have names of nouns: the function `prune` would hide a module
`halve.api.prune`.
"""

from halve.api.benchmark import bench
from halve.api.evaluation import compare, evaluate_tasks, perplexity
from halve.api.generation import generate
from halve.api.inspection import inspect, verify
from halve.api.packing import pack, unpack
from halve.api.pruning import plan, prune
from halve.api.recovery import recover
from halve.api.reporting import measure_output, report

__all__ = [
    "bench",
    "compare",
    "evaluate_tasks",
    "generate",
    "inspect",
    "measure_output",
    "pack",
    "perplexity",
    "plan",
    "prune",
    "recover",
    "report",
    "unpack",
    "verify",
]
