"""Question: at equal size, does pruning or quantization lose less?

For each budget of bits per weight, mask and scales included, tries every pair of
sparsity and grid that takes that many bits, with the same solver and the same block
reconstruction. Dense quantization of the same size is among them, and for comparison
round-to-nearest and one sweep, which is GPTQ (Frantar et al., 2023). A budget is what
dense quantization takes with groups of 128; no dense grid takes 2.4 bits that way, so
int2 gets smaller groups there. In the last row of each budget `--target-bits` chooses
for the whole model by held-out KL divergence. Each is judged by the KL divergence of
its predictions from the dense model's. There is no claim to fail: prints the results.

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

# Bits per weight -> the dense grid that takes as many, and its group size.
BUDGETS = {2.4: ("int2", 40), 3.125: ("int3", 128), 4.125: ("int4", 128)}


def run(task: argparse.Namespace, title: str, **options: Any) -> None:
    """Prune, evaluate and print one row."""
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "out"
        text = {"calibration": task.calibration, "seed": task.seed}
        record = halve.prune(task.model, out, **text, **options)
        judged = halve.compare(out, task.model, data=task.data, segments=task.segments)
    print(
        f"  {title:28} {record.bits:6.3f} bits  KL {judged.kl_mean:.4f} ± "
        f"{judged.kl_error:.4f}  perplexity {judged.model.perplexity:8.3f}  "
        f"{record.seconds:5.0f} s",
        flush=True,
    )


def budget(task: argparse.Namespace, bits: float) -> None:
    """Print all rows of one budget."""
    grid, group = BUDGETS[bits]
    print(f"{bits} bits per weight", flush=True)
    dense = {"sparsity": 0, "quantize": grid, "group_size": group}
    run(task, f"{grid}, round to nearest", **dense, solver="magnitude")
    run(task, f"{grid}, one sweep (GPTQ)", **dense, solver="sparsegpt")
    run(task, f"{grid}", **dense, refine=task.refine)
    for sparsity, scheme in schemes_for_bits(bits, 128, True):
        if sparsity:
            options = {"sparsity": sparsity, "quantize": f"int{scheme.bits}"}
            title = f"{100 * sparsity:.0f} % zeros + {scheme}"
            run(task, title, **options, refine=task.refine)
    run(task, "--target-bits", target_bits=bits, refine=task.refine)


def main() -> int:
    """Print the rows of all budgets."""
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
    evaluated = halve.perplexity(task.model, data=task.data, segments=task.segments)
    print(f"dense {evaluated.perplexity:.3f}")
    for bits in task.budgets:
        budget(task, bits)
    return 0


if __name__ == "__main__":
    sys.exit(main())
