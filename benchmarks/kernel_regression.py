"""Claim: a packed product is faster than a dense one, on this machine, at batch 1.

One [11008 x 4096] bfloat16 matrix with 50 % zeros: packed in Halve's kernel against
dense in Halve's kernel, and against torch, in interleaved rounds over so many copies
that none is in a cache. Exits with 1 where packed is not faster than our own dense.
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

_CACHED = 300e6  # bytes of copies, well past the last cache


def copies(*tensors: torch.Tensor) -> list[tuple[torch.Tensor, ...]]:
    """Return a matrix's tensors as many times as no cache can hold."""
    size = sum(tensor.nbytes for tensor in tensors)
    count = max(int(_CACHED / size), 2)
    return [tuple(tensor.clone() for tensor in tensors) for _ in range(count)]


def alternate(rivals: dict[str, tuple[Callable, list]], rounds: int) -> dict:
    """Return each rival's median seconds; in every round each runs all its copies.

    Each call is timed alone: a thread that loses its core spoils one, not a round.
    """
    seconds: dict[str, list[float]] = {name: [] for name in rivals}
    for _ in range(rounds):
        for name, (multiply, matrices) in rivals.items():
            for matrix in matrices:
                started = time.perf_counter()
                multiply(matrix)
                seconds[name].append(time.perf_counter() - started)
    return {name: statistics.median(found) for name, found in seconds.items()}


def compare(found: Kernels, rows: int, columns: int, batch: int, rounds: int) -> float:
    """Print packed against our dense kernel and torch; return the first ratio."""
    weight = torch.randn(rows, columns).bfloat16()
    weight.masked_fill_(torch.rand(weight.shape) < 0.5, 0)
    p = pack(weight)
    x = torch.randn(batch, columns).bfloat16()
    dense = copies(weight)
    packed = (
        lambda q: found.packed_linear(x, q[0], q[1], q[2], None, columns),
        copies(p.values, p.mask, p.offsets),
    )
    own = (lambda q: found.dense_linear(x, q[0], None), dense)
    torchs = (lambda q: functional.linear(x, q[0]), dense)
    # Two at a time: what ran before decides what the caches hold.
    first = alternate({"packed": packed, "rival": own}, rounds)
    second = alternate({"packed": packed, "rival": torchs}, rounds)
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
    """Print the table; 1 where packed is not faster than our own dense at batch 1."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rows", type=int, default=11008)
    parser.add_argument("--columns", type=int, default=4096)
    parser.add_argument("--rounds", type=int, default=41)
    options = parser.parse_args()
    print(describe_machine())
    found = kernels()
    if found is None:
        print("FAILED: there are no kernels here")
        return 1
    print(f"kernel: {found.name}")
    ratios = [
        compare(found, options.rows, options.columns, batch, options.rounds)
        for batch in (1, 4, 16)
    ]
    if ratios[0] <= 1:
        print("FAILED: packed is not faster than our dense kernel at batch 1")
    return int(ratios[0] <= 1)


if __name__ == "__main__":
    sys.exit(main())
