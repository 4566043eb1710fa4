"""The prunable matrices of a block, all seen as [rows = outputs, columns = inputs]."""

from dataclasses import dataclass

from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from halve.errors import UnsupportedModelError


@dataclass(frozen=True)
class Matrix:
    """A matrix that multiplies hidden states.

    Attributes:
        path: The name of its module within the block, such as `self_attn.q_proj`.
        shape: [rows, columns], which is [outputs, inputs].
        transposed: Whether it is stored as [columns, rows], as GPT-2's Conv1D does.
        plain: Whether its module is of torch's or transformers' class (`is_plain`).
    """

    path: str
    shape: tuple[int, int]
    transposed: bool
    plain: bool

    def as_rows(self, stored: Tensor) -> Tensor:
        """Convert between the stored layout and [rows, columns]; returns a view.

        The conversion is its own inverse: `as_rows(as_rows(x)) == x`.
        """
        return stored.T if self.transposed else stored


def prunable_matrices(block: nn.Module, name: str) -> list[Matrix]:
    """Return the linear layers of a block in the order of its modules.

    Args:
        block: A decoder block; its parameters may be on the meta device.
        name: The block's name, for error messages.

    Raises:
        UnsupportedModelError: There is none, or experts are fused into one parameter.
    """
    _refuse_experts(block, name)
    matrices = [
        _matrix(path, module)
        for path, module in block.named_modules()
        if isinstance(module, nn.Linear | Conv1D)
    ]
    if not matrices:
        raise UnsupportedModelError(
            f"Block {name} ({type(block).__name__}) has nothing to prune: it contains "
            "neither nn.Linear nor Conv1D.",
            "Open an issue that names the model.",
        )
    return matrices


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


def _refuse_experts(block: nn.Module, name: str) -> None:
    for path, parameter in block.named_parameters():
        owner = block.get_submodule(path.rpartition(".")[0])
        # By name: convolutions, the gates of RecurrentGemma and the mixing weights of
        # RWKV have three dimensions as well. They are left dense.
        if "Experts" in type(owner).__name__ or "experts" in path.split("."):
            raise UnsupportedModelError(
                f"Block {name} ({type(block).__name__}) holds a mixture of experts "
                f"({path}, {list(parameter.shape)}), which is not supported yet.",
                "Use a model without experts; support for them is planned.",
            )
