"""The kernels for GPUs, tested without a GPU.

Three parts cover them: Triton's interpreter runs the kernels, with the decoding of
columns in Triton; a small machine runs the PTX that takes its place on a GPU; and the
kernels are compiled for two GPUs, of which the machine code is counted.
"""

import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("triton", reason="triton is not installed; it is for Linux x86-64")

from halve.runtime.cuda import ptx

INTERPRETED = Path(__file__).with_name("interpreted_kernels.py")
# Those of an A100 and an H100.
CAPABILITIES = (80, 90)
# Instructions of a warp for 32 weights. An H100 issues 11 to 13 in the time in which
# its memory delivers them.
MOST_INSTRUCTIONS = 8.5


def test_kernels_in_the_interpreter():
    environment = os.environ | {"TRITON_INTERPRET": "1"}
    command = (
        sys.executable,
        "-m",
        "pytest",
        "-q",
        "-p",
        "no:cacheprovider",
        INTERPRETED,
    )
    done = subprocess.run(
        command, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout[-5000:] + done.stderr[-2000:]


# --- The PTX --------------------------------------------------------------------------


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


@pytest.fixture(autouse=True, scope="module")
def _compiler_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TRITON_CACHE_DIR", str(tmp_path_factory.mktemp("triton")))
        yield


def machine_code(
    kernel: Any, capability: int, warps: int, types: dict[str, str], constants: Any
) -> tuple[int, int]:
    """Compile a kernel; return its instructions and the bytes that it spills.

    Args:
        kernel: A function of `triton.jit`.
        capability: Of the GPU, such as 90.
        warps: Warps of a program.
        types: Type of each argument that is no constant, such as `*bf16`. Addresses and
            numbers are multiples of 16.
        constants: Value of each constant.
    """
    import triton  # noqa: PLC0415
    from triton.backends.compiler import GPUTarget  # noqa: PLC0415
    from triton.compiler import ASTSource  # noqa: PLC0415

    aligned = {
        (kernel.arg_names.index(name),): [["tt.divisibility", 16]] for name in types
    }
    signature = types | dict.fromkeys(constants, "constexpr")
    source = ASTSource(kernel, signature, constants, aligned)
    target = GPUTarget("cuda", capability, 32)
    compiled = triton.compile(source, target=target, options={"num_warps": warps})
    return _count(compiled.asm["cubin"])


def _count(cubin: bytes) -> tuple[int, int]:
    import triton  # noqa: PLC0415

    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    path = Path(os.environ["TRITON_CACHE_DIR"]) / "kernel.cubin"
    path.write_bytes(cubin)
    listing, usage = (
        subprocess.run([tool, option, path], capture_output=True, text=True, check=True)
        for option in ("--dump-sass", "--dump-resource-usage")
    )
    code = re.findall(r"/\*[0-9a-f]{4,}\*/\s+(.*?);", listing.stdout)
    last = max(i for i, line in enumerate(code) if "EXIT" in line)
    memory = re.findall(r"(?:STACK|LOCAL):(\d+)", usage.stdout)
    return last + 1, sum(map(int, memory))


MATRIX = {"mask": "*u64", "offsets": "*u32", "starts": "*u16"}


@pytest.mark.parametrize("capability", CAPABILITIES)
@pytest.mark.parametrize("kind", ["bf16", "fp16", "fp32"])
def test_a_weight_costs_few_instructions(kind, capability):
    from halve.runtime.cuda import launch  # noqa: PLC0415
    from halve.runtime.cuda.bitmask_kernels import vectors_kernel  # noqa: PLC0415

    def instructions(columns: int) -> int:
        """Return those of one program, whose steps are all written out."""
        warps, rows = 4, launch.PACKED_ROWS
        types = {name: f"*{kind}" for name in ("x", "values", "bias", "y")}
        constants = {
            **{"BATCH": 1, "COLUMNS": columns, "LANES": 32 * warps, "ROWS": rows},
            **{"UNROLL": columns // (256 * warps), "WHOLE": True},
            **{"BIASED": False, "INLINE": True},
        }
        code, spilled = machine_code(
            *(vectors_kernel, capability, warps),
            *(types | MATRIX | {"rows": "i32"}, constants),
        )
        assert spilled == 0
        return code

    # What four more steps cost, of 8 weights a lane in each row.
    more = instructions(8192) - instructions(4096)
    assert more / (4 * 8 * launch.PACKED_ROWS) <= MOST_INSTRUCTIONS


@pytest.mark.parametrize("capability", CAPABILITIES)
@pytest.mark.parametrize("kind", ["bf16", "fp16", "fp32"])
def test_unpacking_spills_nothing(kind, capability):
    from halve.runtime.cuda import launch  # noqa: PLC0415
    from halve.runtime.cuda.bitmask_kernels import unpack_kernel  # noqa: PLC0415

    types = {"values": f"*{kind}", "dense": f"*{kind}", "begin": "i32", "end": "i32"}
    constants = {
        **{"COLUMNS": 11008, "LANES": 32},
        **{"ROWS": launch.UNPACK_ROWS, "INLINE": True},
    }
    _, spilled = machine_code(
        unpack_kernel, capability, launch.UNPACK_WARPS, types | MATRIX, constants
    )
    assert spilled == 0


CODES = {
    **{"codes": "*u8", "scales": "*fp16", "zero_codes": "*u8"},
    **MATRIX,
}


@pytest.mark.parametrize("capability", CAPABILITIES)
@pytest.mark.parametrize(("bits", "masked"), [(8, False), (4, False), (3, True)])
def test_kernels_for_codes_spill_nothing(bits, masked, capability):
    from halve.runtime.cuda import launch  # noqa: PLC0415
    from halve.runtime.cuda.codes_kernels import (  # noqa: PLC0415
        codes_rows_kernel,
        codes_vectors_kernel,
    )

    constants = {
        **{"COLUMNS": 4096, "BITS": bits, "GROUP": 128, "ZEROS": masked},
        **{"MIDRISE": False, "MASKED": masked, "ALIGNED": not masked},
    }
    types = {"x": "*bf16", "bias": "*bf16", "y": "*bf16", "rows": "i32"} | CODES
    own = {
        **{"BATCH": 1, "LANES": 32 * launch.CODES_WARPS, "ROWS": launch.CODES_ROWS},
        **{"UNROLL": 1, "BIASED": False},
    }
    _, spilled = machine_code(
        *(codes_vectors_kernel, capability, launch.CODES_WARPS),
        *(types, constants | own),
    )
    assert spilled == 0
    types = {"ids": "*i64", "dense": "*bf16", **CODES}
    types |= dict.fromkeys(("begin", "count", "rows"), "i32")
    own = {"LANES": 32, "ROWS": launch.UNPACK_ROWS, "LOOKUP": False}
    _, spilled = machine_code(
        *(codes_rows_kernel, capability, launch.UNPACK_WARPS),
        *(types, constants | own),
    )
    assert spilled == 0
