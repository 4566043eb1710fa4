"""What is in a checkpoint, counted in its tensors rather than believed."""

from pathlib import Path

from torch import Tensor

from halve.checkpoint import Checkpoint, TensorInfo, resolve_model
from halve.formats import DTYPES, kept_weights, packed_bytes
from halve.models import StoredTensor, build_meta_model, match_names, prunable_matrices
from halve.models.matrices import Matrix
from halve.patterns import describe
from halve.records import Inspection, MatrixInspection


def inspect_model(model: str | Path, trust_remote_code: bool = False) -> Inspection:
    """Count what is in a model; see `halve.inspect` for the contract."""
    folder = resolve_model(model)
    checkpoint = Checkpoint.open(folder)
    matrices = matrices_of(folder, checkpoint, trust_remote_code)
    found: list[MatrixInspection] = []
    zeros = 0
    for name, info in checkpoint.tensors.items():
        tensor = checkpoint.read([name])[name]
        zeros += int((tensor == 0).sum())
        if name in matrices:
            found.append(_matrix(info, matrices[name], tensor))
    order = list(matrices)
    infos = checkpoint.tensors.values()
    return Inspection(
        model=str(model),
        matrices=tuple(sorted(found, key=lambda m: order.index(m.tensor))),
        parameters=sum(info.nbytes // info.dtype.itemsize for info in infos),
        zeros=zeros,
        bytes=sum(info.stored_bytes for info in infos),
    )


def matrices_of(
    folder: Path, checkpoint: Checkpoint, trust_remote_code: bool
) -> dict[str, Matrix]:
    """Return tensor -> prunable matrix, in the order of the model."""
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


def _matrix(info: TensorInfo, matrix: Matrix, tensor: Tensor) -> MatrixInspection:
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
        packed=bool(info.parts),
        packed_bytes=_packed_bytes(weight) if info.dtype in DTYPES else None,
    )


def _packed_bytes(weight: Tensor) -> int:
    rows, columns = weight.shape
    kept = int(kept_weights(weight).sum())
    return packed_bytes(rows, columns, kept, weight.element_size())
