"""What is done otherwise on a GPU, switched on for the CPU by a MonkeyPatch."""

from dataclasses import replace
from pathlib import Path
from typing import Any

from pytest import MonkeyPatch

from halve.pruning import loop, run
from halve.pruning.observe import collect
from halve.runtime import stream
from halve.runtime.blockwise_model import BlockwiseModel

# Many small batches, of which some are held out.
OPTIONS: dict[str, Any] = {"samples": 40, "seq_len": 64, "device": "cpu"}


def check_later(patch: MonkeyPatch) -> None:
    for module in (stream, collect):
        patch.setattr(module, "checks_later", lambda device: True)


def copy_beside(patch: MonkeyPatch) -> None:
    patch.setattr(stream, "copies_beside", lambda hidden, device: True)


def overlap_files(patch: MonkeyPatch) -> None:
    for module in (run, loop):
        patch.setattr(module, "overlaps_files", lambda run: run.overlaps)


def opened(folder: Path, **changes) -> BlockwiseModel:
    return replace(BlockwiseModel.open(folder, "cpu"), **changes)
