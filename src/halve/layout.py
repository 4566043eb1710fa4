"""Which tensors and prunable matrices go into which shard of an output."""

import hashlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn

from halve.checkpoint import Checkpoint, TensorInfo
from halve.formats import store, store_stack
from halve.grids import QuantParams, grid_shortfall, recorded_scheme
from halve.models import (
    Matrix,
    MetaModel,
    Place,
    StoredTensor,
    TensorMap,
    match_names,
    prunable_matrices,
)
from halve.patterns import describe
from halve.records import MatrixStorage
from halve.sharding import divide

# Classes of embeddings and output heads that packed layers can replace.
_HEADS = (nn.Embedding, nn.Linear)
# Returns the grid of a matrix, or None, given its weights as its tensor holds them.
QuantParamsOf = Callable[["PlannedMatrix", Tensor], QuantParams | None]


@dataclass(frozen=True)
class PlannedMatrix:
    """A matrix to prune.

    Attributes:
        place: The checkpoint's tensor that holds it, or the slice of one.
        matrix: Its module, shape and orientation in the block.
    """

    place: Place
    matrix: Matrix

    @property
    def name(self) -> str:
        """Name of its tensor, with the index of its slice: no other matrix has it."""
        return str(self.place)

    @property
    def tensor(self) -> str:
        """Name of the tensor, which may hold other matrices as well."""
        return self.place.tensor

    @property
    def experts_name(self) -> str | None:
        """`name` with `*` for the number of its expert; None where it has none."""
        number = self.matrix.expert
        if number is None:
            return None
        if self.place.index is not None:
            return f"{self.tensor}[*]"
        head, _, tail = self.tensor.rpartition(f".{number}.")
        return f"{head}.*.{tail}"

    @property
    def elements(self) -> int:
        """Number of weights."""
        rows, columns = self.matrix.shape
        return rows * columns

    def as_rows(self, tensor: Tensor) -> Tensor:
        """Return the part of its tensor that it is, [rows, columns]."""
        return self.matrix.as_rows(self.place.view(tensor))


def whole_tensor(info: TensorInfo) -> PlannedMatrix:
    """Return an embedding or an output head as a matrix of its tensor."""
    rows, columns = info.shape
    return PlannedMatrix(
        Place(info.name), Matrix(info.name, (rows, columns), False, True)
    )


def describe_storage(
    info: TensorInfo,
    planned: PlannedMatrix,
    weight: Tensor,
    grid: dict[str, Any] | None,
) -> MatrixStorage:
    """Return the record of a matrix that was written.

    Args:
        info: The written tensor that holds it.
        planned: The matrix.
        weight: Its values, dense, [rows, columns].
        grid: The grid that the input's record names; left out if `weight` is not on it.
    """
    rows, columns = weight.shape
    zeros = weight == 0
    scheme = recorded_scheme(grid)
    lies = scheme is not None and grid_shortfall(scheme, weight) is None
    return MatrixStorage(
        tensor=planned.name,
        rows=rows,
        columns=columns,
        sparsity=float(zeros.double().mean()),
        minus_zeros=int((zeros & weight.signbit()).sum()),
        dense_bytes=weight.numel() * weight.itemsize,
        stored_bytes=info.slice_bytes(planned.place.index),
        packed=info.format is not None,
        pattern=describe(weight),
        grid=asdict(scheme) if scheme is not None and lies else None,
    )


def group_by_tensor(
    matrices: Iterable[PlannedMatrix],
) -> dict[str, list[PlannedMatrix]]:
    """Return tensor -> the matrices that it holds; several where it holds experts."""
    found: dict[str, list[PlannedMatrix]] = {}
    for planned in matrices:
        found.setdefault(planned.tensor, []).append(planned)
    return found


def pack_tensor(
    tensor: Tensor, planned: Sequence[PlannedMatrix], params: QuantParamsOf
) -> dict[str, Tensor]:
    """Return what a file holds for a tensor, whose matrices are packed if smaller.

    Args:
        tensor: The dense tensor as a checkpoint stores it.
        planned: The matrices that it holds.
        params: Returns the grid of one of them, given its weights as in the tensor.
    """
    name, transposed = planned[0].tensor, planned[0].matrix.transposed
    grids = [params(matrix, matrix.place.view(tensor)) for matrix in planned]
    if planned[0].place.index is None:
        return store(name, tensor, transposed, grids[0])
    return store_stack(name, tensor, transposed, grids)


@dataclass(frozen=True)
class PlannedBlock:
    """A decoder block.

    Attributes:
        index: Position in the model, from 0.
        name: Path of its module, such as `model.layers.3`.
        matrices: Matrices to prune, in the order of their modules.
        shard: The shard of the block's tensors.
    """

    index: int
    name: str
    matrices: tuple[PlannedMatrix, ...]
    shard: str

    @property
    def outside_experts(self) -> tuple[PlannedMatrix, ...]:
        """Matrices that every token is multiplied by."""
        return tuple(m for m in self.matrices if m.matrix.expert is None)

    @property
    def experts(self) -> dict[str, tuple[tuple[PlannedMatrix, ...], ...]]:
        """Path of a module of experts -> the matrices of each expert.

        Matrices are in the order of computation: the last one gets what is made of the
        outputs of the others.
        """
        found: dict[str, list[list[PlannedMatrix]]] = {}
        for planned in self.matrices:
            if (path := planned.matrix.experts) is not None:
                experts = found.setdefault(path, [])
                if planned.matrix.expert == len(experts):
                    experts.append([])
                experts[-1].append(planned)
        return {path: tuple(map(tuple, every)) for path, every in found.items()}


@dataclass(frozen=True)
class Layout:
    """The files of an output and what each contains.

    Attributes:
        blocks: Decoder blocks, in the order of the model.
        shards: Shard -> names of its tensors. Shards are what is committed at once:
            first those of everything outside the blocks, then one for each block.
        files: Output file -> the shards that it is made of.
        left_dense: Tensors of the blocks that have two dimensions or more and are not
            pruned.
        sources: File of the input -> digest, or size and modification time; a run
            cannot be resumed after it has changed.
        tensors: Name -> header, for every tensor of the checkpoint.
        heads: Tensors of the output head and of an embedding in which rows are only
            looked up, if a packed layer can take their place.
        unread: Tensors outside the blocks that take part in no computation while a
            model is pruned: an output head, and an embedding in which rows are only
            looked up.
    """

    blocks: tuple[PlannedBlock, ...]
    shards: dict[str, tuple[str, ...]]
    files: dict[str, tuple[str, ...]]
    left_dense: tuple[str, ...]
    sources: dict[str, str]
    tensors: dict[str, TensorInfo]
    heads: tuple[str, ...]
    unread: frozenset[str]

    @property
    def prunable(self) -> int:
        """Number of weights in all prunable matrices."""
        return sum(m.elements for b in self.blocks for m in b.matrices)

    @property
    def dtype(self) -> torch.dtype:
        """The least precise dtype of the prunable matrices."""
        dtypes = {self.tensors[m.tensor].dtype for b in self.blocks for m in b.matrices}
        return max(dtypes, key=lambda dtype: torch.finfo(dtype).eps)

    @property
    def has_experts(self) -> bool:
        """Whether any block is a mixture of experts."""
        return any(block.experts for block in self.blocks)

    @property
    def has_weights(self) -> bool:
        """Whether the input has files of weights, rather than a config alone."""
        # The first source is config.json.
        return len(self.sources) > 1

    @property
    def output_bytes(self) -> int:
        """Size of the output's tensors in bytes, if all are stored dense."""
        return sum(info.nbytes for info in self.tensors.values())

    @property
    def disk_bytes(self) -> int:
        """Bytes of disk while the output is written.

        A file that is made of several shards is there beside them for a moment.
        """
        merged = [shards for shards in self.files.values() if len(shards) > 1]
        sizes = [
            sum(self.tensors[name].nbytes for s in shards for name in self.shards[s])
            for shards in merged
        ]
        return self.output_bytes + max(sizes, default=0)


def make_layout(checkpoint: Checkpoint, meta_model: MetaModel) -> Layout:
    """Lay out the files of an output.

    Args:
        checkpoint: The input.
        meta_model: The model that the input's config describes.

    Raises:
        CheckpointError: The tensors contradict the config.
        UnsupportedModelError: There is nothing to prune.
    """
    infos = checkpoint.tensors.values()
    tensors = match_names(
        meta_model, [StoredTensor(i.name, i.shape, i.dtype) for i in infos]
    )
    names = {parameter: place.tensor for parameter, place in tensors.places.items()}
    owners = _owners(meta_model, names)
    shards, files = divide(checkpoint, owners, len(meta_model.blocks))
    own = list(shards)[-len(meta_model.blocks) :]
    blocks = tuple(_blocks(meta_model, tensors, own))
    unread = _unread(meta_model, names)
    return Layout(
        blocks=blocks,
        shards=shards,
        files=files,
        left_dense=_left_dense(checkpoint, owners, blocks),
        sources=_sources(checkpoint),
        tensors=checkpoint.tensors,
        heads=_heads(meta_model, names, unread),
        unread=unread,
    )


def _unread(meta_model: MetaModel, names: dict[str, str]) -> frozenset[str]:
    head = meta_model.model.get_output_embeddings()
    idle = meta_model.parameter_names(meta_model.lookup_embedding)
    idle |= meta_model.parameter_names(head)
    # A tensor that is tied to any other parameter is used by it.
    used = {tensor for name, tensor in names.items() if name not in idle}
    return frozenset(names[name] for name in idle if name in names) - used


def _heads(
    meta_model: MetaModel, names: dict[str, str], unread: frozenset[str]
) -> tuple[str, ...]:
    """Return tensors of plain layers that do nothing but look up or score tokens."""
    embedding = meta_model.lookup_embedding
    head = meta_model.model.get_output_embeddings()
    modules: list[Any] = [m for m in (embedding, head) if m is not None]
    found = _weights(meta_model, names, [m for m in modules if type(m) in _HEADS])
    # A head of another class would read the tensor that it shares with an embedding.
    read = _weights(meta_model, names, [m for m in modules if type(m) not in _HEADS])
    return tuple(sorted(found & unread - read))


def _weights(
    meta_model: MetaModel, names: dict[str, str], modules: list[Any]
) -> set[str]:
    """Return the checkpoint's tensors that are weights of some modules."""
    parameters = {n for module in modules for n in meta_model.parameter_names(module)}
    return {names[n] for n in parameters if n in names and n.endswith(".weight")}


def _owners(meta_model: MetaModel, names: dict[str, str]) -> dict[str, int]:
    """Return name of a tensor -> index of the block that it belongs to."""
    prefix = meta_model.path + "."
    return {
        tensor: int(name.removeprefix(prefix).partition(".")[0])
        for name, tensor in names.items()
        if name.startswith(prefix)
    }


def _blocks(
    meta_model: MetaModel, tensors: TensorMap, shards: list[str]
) -> Iterator[PlannedBlock]:
    for index, block in enumerate(meta_model.blocks):
        name = f"{meta_model.path}.{index}"
        matrices = tuple(
            PlannedMatrix(tensors.places[f"{name}.{matrix.path}.weight"], matrix)
            for matrix in prunable_matrices(block, name, tensors.experts_of(name))
        )
        yield PlannedBlock(index, name, matrices, shards[index])


def _left_dense(
    checkpoint: Checkpoint, owners: dict[str, int], blocks: tuple[PlannedBlock, ...]
) -> tuple[str, ...]:
    pruned = {m.tensor for block in blocks for m in block.matrices}
    return tuple(
        name
        for name in owners
        if name not in pruned and len(checkpoint.tensors[name].shape) > 1
    )


def _sources(checkpoint: Checkpoint) -> dict[str, str]:
    model = checkpoint.folder
    config = hashlib.sha256((model / "config.json").read_bytes()).hexdigest()
    sources = {"config.json": config}
    for shard in checkpoint.shards:
        status = (model / shard).stat()
        sources[shard] = f"{status.st_size} bytes, changed {status.st_mtime_ns}"
    return sources
