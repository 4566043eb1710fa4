"""The code of the kernels for GPUs: their PTX, and what the compilers make of them.

Triton's interpreter, in which the kernels are tested, knows no inline PTX. So a small
machine runs the PTX here; and the kernels are compiled for two GPUs, neither of which
is needed for that, and their machine code is counted.
"""

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from halve.runtime.cuda import launch, ptx

# Instructions of a warp for 32 weights. An H100 issues 11 to 13 in the time in which
# its memory delivers them.
MOST_INSTRUCTIONS = 8.5


class Machine:
    """Runs straight PTX of one lane; a value of 16 bits is the number that it means.

    Args:
        operands: Operand such as `$1` -> value; results are added.
        memory: Values by address.
    """

    def __init__(self, operands: dict[str, Any], memory: dict[int, float]) -> None:
        self.state = dict(operands)
        self.memory = memory

    def run(self, code: str) -> dict[str, Any]:
        for statement in filter(None, map(str.strip, code.strip("{} ").split(";"))):
            if statement.startswith(".reg"):
                continue
            guard = re.match(r"@(p\d) (.*)", statement)
            if guard is None:
                self._execute(statement)
            elif self.state[guard[1]]:
                self._execute(guard[2])
        return self.state

    def _execute(self, statement: str) -> None:
        operation, _, rest = statement.partition(" ")
        to, *names = re.findall(r"\{z, \w+\}|\[[^\]]+\]|[$\w]+", rest)
        if operation.startswith("ld.global.nc"):
            base, _, offset = names[0].strip("[]").partition("+")
            self.state[to] = self.memory[self.state[base] + int(offset)]
            return
        a, *more = (self._value(name) for name in names)
        results = {
            "mov": lambda: a,
            "cvt": lambda: a,
            "and": lambda: a & more[0],
            "setp": lambda: a != more[0],
            "popc": lambda: int(a).bit_count(),
            "mad": lambda: a * more[0] + more[1],
            "fma": lambda: a * more[0] + more[1],
            "selp": lambda: a if more[1] else more[0],
        }
        self.state[to] = results[operation.partition(".")[0]]()

    def _value(self, name: str) -> Any:
        name = name.strip("{}").removeprefix("z, ")  # the upper half of a float32
        return self.state[name] if name in self.state else int(name)


@pytest.mark.parametrize("kind", ["bf16", "fp16", "fp32"])
def test_the_ptx_decodes_all_bytes(kind):
    size, first = (4 if kind == "fp32" else 2), 5
    memory = {size * place: float(place + 1) for place in range(first, 40)}
    x = [0.5, 2.0, -1.0, 3.0, 0.25, 8.0, -4.0, 1.5]
    for bits in range(256):
        places = iter(range(first, 40))
        wanted = [memory[size * next(places)] if bits >> j & 1 else 0 for j in range(8)]
        above = bits | 0xABC << 8  # of the next lanes
        operands = {"$8": above, "$9": size * first}
        found = Machine(operands, memory).run(ptx.expand(kind))
        assert [float(found[f"${j}"]) for j in range(8)] == wanted
        operands = {"$1": 10.0, "$2": above, "$3": size * first}
        operands |= {f"${4 + j}": x[j] for j in range(8)}
        total = Machine(operands, memory).run(ptx.multiply_add(kind))["$0"]
        assert total == 10 + sum(a * b for a, b in zip(wanted, x, strict=True))


@pytest.mark.parametrize("kind", ["bf16", "fp16", "fp32"])
def test_no_more_is_read_than_the_slack(kind):
    size = 4 if kind == "fp32" else 2
    kept = 3
    memory = {size * place: 1.0 for place in range(kept + ptx.OVERREAD)}
    for bits, first in ((0b111, 0), (0b1, 2), (0, kept)):
        Machine({"$8": bits, "$9": size * first}, memory).run(ptx.expand(kind))


# --- Machine code ---------------------------------------------------------------------


def compiled(capability: int, cache: Path) -> dict[str, dict[str, int]]:
    """Return instructions and spilled bytes by variant."""
    ran = subprocess.run(
        [sys.executable, "-m", "tests.contracts.compile_cuda_kernels", str(capability)],
        env=os.environ | {"TRITON_INTERPRET": "0", "TRITON_CACHE_DIR": str(cache)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert ran.returncode == 0, ran.stderr
    lines = [json.loads(line) for line in ran.stdout.splitlines()]
    return {line["variant"]: line for line in lines}


# Each takes more than ten seconds.
@pytest.mark.parametrize("capability", [90, pytest.param(80, marks=pytest.mark.slow)])
def test_kernels_spill_nothing_and_a_weight_costs_few_instructions(
    capability, tmp_path
):
    pytest.importorskip("triton", reason="Triton is not installed")
    if not sys.platform.startswith("linux"):
        pytest.skip("Triton brings its assembler on Linux only")
    found = compiled(capability, tmp_path)
    assert len(found) == 15
    assert {name: c["spilled"] for name, c in found.items() if c["spilled"]} == {}
    for kind in ("bf16", "fp16", "fp32"):
        short, long = (
            found[f"vectors {kind} {columns}"]["instructions"]
            for columns in (4096, 8192)
        )
        # What four more steps cost, of 8 weights a lane in each row.
        cost = (long - short) / (4 * 8 * launch.PACKED_ROWS)
        assert 4 < cost <= MOST_INSTRUCTIONS, kind
