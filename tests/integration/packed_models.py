"""What tests of packed models share: how to prune quickly, and to change a matrix."""

import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path

from safetensors.torch import load_file, save_file
from torch import Tensor

import halve

# Magnitude needs no text, and the solver does not matter here.
prune = partial(halve.prune, solver="magnitude", device="cpu")
# The matrix that `change_matrix` changes.
CHANGED = "model.layers.1.mlp.up_proj.weight"


def change_matrix(
    source: Path, folder: Path, change: Callable[[Tensor], Tensor]
) -> Path:
    """Copy a model of safetensors, one tensor changed; return the folder."""
    shutil.copytree(source, folder)
    for path in folder.glob("*.safetensors"):
        tensors = load_file(path)
        if CHANGED in tensors:
            tensors[CHANGED] = change(tensors[CHANGED])
            save_file(tensors, path, {"format": "pt"})
    return folder
