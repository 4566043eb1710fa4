"""What is in a checkpoint, counted in its tensors rather than read from its record."""

from pathlib import Path
from typing import Any

from torch import Tensor

from halve.checkpoint import Checkpoint, TensorInfo, resolve_model, source_record
from halve.errors import HalveError
from halve.formats import packed_size
from halve.grids import QuantScheme, grid_shortfall, recorded_scheme
from halve.layout import PlannedMatrix, group_by_tensor
from halve.models import StoredTensor, build_meta_model, match_names, prunable_matrices
from halve.patterns import describe
from halve.records import Inspection, MatrixInspection, recorded_grids


def inspect_model(model: str | Path, trust_remote_code: bool = False) -> Inspection:
    """Count what is in a model; see `halve.inspect` for the contract."""
    folder = resolve_model(model)
    checkpoint = Checkpoint.open(folder)
    matrices = matrices_of(folder, checkpoint, trust_remote_code)
    grids = _recorded_grids(folder)
    by_tensor = group_by_tensor(matrices.values())
    inspected: dict[str, MatrixInspection] = {}
    zeros = 0
    for name, info in checkpoint.tensors.items():
        tensor = checkpoint.read([name])[name]
        zeros += int((tensor == 0).sum())
        for planned in by_tensor.get(name, ()):
            scheme = recorded_scheme(grids.get(planned.name))
            inspected[planned.name] = _matrix(info, planned, tensor, scheme)
    infos = checkpoint.tensors.values()
    return Inspection(
        model=str(model),
        matrices=tuple(inspected[name] for name in matrices),
        parameters=sum(info.elements for info in infos),
        zeros=zeros,
        bytes=sum(info.stored_bytes for info in infos),
    )


def matrices_of(
    folder: Path, checkpoint: Checkpoint, trust_remote_code: bool
) -> dict[str, PlannedMatrix]:
    """Return name -> prunable matrix, in the order of the model.

    A tensor that blocks share is there once.
    """
    meta_model = build_meta_model(folder, trust_remote_code)
    infos = checkpoint.tensors.values()
    tensors = match_names(
        meta_model, [StoredTensor(i.name, i.shape, i.dtype) for i in infos]
    )
    planned = (
        PlannedMatrix(tensors.places[f"{name}.{matrix.path}.weight"], matrix)
        for index, block in enumerate(meta_model.blocks)
        for name in [f"{meta_model.path}.{index}"]
        for matrix in prunable_matrices(block, name, tensors.experts_of(name))
    )
    return {matrix.name: matrix for matrix in planned}


def _recorded_grids(folder: Path) -> dict[str, Any]:
    """Return the grids that a record names; none where it cannot be read."""
    try:
        return recorded_grids(source_record(folder))
    except HalveError:
        return {}


def _grid_label(scheme: QuantScheme | None, weight: Tensor) -> str:
    """Return bits and group size of a grid; "" if a matrix does not lie on it."""
    if scheme is None or grid_shortfall(scheme, weight) is not None:
        return ""
    return f"{scheme} g{scheme.group_size}"


def _matrix(
    info: TensorInfo, planned: PlannedMatrix, tensor: Tensor, scheme: QuantScheme | None
) -> MatrixInspection:
    weight = planned.matrix.as_rows(planned.place.view(tensor))
    rows, columns = weight.shape
    stored = info.slice_bytes(planned.place.index)
    return MatrixInspection(
        tensor=planned.name,
        rows=rows,
        columns=columns,
        dtype=str(info.dtype).removeprefix("torch."),
        sparsity=float((weight == 0).double().mean()),
        pattern=describe(weight),
        bytes=stored,
        packed=info.is_packed,
        packed_bytes=stored if info.is_packed else packed_size(weight, scheme),
        storage=info.label,
        grid="" if info.format else _grid_label(scheme, weight),
        experts=planned.experts_name,
    )
