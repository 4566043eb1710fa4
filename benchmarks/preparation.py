"""Claim: the candidates of a group share one preparation of its Hessian.

Prunes the bundled model with several candidates a matrix, each way in a process of its
own. Prints seconds and peak resident set; and, from a second run that is watched, for
the widest group of matrices (1024 columns): how often its Hessian was factorised, and
how many [columns, columns] matrices were alive at once when a matrix had been solved,
ADMM's shifted inverses counted apart. Exits with 1 where a group is factorised more
than once for each block, or where more than four such matrices are alive beside the
inverses.

    python benchmarks/preparation.py [--repeats 3]
"""

import argparse
import gc
import json
import statistics
import subprocess
import sys
import tempfile
import time
from importlib.resources import files
from pathlib import Path
from typing import Any

import torch
from machine import describe_machine

import halve
from halve.solvers import Solver, factors

MODEL = files("halve") / "data" / "pycode-opt"
COLUMNS = 1024
MAX_SQUARES = 4
# A batch of four windows has 1000 tokens, so that its inputs are not square.
SEQ_LEN = 250
WAYS: dict[str, dict[str, Any]] = {
    "auto": {},
    "--quantize int4": {"quantize": "int4"},
    "--target-bits 3.1": {"target_bits": 3.1, "group_size": 256},
}


def main() -> int:
    """Measure every way; return 1 where preparation is not shared."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--run", nargs=2, help="used by the script itself")
    options = parser.parse_args()
    if options.run:
        _run(options.run[0], watched=options.run[1] == "watched")
        return 0
    print(describe_machine(), f"halve {halve.__version__}", sep="\n")
    shared = True
    for way in WAYS:
        runs = [_child(way, "timed") for _ in range(options.repeats)]
        seconds = statistics.median(run["seconds"] for run in runs)
        peak = statistics.median(run["peak"] for run in runs)
        seen = _child(way, "watched")
        shared &= seen["squares"] <= MAX_SQUARES and seen["factored"] <= seen["blocks"]
        print(
            f"{way:18} {seconds:5.1f} s, peak {peak / 2**20:5.0f} MiB; "
            f"{seen['factored']} factorizations in {seen['blocks']} blocks, "
            f"{seen['cholesky']} Cholesky factors of shifted or corrected systems; "
            f"{seen['squares']} squares alive and {seen['inverses']} inverses",
            flush=True,
        )
    print("kept" if shared else "MISSED")
    return int(not shared)


def _child(way: str, how: str) -> dict[str, Any]:
    command = [sys.executable, __file__, "--run", way, how]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    return json.loads(done.stdout.splitlines()[-1])


def _run(way: str, watched: bool) -> None:
    """Prune once and print what was measured as JSON."""
    seen = _watch() if watched else {}
    with tempfile.TemporaryDirectory() as folder:
        started = time.perf_counter()
        record = halve.prune(
            str(MODEL),
            Path(folder) / "out",
            calibration="stdlib",
            device="cpu",
            seq_len=SEQ_LEN,
            **WAYS[way],
        )
        seen |= {"seconds": time.perf_counter() - started, "peak": _peak()}
    print(json.dumps(seen | {"blocks": len(record.blocks)}))


def _peak() -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(x.split()[1]) * 1024 for x in lines if x.startswith("VmHWM:"))


def _watch() -> dict[str, Any]:
    """Count factorisations, and square matrices after each solution."""
    seen: dict[str, Any] = dict.fromkeys(("factored", "cholesky"), 0)
    seen |= {"squares": 0, "inverses": 0}
    inverses: set[int] = set()
    lapack, cholesky = factors._by_lapack, torch.linalg.cholesky_ex
    invert = torch.cholesky_inverse

    def by_lapack(square: Any, name: str, **options: Any) -> bool:
        seen["factored"] += name == "potrf" and len(square) == COLUMNS
        return lapack(square, name, **options)

    def cholesky_ex(matrix: Any, *args: Any, **options: Any) -> Any:
        seen["cholesky"] += len(matrix) == COLUMNS
        return cholesky(matrix, *args, **options)

    def cholesky_inverse(lower: Any) -> Any:
        inverse = invert(lower)
        inverses.add(inverse.untyped_storage().data_ptr())
        return inverse

    factors._by_lapack = by_lapack
    torch.linalg.cholesky_ex = cholesky_ex  # pyright: ignore[reportAttributeAccessIssue]
    torch.cholesky_inverse = cholesky_inverse  # pyright: ignore[reportAttributeAccessIssue]
    for solver in _all_solvers(Solver):
        _count_after(solver, seen, inverses)
    return seen


def _all_solvers(base: type) -> list[type]:
    return [c for s in base.__subclasses__() for c in (s, *_all_solvers(s))]


def _count_after(solver: Any, seen: dict[str, Any], inverses: set[int]) -> None:
    solve = solver.solve

    def counted(*args: Any, **options: Any) -> Any:
        solution = solve(*args, **options)
        alive = {
            tensor.untyped_storage().data_ptr()
            for tensor in gc.get_objects()
            if type(tensor) is torch.Tensor and tensor.shape == (COLUMNS, COLUMNS)
        }
        seen["squares"] = max(seen["squares"], len(alive - inverses))
        seen["inverses"] = max(seen["inverses"], len(alive & inverses))
        return solution

    solver.solve = counted


if __name__ == "__main__":
    sys.exit(main())
