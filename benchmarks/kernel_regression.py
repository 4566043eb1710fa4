"""Claim: at batch 1 a packed product is faster than a dense one on this machine.

Multiplies one [11008 x 4096] bfloat16 matrix with 50 % zeros: packed with Halve's
kernel, dense with Halve's kernel, and dense with torch, in interleaved rounds over
enough copies that none stays in a cache. Exits with 1 unless the packed product is
faster than Halve's dense one.
"""

import argparse
import statistics
import sys
import time
from collections.abc import Callable

import torch
from machine import describe_machine
from torch.nn import functional

from halve.formats.bitmask import pack
from halve.runtime.cpu.kernels import Kernels, kernels

_COPIES_BYTES = 300e6  # well past the size of the last-level cache


def copies(*tensors: torch.Tensor) -> list[tuple[torch.Tensor, ...]]:
    """Return so many copies of a matrix's tensors that no cache holds them."""
    size = sum(tensor.nbytes for tensor in tensors)
    count = max(int(_COPIES_BYTES / size), 2)
    return [tuple(tensor.clone() for tensor in tensors) for _ in range(count)]


def alternate(rivals: dict[str, tuple[Callable, list]], rounds: int) -> dict:
    """Return the median seconds of each rival, which take turns in every round.

    Each call is timed separately, so that a thread that is preempted distorts one
    measurement and not a whole round.
    """
    seconds: dict[str, list[float]] = {name: [] for name in rivals}
    for _ in range(rounds):
        for name, (multiply, matrices) in rivals.items():
            for matrix in matrices:
                started = time.perf_counter()
                multiply(matrix)
                seconds[name].append(time.perf_counter() - started)
    return {name: statistics.median(times) for name, times in seconds.items()}


def compare(
    library: Kernels, rows: int, columns: int, batch: int, rounds: int
) -> float:
    """Print the packed product against Halve's dense one and torch's.

    Returns:
        How many times as fast as Halve's dense product it is.
    """
    weight = torch.randn(rows, columns).bfloat16()
    weight.masked_fill_(torch.rand(weight.shape) < 0.5, 0)
    p = pack(weight)
    x = torch.randn(batch, columns).bfloat16()
    dense = copies(weight)
    packed = (
        lambda q: library.packed_linear(x, q[0], q[1], q[2], None, columns),
        copies(p.values, p.mask, p.offsets),
    )
    halve_dense = (lambda q: library.dense_linear(x, q[0], None), dense)
    torch_dense = (lambda q: functional.linear(x, q[0]), dense)
    # Two at a time, since what ran before decides what is in the caches.
    first = alternate({"packed": packed, "rival": halve_dense}, rounds)
    second = alternate({"packed": packed, "rival": torch_dense}, rounds)
    ratios = [times["rival"] / times["packed"] for times in (first, second)]
    print(
        f"[{rows} x {columns}] batch {batch:2}: "
        f"{1e3 * first['rival']:.3f} ms halve dense / {1e3 * first['packed']:.3f} ms "
        f"packed = {ratios[0]:.2f}; {1e3 * second['rival']:.3f} ms torch / "
        f"{1e3 * second['packed']:.3f} ms packed = {ratios[1]:.2f}",
        flush=True,
    )
    return ratios[0]


def main() -> int:
    """Print the table; return 1 unless packed beats Halve's dense at batch 1."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rows", type=int, default=11008)
    parser.add_argument("--columns", type=int, default=4096)
    parser.add_argument("--rounds", type=int, default=41)
    options = parser.parse_args()
    print(describe_machine())
    library = kernels()
    if library is None:
        print("FAILED: Halve was installed without its kernels")
        return 1
    print(f"kernel: {library.name}")
    ratios = [
        compare(library, options.rows, options.columns, batch, options.rounds)
        for batch in (1, 4, 16)
    ]
    if ratios[0] <= 1:
        print("FAILED: packed is not faster than Halve's dense kernel at batch 1")
    return int(ratios[0] <= 1)


if __name__ == "__main__":
    sys.exit(main())
