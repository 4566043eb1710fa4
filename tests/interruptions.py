"""Runs that stop at a chosen point, and what their outputs are compared by."""

from collections.abc import Callable
from hashlib import sha256
from pathlib import Path
from typing import Any

from pytest import MonkeyPatch

_ALLOCATED = {"sparsity": 0.6371, "solver": "sparsegpt", "allocation": "error"}
# Name -> options of a run to stop, one row for each way of pruning.
STOPPED: dict[str, dict[str, Any]] = {
    "magnitude": {"solver": "magnitude"},
    "sparsegpt": {"solver": "sparsegpt"},
    "refined": {"solver": "auto", "refine": True, "epochs": 2},
    "allocated": _ALLOCATED,
    "allocated, packed": _ALLOCATED | {"packed": True},
    "refined, dense targets": {"solver": "magnitude", "refine": True, "epochs": 1},
}


class Stopped(BaseException):
    """Stands for anything that ends a process; no handler catches it."""


def digests(folder: Path) -> dict[str, str]:
    """Return file name -> SHA-256, without the record, which contains times."""
    return {
        str(path.relative_to(folder)): sha256(path.read_bytes()).hexdigest()
        for path in folder.rglob("*")
        if path.name != "halve.json" and path.is_file()
    }


def stop_at(count: int) -> Callable[..., None]:
    """Return a progress callback that raises Stopped at its count-th call."""
    calls = []

    def progress(step):
        calls.append(step)
        if len(calls) == count:
            raise Stopped

    return progress


def stop_at_rename(patch: MonkeyPatch, count: int) -> Callable[[], bool]:
    """Raise Stopped before the count-th rename that completes a file or folder.

    Returns:
        A function that says whether there were fewer renames than that.
    """
    calls = []

    def stop_or(real):
        def rename(path, target):
            calls.append(path)
            if len(calls) == count:
                raise Stopped
            return real(path, target)

        return rename

    patch.setattr(Path, "replace", stop_or(Path.replace))
    patch.setattr(Path, "rename", stop_or(Path.rename))
    return lambda: len(calls) < count
