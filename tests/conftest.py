"""Fixtures: tiny models, saved once for all tests of a worker, and a text."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from tests.tables import save_pico

torch.set_num_threads(1)  # pytest-xdist uses the other cores


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
    """Return a file with the Python source of Halve, enough for small calibrations."""
    path = tmp_path_factory.mktemp("text") / "sources.txt"
    sources = sorted((Path(__file__).parents[1] / "src/halve").rglob("*.py"))
    path.write_text("\n".join(source.read_text("utf-8") for source in sources))
    return path
