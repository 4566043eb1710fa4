"""Claim: auto loses much less than SparseGPT in twice its time, less with --refine.

Prunes a model, by default the bundled one, with every solver, at every sparsity, with
three draws of the calibration windows, and evaluates it on held-out text. The recovery
r of a solver is (P_sparsegpt - P) / (P_sparsegpt - P_dense), where P is perplexity.
Exits with 1 if auto, with or without --refine, recovers less or takes longer than
`CLAIMS` says.

    python benchmarks/quality.py [--seeds 3] [--segments 128] [--patterns 50% 2:4]
        [--model FOLDER --calibration TEXT --data TEXT]
"""

import argparse
import math
import statistics
import sys
import tempfile
from importlib.resources import files
from pathlib import Path

from machine import describe_machine

import halve

PATTERNS = ("50%", "60%", "70%", "2:4")
# Name -> options of halve.prune; the first is what the others are compared with.
SOLVERS = {
    "sparsegpt": {"solver": "sparsegpt"},
    "magnitude": {"solver": "magnitude"},
    "wanda": {"solver": "wanda"},
    "admm, block at once": {"solver": "admm", "sequential": False},
    "auto": {"solver": "auto"},
    "auto --refine": {"solver": "auto", "refine": True},
}
# Row -> the least recovery by sparsity, and the most time relative to SparseGPT's.
CLAIMS = {
    "auto": ({"50%": 0.55, "60%": 0.60, "70%": 0.60, "2:4": 0.70}, 2.0),
    "auto --refine": ({"50%": 0.70, "60%": 0.75, "70%": 0.75, "2:4": 0.80}, 5.0),
}


def run(task: argparse.Namespace, pattern: str, options: dict, seed: int) -> tuple:
    """Prune once; return the perplexity and the seconds of pruning."""
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "out"
        text = {"calibration": task.calibration, "seed": seed}
        record = halve.prune(task.model, out, sparsity=pattern, **text, **options)
        evaluated = halve.perplexity(out, data=task.data, segments=task.segments)
    return evaluated.perplexity, record.seconds


def row(name: str, runs: list[tuple], base: list[tuple], dense: float) -> dict:
    """Print a solver's mean and range at one pattern; return its recovery and time."""
    recovery = [(b[0] - f[0]) / (b[0] - dense) for f, b in zip(runs, base, strict=True)]
    time = statistics.median(f[1] for f in runs) / statistics.median(b[1] for b in base)
    values = [f[0] for f in runs]
    print(
        f"  {name:20} {statistics.fmean(values):8.3f} "
        f"({min(values):.3f} to {max(values):.3f})  "
        f"r {statistics.fmean(recovery):6.3f} "
        f"({min(recovery):.3f} to {max(recovery):.3f})  time {time:.2f}",
        flush=True,
    )
    return {"recovery": statistics.fmean(recovery), "time": time}


def arguments() -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--patterns", nargs="+", default=PATTERNS, choices=PATTERNS)
    parser.add_argument("--segments", type=int, default=128)
    parser.add_argument("--model", default=str(files("halve") / "data" / "pycode-opt"))
    parser.add_argument("--calibration", default="stdlib")
    parser.add_argument("--data", default="stdlib")
    return parser.parse_args()


def holds(name: str, pattern: str, result: dict) -> bool:
    """Return whether a row is as good and as fast as its claim."""
    recovery, max_time = CLAIMS.get(name, ({pattern: -math.inf}, math.inf))
    return result["recovery"] >= recovery[pattern] and result["time"] <= max_time


def main() -> int:
    """Print the table; return 1 if a claim does not hold."""
    task = arguments()
    print(describe_machine())
    evaluated = halve.perplexity(task.model, data=task.data, segments=task.segments)
    print(f"dense {evaluated.perplexity:.3f}")
    all_hold = True
    for pattern in task.patterns:
        print(pattern, flush=True)
        base: list[tuple] = []
        for name, options in SOLVERS.items():
            runs = [run(task, pattern, options, seed) for seed in range(task.seeds)]
            base = base or runs
            result = row(name, runs, base, evaluated.perplexity)
            all_hold &= holds(name, pattern, result)
    print("held" if all_hold else "MISSED")
    return int(not all_hold)


if __name__ == "__main__":
    sys.exit(main())
