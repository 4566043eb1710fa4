"""The interfaces of linear layers and embeddings whose weight stays packed.

The layers are the same on every device: operators choose the kernels. What only one
device needs is made by `prepare_device`.
"""

from abc import ABC, abstractmethod
from typing import Any

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from halve._compat.torch import buffer_slots, tensor_version
from halve.formats import PackedMatrix
from halve.runtime.cuda.side_index import tile_kept, word_starts
from halve.runtime.cuda.support import runs_kernels

# Unsigned dtype -> signed one of the same width: torch cannot unpickle the former.
_SIGNED = {
    torch.uint64: torch.int64,
    torch.uint32: torch.int32,
    torch.uint16: torch.int16,
}
# The entry of a pickled state that lists the buffers that were unsigned.
_UNSIGNED = "unsigned_buffers"


class _PackedModule(nn.Module, ABC):
    """What packed layers and embeddings have in common.

    Attributes:
        weight: The part without a suffix.
    """

    weight: nn.Parameter

    @property
    @abstractmethod
    def packed(self) -> PackedMatrix:
        """The module's tensors as a packed matrix."""

    @property
    def is_supported(self) -> bool:
        """Whether the module should stay packed: not on a GPU without kernels.

        Its results would be right there, but each product would unpack the matrix.
        """
        device = self.weight.device
        return device.type != "cuda" or runs_kernels(device, self.packed.dtype)

    def prepare_device(self) -> None:
        """Make what the kernels of the weight's device need, if it is missing.

        To be called where tensors may have arrived on another device, unless by
        `Module.to`, which does so itself.
        """

    def __getstate__(self) -> dict[str, Any]:
        """Return what is pickled: unsigned buffers as signed ones."""
        named = dict(self.named_buffers(recurse=False))
        unsigned = {n: b.dtype for n, b in named.items() if b.dtype in _SIGNED}
        views = {name: named[name].view(_SIGNED[unsigned[name]]) for name in unsigned}
        state = dict(self.__dict__)
        state["_buffers"] = state["_buffers"] | views
        return state | {_UNSIGNED: unsigned}

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Take over a pickled state."""
        unsigned = state.pop(_UNSIGNED, {})
        super().__setstate__(state)
        buffers = buffer_slots(self)
        for name, dtype in unsigned.items():
            buffer = buffers[name]
            assert buffer is not None
            buffers[name] = buffer.view(dtype)


class PackedLinear(_PackedModule):
    """`y = x W.T + bias` for a packed W; replaces nn.Linear and Conv1D.

    The parts of the matrix have the same names as in a file, so a state dict is loaded
    from it and saved to it unchanged: the part without a suffix is the parameter
    `weight`, and each companion a buffer, such as `weight_mask`. The weight is not
    trainable; gradients pass to the input and the bias.

    Attributes:
        in_features: Columns of W.
        out_features: Rows of W.
        transposed: Whether the dense weight is stored as [in_features, out_features].
        weight: The part without a suffix.
        bias: [out_features], or None.
    """

    bias: nn.Parameter | None

    def __init__(self, packed: PackedMatrix, bias: nn.Parameter | None = None) -> None:
        super().__init__()
        rows, columns = packed.shape[::-1] if packed.transposed else packed.shape
        self.in_features = columns
        self.out_features = rows
        self.transposed = packed.transposed
        self.bias = bias
        _register_parts(self, packed)

    def forward(self, x: Tensor, bias: Tensor | None = None) -> Tensor:
        """Multiply [..., in_features] to [..., out_features].

        Args:
            x: Inputs.
            bias: [out_features], in the place of the layer's own.
        """
        return self.multiply(x, self.bias if bias is None else bias)

    @abstractmethod
    def multiply(self, x: Tensor, bias: Tensor | None) -> Tensor:
        """Multiply [..., in_features] to [..., out_features], and add a bias."""

    def dense_weight(self) -> Tensor:
        """Return W, dense, [out_features, in_features]."""
        weight = self.packed.unpack()
        return weight.T.contiguous() if self.transposed else weight

    def to_dense(self) -> nn.Module:
        """Return the nn.Linear or Conv1D that the layer replaced, bias shared."""
        rows, columns = self.out_features, self.in_features
        with torch.device("meta"):
            dense = (
                Conv1D(rows, columns) if self.transposed else nn.Linear(columns, rows)
            )
        dense.weight = nn.Parameter(self.packed.unpack(), requires_grad=False)
        dense.register_parameter("bias", self.bias)
        return dense

    def extra_repr(self) -> str:
        """Show the shape."""
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, "
            f"bias={self.bias is not None}"
        )


class PackedEmbedding(_PackedModule):
    """A lookup of rows of a packed matrix; replaces nn.Embedding.

    Its tensors are named as those of `PackedLinear`.

    Attributes:
        num_embeddings: Rows of the matrix.
        embedding_dim: Columns.
        weight: The part without a suffix.
    """

    padding_idx: int | None = None

    def __init__(self, packed: PackedMatrix) -> None:
        super().__init__()
        self.num_embeddings, self.embedding_dim = packed.shape
        _register_parts(self, packed)

    @abstractmethod
    def forward(self, input: Tensor) -> Tensor:
        """Return the rows of token ids [...], [..., embedding_dim]."""

    def to_dense(self) -> nn.Module:
        """Return the nn.Embedding that the layer replaced."""
        with torch.device("meta"):
            dense = nn.Embedding(self.num_embeddings, self.embedding_dim)
        dense.weight = nn.Parameter(self.packed.unpack(), requires_grad=False)
        return dense

    def extra_repr(self) -> str:
        """Show the shape, and how the matrix is stored."""
        return f"{self.num_embeddings}, {self.embedding_dim}, {self.packed.label}"


def _register_parts(module: nn.Module, packed: PackedMatrix) -> None:
    """Register the parts of a matrix under the names that they have in a file."""
    parts = packed.parts
    module.weight = nn.Parameter(parts.pop(""), requires_grad=False)
    for suffix, part in parts.items():
        module.register_buffer(f"weight{suffix}", part)


class IndexedMask(nn.Module):
    """The side index of a mask, which kernels on a GPU need.

    It is made where the module arrives on the GPU, and is in no file.

    Attributes:
        weight_starts: Stored values of a row before each mask word, [rows, words]; None
            where no kernels run that need it. A buffer that is not persistent.
        tile_kept: Most stored values in a tile, as `side_index` counts them; 0 without
            the index.
    """

    weight_starts: Tensor | None

    def expect_index(self) -> None:
        """Register the index as missing; for constructors."""
        self.register_buffer("weight_starts", None, persistent=False)
        self.tile_kept = 0
        # The mask that the index belongs to, as `_identity` returns it.
        self._indexed: tuple[int, int] | None = None

    def index_mask(self, mask: Tensor) -> None:
        """Make the index of a mask, [rows, words], unless it is there.

        Cost:
            See `side_index`; one synchronization if the index is made.
        """
        if _identity(mask) == self._indexed:
            return
        # Not inference tensors, which could not be saved for a gradient later.
        with torch.inference_mode(False):
            self.weight_starts = word_starts(mask)
            self.tile_kept = tile_kept(mask)
        self._indexed = _identity(mask)

    def drop_index(self) -> None:
        """Forget the index."""
        if self._indexed is not None:
            self.weight_starts = self._indexed = None
            self.tile_kept = 0


def _identity(mask: Tensor) -> tuple[int, int]:
    """Return what changes if a mask is replaced, moved or written to."""
    version = 0 if mask.is_inference() else tensor_version(mask)
    return mask.data_ptr(), version


def wants_gradient(*tensors: Tensor | None) -> bool:
    """Whether autograd records an operation on these tensors."""
    return torch.is_grad_enabled() and any(
        tensor is not None and tensor.requires_grad for tensor in tensors
    )
