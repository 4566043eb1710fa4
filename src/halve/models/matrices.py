"""The prunable matrices of a block, all seen as [rows = outputs, columns = inputs]."""

from dataclasses import dataclass

from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from halve.errors import UnsupportedModelError


@dataclass(frozen=True)
class Matrix:
    """A matrix that multiplies hidden states.

    Attributes:
        path: The module's name within its block, such as `self_attn.q_proj`.
        shape: [rows, columns].
        transposed: Whether it is stored as [columns, rows], as GPT-2's Conv1D does.
        plain: Whether its module is as `is_plain` says.
    """

    path: str
    shape: tuple[int, int]
    transposed: bool
    plain: bool

    def as_rows(self, stored: Tensor) -> Tensor:
        """Turn between the stored layout and [rows, columns]; a view, its own inverse.

        `as_rows(as_rows(x)) == x`.
        """
        return stored.T if self.transposed else stored


def prunable_matrices(block: nn.Module, name: str) -> list[Matrix]:
    """Return a block's linear layers in the order of their modules.

    Args:
        block: Parameters may lie on the meta device.
        name: The block's name, for errors.

    Raises:
        UnsupportedModelError: There is none, or experts are fused into one parameter.
    """
    _refuse_experts(block, name)
    found = [
        _matrix(path, module)
        for path, module in block.named_modules()
        if isinstance(module, nn.Linear | Conv1D)
    ]
    if not found:
        raise UnsupportedModelError(
            f"Block {name} ({type(block).__name__}) has nothing to prune: no nn.Linear "
            "and no Conv1D was found in it.",
            "Open an issue that names the model.",
        )
    return found


def is_plain(module: nn.Module) -> bool:
    """Whether a module multiplies by its matrix as torch or transformers do it.

    A class of its own may ask for the matrix's dtype, or multiply otherwise.
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
        fused = parameter.dim() == 3 and not isinstance(owner, nn.Conv1d)  # noqa: PLR2004
        if fused or "Experts" in type(owner).__name__ or "experts" in path.split("."):
            raise UnsupportedModelError(
                f"Block {name} ({type(block).__name__}) holds a mixture of experts "
                f"({path}, {list(parameter.shape)}), which is not supported yet.",
                "Name a model without experts; support for them is planned.",
            )
