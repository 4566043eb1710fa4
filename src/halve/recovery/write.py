"""Write the shards of a recovered model.

A tensor that was not trained is copied as it is stored, packed or not. A trained one
has the dtype of the input, and is packed if the input was. Every file is read back, and
the zeros of its matrices are compared with those of the input.
"""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from halve.checkpoint import Checkpoint, TensorInfo, Workspace, parse_note
from halve.errors import OutputError, TargetMissedError
from halve.layout import (
    Layout,
    PlannedMatrix,
    describe_storage,
    group_by_tensor,
    pack_tensor,
    whole_tensor,
)
from halve.models import Place
from halve.records import MatrixStorage
from halve.runtime.blockwise_model import BlockwiseModel


@dataclass(frozen=True)
class Output:
    """What is written.

    Attributes:
        model: The input.
        layout: Its matrices, and the files of the output.
        grids: Tensor -> the grid that the input's record names.
        values: Parameter -> its new values, in their stored dtype; none where the input
            was not improved.
    """

    model: BlockwiseModel
    layout: Layout
    grids: dict[str, Any]
    values: Mapping[str, Tensor]


@dataclass(frozen=True)
class _Note:
    """What the ledger holds for a shard."""

    matrices: tuple[MatrixStorage, ...]
    heads: tuple[MatrixStorage, ...]


def write_shards(output: Output, workspace: Workspace) -> _Note:
    """Write every shard that is missing from a workspace.

    Returns:
        How the matrices of the blocks are stored, and how quantized heads are.

    Raises:
        TargetMissedError: A file has other zeros than the input. Nothing is committed
            then.
        OutputError: A file cannot be written or read back.
    """
    writer = _Writer(output)
    notes = []
    for file in output.layout.shards:
        done = workspace.committed.get(file)
        note = done.note if done else writer.commit(workspace, file)
        notes.append(parse_note(workspace.folder, _Note, note))
    return _Note(
        tuple(each for note in notes for each in note.matrices),
        tuple(each for note in notes for each in note.heads),
    )


class _Writer:
    """Writes and checks one shard after another."""

    def __init__(self, output: Output) -> None:
        self.output = output
        self.checkpoint = output.model.checkpoint
        blocks = output.layout.blocks
        self.matrices = group_by_tensor(m for b in blocks for m in b.matrices)
        self.heads = {
            name: whole_tensor(self.checkpoint.tensors[name])
            for name in output.layout.heads
            if name in output.grids
        }
        self.changed = _changed(output)

    def commit(self, workspace: Workspace, file: str) -> dict[str, Any]:
        names = self.output.layout.shards[file]
        stored: dict[str, Tensor] = {}
        for name in names:
            stored |= self._stored(name)
        return workspace.commit(file, stored, lambda path: self._verify(names, path))

    def _stored(self, name: str) -> dict[str, Tensor]:
        """Return what a file holds for a tensor."""
        if name not in self.changed:
            return self.checkpoint.read_stored(name)
        original = self.checkpoint.read([name])[name]
        tensor = original.clone()
        for place, values in self.changed[name]:
            part = place.view(tensor)
            # Zeros keep their sign, so that every bit of them is the input's.
            keeps = (part == 0) & (values.to(part.device) == 0)
            part.copy_(torch.where(keeps, part, values.to(part.device)))
        if not self.checkpoint.tensors[name].is_packed:
            return {name: tensor}
        return pack_tensor(tensor, self.matrices[name], lambda *_: None)

    def _verify(self, names: tuple[str, ...], path: Path) -> dict[str, Any]:
        """Read a shard back and return its note."""
        written = Checkpoint.of_files([path])
        matrices: list[dict[str, Any]] = []
        heads: list[dict[str, Any]] = []
        for name in (n for n in names if n in self.matrices or n in self.heads):
            before = self.checkpoint.read([name])[name]
            after = written.read([name])[name]
            info = written.tensors[name]
            for planned in self.matrices.get(name, ()):
                rows = planned.as_rows(before), planned.as_rows(after)
                self._check(path, planned, *rows)
                matrices.append(self._storage(info, planned, rows[1]))
            if name in self.heads:
                head = self.heads[name]
                heads.append(self._storage(info, head, after))
        return {"matrices": matrices, "heads": heads}

    def _storage(
        self, info: TensorInfo, planned: PlannedMatrix, weight: Tensor
    ) -> dict[str, Any]:
        grid = self.output.grids.get(planned.name)
        return asdict(describe_storage(info, planned, weight, grid))

    def _check(
        self, path: Path, planned: PlannedMatrix, before: Tensor, after: Tensor
    ) -> None:
        if planned.tensor not in self.changed:
            if not torch.equal(before, after):
                raise OutputError(
                    f"{planned.name} in {path} is not what was written.",
                    "Check the disk; if it is healthy, report a bug in Halve.",
                )
        elif not torch.equal(before == 0, after == 0):
            raise TargetMissedError(
                f"{planned.name} in {path} has other zeros than the input.",
                "This is a bug in Halve; report it with the name of the model.",
            )


def _changed(output: Output) -> dict[str, list[tuple[Place, Tensor]]]:
    """Return tensor -> the places in it that change, and their new values."""
    changed: dict[str, list[tuple[Place, Tensor]]] = {}
    for name, values in output.values.items():
        place = output.model.places[name]
        changed.setdefault(place.tensor, []).append((place, values))
    return changed
