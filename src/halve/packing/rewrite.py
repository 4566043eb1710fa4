"""Rewrites a checkpoint shard by shard, packed or dense, and changes nothing else."""

import time
from collections.abc import Iterable
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
    find_side_files,
    is_finished,
    open_workspace,
    output_path,
    parse_note,
    read_record,
    resolve_model,
    source_record,
)
from halve.errors import HalveError, OutputError
from halve.formats import VERSION, packed_size, quantization_config, store
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
    """

    kind: str
    phase: str
    packs: bool


def pack_model(model: str | Path, out: str | Path, options: PackOptions) -> PackRecord:
    """Pack a model; see `halve.pack` for the contract."""
    packing = _Rewriting("pack", "packing", packs=True)
    return _rewrite(model, out, options, packing)


def unpack_model(
    model: str | Path, out: str | Path, options: PackOptions
) -> PackRecord:
    """Unpack a model; see `halve.unpack` for the contract."""
    source = resolve_model(model)
    output_path(out, source)  # an invalid output folder is reported first
    if Checkpoint.open(source).is_dense:
        raise HalveError(
            f"Nothing in {source} is packed or quantized.",
            "Use the model as it is; it is dense.",
        )
    unpacking = _Rewriting("unpack", "unpacking", packs=False)
    return _rewrite(model, out, options, unpacking)


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
    # Refused, if they cannot be read or copied, before a folder exists.
    provenance = source_record(source)
    find_side_files(source)
    check_space(out, layout.output_bytes)
    conversion = _Conversion(
        source, layout, options, rewriting, recorded_grids(provenance)
    )
    if rewriting.packs:
        conversion.check_gain(model)
    with open_workspace(out, identity) as workspace:
        if workspace.is_complete:
            workspace.publish()
            return read_record(out, PackRecord.from_json)
        matrices, heads = conversion.rewrite(workspace)
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


class _Conversion:
    """The loop over the shards of an output; each is committed before the next."""

    def __init__(
        self,
        source: Path,
        layout: Layout,
        options: PackOptions,
        rewriting: _Rewriting,
        grids: dict[str, Any],
    ) -> None:
        self.checkpoint = Checkpoint(source, layout.tensors)
        self.layout = layout
        self.options = options
        self.rewriting = rewriting
        self.grids = grids
        self.heads = [name for name in layout.heads if name in grids]
        self.matrices: dict[str, Matrix] = {
            planned.tensor: planned.matrix
            for block in layout.blocks
            for planned in block.matrices
        }

    def check_gain(self, model: str | Path) -> None:
        """Raise HalveError if no matrix would be smaller packed.

        Cost:
            Reads matrices until it has found one; at worst the whole model, once.
        """
        sparsest = 0.0
        for name in self.matrices:
            tensor = self._read([name])[name]
            if self._shrinks(name, tensor):
                return
            sparsest = max(sparsest, float((tensor == 0).double().mean()))
        raise HalveError(
            f"No matrix of {model} would get smaller: the sparsest of "
            f"{len(self.matrices)} has {100 * sparsest:.1f}% zeros, and each weight "
            "costs a bit more when packed.",
            "Prune the model first, with `halve prune`; if its zeros are minus zeros, "
            "pass --positive-zeros.",
        )

    def _shrinks(self, name: str, tensor: Tensor) -> bool:
        """Whether a matrix is smaller packed; counted first, since packing is slow."""
        weight = self._as_rows(name, tensor)
        size = packed_size(weight, recorded_scheme(self.grids.get(name)))
        if size is None or size >= tensor.nbytes:
            return False
        return len(self._stored(name, tensor)) > 1

    def rewrite(
        self, workspace: Workspace
    ) -> tuple[tuple[MatrixStorage, ...], tuple[MatrixStorage, ...]]:
        """Write every shard that is missing from a workspace.

        Returns:
            How the matrices of the blocks are stored, and how embedding and head are.
        """
        matrices: list[MatrixStorage] = []
        heads: list[MatrixStorage] = []
        for number, file in enumerate(self.layout.shards):
            self._report(number)
            done = workspace.committed.get(file)
            note = done.note if done else self._commit(workspace, file)
            parsed = parse_note(workspace.folder, _Note, note)
            matrices += parsed.matrices
            heads += parsed.heads
        return tuple(matrices), tuple(heads)

    def _report(self, number: int) -> None:
        shards = len(self.layout.shards)
        self.options.progress(Progress(number, shards, self.rewriting.phase))

    def _read(self, names: Iterable[str]) -> dict[str, Tensor]:
        """Return tensors of the input, matrices without negative zeros if asked."""
        dense = self.checkpoint.read(names)
        if self.options.positive_zeros:
            # -0.0 + 0 is +0.0; every other number stays as it is.
            dense |= {name: dense[name] + 0 for name in dense if name in self.matrices}
        return dense

    def _commit(self, workspace: Workspace, file: str) -> dict[str, Any]:
        """Write one shard; return its note for the ledger."""
        dense = self._read(self.layout.shards[file])
        tensors: dict[str, Tensor] = {}
        for name, tensor in dense.items():
            tensors |= self._stored(name, tensor)
        return workspace.commit(file, tensors, lambda path: self._verify(dense, path))

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
