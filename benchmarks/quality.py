"""Claim: admm loses much less than SparseGPT, in about its time.

Prunes the bundled model by every solver, at every sparsity, with three draws of the
calibration windows, and judges it on standard-library modules that none of them saw.
The recovered share of a solver is (P_sparsegpt - P) / (P_sparsegpt - P_dense), P being
perplexity. Exits with 1 where admm recovers less than it promises, or takes more than
twice SparseGPT's time.

    python benchmarks/quality.py [--seeds 3] [--segments 128]
"""

import argparse
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
    "sparsegpt --refit": {"solver": "sparsegpt", "refit": True},
    "admm": {"solver": "admm"},
}
# Recovered by admm at least; 2:4 has not reached its goal of 0.70 yet.
PROMISED = {"50%": 0.55, "60%": 0.60, "70%": 0.60, "2:4": 0.55}
MOST_TIME = 2.0
MODEL = str(files("halve") / "data" / "pycode-opt")


def run(pattern: str, options: dict, seed: int, segments: int) -> tuple[float, float]:
    """Return perplexity and seconds of one pruning."""
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "out"
        record = halve.prune(
            MODEL, out, sparsity=pattern, calibration="stdlib", seed=seed, **options
        )
        judged = halve.perplexity(out, data="stdlib", segments=segments)
    return judged.perplexity, record.seconds


def row(name: str, found: list[tuple], base: list[tuple], dense: float) -> dict:
    """Print a solver's mean and spread at one pattern; return shares and time."""
    shares = [(b[0] - f[0]) / (b[0] - dense) for f, b in zip(found, base, strict=True)]
    pace = statistics.median(f[1] for f in found) / statistics.median(
        b[1] for b in base
    )
    values = [f[0] for f in found]
    print(
        f"  {name:18} {statistics.fmean(values):8.3f} "
        f"({min(values):.3f} to {max(values):.3f})  r {statistics.fmean(shares):6.3f} "
        f"({min(shares):.3f} to {max(shares):.3f})  time {pace:.2f}",
        flush=True,
    )
    return {"share": statistics.fmean(shares), "time": pace}


def main() -> int:
    """Print the table; 1 where a promise was not kept."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--segments", type=int, default=128)
    options = parser.parse_args()
    print(describe_machine())
    dense = halve.perplexity(MODEL, data="stdlib", segments=options.segments).perplexity
    print(f"dense {dense:.3f}")
    kept = True
    for pattern in PATTERNS:
        print(pattern, flush=True)
        base: list[tuple] = []
        for name, arguments in SOLVERS.items():
            found = [
                run(pattern, arguments, seed, options.segments)
                for seed in range(options.seeds)
            ]
            base = base or found
            result = row(name, found, base, dense)
            if name == "admm":
                kept &= result["share"] >= PROMISED[pattern]
                kept &= result["time"] <= MOST_TIME
    print("kept" if kept else "MISSED")
    return int(not kept)


if __name__ == "__main__":
    sys.exit(main())
