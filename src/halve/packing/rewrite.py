"""Rewrites a checkpoint shard by shard, packed or dense, and changes nothing else."""

import time
from collections.abc import Callable
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
from halve.errors import HalveError, OutputError
from halve.formats import VERSION, quantization_config, store
from halve.grids import grid_shortfall, recorded_scheme, recover_quant_params
from halve.layout import Layout, make_layout, refuse_packed_experts
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


@dataclass(frozen=True)
class _Rewriting:
    """What distinguishes packing from unpacking.

    Attributes:
        kind: Verb in the record and in the identity of the output.
        phase: The verb in reports of progress.
        packs: Whether matrices are stored packed where that is smaller.
        check: (model, how its matrices are stored) -> raises HalveError if the output
            is of no use.
    """

    kind: str
    phase: str
    packs: bool
    check: Callable[[str | Path, tuple[MatrixStorage, ...]], None]


def pack_model(model: str | Path, out: str | Path, options: PackOptions) -> PackRecord:
    """Pack a model; see `halve.pack` for the contract."""
    packing = _Rewriting("pack", "packing", packs=True, check=_check_gain)
    return _rewrite(model, out, options, packing)


def unpack_model(
    model: str | Path, out: str | Path, options: PackOptions
) -> PackRecord:
    """Unpack a model; see `halve.unpack` for the contract."""
    source = resolve_model(model)
    output_path(out, source)  # an invalid output folder is reported first
    if not Checkpoint.open(source).is_packed:
        raise HalveError(
            f"Nothing in {source} is packed.", "Use the model as it is; it is dense."
        )
    unpacking = _Rewriting(
        kind="unpack",
        phase="unpacking",
        packs=False,
        check=lambda model, matrices: None,
    )
    return _rewrite(model, out, options, unpacking)


def _check_gain(model: str | Path, matrices: tuple[MatrixStorage, ...]) -> None:
    """Raise HalveError if no matrix is smaller packed."""
    if any(matrix.packed for matrix in matrices):
        return
    sparsest = max(matrix.sparsity for matrix in matrices)
    raise HalveError(
        f"No matrix of {model} would get smaller: the sparsest of {len(matrices)} has "
        f"{100 * sparsest:.1f}% zeros, and each weight costs a bit more when packed.",
        "Prune the model first, with `halve prune`; if its zeros are minus zeros, pass "
        "--positive-zeros.",
    )


def _rewrite(
    model: str | Path, out: str | Path, options: PackOptions, rewriting: _Rewriting
) -> PackRecord:
    started = time.monotonic()
    source = resolve_model(model)
    out = output_path(out, source)
    meta_model = build_meta_model(source, options.trust_remote_code)
    layout = make_layout(Checkpoint.open(source), meta_model)
    refuse_packed_experts(layout)
    identity = {
        "verb": rewriting.kind,
        "format": VERSION,
        "positive_zeros": options.positive_zeros,
        "sources": layout.sources,
    }
    if is_finished(out, identity):
        return read_record(out, PackRecord.from_json)
    provenance = source_record(source)  # refused, if at all, before a folder exists
    check_space(out, layout.output_bytes)
    with open_workspace(out, identity) as workspace:
        if workspace.is_complete:
            workspace.publish()
            return read_record(out, PackRecord.from_json)
        grids = recorded_grids(provenance)
        shards = _Shards(source, layout, workspace, options, rewriting, grids)
        matrices, heads = shards.rewrite()
        try:
            rewriting.check(model, matrices)
        except HalveError:
            workspace.discard()
            raise
        packed = quantization_config(workspace.formats) if rewriting.packs else None
        record = PackRecord(
            kind=rewriting.kind,
            versions=versions(),
            identity=identity,
            matrices=matrices,
            shards={file: workspace.committed[file].sha256 for file in layout.shards},
            source=provenance,
            files=workspace.add_side_files(source, packed),
            heads=heads,
            seconds=time.monotonic() - started,
            finished=now(),
        )
        workspace.finish(record.to_json())
    return record


@dataclass(frozen=True)
class _Note:
    """What the ledger holds for a shard."""

    matrices: tuple[MatrixStorage, ...]
    heads: tuple[MatrixStorage, ...]


class _Shards:
    """The loop over the shards of an output; each is committed before the next."""

    def __init__(
        self,
        source: Path,
        layout: Layout,
        workspace: Workspace,
        options: PackOptions,
        rewriting: _Rewriting,
        grids: dict[str, Any],
    ) -> None:
        self.checkpoint = Checkpoint(source, layout.tensors)
        self.layout = layout
        self.workspace = workspace
        self.options = options
        self.rewriting = rewriting
        self.grids = grids
        self.heads = [name for name in layout.heads if name in grids]
        self.matrices: dict[str, Matrix] = {
            planned.tensor: planned.matrix
            for block in layout.blocks
            for planned in block.matrices
        }

    def rewrite(self) -> tuple[tuple[MatrixStorage, ...], tuple[MatrixStorage, ...]]:
        """Write every shard that is missing.

        Returns:
            How the matrices of the blocks are stored, and how embedding and head are.
        """
        matrices: list[MatrixStorage] = []
        heads: list[MatrixStorage] = []
        for number, file in enumerate(self.layout.shards):
            self._report(number)
            done = self.workspace.committed.get(file)
            note = done.note if done else self._commit(file)
            parsed = parse_note(self.workspace.folder, _Note, note)
            matrices += parsed.matrices
            heads += parsed.heads
        return tuple(matrices), tuple(heads)

    def _report(self, number: int) -> None:
        shards = len(self.layout.shards)
        self.options.progress(Progress(number, shards, self.rewriting.phase))

    def _commit(self, file: str) -> dict[str, Any]:
        """Write one shard; return its note for the ledger."""
        dense = self.checkpoint.read(self.layout.shards[file])
        if self.options.positive_zeros:
            # -0.0 + 0 is +0.0; every other number stays as it is.
            dense |= {name: dense[name] + 0 for name in dense if name in self.matrices}
        tensors: dict[str, Tensor] = {}
        for name, tensor in dense.items():
            tensors |= self._stored(name, tensor)
        return self.workspace.commit(
            file, tensors, lambda path: self._verify(dense, path)
        )

    def _stored(self, name: str, tensor: Tensor) -> dict[str, Tensor]:
        known = name in self.matrices or name in self.heads
        if not known or not self.rewriting.packs:
            return {name: tensor}
        scheme = recorded_scheme(self.grids.get(name))
        weight = self._as_rows(name, tensor)
        params = scheme and recover_quant_params(scheme, weight)
        matrix = self.matrices.get(name)
        return store(name, tensor, matrix is not None and matrix.transposed, params)

    def _as_rows(self, name: str, tensor: Tensor) -> Tensor:
        matrix = self.matrices.get(name)
        return tensor if matrix is None else matrix.as_rows(tensor)

    def _verify(self, dense: dict[str, Tensor], path: Path) -> dict[str, Any]:
        """Read a shard back and compare it bit for bit; return its note."""
        written = Checkpoint.of_files([path])
        matrices: list[dict[str, Any]] = []
        heads: list[dict[str, Any]] = []
        for name, tensor in dense.items():
            if not _same_bits(written.read([name])[name], tensor):
                raise OutputError(
                    f"{name} in {path} is not what was written.",
                    "Check the disk; if it is healthy, report a bug in Halve.",
                )
            if name in self.matrices or name in self.heads:
                record = asdict(self._storage(written.tensors[name], tensor))
                (matrices if name in self.matrices else heads).append(record)
        return {"matrices": matrices, "heads": heads}

    def _storage(self, info: TensorInfo, dense: Tensor) -> MatrixStorage:
        weight = self._as_rows(info.name, dense)
        rows, columns = weight.shape
        return MatrixStorage(
            tensor=info.name,
            rows=rows,
            columns=columns,
            sparsity=float((dense == 0).double().mean()),
            minus_zeros=int(((dense == 0) & dense.signbit()).sum()),
            dense_bytes=info.nbytes,
            stored_bytes=info.stored_bytes,
            packed=info.format is not None,
            pattern=describe(weight),
            grid=self._grid(info.name, weight),
        )

    def _grid(self, name: str, weight: Tensor) -> dict[str, Any] | None:
        """Return the grid that the input records, if the matrix lies on it."""
        scheme = recorded_scheme(self.grids.get(name))
        lies = scheme is not None and grid_shortfall(scheme, weight) is None
        return asdict(scheme) if scheme is not None and lies else None


def _same_bits(a: Tensor, b: Tensor) -> bool:
    return a.dtype == b.dtype and torch.equal(_octets(a), _octets(b))


def _octets(tensor: Tensor) -> Tensor:
    return tensor.contiguous().flatten().view(torch.uint8)
