"""What is in a checkpoint, counted in its tensors rather than read from its record."""

from pathlib import Path
from typing import Any

from torch import Tensor

from halve.checkpoint import Checkpoint, TensorInfo, resolve_model, source_record
from halve.errors import HalveError
from halve.formats import packed_size
from halve.grids import QuantScheme, grid_shortfall, recorded_scheme
from halve.models import StoredTensor, build_meta_model, match_names, prunable_matrices
from halve.models.matrices import Matrix
from halve.patterns import describe
from halve.records import Inspection, MatrixInspection, recorded_grids


def inspect_model(model: str | Path, trust_remote_code: bool = False) -> Inspection:
    """Count what is in a model; see `halve.inspect` for the contract."""
    folder = resolve_model(model)
    checkpoint = Checkpoint.open(folder)
    matrices = matrices_of(folder, checkpoint, trust_remote_code)
    grids = _recorded_grids(folder)
    inspected: list[MatrixInspection] = []
    zeros = 0
    for name, info in checkpoint.tensors.items():
        tensor = checkpoint.read([name])[name]
        zeros += int((tensor == 0).sum())
        if name in matrices:
            scheme = recorded_scheme(grids.get(name))
            inspected.append(_matrix(info, matrices[name], tensor, scheme))
    order = list(matrices)
    infos = checkpoint.tensors.values()
    return Inspection(
        model=str(model),
        matrices=tuple(sorted(inspected, key=lambda m: order.index(m.tensor))),
        parameters=sum(info.elements for info in infos),
        zeros=zeros,
        bytes=sum(info.stored_bytes for info in infos),
    )


def matrices_of(
    folder: Path, checkpoint: Checkpoint, trust_remote_code: bool
) -> dict[str, Matrix]:
    """Return name of the tensor -> prunable matrix, in the order of the model."""
    meta_model = build_meta_model(folder, trust_remote_code)
    infos = checkpoint.tensors.values()
    names = match_names(
        meta_model, [StoredTensor(i.name, i.shape, i.dtype) for i in infos]
    )
    return {
        names[f"{meta_model.path}.{index}.{matrix.path}.weight"]: matrix
        for index, block in enumerate(meta_model.blocks)
        for matrix in prunable_matrices(block, f"{meta_model.path}.{index}")
    }


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
    info: TensorInfo, matrix: Matrix, tensor: Tensor, scheme: QuantScheme | None
) -> MatrixInspection:
    weight = matrix.as_rows(tensor)
    rows, columns = weight.shape
    return MatrixInspection(
        tensor=info.name,
        rows=rows,
        columns=columns,
        dtype=str(info.dtype).removeprefix("torch."),
        sparsity=float((weight == 0).double().mean()),
        pattern=describe(weight),
        bytes=info.stored_bytes,
        packed=info.is_packed,
        packed_bytes=info.stored_bytes
        if info.is_packed
        else packed_size(weight, scheme),
        storage=info.label,
        grid="" if info.format else _grid_label(scheme, weight),
    )
