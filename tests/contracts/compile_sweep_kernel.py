"""Compile the kernel of the sweep for some GPUs, none of which is needed for that.

Prints a line of JSON for each variant: registers of a thread, bytes that it spills to
memory, and how many divisions are not rounded to nearest. Run as a program, since a
process that has imported triton for its interpreter cannot compile.
"""

import json
import re
import subprocess
import tempfile
from pathlib import Path

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from halve.grids import QuantScheme
from halve.patterns import NM
from halve.solvers.sweep_kernel import BlockKernel, _fix_columns

_DUMP = Path(str(triton.__file__)).parent / "backends/nvidia/bin/cuobjdump"
_POINTERS = ("values", "before", "finals", "coefficients", "errors", "scale", "zero")
_SIZES = ("rows", "coefficient_stride", "grid_groups", "first")
_CAPABILITIES = (80, 90)
VARIANTS = {
    "given": BlockKernel(128, None, None),
    "2:4": BlockKernel(128, NM(2, 4), None),
    "int4": BlockKernel(128, None, QuantScheme(4)),
    "2:4, int4": BlockKernel(128, NM(2, 4), QuantScheme(4, symmetric=False)),
    "int2, midrise": BlockKernel(128, None, QuantScheme(2, midrise=True)),
    "descent": BlockKernel(128, None, QuantScheme(4), True),
    "ragged": BlockKernel(100, None, QuantScheme(4)),
    "large": BlockKernel(1024, NM(2, 4), QuantScheme(4)),
}


def compiled(kernel: BlockKernel, capability: int) -> dict[str, int]:
    """Return what a kernel takes of a GPU of a compute capability."""
    types = dict.fromkeys(_POINTERS, "*fp32") | {"pruned": "*u8"}
    types |= dict.fromkeys(_SIZES, "i32") | dict.fromkeys(kernel.constants, "constexpr")
    names = vars(_fix_columns)["arg_names"]
    source = ASTSource(
        _fix_columns,
        signature={name: types[name] for name in names},
        constexprs={(names.index(n),): v for n, v in kernel.constants.items()},
        attrs={
            (names.index(name),): [["tt.divisibility", 16]]
            for name in (*_POINTERS, "pruned", "rows", "coefficient_stride")
        },
    )
    target = GPUTarget("cuda", capability, 32)
    options = {"num_warps": kernel.warps}
    code = triton.compile(source, target=target, options=options).asm
    usage = _resources(code["cubin"])
    return {
        "registers": int(usage["REG"]),
        "spilled": int(usage["STACK"]) + int(usage["LOCAL"]),
        "inexact": len(re.findall(r"div\.(full|approx)", code["ptx"])),
    }


def _resources(cubin: bytes) -> dict[str, str]:
    """Return what cuobjdump tells of a kernel: registers, stack, local memory."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "kernel.cubin"
        path.write_bytes(cubin)
        command = [_DUMP, "--dump-resource-usage", path]
        told = subprocess.run(command, capture_output=True, text=True, check=True)
    return dict(re.findall(r"(REG|STACK|LOCAL):(\d+)", told.stdout))


if __name__ == "__main__":
    for name, kernel in VARIANTS.items():
        for capability in _CAPABILITIES:
            found = {"variant": name, "capability": capability}
            print(json.dumps(found | compiled(kernel, capability)))  # noqa: T201
