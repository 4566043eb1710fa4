"""Fixtures of the integration tests."""

from pathlib import Path

import pytest
import torch

import halve
from tests.integration.packed_models import prune


@pytest.fixture(scope="session")
def made(pico, tmp_path_factory):
    """Return a function that returns dense, pruned and packed folders of a family.

    Tests must not write to them.
    """
    homes: dict[str, Path] = {}

    def folders(row: str = "llama", sparsity: str = "50%", **options):
        options = {"dtype": torch.bfloat16} | options
        key = f"{row}-{sparsity}-{options}"
        if key not in homes:
            homes[key] = tmp_path_factory.mktemp(row)
            prune(pico(row, **options), homes[key] / "pruned", sparsity=sparsity)
            halve.pack(homes[key] / "pruned", homes[key] / "packed")
        return pico(row, **options), homes[key] / "pruned", homes[key] / "packed"

    return folders
