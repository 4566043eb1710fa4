"""Which files of a folder hold its weights, and which tensors the index promises.

Names in an index are untrusted: each must be a bare file name, and the file must be
inside the checkpoint's folder after its links are followed.
"""

from collections.abc import Callable, Iterable
from pathlib import Path

from halve.errors import CheckpointError
from halve.untrusted import is_inside, read_json, truncated

# (index, single file) of each kind, the preferred one first. If both exist the single
# file counts, as in transformers, which leaves a stale index behind when it saves.
_KINDS = (
    ("model.safetensors.index.json", "model.safetensors"),
    ("pytorch_model.bin.index.json", "pytorch_model.bin"),
)


def select_weight_files(
    names: Iterable[str], read_index: Callable[[str], Path]
) -> list[str]:
    """Return the files of a repository that hold its weights, index included.

    They are those that `indexed_shards` would read of a folder with all its files.

    Args:
        names: All files of the repository.
        read_index: Downloads an index by its name, and returns its path.

    Raises:
        CheckpointError: The index is damaged.
    """
    present = set(names)
    for index, single in _KINDS:
        if single in present:
            return [single]
        if index in present:
            path = read_index(index)
            return [index, *_read_index(path.parent, path.name)]
    return []


def has_no_weights(folder: Path) -> bool:
    """Whether a folder holds no file of weights, even if it holds an index.

    Raises:
        CheckpointError: The index is damaged, or names a file outside the folder.
    """
    for index, single in _KINDS:
        names = [single]
        if (folder / index).is_file():
            names += _shards_of_index(folder, index)
        if any((folder / name).exists() for name in names):
            return False
    return True


def indexed_shards(folder: Path) -> dict[str, set[str] | None]:
    """Return shard -> names of the tensors that the index promises in it.

    The names are None for a single file, which has no index.

    Raises:
        CheckpointError: There are no weights, the index is damaged, or a shard is
            missing or outside the folder.
    """
    for index, single in _KINDS:
        if (folder / single).is_file():
            _check_inside(folder, single, "the folder")
            return {single: None}
        if (folder / index).is_file():
            return _shards_of_index(folder, index)
    raise CheckpointError(
        f"There are no weights in {folder}: neither model.safetensors nor "
        "pytorch_model.bin, nor an index of either.",
        "Name the folder of a complete checkpoint.",
    )


def _shards_of_index(folder: Path, index: str) -> dict[str, set[str] | None]:
    shards = _read_index(folder, index)
    for shard in shards:
        _check_inside(folder, shard, index)
    return shards


def _read_index(folder: Path, index: str) -> dict[str, set[str] | None]:
    """Return shard -> names of its tensors, as the index has them."""
    try:
        weight_map = read_json(folder / index, folder)["weight_map"]
        items = [(str(name), str(shard)) for name, shard in weight_map.items()]
    except (
        *(OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError),
    ) as error:
        raise CheckpointError(
            f"The index {folder / index} cannot be read "
            f"({type(error).__name__}: {truncated(error)}).",
            "Download the checkpoint again.",
        ) from error
    shards: dict[str, set[str] | None] = {}
    for name, shard in items:
        promised = shards.setdefault(shard, set())
        assert promised is not None
        promised.add(name)
    return shards


def _check_inside(folder: Path, shard: str, index: str) -> None:
    """Reject a shard that is missing, or outside the folder, directly or by a link."""
    path = folder / shard
    if shard in {"", ".", ".."} or Path(shard).name != shard or "\\" in shard:
        raise CheckpointError(
            f"{index} of {folder} names the file {shard[:200]!r}, which is not a bare "
            "file name inside the folder.",
            "Do not use this checkpoint; it may be hostile.",
        )
    if not _is_file(path):
        raise CheckpointError(
            f"{index} of {folder} names {shard[:200]!r}, which is not there.",
            "Download the missing file.",
        )
    if not is_inside(folder, path):
        raise CheckpointError(
            f"{shard} in {folder} is a link out of the folder.",
            "Copy the file itself into the folder.",
        )


def _is_file(path: Path) -> bool:
    try:
        return path.is_file()
    except OSError:  # the name is longer than the file system allows
        return False
