"""Pico models, written to disk once for all tests of a worker."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from tests.tables import save_pico

torch.set_num_threads(1)  # pytest-xdist has the other cores


@pytest.fixture(scope="session")
def pico(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """Return a function that gives the folder of a family's random model.

    Tests must not write to it.
    """
    made: dict[str, Path] = {}

    def folder(row: str, **options) -> Path:
        key = f"{row}-{options}"
        if key not in made:
            made[key] = save_pico(tmp_path_factory.mktemp(row), row, **options)
        return made[key]

    return folder


@pytest.fixture(scope="session")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a file of Python source, enough for small calibrations."""
    path = tmp_path_factory.mktemp("text") / "sources.txt"
    sources = sorted((Path(__file__).parents[1] / "src/halve").rglob("*.py"))
    path.write_text("\n".join(source.read_text("utf-8") for source in sources))
    return path
