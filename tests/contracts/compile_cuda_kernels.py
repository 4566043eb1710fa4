"""Compile the kernels of packed layers for a GPU, which is not needed for that.

    python -m tests.contracts.compile_cuda_kernels CAPABILITY

CAPABILITY is that of the GPU, such as 90. Prints a line of JSON for each variant: the
instructions of a warp, and the bytes that a thread spills to memory. Run as a program,
since a process that has imported triton for its interpreter cannot compile.
"""

import json
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any, NamedTuple

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from halve.runtime.cuda import launch
from halve.runtime.cuda.bitmask_kernels import unpack_kernel, vectors_kernel
from halve.runtime.cuda.codes_kernels import codes_rows_kernel, codes_vectors_kernel

_DUMP = Path(str(triton.__file__)).parent / "backends/nvidia/bin/cuobjdump"
KINDS = ("bf16", "fp16", "fp32")
# Columns of two products whose programs differ by `STEPS` steps and nothing else.
COLUMNS, STEPS, WARPS = (4096, 8192), 4, 4
_MATRIX = {"mask": "*u64", "offsets": "*u32", "starts": "*u16"}
_CODES = {"codes": "*u8", "scales": "*fp16", "zero_codes": "*u8", **_MATRIX}


class Variant(NamedTuple):
    """A kernel, the types of its arguments, its constants, and its warps."""

    kernel: Any
    types: dict[str, str]
    constants: dict[str, Any]
    warps: int


def vectors(kind: str, columns: int) -> Variant:
    """Return the product with one vector, whose steps are all written out."""
    types = {name: f"*{kind}" for name in ("x", "values", "bias", "y")}
    constants = {
        **{"BATCH": 1, "COLUMNS": columns, "LANES": 32 * WARPS},
        **{"ROWS": launch.PACKED_ROWS, "UNROLL": columns // (256 * WARPS)},
        **{"WHOLE": True, "BIASED": False, "INLINE": True},
    }
    return Variant(vectors_kernel, types | _MATRIX | {"rows": "i32"}, constants, WARPS)


def unpacking(kind: str) -> Variant:
    """Return the kernel that unpacks a bitmask matrix."""
    types = {"values": f"*{kind}", "dense": f"*{kind}", "begin": "i32", "end": "i32"}
    constants = {"COLUMNS": 11008, "LANES": 32, "ROWS": launch.UNPACK_ROWS}
    constants |= {"INLINE": True}
    return Variant(unpack_kernel, types | _MATRIX, constants, launch.UNPACK_WARPS)


def codes(bits: int, masked: bool) -> tuple[Variant, Variant]:
    """Return the product with codes, and the kernel that unpacks them."""
    shared = {
        **{"COLUMNS": 4096, "BITS": bits, "GROUP": 128, "ZEROS": masked},
        **{"MIDRISE": False, "MASKED": masked, "ALIGNED": not masked},
    }
    warps, rows = launch.CODES_WARPS, launch.CODES_ROWS
    types = {"x": "*bf16", "bias": "*bf16", "y": "*bf16", "rows": "i32"} | _CODES
    own = {"BATCH": 1, "LANES": 32 * warps, "ROWS": rows, "UNROLL": 1, "BIASED": False}
    product = Variant(codes_vectors_kernel, types, shared | own, warps)
    types = {"ids": "*i64", "dense": "*bf16", **_CODES}
    types |= dict.fromkeys(("begin", "count", "rows"), "i32")
    own = {"LANES": 32, "ROWS": launch.UNPACK_ROWS, "LOOKUP": False}
    unpacked = Variant(codes_rows_kernel, types, shared | own, launch.UNPACK_WARPS)
    return product, unpacked


def variants() -> dict[str, Variant]:
    """Return all variants by name."""
    found = {f"vectors {k} {c}": vectors(k, c) for k in KINDS for c in COLUMNS}
    found |= {f"unpacking {kind}": unpacking(kind) for kind in KINDS}
    for bits, masked in ((8, False), (4, False), (3, True)):
        product, unpacked = codes(bits, masked)
        found |= {f"int{bits} vectors": product, f"int{bits} rows": unpacked}
    return found


def compiled(variant: Variant, capability: int) -> dict[str, int]:
    """Return what a kernel takes of a GPU of a compute capability.

    Addresses and numbers are multiples of 16, as they are of most models.
    """
    kernel, types, constants, warps = variant
    aligned = {
        (kernel.arg_names.index(name),): [["tt.divisibility", 16]] for name in types
    }
    signature = types | dict.fromkeys(constants, "constexpr")
    source = ASTSource(kernel, signature, constants, aligned)
    target = GPUTarget("cuda", capability, 32)
    code = triton.compile(source, target=target, options={"num_warps": warps})
    return _count(code.asm["cubin"])


def _count(cubin: bytes) -> dict[str, int]:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "kernel.cubin"
        path.write_bytes(cubin)
        listing, usage = (
            subprocess.run(
                [_DUMP, option, path], capture_output=True, text=True, check=True
            ).stdout
            for option in ("--dump-sass", "--dump-resource-usage")
        )
    code = re.findall(r"/\*[0-9a-f]{4,}\*/\s+(.*?);", listing)
    last = max(i for i, line in enumerate(code) if "EXIT" in line)
    memory = re.findall(r"(?:STACK|LOCAL):(\d+)", usage)
    return {"instructions": last + 1, "spilled": sum(map(int, memory))}


if __name__ == "__main__":
    for name, variant in variants().items():
        found = {"variant": name} | compiled(variant, int(sys.argv[1]))
        print(json.dumps(found))  # noqa: T201
