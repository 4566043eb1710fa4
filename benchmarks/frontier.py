"""Question: at equal bytes, do zeros or bits lose less?

For each budget of bits a weight, mask and scales included, every pair of sparsity and
grid that takes so many is tried, by the same solver with the same refining: dense
rounding of that size among them, to the nearest level and by one sweep, which is GPTQ
(Frantar et al., 2023), as well. A budget is what dense rounding takes with groups of
128; for 2.4 bits there is no dense grid, so that of 2 bits gets smaller groups. The
last row of each lets `--target-bits` choose for every matrix by held-out error. Prints
what was found, whichever way it falls.

    python benchmarks/frontier.py [--segments 128] [--seed 0] [--no-refine]
        [--budgets 2.4 3.125 4.125]
        [--model FOLDER --calibration TEXT --data TEXT]
"""

import argparse
import sys
import tempfile
from importlib.resources import files
from pathlib import Path
from typing import Any

from machine import describe_machine

import halve
from halve.grids import schemes_for_bits

# Budget -> the dense rounding that takes it: grid and group size.
BUDGETS = {2.4: ("int2", 40), 3.125: ("int3", 128), 4.125: ("int4", 128)}


def run(task: argparse.Namespace, title: str, **options: Any) -> None:
    """Prune, judge and print one row."""
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "out"
        text = {"calibration": task.calibration, "seed": task.seed}
        record = halve.prune(task.model, out, **text, **options)
        judged = halve.perplexity(out, data=task.data, segments=task.segments)
    print(
        f"  {title:28} {record.bits:6.3f} bits  perplexity {judged.perplexity:8.3f}  "
        f"{record.seconds:5.0f} s",
        flush=True,
    )


def budget(task: argparse.Namespace, bits: float) -> None:
    """Print all rows of one budget."""
    grid, group = BUDGETS[bits]
    print(f"{bits} bits a weight", flush=True)
    dense = {"sparsity": 0, "quantize": grid, "group_size": group}
    run(task, f"{grid}, nearest", **dense, solver="magnitude")
    run(task, f"{grid}, one sweep (GPTQ)", **dense, solver="sparsegpt")
    run(task, f"{grid}", **dense, refine=task.refine)
    for sparsity, thin in schemes_for_bits(bits, 128, True):
        if sparsity:
            options = {"sparsity": sparsity, "quantize": str(thin)}
            title = f"{100 * sparsity:.0f} % zeros + {thin}"
            run(task, title, **options, solver="admm", refine=task.refine)
    run(task, "--target-bits", target_bits=bits, solver="admm", refine=task.refine)


def main() -> int:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--segments", type=int, default=128)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--budgets", nargs="+", type=float, default=list(BUDGETS))
    parser.add_argument("--refine", action=argparse.BooleanOptionalAction, default=True)
    parser.add_argument("--model", default=str(files("halve") / "data" / "pycode-opt"))
    parser.add_argument("--calibration", default="stdlib")
    parser.add_argument("--data", default="stdlib")
    task = parser.parse_args()
    print(describe_machine())
    judged = halve.perplexity(task.model, data=task.data, segments=task.segments)
    print(f"dense {judged.perplexity:.3f}")
    for bits in task.budgets:
        budget(task, bits)
    return 0


if __name__ == "__main__":
    sys.exit(main())
