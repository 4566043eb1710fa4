"""How the tensors of an output are divided: into shards, and these among files.

A shard is what a run commits at once: a block, or tensors outside the blocks. Small
shards are merged into files of about a gigabyte, so that a small model is one file.
"""

from collections.abc import Callable, Iterator
from typing import TypeVar

from halve.checkpoint import Checkpoint

# The size of a file in bytes, unless a single shard is larger.
_FILE_BYTES = 10**9

Division = dict[str, tuple[str, ...]]
Item = TypeVar("Item")


def divide(
    checkpoint: Checkpoint, owners: dict[str, int], depth: int
) -> tuple[Division, Division]:
    """Divide the tensors of a checkpoint.

    No file is larger than a gigabyte or, if that is less, than the largest file of the
    checkpoint, but for one that holds a single shard. Sizes are those of dense tensors.

    Args:
        checkpoint: The input.
        owners: Name of a tensor -> index of the block that it belongs to.
        depth: Number of blocks.

    Returns:
        Shard -> names of its tensors: shards of what is outside the blocks, then one
        for each block. And output file -> its shards, of which an only one has the name
        of the file.
    """
    contents = list(_contents(checkpoint, owners, depth))
    sizes = [_nbytes(checkpoint, names) for names in contents]
    limit = min(_FILE_BYTES, _largest_file(checkpoint))
    groups = _pieces(list(range(len(contents))), sizes.__getitem__, limit)
    shards: Division = {}
    files: Division = {}
    for number, group in enumerate(groups, start=1):
        file = _file_name(number, len(groups))
        own = (
            [file] if len(group) == 1 else [f"shard-{i:05}.safetensors" for i in group]
        )
        shards |= {name: tuple(contents[i]) for name, i in zip(own, group, strict=True)}
        files[file] = tuple(own)
    return shards, files


def _contents(
    checkpoint: Checkpoint, owners: dict[str, int], depth: int
) -> Iterator[list[str]]:
    """Yield the tensors of each shard: those outside the blocks, then the blocks.

    The result does not depend on the files of the input. Large tensors come first, so
    that the small ones fit into one shard.
    """
    blocks: list[list[str]] = [[] for _ in range(depth)]
    outside: list[str] = []
    for name in checkpoint.tensors:
        (blocks[owners[name]] if name in owners else outside).append(name)
    outside.sort(key=lambda name: (-checkpoint.tensors[name].nbytes, name))
    limit = max(_nbytes(checkpoint, names) for names in blocks)
    yield from _pieces(outside, lambda name: checkpoint.tensors[name].nbytes, limit)
    yield from blocks


def _pieces(
    items: list[Item], size: Callable[[Item], int], limit: int
) -> list[list[Item]]:
    """Split a list into runs of at most `limit` bytes, or of one larger item."""
    pieces: list[list[Item]] = []
    total = 0
    for item in items:
        if not pieces or total + size(item) > limit:
            pieces.append([])
            total = 0
        pieces[-1].append(item)
        total += size(item)
    return pieces


def _nbytes(checkpoint: Checkpoint, names: list[str]) -> int:
    return sum(checkpoint.tensors[name].nbytes for name in names)


def _largest_file(checkpoint: Checkpoint) -> int:
    """Return the bytes of tensors in the largest file of the input."""
    sizes: dict[str, int] = {}
    for info in checkpoint.tensors.values():
        sizes[info.shard] = sizes.get(info.shard, 0) + info.nbytes
    return max(sizes.values())


def _file_name(number: int, count: int) -> str:
    """Return the name that transformers gives a file of weights."""
    if count == 1:
        return "model.safetensors"
    return f"model-{number:05}-of-{count:05}.safetensors"
