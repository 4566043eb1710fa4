"""Everything that a run will do, worked out from config and headers before it starts.

A plan is a frozen value: it can be printed, compared and tested. No tensor is read.
"""

import hashlib
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch

from halve.checkpoint import Checkpoint, TensorInfo, is_bare
from halve.errors import HalveError
from halve.formats import packed_bytes
from halve.models import (
    Matrix,
    Skeleton,
    Stored,
    build_skeleton,
    expected_tensors,
    match_names,
    prunable_matrices,
)
from halve.patterns import parse_pattern
from halve.settings import Settings


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


@dataclass(frozen=True)
class Plan:
    """A run, before it starts.

    Attributes:
        model: Folder of the checkpoint.
        settings: What the user chose, `seq_len` filled in.
        layout: What will lie where.
        width: Of the hidden states.
        vocabulary: Tokens that the model knows.
        scored_heads: As of `Skeleton`.
    """

    model: Path
    settings: Settings
    layout: Layout
    width: int
    vocabulary: int
    scored_heads: int

    @property
    def tokens(self) -> int:
        """Tokens in all windows."""
        return self.settings.samples * (self.settings.seq_len or 0)

    def identity(self) -> dict[str, Any]:
        """Return what two runs must share to end in the same bytes."""
        pattern = str(parse_pattern(self.settings.sparsity, allow_dense=True))
        settings = asdict(self.settings) | {"sparsity": pattern}
        return settings | {"sources": self.layout.sources}


def make_plan(
    model: Path,
    settings: Settings,
    trust_remote_code: bool = False,
    needs_weights: bool = True,
) -> Plan:
    """Work out a run.

    Args:
        model: Folder of the checkpoint.
        settings: What the user chose.
        trust_remote_code: Whether Python code that comes with the model may run.
        needs_weights: False to go by the config alone where the folder has none.

    Raises:
        HalveError: Whatever can be known to go wrong before a tensor is read: a bad
            setting, an unsupported model, a damaged header, a pattern that a matrix's
            width does not allow.
    """
    settings.check()
    skeleton = build_skeleton(model, trust_remote_code)
    by_config = not needs_weights and is_bare(model)
    checkpoint = _expected(model, skeleton) if by_config else Checkpoint.open(model)
    layout = lay_out(checkpoint, skeleton)
    _check_pattern(layout.blocks, settings)
    if settings.packed:
        _check_packing(layout, settings)
    return Plan(
        model=model,
        settings=_with_length(settings, skeleton),
        layout=layout,
        width=skeleton.config.get_text_config().hidden_size,
        vocabulary=skeleton.vocabulary,
        scored_heads=skeleton.scored_heads,
    )


def _expected(model: Path, skeleton: Skeleton) -> Checkpoint:
    """Return the checkpoint that a config belongs to; it lies in no file."""
    stored = expected_tensors(skeleton, skeleton.dtype)
    infos = [TensorInfo(s.name, "", s.shape, s.dtype or skeleton.dtype) for s in stored]
    return Checkpoint(model, {info.name: info for info in infos})


def lay_out(checkpoint: Checkpoint, skeleton: Skeleton) -> Layout:
    """Work out the files of an output: which tensors they hold, which matrices.

    Args:
        checkpoint: The input.
        skeleton: Of its config.

    Raises:
        CheckpointError: Tensors that contradict the config.
        UnsupportedModelError: There is nothing to prune.
    """
    infos = checkpoint.tensors.values()
    names = match_names(skeleton, [Stored(i.name, i.shape, i.dtype) for i in infos])
    owners = _owners(skeleton, names)
    shards = dict(_shards(checkpoint, owners, len(skeleton.blocks)))
    blocks = tuple(_blocks(skeleton, names, list(shards)[-len(skeleton.blocks) :]))
    return Layout(
        blocks=blocks,
        shards=shards,
        left_dense=_left_dense(checkpoint, owners, blocks),
        sources=_sources(checkpoint),
        tensors=checkpoint.tensors,
        unread=_unread(skeleton, names),
    )


def _unread(skeleton: Skeleton, names: dict[str, str]) -> frozenset[str]:
    head = skeleton.model.get_output_embeddings()
    spared = skeleton.names_of(skeleton.table) | skeleton.names_of(head)
    used = {tensor for name, tensor in names.items() if name not in spared}
    return frozenset(names[name] for name in spared if name in names) - used


def _with_length(settings: Settings, skeleton: Skeleton) -> Settings:
    length = settings.seq_len or skeleton.default_length
    skeleton.check_length(length)
    return replace(settings, seq_len=length)


def _owners(skeleton: Skeleton, names: dict[str, str]) -> dict[str, int]:
    """Return tensor -> index of the block it belongs to."""
    prefix = skeleton.path + "."
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
    skeleton: Skeleton, names: dict[str, str], files: list[str]
) -> Iterator[PlannedBlock]:
    for index, block in enumerate(skeleton.blocks):
        name = f"{skeleton.path}.{index}"
        matrices = tuple(
            PlannedMatrix(names[f"{name}.{matrix.path}.weight"], matrix)
            for matrix in prunable_matrices(block, name)
        )
        yield PlannedBlock(index, name, matrices, files[index])


def _check_pattern(blocks: tuple[PlannedBlock, ...], settings: Settings) -> None:
    for pattern in {pattern for pattern, _ in settings.pairs}:
        for block in blocks:
            for planned in block.matrices:
                pattern.check_fits(planned.tensor, planned.matrix.shape[1])


def _check_packing(layout: Layout, settings: Settings) -> None:
    """Raise HalveError where no matrix would get smaller when packed."""
    pattern = max((pattern for pattern, _ in settings.pairs), key=lambda p: p.sparsity)
    for block in layout.blocks:
        for planned in block.matrices:
            rows, columns = planned.matrix.shape
            info = layout.tensors[planned.tensor]
            kept = rows * columns - pattern.count(rows * columns)
            if packed_bytes(rows, columns, kept, info.dtype.itemsize) < info.nbytes:
                return
    raise HalveError(
        f"With {pattern} zeros no matrix of {layout.blocks[0].name} or any other block "
        "would get smaller when packed: each weight costs a bit more.",
        "Leave out --pack, or prune more.",
    )


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
