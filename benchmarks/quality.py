"""Claim: auto loses much less than SparseGPT in twice its time, refined less still.

Prunes a model, the bundled one unless another is named, by every solver, at every
sparsity, with three draws of the calibration windows, and judges it on text that none
of them saw. The recovered share of a solver is
(P_sparsegpt - P) / (P_sparsegpt - P_dense), P being perplexity. Exits
with 1 where auto recovers less than it promises, with and without refining, or takes
longer.

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
# Name -> options of halve.prune; sparsegpt comes first, as the measure of the others.
SOLVERS = {
    "sparsegpt": {"solver": "sparsegpt"},
    "magnitude": {"solver": "magnitude"},
    "wanda": {"solver": "wanda"},
    "admm, block at once": {"solver": "admm", "sequential": False},
    "auto": {"solver": "auto"},
    "auto --refine": {"solver": "auto", "refine": True},
}
# Row -> share recovered at least, by sparsity, and SparseGPT's times taken at most.
PROMISED = {
    "auto": ({"50%": 0.55, "60%": 0.60, "70%": 0.60, "2:4": 0.70}, 2.0),
    "auto --refine": ({"50%": 0.70, "60%": 0.75, "70%": 0.75, "2:4": 0.80}, 5.0),
}


def run(task: argparse.Namespace, pattern: str, options: dict, seed: int) -> tuple:
    """Return perplexity and seconds of one pruning."""
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "out"
        text = {"calibration": task.calibration, "seed": seed}
        record = halve.prune(task.model, out, sparsity=pattern, **text, **options)
        judged = halve.perplexity(out, data=task.data, segments=task.segments)
    return judged.perplexity, record.seconds


def row(name: str, found: list[tuple], base: list[tuple], dense: float) -> dict:
    """Print a solver's mean and spread at one pattern; return shares and time."""
    shares = [(b[0] - f[0]) / (b[0] - dense) for f, b in zip(found, base, strict=True)]
    pace = statistics.median(f[1] for f in found) / statistics.median(
        b[1] for b in base
    )
    values = [f[0] for f in found]
    print(
        f"  {name:20} {statistics.fmean(values):8.3f} "
        f"({min(values):.3f} to {max(values):.3f})  r {statistics.fmean(shares):6.3f} "
        f"({min(shares):.3f} to {max(shares):.3f})  time {pace:.2f}",
        flush=True,
    )
    return {"share": statistics.fmean(shares), "time": pace}


def arguments() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--patterns", nargs="+", default=PATTERNS, choices=PATTERNS)
    parser.add_argument("--segments", type=int, default=128)
    parser.add_argument("--model", default=str(files("halve") / "data" / "pycode-opt"))
    parser.add_argument("--calibration", default="stdlib")
    parser.add_argument("--data", default="stdlib")
    return parser.parse_args()


def is_kept(name: str, pattern: str, result: dict) -> bool:
    """Whether a row is as good and as fast as it promises."""
    shares, most_time = PROMISED.get(name, ({pattern: -math.inf}, math.inf))
    return result["share"] >= shares[pattern] and result["time"] <= most_time


def main() -> int:
    """Print the table; 1 where a promise was not kept."""
    task = arguments()
    print(describe_machine())
    judged = halve.perplexity(task.model, data=task.data, segments=task.segments)
    print(f"dense {judged.perplexity:.3f}")
    kept = True
    for pattern in task.patterns:
        print(pattern, flush=True)
        base: list[tuple] = []
        for name, options in SOLVERS.items():
            found = [run(task, pattern, options, seed) for seed in range(task.seeds)]
            base = base or found
            kept &= is_kept(name, pattern, row(name, found, base, judged.perplexity))
    print("kept" if kept else "MISSED")
    return int(not kept)


if __name__ == "__main__":
    sys.exit(main())
