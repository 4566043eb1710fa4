"""One file of weights, safetensors or pickle: headers within bounds, and tensors."""

from collections.abc import Iterable, Iterator
from pathlib import Path

from torch import Tensor

from halve.checkpoint import safetensors_file
from halve.checkpoint.pickles import damaged, load_pickle
from halve.checkpoint.tensor_info import TensorInfo
from halve.errors import CheckpointError
from halve.untrusted import MAX_NAME, truncated

_MAX_DIMENSIONS = 8
_MAX_SIZE = 2**48  # of one dimension
_CODES = {dtype: code for code, dtype in safetensors_file.DTYPES.items()}


def read_header(folder: Path, shard: str) -> Iterator[TensorInfo]:
    """Yield the header of every tensor in a file, packed matrices part by part.

    Raises:
        CheckpointError: The file is damaged, or holds a tensor whose name, shape or
            dtype no weight has.
    """
    path = folder / shard
    for name, shape, dtype in _described(path):
        if len(name) > MAX_NAME:
            raise CheckpointError(
                f"{path} holds a tensor whose name has {len(name)} characters; "
                f"the limit is {MAX_NAME}.",
                "Do not use this checkpoint; it may be hostile.",
            )
        if len(shape) > _MAX_DIMENSIONS or any(size > _MAX_SIZE for size in shape):
            raise CheckpointError(
                f"Tensor {name} of {path} has the shape {truncated(list(shape))}, "
                "which no weight has.",
                "Do not use this checkpoint; it may be hostile.",
            )
        if dtype not in safetensors_file.DTYPES:
            raise CheckpointError(
                f"Tensor {name} of {path} has the dtype {dtype}, which Halve does not "
                "read.",
                "Convert the checkpoint to bfloat16 first.",
            )
        yield TensorInfo(name, shard, shape, safetensors_file.DTYPES[dtype])


def read_tensors(folder: Path, infos: Iterable[TensorInfo]) -> dict[str, Tensor]:
    """Return tensors of any shards as stored, in newly allocated memory.

    Raises:
        CheckpointError: A shard is damaged, cannot be read, or differs from its header.
    """
    by_shard: dict[str, list[TensorInfo]] = {}
    for info in infos:
        by_shard.setdefault(info.shard, []).append(info)
    tensors: dict[str, Tensor] = {}
    for shard, members in by_shard.items():
        tensors |= _read_file(folder / shard, [info.name for info in members])
        for info in members:
            _check_as_described(folder / shard, info, tensors[info.name])
    return tensors


def _described(path: Path) -> Iterator[tuple[str, tuple[int, ...], str]]:
    """Yield name, shape and dtype code of every tensor in a file."""
    if path.suffix == ".safetensors":
        yield from safetensors_file.describe_tensors(path)
        return
    for name, tensor in load_pickle(path, "meta").items():
        code = _CODES.get(tensor.dtype, str(tensor.dtype))
        yield name, tuple(tensor.shape), code


def _read_file(path: Path, names: list[str]) -> dict[str, Tensor]:
    if path.suffix == ".safetensors":
        return safetensors_file.read_tensors(path, names)
    stored = load_pickle(path, "cpu")
    return {name: stored[name].detach().clone().contiguous() for name in names}


def _check_as_described(path: Path, info: TensorInfo, tensor: Tensor) -> None:
    """Reject a tensor that differs from its header.

    A pickle may describe one storage with two dtypes.
    """
    if (tuple(tensor.shape), tensor.dtype) != (info.shape, info.dtype):
        difference = f"{info.name} is {tensor.dtype} where {info.dtype} was described"
        raise damaged(path, ValueError(difference))
