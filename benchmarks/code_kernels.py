"""Claim: zeros with codes are multiplied faster than dense 8-bit codes.

Multiplies one [11008 x 4096] matrix of codes by one bfloat16 vector: dense codes of 8,
4, 3 and 2 bits, and codes of half of the weights or less beside a mask, with
activations of 16 and of 8 bits. Every row has a turn in each round, over enough copies
that none stays in a cache, and so has a read of the memory, of whose speed each row
reaches a share. Exits with 1 unless 50 % zeros with int4 take less time than dense
int8.

    python benchmarks/code_kernels.py [--rows 11008] [--columns 4096] [--rounds 25]
"""

import argparse
import statistics
import sys
import time
from collections.abc import Callable

import torch
from machine import describe_machine

from halve.formats.quantized_packing import pack
from halve.grids import QuantScheme, fit_quant_params
from halve.measure.speed import read_bandwidth
from halve.runtime.cpu.kernels import kernels
from halve.runtime.cpu.quantized_linear import QuantizedLinear

GROUP = 128
# Row -> bits, whether the grid is midrise, and the fraction of zeros.
ROWS = {
    "int4": (4, False, 0.0),
    "int3": (3, False, 0.0),
    "int2, midrise": (2, True, 0.0),
    "int8": (8, False, 0.0),
    "int8, 50 %": (8, False, 0.5),
    "int4, 50 %": (4, False, 0.5),
    "int3, 57 %": (3, False, 0.57),
}
ACTIVATIONS = ("int16", "int8")
_COPIES = 3


def make_layer(name: str, rows: int, columns: int) -> QuantizedLinear:
    """Return a layer of random codes."""
    bits, midrise, zeros = ROWS[name]
    scheme = QuantScheme(bits, GROUP, midrise=midrise).exact_in(torch.bfloat16)
    weight, pruned = torch.randn(rows, columns), torch.rand(rows, columns) < zeros
    params = fit_quant_params(scheme, weight.masked_fill_(pruned, 0))
    # A normal variable is exactly 0 now and then. Kept as a zero, it would take a mask
    # for the whole matrix where the grid has no zero, so only pruned weights are zeros.
    kept = params.fake_quantize(weight).masked_fill_(pruned, 0)
    packed = pack(kept.bfloat16(), params)
    assert packed is not None, "the values are on the grid"
    return QuantizedLinear(packed)


def layer_nbytes(layer: QuantizedLinear) -> int:
    """Return the bytes that a product reads of a layer."""
    return sum(operand.nbytes for operand in layer.operands if operand is not None)


def median_seconds(
    work: dict[tuple[str, str], list[Callable[[], object]]], rounds: int
) -> tuple[dict[tuple[str, str], float], float]:
    """Time all work in turn; return medians, and that of the bytes read per second."""
    seconds: dict[tuple[str, str], list[float]] = {key: [] for key in work}
    speeds = []
    for _ in range(rounds):
        speeds.append(read_bandwidth())
        for key, calls in work.items():
            for call in calls:
                started = time.perf_counter()
                call()
                seconds[key].append(time.perf_counter() - started)
    medians = {key: statistics.median(times) for key, times in seconds.items()}
    return medians, statistics.median(speeds)


@torch.no_grad()
def main() -> int:
    """Print the table; return 1 where zeros do not save time."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rows", type=int, default=11008)
    parser.add_argument("--columns", type=int, default=4096)
    parser.add_argument("--rounds", type=int, default=25)
    task = parser.parse_args()
    print(describe_machine())
    library = kernels()
    if library is None:
        print("FAILED: Halve was installed without its kernels")
        return 1
    x = torch.randn(1, task.columns).bfloat16()
    layers = {
        (name, activations): [
            make_layer(name, task.rows, task.columns) for _ in range(_COPIES)
        ]
        for name in ROWS
        for activations in ACTIVATIONS
    }
    for (_, activations), copies in layers.items():
        for layer in copies:
            layer.activations = activations
    work = {
        key: [lambda layer=layer: layer(x) for layer in copies]
        for key, copies in layers.items()
    }
    medians, bandwidth = median_seconds(work, task.rounds)
    print(f"kernel: {library.name}; the memory is read at {bandwidth / 1e9:.1f} GB/s")
    for name in ROWS:
        print(f"  {name:14}", end="")
        for activations in ACTIVATIONS:
            seconds = medians[name, activations]
            share = layer_nbytes(layers[name, activations][0]) / seconds / bandwidth
            print(f"  {activations:5} {1e3 * seconds:.2f} ms, {share:.2f}", end="")
        print()
    saves = medians["int4, 50 %", "int16"] < medians["int8", "int16"]
    if not saves:
        print("FAILED: 50 % zeros with int4 are slower than dense int8")
    return int(not saves)


if __name__ == "__main__":
    sys.exit(main())
