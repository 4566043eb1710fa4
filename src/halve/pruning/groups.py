"""Which matrices of a block see the same input, and what that input looks like."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from halve.errors import NumericalError, UnsupportedModelError
from halve.plan import PlannedBlock, PlannedMatrix
from halve.runtime.streamed import Stream
from halve.statistics import Statistic

Hook = Callable[[str, Tensor], object]


@dataclass(frozen=True)
class Group:
    """Matrices that share their input; the first stands for all."""

    matrices: tuple[PlannedMatrix, ...]

    @property
    def leader(self) -> str:
        """Path of the first matrix within its block."""
        return self.matrices[0].matrix.path

    @property
    def columns(self) -> int:
        """Width of the input."""
        return self.matrices[0].matrix.shape[1]


class _AllSeen(Exception):  # noqa: N818  (no error: the rest of the block is not needed)
    pass


@contextmanager
def _hooks(block: nn.Module, paths: list[str], hook: Hook) -> Iterator[None]:
    """Call the hook with each module's path and input whenever it runs."""

    def watch(path: str) -> Any:  # noqa: ANN401
        def before(_: nn.Module, args: tuple[Any, ...]) -> None:
            hook(path, args[0])

        return before

    handles = [
        block.get_submodule(path).register_forward_pre_hook(watch(path))
        for path in paths
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def find_groups(stream: Stream, block: nn.Module, planned: PlannedBlock) -> list[Group]:
    """Run one window and see which modules are given the same tensor.

    Raises:
        UnsupportedModelError: A matrix is never used.
    """
    seen: dict[str, Tensor] = {}  # kept alive, so that no address is used twice
    paths = [m.matrix.path for m in planned.matrices]
    with _hooks(block, paths, seen.setdefault):
        stream.run_first(block, planned.index)
    groups: dict[Any, list[PlannedMatrix]] = {}
    for matrix in planned.matrices:
        path = matrix.matrix.path
        if path not in seen:
            raise UnsupportedModelError(
                f"Matrix {matrix.tensor} takes no part when its block runs, so nothing "
                "can be learnt of its inputs.",
                "Open an issue that names the model.",
            )
        groups.setdefault(_identity(seen[path]), []).append(matrix)
    return [Group(tuple(matrices)) for matrices in groups.values()]


def _identity(tensor: Tensor) -> tuple[Any, ...]:
    return (tensor.data_ptr(), tensor.shape[-1], tensor.numel(), tensor._version)


def collect(
    stream: Stream,
    block: nn.Module,
    planned: PlannedBlock,
    groups: list[Group],
    kind: type[Statistic],
) -> tuple[list[tuple[Group, Statistic]], Tensor]:
    """Gather the statistics of all groups on the dense block, in one pass.

    Each batch stops at the last input that is wanted; the first runs to the end.

    Returns:
        Each group with its statistic, and the block's output for the first batch.

    Raises:
        NumericalError: An input is not finite; names block, matrix and sample.
    """
    device = stream.model.device
    statistics = {group.leader: kind(group.columns, device) for group in groups}
    calls = 0
    limit: int | None = None

    def take(path: str, inputs: Tensor) -> None:
        nonlocal calls
        statistics[path].add(inputs.reshape(-1, inputs.shape[-1]))
        if not statistics[path].is_finite():
            _report(f"{planned.name}.{path}", inputs, part)
        calls += 1
        if calls == limit:
            raise _AllSeen

    first = torch.empty(0)
    with _hooks(block, list(statistics), take):
        for part in stream.batches():
            calls = 0
            try:
                output = stream.run(block, planned.index, part)
            except _AllSeen:
                continue
            if part.start == 0:
                first, limit = output, calls
    return [(group, statistics[group.leader]) for group in groups], first


def _report(name: str, inputs: Tensor, part: slice) -> None:
    samples = part.stop - part.start
    finite = inputs.isfinite().reshape(samples, -1).all(dim=1)
    bad = (~finite).nonzero()
    sample = part.start + (int(bad[0]) if len(bad) else 0)
    raise NumericalError(
        f"The inputs of {name} are not finite, or too large to square, in sample "
        f"{sample}.",
        "Check the checkpoint and the calibration text.",
    )
