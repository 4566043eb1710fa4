"""A checkpoint rewritten shard by shard, packed or dense, and nothing else changed."""

import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from halve.checkpoint import (
    Checkpoint,
    TensorInfo,
    Workspace,
    check_space,
    is_finished,
    open_workspace,
    output_path,
    parse_note,
    read_record,
    resolve_model,
    source_record,
)
from halve.errors import HalveError, OutputError, QuantizationError
from halve.formats import quantization_config, store
from halve.grids import QuantScheme, grid_shortfall
from halve.layout import Layout, make_layout
from halve.models import Matrix, build_meta_model
from halve.options import PackOptions
from halve.patterns import describe
from halve.records import (
    MatrixStorage,
    PackRecord,
    Progress,
    now,
    recorded_grids,
    versions,
)


def rewrite_model(
    model: str | Path, out: str | Path, options: PackOptions
) -> PackRecord:
    """Rewrite a model; see `halve.pack` and `halve.unpack` for the contracts."""
    started = time.monotonic()
    source = resolve_model(model)
    out = output_path(out, source)
    if options.kind == "unpack":
        _check_packed(source)
    meta_model = build_meta_model(source, options.trust_remote_code)
    layout = make_layout(Checkpoint.open(source), meta_model)
    identity = {
        "verb": options.kind,
        "format": quantization_config()["version"],
        "positive_zeros": options.positive_zeros,
        "sources": layout.sources,
    }
    if is_finished(out, identity):
        return read_record(out, PackRecord.from_json)
    check_space(out, layout.output_bytes)
    with open_workspace(out, identity) as workspace:
        if workspace.is_complete:
            workspace.publish()
            return read_record(out, PackRecord.from_json)
        matrices = _Rewriter(source, layout, workspace, options).run()
        _check_gain(model, matrices, workspace, options)
        files = workspace.add_side_files(source, _quantization(options))
        record = PackRecord(
            kind=options.kind,
            versions=versions(),
            identity=identity,
            matrices=matrices,
            shards={file: workspace.committed[file].sha256 for file in layout.shards},
            source=source_record(source),
            seconds=time.monotonic() - started,
            finished=now(),
            files=files,
        )
        workspace.finish(record.to_json())
    return record


def _quantization(options: PackOptions) -> dict[str, Any] | None:
    """Return the `quantization_config` of the new config.json; None where dense."""
    return quantization_config() if options.kind == "pack" else None


def _check_packed(source: Path) -> None:
    if not any(info.parts for info in Checkpoint.open(source).tensors.values()):
        raise HalveError(
            f"Nothing in {source} is packed.", "Use the model as it is; it is dense."
        )


def _check_gain(
    model: str | Path,
    matrices: tuple[MatrixStorage, ...],
    workspace: Workspace,
    options: PackOptions,
) -> None:
    """Refuse to have packed nothing at all."""
    if options.kind != "pack" or any(matrix.packed for matrix in matrices):
        return
    workspace.discard()
    sparsest = max(matrix.sparsity for matrix in matrices)
    raise HalveError(
        f"No matrix of {model} would get smaller: the sparsest of {len(matrices)} has "
        f"{100 * sparsest:.1f}% zeros, and each weight costs a bit more when packed.",
        "Prune the model first, with `halve prune`; if its zeros are minus zeros, pass "
        "--positive-zeros.",
    )


@dataclass(frozen=True)
class _Note:
    """What the ledger holds for a file."""

    matrices: tuple[MatrixStorage, ...]


class _Rewriter:
    """The loop over the files of an output, each committed before the next."""

    def __init__(
        self, source: Path, layout: Layout, workspace: Workspace, options: PackOptions
    ) -> None:
        self.checkpoint = Checkpoint.open(source)
        self.layout = layout
        self.workspace = workspace
        self.options = options
        self.grids = recorded_grids(source_record(source))
        self.matrices: dict[str, Matrix] = {
            planned.tensor: planned.matrix
            for block in layout.blocks
            for planned in block.matrices
        }

    def run(self) -> tuple[MatrixStorage, ...]:
        """Do every file that is not done; return how each matrix is stored."""
        stored: list[MatrixStorage] = []
        for number, file in enumerate(self.layout.shards):
            self._report(number)
            done = self.workspace.committed.get(file)
            note = done.note if done else self._file(file)
            stored += parse_note(self.workspace.folder, _Note, note).matrices
        return tuple(stored)

    def _report(self, number: int) -> None:
        phase = f"{self.options.kind}ing"
        self.options.progress(Progress(number, len(self.layout.shards), phase))

    def _file(self, file: str) -> dict[str, Any]:
        dense = self.checkpoint.read(self.layout.shards[file])
        if self.options.positive_zeros:
            dense |= {name: dense[name] + 0 for name in dense if name in self.matrices}
        tensors: dict[str, Tensor] = {}
        for name, tensor in dense.items():
            tensors |= self._stored(name, tensor)
        return self.workspace.commit(
            file, tensors, lambda path: self._verify(dense, path)
        )

    def _stored(self, name: str, tensor: Tensor) -> dict[str, Tensor]:
        if self.options.kind == "pack" and name in self.matrices:
            return store(name, tensor, self.matrices[name].transposed)
        return {name: tensor}

    def _verify(self, dense: dict[str, Tensor], path: Path) -> dict[str, Any]:
        """Read the file again, bit for bit; return how its matrices are stored."""
        written = Checkpoint.of_files([path])
        stored: list[dict[str, Any]] = []
        for name, tensor in dense.items():
            if not _same_bits(written.read([name])[name], tensor):
                raise OutputError(
                    f"{name} in {path} is not what was written.",
                    "Check the disk; if it is sound, report a defect of Halve.",
                )
            if name in self.matrices:
                stored.append(asdict(self._storage(written.tensors[name], tensor)))
        return {"matrices": stored}

    def _storage(self, info: TensorInfo, dense: Tensor) -> MatrixStorage:
        rows, columns = self.matrices[info.name].shape
        weight = self.matrices[info.name].as_rows(dense)
        return MatrixStorage(
            tensor=info.name,
            rows=rows,
            columns=columns,
            sparsity=float((dense == 0).double().mean()),
            minus_zeros=int(((dense == 0) & dense.signbit()).sum()),
            dense_bytes=info.nbytes,
            stored_bytes=info.stored_bytes,
            packed=bool(info.parts),
            pattern=describe(weight),
            grid=self._grid(info.name, weight),
        )

    def _grid(self, name: str, weight: Tensor) -> dict[str, Any] | None:
        """Return the grid that the input names, if the matrix does lie on it."""
        try:
            grid = QuantScheme(**self.grids[name])
        except (LookupError, TypeError, QuantizationError):
            return None
        return None if grid_shortfall(grid, weight) else asdict(grid)


def _same_bits(a: Tensor, b: Tensor) -> bool:
    return a.dtype == b.dtype and torch.equal(_octets(a), _octets(b))


def _octets(tensor: Tensor) -> Tensor:
    return tensor.contiguous().flatten().view(torch.uint8)
