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
from halve.formats import VERSION, packed_size, quantization_config
from halve.grids import (
    QuantParams,
    QuantScheme,
    recorded_scheme,
    recover_quant_params,
)
from halve.layout import (
    Layout,
    PlannedMatrix,
    describe_storage,
    group_by_tensor,
    make_layout,
    pack_tensor,
    whole_tensor,
)
from halve.models import build_meta_model
from halve.options import PackOptions
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
    check_space(out, layout.disk_bytes)
    conversion = _Conversion(
        source, layout, options, rewriting, recorded_grids(provenance)
    )
    if rewriting.packs:
        conversion.check_gain(model)
    with open_workspace(out, identity, layout.files) as workspace:
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
            shards={file: workspace.digests[file] for file in layout.files},
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
        self.heads = {
            name: [whole_tensor(layout.tensors[name])]
            for name in layout.heads
            if name in grids
        }
        self.matrices = group_by_tensor(
            planned for block in layout.blocks for planned in block.matrices
        )

    def check_gain(self, model: str | Path) -> None:
        """Raise HalveError if no matrix would be smaller packed.

        Cost:
            Reads matrices until it has found one; at worst the whole model, once.
        """
        sparsest, count = 0.0, 0
        for name, planned in self.matrices.items():
            tensor = self._read([name])[name]
            if self._shrinks(planned, tensor):
                return
            sparsest = max(sparsest, float((tensor == 0).double().mean()))
            count += len(planned)
        raise HalveError(
            f"No matrix of {model} would get smaller: the sparsest of "
            f"{count} has {100 * sparsest:.1f}% zeros, and each weight "
            "costs a bit more when packed.",
            "Prune the model first, with `halve prune`; if its zeros are minus zeros, "
            "pass --positive-zeros.",
        )

    def _shrinks(self, planned: list[PlannedMatrix], tensor: Tensor) -> bool:
        """Whether a tensor is smaller packed; counted first, since packing is slow."""
        sizes = [
            packed_size(matrix.as_rows(tensor), self._scheme(matrix))
            for matrix in planned
        ]
        known = [size for size in sizes if size is not None]
        if len(known) < len(sizes) or sum(known) >= tensor.nbytes:
            return False
        return len(self._packed(planned, tensor)) > 1

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
        planned = self.matrices.get(name) or self.heads.get(name)
        if planned is None or not self.rewriting.packs:
            return {name: tensor}
        return self._packed(planned, tensor)

    def _packed(
        self, planned: list[PlannedMatrix], tensor: Tensor
    ) -> dict[str, Tensor]:
        return pack_tensor(tensor, planned, self._params)

    def _params(self, planned: PlannedMatrix, stored: Tensor) -> QuantParams | None:
        """Return the grid of a matrix that lies on the one its input records."""
        scheme = self._scheme(planned)
        return scheme and recover_quant_params(scheme, planned.matrix.as_rows(stored))

    def _scheme(self, planned: PlannedMatrix) -> QuantScheme | None:
        return recorded_scheme(self.grids.get(planned.name))

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
            info = written.tensors[name]
            for planned in self.matrices.get(name, ()):
                matrices.append(self._storage(info, planned, tensor))
            for planned in self.heads.get(name, ()):
                heads.append(self._storage(info, planned, tensor))
        return {"matrices": matrices, "heads": heads}

    def _storage(
        self, info: TensorInfo, planned: PlannedMatrix, dense: Tensor
    ) -> dict[str, Any]:
        grid = self.grids.get(planned.name)
        return asdict(describe_storage(info, planned, planned.as_rows(dense), grid))


def _same_bits(a: Tensor, b: Tensor) -> bool:
    return a.dtype == b.dtype and torch.equal(_octets(a), _octets(b))


def _octets(tensor: Tensor) -> Tensor:
    return tensor.contiguous().flatten().view(torch.uint8)
