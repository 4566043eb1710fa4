"""Which matrices of a block see the same input, and in which order."""

from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from halve._compat.torch import tensor_version
from halve.errors import UnsupportedModelError
from halve.layout import PlannedBlock, PlannedMatrix
from halve.runtime.stream import Stream

Hook = Callable[[str, Tensor], object]


@dataclass(frozen=True)
class Group:
    """Matrices that share their input; the first stands for all.

    Attributes:
        matrices: In the order of the modules.
        calls: How often the first is called in one pass.
    """

    matrices: tuple[PlannedMatrix, ...]
    calls: int = 1

    @property
    def leader(self) -> str:
        """Path of the first matrix within its block."""
        return self.matrices[0].matrix.path

    @property
    def columns(self) -> int:
        """Width of the input."""
        return self.matrices[0].matrix.shape[1]


@contextmanager
def hooks(block: nn.Module, streams: Iterable[str], hook: Hook) -> Iterator[None]:
    """Call the hook with each module's path and input whenever it runs."""

    def watch(path: str) -> Any:  # noqa: ANN401
        def before(_: nn.Module, args: tuple[Any, ...]) -> None:
            hook(path, args[0])

        return before

    handles = [
        block.get_submodule(path).register_forward_pre_hook(watch(path))
        for path in streams
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def find_groups(stream: Stream, block: nn.Module, planned: PlannedBlock) -> list[Group]:
    """Run one window and see which modules are given the same tensor.

    Returns:
        The groups, in the order in which data meets them.

    Raises:
        UnsupportedModelError: A matrix is never used.
    """
    seen: dict[str, Tensor] = {}  # kept alive, so that no address is used twice
    calls: Counter[str] = Counter()

    def note(path: str, inputs: Tensor) -> None:
        seen.setdefault(path, inputs)
        calls[path] += 1

    with hooks(block, [m.matrix.path for m in planned.matrices], note):
        stream.run_first(block, planned.index)
    groups: dict[Any, list[PlannedMatrix]] = {_identity(seen[p]): [] for p in seen}
    for matrix in planned.matrices:
        if matrix.matrix.path not in seen:
            raise UnsupportedModelError(
                f"Matrix {matrix.tensor} takes no part when its block runs, so nothing "
                "can be learnt of its inputs.",
                "Open an issue that names the model.",
            )
        groups[_identity(seen[matrix.matrix.path])].append(matrix)
    return [
        Group(tuple(matrices), calls[matrices[0].matrix.path])
        for matrices in groups.values()
    ]


def stages(groups: list[Group], width: int) -> list[list[Group]]:
    """Return runs of groups that are pruned on the inputs of one pass.

    A group feeds the next one, which must wait for it, but for a group whose single
    matrix is as high as hidden states are wide: such a matrix only adds to them, as an
    attention's output does, and what is added moves them little.

    Args:
        groups: In the order in which data meets them.
        width: Of hidden states.
    """
    runs: list[list[Group]] = []
    waits = True
    for group in groups:
        if waits:
            runs.append([])
        runs[-1].append(group)
        heights = [matrix.matrix.shape[0] for matrix in group.matrices]
        waits = heights != [width]
    return runs


def _identity(tensor: Tensor) -> tuple[Any, ...]:
    version = tensor_version(tensor)
    return (tensor.data_ptr(), tensor.shape[-1], tensor.numel(), version)
