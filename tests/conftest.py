"""Fixtures: tiny models, saved once for all tests of a worker, and a text."""

import lzma
import os
import tomllib
from collections.abc import Callable
from pathlib import Path

# Triton decides when it is imported whether kernels run in its interpreter, on the CPU.
os.environ.setdefault("TRITON_INTERPRET", "1")
# SciPy's OpenBLAS decides when it is loaded how many threads wait for work, and busily.
# With one for each core, those of all workers take most of the processor's time, and
# commands that tests start inherit it.
os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest
import torch

from tests.tables import save_pico

ROOT = Path(__file__).parents[1]
PYTHON = ROOT / "tests/data/python.txt.xz"
# Bytes of it that `text` has. Tokenizing all of them takes longer than pruning a tiny
# model; these are cut into two pieces when they are tokenized, as long texts are.
ENOUGH = 80_000

torch.set_num_threads(1)  # pytest-xdist uses the other cores
# Waiting for the disk took a fifth of the suite's time, and no output of a test has to
# survive a power failure: `test_write_failures` simulates one from the calls of
# `disk.sync`, and `test_other_systems` sees that these reach the operating system.
os.fsync = lambda descriptor: None


@pytest.fixture(scope="session")
def pico(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """Return a function from a row of `tables` to the folder of its random model.

    The folder is shared, so tests must not write to it.
    """
    folders: dict[str, Path] = {}

    def folder(row: str, **options) -> Path:
        key = f"{row}-{options}"
        if key not in folders:
            folders[key] = save_pico(tmp_path_factory.mktemp(row), row, **options)
        return folders[key]

    return folder


@pytest.fixture(scope="session")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a file of Python source, enough for small calibrations.

    It is Halve's source as it was once: figures of tests do not move with the code.
    """
    path = tmp_path_factory.mktemp("text") / "python.txt"
    path.write_bytes(lzma.decompress(PYTHON.read_bytes())[:ENOUGH])
    return path


@pytest.fixture(scope="session")
def installed(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Return an environment for processes that find Halve's entry points.

    They are those of pyproject.toml, whether this Halve is installed or not.
    """
    folder = tmp_path_factory.mktemp("installed")
    metadata = folder / "halve-0.dist-info"
    metadata.mkdir()
    (metadata / "METADATA").write_text("Name: halve\nVersion: 0\n")
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    lines = []
    for group, points in project["entry-points"].items():
        lines += [f"[{group}]", *(f"{name} = {at}" for name, at in points.items())]
    (metadata / "entry_points.txt").write_text("\n".join(lines))
    paths = [str(folder), str(ROOT / "src"), os.environ.get("PYTHONPATH", "")]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, paths))}
    environment.pop("TORCH_DEVICE_BACKEND_AUTOLOAD", None)
    return environment
