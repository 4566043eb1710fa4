"""Groups of matrices of a block that get the same input, and the order to prune them.

Matrices of a group (such as the projections to queries, keys and values) share one Gram
matrix. Groups are found by running the block, so no model family needs code here.
"""

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

# Groups of one width that a block has, at most, as far as the forecast knows: inputs of
# the attention, of its output projection, and of the feed-forward network.
_GROUPS = 3
# Groups in a stage, at most, in the families that are known; see `stages`.
MAX_GROUPS_PER_STAGE = 2


@dataclass(frozen=True)
class Group:
    """Matrices that get the same input.

    Attributes:
        matrices: The matrices, in the order of their modules.
        calls: How often the first of them is called in one forward pass.
    """

    matrices: tuple[PlannedMatrix, ...]
    calls: int = 1

    @property
    def leader(self) -> str:
        """Path of the first matrix within its block; identifies the group."""
        return self.matrices[0].matrix.path

    @property
    def columns(self) -> int:
        """Width of the input, in_features."""
        return self.matrices[0].matrix.shape[1]


@dataclass(frozen=True)
class RoutedGroup:
    """All experts of a module; a router sends some of the tokens to each.

    Attributes:
        leader: Path of the module within its block.
        experts: The matrices of each expert, in the order of computation.
        calls: How often the module is called in one forward pass.
    """

    leader: str
    experts: tuple[tuple[PlannedMatrix, ...], ...]
    calls: int = 1

    @property
    def columns(self) -> int:
        """Width of the experts' inputs."""
        return self.experts[0][0].matrix.shape[1]

    @property
    def inner(self) -> int:
        """Width of the inputs of each expert's last matrix."""
        return self.experts[0][-1].matrix.shape[1]


def routed_groups(planned: PlannedBlock) -> list[RoutedGroup]:
    """Return the modules of experts of a block."""
    return [RoutedGroup(path, every) for path, every in planned.experts.items()]


def expected_groups(planned: PlannedBlock) -> Counter[int]:
    """Return columns -> number of groups of that width, without running the block.

    Those of experts are not counted (`routing`).
    The number is an upper bound: matrices of one width are taken for separate groups,
    up to three.
    """
    matrices = Counter(m.matrix.shape[1] for m in planned.outside_experts)
    return Counter({c: min(count, _GROUPS) for c, count in matrices.items()})


@contextmanager
def hooks(block: nn.Module, paths: Iterable[str], hook: Hook) -> Iterator[None]:
    """Call a hook with a module's path and input before each of its calls.

    Args:
        block: The block.
        paths: Paths of the modules.
        hook: Called with a path and the module's first argument.
    """

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
    """Run one window through a block and see which modules get the same tensor.

    Experts are left out: one window need not reach all of them (`routing`).

    Returns:
        The groups, in the order in which they are computed.

    Raises:
        UnsupportedModelError: A matrix is never used.
    """
    # Holding the tensors ensures that no address is reused, and identifies two of them.
    seen: dict[str, Tensor] = {}
    calls: Counter[str] = Counter()

    def note(path: str, inputs: Tensor) -> None:
        seen.setdefault(path, inputs)
        calls[path] += 1

    matrices = planned.outside_experts
    with hooks(block, [m.matrix.path for m in matrices], note):
        stream.run_first(block, planned.index)
    groups: dict[Any, list[PlannedMatrix]] = {_identity(seen[p]): [] for p in seen}
    for matrix in matrices:
        if matrix.matrix.path not in seen:
            raise UnsupportedModelError(
                f"The layer of {matrix.name} is not called when its block runs, so "
                "there are no inputs to calibrate the matrix on.",
                "Pass --solver magnitude, which needs none.",
            )
        groups[_identity(seen[matrix.matrix.path])].append(matrix)
    return [
        Group(tuple(matrices), calls[matrices[0].matrix.path])
        for matrices in groups.values()
    ]


def stages(groups: list[Group], width: int) -> list[list[Group]]:
    """Cut the groups into stages, whose statistics are collected in one pass.

    A group's solution changes the inputs of the next group, so a stage normally ends
    with each group. The exception is a group whose only matrix has as many rows as
    hidden states are wide, such as the output projection of the attention. Its output
    is added to the residual stream, which it changes little, so the group that follows
    shares its pass.

    Args:
        groups: Groups in the order in which they are computed.
        width: Width of hidden states.
    """
    stages_: list[list[Group]] = []
    starts_stage = True
    for group in groups:
        if starts_stage:
            stages_.append([])
        stages_[-1].append(group)
        rows = [matrix.matrix.shape[0] for matrix in group.matrices]
        starts_stage = rows != [width]
    return stages_


def _identity(tensor: Tensor) -> tuple[Any, ...]:
    """Return what two tensors have in common if they hold the same values for sure.

    The version counts changes in place: the same memory may hold two inputs in turn.
    """
    return (tensor.data_ptr(), tensor.shape[-1], tensor.numel(), tensor_version(tensor))
