"""The pruned model in memory: what is trained, what stays zero, what is stored.

All parameters of the blocks are trained, with those of the final norm. Embeddings, the
output head, and matrices that lie on a quantization grid keep their values; parameters
that are used in several places as well.
"""

from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from halve.layout import Layout
from halve.numerics.matmul import FastMatmul
from halve.runtime.blockwise_model import BlockwiseModel
from halve.runtime.keep_zeros import set_zeros
from halve.runtime.whole_model import whole_model
from halve.system import available_memory

# Bytes of each trained parameter beside its value: gradient and Adam's two moments.
_TRAINING_NBYTES = 12


@dataclass(frozen=True)
class Student:
    """A model that is loaded whole, with float32 copies of what is trained.

    Attributes:
        model: The model.
        parameters: Name -> parameter that is trained, float32.
        dtypes: Name -> the dtype in which the parameter is stored.
        zeros: Name of a prunable matrix among them -> True where it stays zero.
    """

    model: BlockwiseModel
    parameters: dict[str, nn.Parameter]
    dtypes: dict[str, torch.dtype]
    zeros: dict[str, Tensor]

    @property
    def count(self) -> int:
        """Number of parameters that are trained, zeros included."""
        return sum(parameter.numel() for parameter in self.parameters.values())

    def apply_zeros(self) -> None:
        """Set to zero again what an optimizer's step has moved."""
        for name, zeros in self.zeros.items():
            set_zeros(self.parameters[name].data, zeros)

    def apply_zeros_to_gradients(self) -> None:
        """Set the gradients of zeros to zero, so that no moment moves them."""
        for name, zeros in self.zeros.items():
            gradient = self.parameters[name].grad
            assert gradient is not None, "every parameter has taken part in the loss"
            set_zeros(gradient, zeros)

    def backward(self, logits: Tensor, gradient: Tensor) -> None:
        """Add to the gradients of the parameters, given that of the model's logits."""
        with self.model.running():  # blocks are run again
            logits.backward(gradient)

    @torch.no_grad()
    def as_stored(self) -> dict[str, Tensor]:
        """Return copies of the parameters in the dtypes of the output.

        A kept weight that would be rounded to zero becomes the smallest normal number
        of its dtype instead: the output has exactly the zeros of the input.
        """
        return {
            name: _rounded(parameter.data, self.dtypes[name], self.zeros.get(name))
            for name, parameter in self.parameters.items()
        }

    @contextmanager
    def holding(self, values: Mapping[str, Tensor]) -> Iterator[None]:
        """Let the model compute with other values for the duration of the context."""
        own = {name: parameter.data for name, parameter in self.parameters.items()}
        try:
            for name, parameter in self.parameters.items():
                parameter.data = values[name].to(torch.float32)
            yield
        finally:
            for name, parameter in self.parameters.items():
                parameter.data = own[name]


def _rounded(values: Tensor, dtype: torch.dtype, zeros: Tensor | None) -> Tensor:
    stored = values.to(dtype, copy=True)
    if zeros is None:
        return stored
    smallest = torch.full_like(stored, torch.finfo(dtype).smallest_normal)
    lost = (stored == 0) & ~zeros
    return torch.where(lost, smallest.copysign(stored), stored)


@contextmanager
def load_student(
    model: BlockwiseModel, layout: Layout, unchanged: set[str], length: int
) -> Iterator[Student]:
    """Load a model to be trained, for the duration of the context.

    Args:
        model: The pruned model.
        layout: Its matrices.
        unchanged: Names of the matrices that are not trained.
        length: Number of tokens in a window.
    """
    with whole_model(model) as network, ExitStack() as changes:
        matrices = {
            f"{block.name}.{planned.matrix.path}.weight": planned.name
            for block in layout.blocks
            for planned in block.matrices
        }
        dtypes = {
            name: dtype
            for name, dtype in _trainable(model).items()
            if matrices.get(name) not in unchanged
        }
        parameters: dict[str, nn.Parameter] = {}
        zeros: dict[str, Tensor] = {}
        for name in dtypes:
            parameter = parameters[name] = network.get_parameter(name)
            if name in matrices:
                zeros[name] = parameter.data == 0
            # Own memory: transformers' tensors may be views of the file's.
            parameter.data = parameter.data.to(torch.float32, copy=True)
        student = Student(model, parameters, dtypes, zeros)
        if not _activations_fit(student, length):
            changes.enter_context(_recomputing_blocks(model))
        yield student


def _trainable(model: BlockwiseModel) -> dict[str, torch.dtype]:
    """Return name -> stored dtype of what is trained."""
    found: dict[str, torch.dtype] = {}
    for index in range(model.depth):
        block = model.block_name(index)
        for path, dtype in model.own_dtypes(block).items():
            found[f"{block}.{path}"] = dtype
    return found | _vectors_outside(model)


def _vectors_outside(model: BlockwiseModel) -> dict[str, torch.dtype]:
    """Return the norms and biases outside the blocks, such as the final norm."""
    blocks = f"{model.meta_model.path}."
    parameters = dict(model.meta_model.model.named_parameters())
    found: dict[str, torch.dtype] = {}
    for name, place in model.places.items():
        info = model.checkpoint.tensors[place.tensor]
        outside = name in parameters and not name.startswith(blocks)
        if outside and len(info.shape) == 1 and info.dtype.is_floating_point:
            found[name] = info.dtype
    return found


def _activations_fit(student: Student, length: int) -> bool:
    """Whether the activations of all blocks can be kept for the backward pass.

    Running blocks again takes an eighth of a step, and changes no bit of the result. On
    a GPU batches fill the memory, so blocks are run again there.

    Args:
        student: The model, before any gradient or moment of it is in memory.
        length: Number of tokens in a window.
    """
    model = student.model
    kept = model.depth * model.batch_nbytes(model.batch(length) * length)
    free = available_memory() - _TRAINING_NBYTES * student.count
    return model.device.type == "cpu" and kept <= free // 4


@contextmanager
def _recomputing_blocks(model: BlockwiseModel) -> Iterator[None]:
    """Keep only the inputs of each block, and run it again in the backward pass."""
    blocks = list(model.meta_model.blocks)
    for block in blocks:
        block.forward = _recomputed(block.forward)
    try:
        yield
    finally:
        for block in blocks:
            del block.forward  # of the instance; that of the class is left


def _recomputed(forward: Any) -> Any:  # noqa: ANN401
    def run(*args: Any, **kwargs: Any) -> Any:  # noqa: ANN401
        if not torch.is_grad_enabled():
            return forward(*args, **kwargs)
        return checkpoint(computed, *args, use_reentrant=False, **kwargs)

    def computed(*args: Any, **kwargs: Any) -> Any:  # noqa: ANN401
        with FastMatmul():  # which `backward` has left when it runs the block again
            return forward(*args, **kwargs)

    return run
