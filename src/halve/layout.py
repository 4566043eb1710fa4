"""Which tensors and prunable matrices lie in which file of an output."""

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass

import torch

from halve.checkpoint import Checkpoint, TensorInfo
from halve.models import (
    Matrix,
    MetaModel,
    StoredTensor,
    match_names,
    prunable_matrices,
)


@dataclass(frozen=True)
class PlannedMatrix:
    """A matrix to prune: the tensor that holds it and what it is in its block."""

    tensor: str
    matrix: Matrix

    @property
    def elements(self) -> int:
        """Weights in it."""
        rows, columns = self.matrix.shape
        return rows * columns


@dataclass(frozen=True)
class PlannedBlock:
    """A block: its index, its matrices, and the output shard of its tensors."""

    index: int
    name: str
    matrices: tuple[PlannedMatrix, ...]
    shard: str


@dataclass(frozen=True)
class Layout:
    """What lies where in an output.

    Attributes:
        blocks: In the order of the model.
        shards: Output file -> tensors in it: first everything outside the blocks,
            then a file for each block.
        left_dense: Tensors of two dimensions or more in the blocks, not pruned.
        sources: File of the input -> what must not change under a run.
        tensors: Headers of the checkpoint.
        unread: Tensors outside the blocks with which nothing is computed while a model
            is pruned: an output head, and an embedding in which rows are looked up.
    """

    blocks: tuple[PlannedBlock, ...]
    shards: dict[str, tuple[str, ...]]
    left_dense: tuple[str, ...]
    sources: dict[str, str]
    tensors: dict[str, TensorInfo]
    unread: frozenset[str]

    @property
    def prunable(self) -> int:
        """Weights in all prunable matrices."""
        return sum(m.elements for b in self.blocks for m in b.matrices)

    @property
    def dtype(self) -> torch.dtype:
        """The dtype with the fewest significant bits that a prunable matrix has."""
        dtypes = {self.tensors[m.tensor].dtype for b in self.blocks for m in b.matrices}
        return max(dtypes, key=lambda dtype: torch.finfo(dtype).eps)

    @property
    def has_weights(self) -> bool:
        """Whether the input's files hold any; else all is as its config has it."""
        return len(self.sources) > 1

    @property
    def output_bytes(self) -> int:
        """Bytes of the output's tensors, when dense."""
        return sum(info.nbytes for info in self.tensors.values())


def make_layout(checkpoint: Checkpoint, meta_model: MetaModel) -> Layout:
    """Work out the files of an output: which tensors they hold, which matrices.

    Args:
        checkpoint: The input.
        meta_model: Of its config.

    Raises:
        CheckpointError: Tensors that contradict the config.
        UnsupportedModelError: There is nothing to prune.
    """
    infos = checkpoint.tensors.values()
    names = match_names(
        meta_model, [StoredTensor(i.name, i.shape, i.dtype) for i in infos]
    )
    owners = _owners(meta_model, names)
    shards = dict(_shards(checkpoint, owners, len(meta_model.blocks)))
    blocks = tuple(_blocks(meta_model, names, list(shards)[-len(meta_model.blocks) :]))
    return Layout(
        blocks=blocks,
        shards=shards,
        left_dense=_left_dense(checkpoint, owners, blocks),
        sources=_sources(checkpoint),
        tensors=checkpoint.tensors,
        unread=_unread(meta_model, names),
    )


def _unread(meta_model: MetaModel, names: dict[str, str]) -> frozenset[str]:
    head = meta_model.model.get_output_embeddings()
    embedding = meta_model.lookup_embedding
    spared = meta_model.parameter_names(embedding) | meta_model.parameter_names(head)
    used = {tensor for name, tensor in names.items() if name not in spared}
    return frozenset(names[name] for name in spared if name in names) - used


def _owners(meta_model: MetaModel, names: dict[str, str]) -> dict[str, int]:
    """Return tensor -> index of the block it belongs to."""
    prefix = meta_model.path + "."
    return {
        tensor: int(name.removeprefix(prefix).partition(".")[0])
        for name, tensor in names.items()
        if name.startswith(prefix)
    }


def _shards(
    checkpoint: Checkpoint, owners: dict[str, int], depth: int
) -> Iterator[tuple[str, tuple[str, ...]]]:
    """Yield output files: what lies outside the blocks, in pieces, then the blocks.

    Large tensors come first, so that the small ones share a piece; the files of the
    input do not matter.
    """
    blocks: list[list[str]] = [[] for _ in range(depth)]
    rest: list[str] = []
    for name in checkpoint.tensors:
        (blocks[owners[name]] if name in owners else rest).append(name)
    sizes = [sum(checkpoint.tensors[n].nbytes for n in names) for names in blocks]
    rest.sort(key=lambda name: (-checkpoint.tensors[name].nbytes, name))
    pieces = _pieces(checkpoint, rest, max(sizes))
    contents = [*pieces, *blocks]
    for number, names in enumerate(contents, start=1):
        file = f"model-{number:05}-of-{len(contents):05}.safetensors"
        yield file, tuple(names)


def _pieces(checkpoint: Checkpoint, names: list[str], limit: int) -> list[list[str]]:
    """Cut a list of tensors so that no piece is larger than a block, if it can be."""
    pieces: list[list[str]] = []
    size = 0
    for name in names:
        extra = checkpoint.tensors[name].nbytes
        if not pieces or size + extra > limit:
            pieces.append([])
            size = 0
        pieces[-1].append(name)
        size += extra
    return pieces


def _blocks(
    meta_model: MetaModel, names: dict[str, str], files: list[str]
) -> Iterator[PlannedBlock]:
    for index, block in enumerate(meta_model.blocks):
        name = f"{meta_model.path}.{index}"
        matrices = tuple(
            PlannedMatrix(names[f"{name}.{matrix.path}.weight"], matrix)
            for matrix in prunable_matrices(block, name)
        )
        yield PlannedBlock(index, name, matrices, files[index])


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
    found = {"config.json": config}
    for shard in checkpoint.shards:
        status = (model / shard).stat()
        found[shard] = f"{status.st_size} bytes, changed {status.st_mtime_ns}"
    return found
