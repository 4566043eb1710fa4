"""The CUDA C++ kernel for a few vectors, on a CPU that emulates a GPU."""

import ctypes
import re
import shutil
import subprocess
from importlib.resources import files
from pathlib import Path

import pytest
import torch

from halve.formats.bitmask import pack
from halve.runtime.cuda import few
from halve.runtime.cuda.nvrtc import Argument, NvrtcError, c_value
from halve.runtime.cuda.side_index import tile_kept, with_slack, word_starts

EMULATOR = Path(__file__).parents[1] / "emulator"
LIMITS = {torch.bfloat16: 4e-3, torch.float16: 5e-4}
# Instructions of a warp for 32 weights.
MOST_INSTRUCTIONS = 12
# Rows, columns, vectors, share that is stored, multiprocessors.
PRODUCTS = [
    (16, 256, 8, 0.5, 1),  # one tile
    (50, 700, 3, 0.5, 2),  # ragged tiles, several for each block
    (33, 600, 16, 0.5, 1),
    (70, 64, 1, 0.5, 2),
    (5, 70, 2, 0.9, 1),
    (40, 530, 5, 0.02, 3),
    (20, 520, 9, 1.0, 1),
    (1, 2, 1, 1.0, 1),
]


class EmulatedKernel:
    """A kernel that runs on the CPU, in the place of one of a GPU."""

    def __init__(self, function) -> None:
        self._function = function

    def launch(
        self,
        grid: tuple[int, int],
        threads: int,
        arguments: list[Argument],
        shared_memory: int = 0,
    ) -> None:
        self._function(*grid, threads, *map(c_value, arguments))


@pytest.fixture(scope="session")
def build(tmp_path_factory):
    """Return a function that compiles the kernels for the emulator, once each."""
    if not shutil.which("c++"):
        pytest.skip("needs a C++ compiler")
    folder = tmp_path_factory.mktemp("emulator")

    def kernels(_, dtype, n_tiles):
        library = folder / f"few{n_tiles}{dtype}.so"
        if not library.exists():
            source = str(files("halve.runtime.cuda"))
            flags = ["-std=c++20", "-O1", "-shared", "-fPIC", "-pthread"]
            flags += ["-Wno-unknown-pragmas", f"-I{source}", f"-DN_TILES={n_tiles}"]
            flags += [f"-DHALF={int(dtype == torch.float16)}"]
            command = ["c++", *flags, "-o", library, EMULATOR / "few.cpp"]
            subprocess.run(command, check=True, capture_output=True)
        loaded = ctypes.CDLL(str(library))
        return EmulatedKernel(loaded.run_few), EmulatedKernel(loaded.run_few_sum)

    return kernels


# The most warps of a block differ, so that columns are divided among blocks, too.
CASES = [
    (product, dtype, warps)
    for product, warps in zip(PRODUCTS, [20, 2, 1, 20, 2, 1, 2, 20], strict=True)
    for dtype in LIMITS
]


@pytest.mark.parametrize(("product", "dtype", "warps"), CASES, ids=str)
def test_a_product_is_that_of_the_dense_matrix(
    product, dtype, warps, build, monkeypatch
):
    rows, columns, batch, kept, multiprocessors = product
    monkeypatch.setattr(few, "_kernels", build)
    monkeypatch.setattr(few, "_gpu", lambda device: (multiprocessors, 227 * 1024))
    monkeypatch.setattr(few, "MAX_WARPS", {1: warps, 2: warps})
    torch.manual_seed(0)
    weight = torch.randn(rows, columns).masked_fill(torch.rand(rows, columns) > kept, 0)
    if rows > 2:
        weight[1], weight[2] = 0, torch.randn(columns)
    weight = weight.to(dtype)
    packed = pack(weight)
    starts = word_starts(packed.mask)
    kept = tile_kept(packed.mask)
    values = with_slack(packed.values)
    assert few.can_multiply(values, columns, kept)
    # A view from an odd number on, which the kernel cannot load in pairs.
    x = torch.randn(batch * columns + 1).to(dtype)[1:].view(batch, columns)
    bias = torch.randn(rows).to(dtype)
    y = torch.full((batch, rows), torch.nan, dtype=dtype)
    parts = (values, packed.mask, packed.offsets, starts)
    few.multiply_few(x, parts, kept, bias, y)
    wanted = x.double() @ weight.double().T + bias.double()
    assert (y.double() - wanted).norm() <= LIMITS[dtype] * wanted.norm()


@pytest.mark.parametrize("dtype", LIMITS)
@pytest.mark.parametrize("n_tiles", [1, 2])
def test_the_check_before_the_first_product_passes(n_tiles, dtype, build, monkeypatch):
    monkeypatch.setattr(few, "_kernels", build)
    monkeypatch.setattr(few, "_gpu", lambda device: (4, 227 * 1024))
    assert few.find_fault(torch.device("cpu"), dtype, n_tiles) is None


@pytest.mark.parametrize("n_tiles", [1, 2])
@pytest.mark.parametrize("architecture", ["sm_80", "sm_90"])
def test_a_weight_costs_few_instructions(architecture, n_tiles, tmp_path):
    pytest.importorskip("triton", reason="its package has the disassembler")
    try:
        cubin = few.compile_few(architecture, torch.bfloat16, n_tiles)
    except NvrtcError as error:
        pytest.skip(str(error))
    code, spilled = _disassemble(cubin, tmp_path)
    steps = [i for i, line in enumerate(code) if "HMMA" in line][::n_tiles]
    assert len(steps) == 16  # of 16 columns, in a tile of 256
    # A lane has 8 of the weights of a step.
    assert (steps[-1] - steps[0]) / (15 * 8) <= MOST_INSTRUCTIONS
    assert spilled == 0


def _disassemble(cubin: bytes, folder: Path) -> tuple[list[str], int]:
    """Return the instructions of the kernel, and the bytes that it spills."""
    import triton  # noqa: PLC0415

    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    path = folder / "few.cubin"
    path.write_bytes(cubin)
    listing, usage = (
        subprocess.run([tool, option, path], capture_output=True, text=True, check=True)
        for option in ("--dump-sass", "--dump-resource-usage")
    )
    (code,) = re.findall(
        r"Function : halve_few\n(.*?)(?:Function :|\Z)", listing.stdout, re.S
    )
    (memory,) = re.findall(r"halve_few:\n.*?STACK:(\d+)", usage.stdout)
    return re.findall(r"/\*[0-9a-f]{4,}\*/\s+(.*?);", code), int(memory)
