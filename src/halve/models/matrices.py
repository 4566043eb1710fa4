"""The prunable matrices of a block, all seen as [rows = outputs, columns = inputs]."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from halve.errors import UnsupportedModelError
from halve.models.experts import ExpertLayers, is_router, refuse_unknown_experts


@dataclass(frozen=True)
class Matrix:
    """A matrix that multiplies hidden states.

    Attributes:
        path: The name of its module within the block, such as `self_attn.q_proj`.
        shape: [rows, columns], which is [outputs, inputs].
        transposed: Whether it is stored as [columns, rows], as GPT-2's Conv1D does.
        plain: Whether its module is of torch's or transformers' class (`is_plain`).
        expert: Number of the expert that it belongs to; None where it belongs to none.
    """

    path: str
    shape: tuple[int, int]
    transposed: bool
    plain: bool
    expert: int | None = None

    @property
    def experts(self) -> str | None:
        """Path of the module of experts that it belongs to; None where to none."""
        return None if self.expert is None else self.path.rsplit(".", 2)[0]

    def as_rows(self, stored: Tensor) -> Tensor:
        """Convert between the stored layout and [rows, columns]; returns a view.

        The conversion is its own inverse: `as_rows(as_rows(x)) == x`.
        """
        return stored.T if self.transposed else stored


def prunable_matrices(
    block: nn.Module, name: str, experts: Mapping[str, ExpertLayers] | None = None
) -> list[Matrix]:
    """Return the linear layers of a block in the order of its modules.

    Routers and gates of a mixture of experts are left out: they decide where tokens go,
    and hold one row for each expert.

    Args:
        block: A decoder block; its parameters may be on the meta device.
        name: The block's name, for error messages.
        experts: Path of each module of experts within the block -> its layers
            (`TensorMap.experts_of`).

    Raises:
        UnsupportedModelError: There is none, or experts of a form that is not known.
    """
    refuse_unknown_experts(block, name)
    matrices = list(_matrices(block, experts or {}))
    if not matrices:
        raise UnsupportedModelError(
            f"Block {name} ({type(block).__name__}) has nothing to prune: it contains "
            "neither nn.Linear nor Conv1D.",
            "Open an issue that names the model.",
        )
    return matrices


def _matrices(
    block: nn.Module, experts: Mapping[str, ExpertLayers]
) -> Iterator[Matrix]:
    for path, module in block.named_modules():
        if path in experts:
            yield from _experts_matrices(path, experts[path])
        elif not isinstance(module, nn.Linear | Conv1D):
            continue
        elif not is_router(path, module, experts):
            yield _matrix(path, module)


def _experts_matrices(path: str, experts: ExpertLayers) -> Iterator[Matrix]:
    """Yield the matrices of a module of experts, expert after expert."""
    for number in range(experts.count):
        for layer in experts.layers:
            inner = f"{path}.{number}.{layer.name}"
            yield Matrix(inner, layer.shape, layer.transposed, True, number)


def is_plain(module: nn.Module) -> bool:
    """Whether a module is exactly torch's nn.Linear or transformers' Conv1D.

    A subclass may read the dtype of its matrix, or multiply in another way.
    """
    return type(module) in (nn.Linear, Conv1D)


def _matrix(path: str, module: nn.Module) -> Matrix:
    weight = module.weight
    assert isinstance(weight, Tensor)
    transposed = isinstance(module, Conv1D)
    first, second = weight.shape
    shape = (second, first) if transposed else (first, second)
    return Matrix(path, shape, transposed, is_plain(module))
