"""A model with all of its weights in memory, as transformers' own class calls it."""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

from torch import Tensor

from halve.numerics.matmul import FastMatmul
from halve.runtime.blockwise_model import BlockwiseModel


@contextmanager
def whole_model(model: BlockwiseModel) -> Iterator[Any]:
    """Load a model whole for the duration of the context.

    Weights are held as `BlockwiseModel.block` holds them: 16-bit matrices of linear
    layers keep their dtype, all else is float32. Experts are linear layers of their
    own.

    Yields:
        The model, of one of transformers' classes.
    """
    with ExitStack() as loaded:
        loaded.enter_context(model.surroundings(with_head=True))
        for index in range(model.depth):
            loaded.enter_context(model.block(index))
        yield model.meta_model.model


def logits_of(model: BlockwiseModel, ids: Tensor, *, mixed: bool = False) -> Tensor:
    """Return the logits of a model that is loaded whole, [windows, length, vocabulary].

    They are differentiable if gradients are enabled.

    Args:
        model: The model.
        ids: Token ids, [windows, length], on any device.
        mixed: Whether bfloat16 is precise enough, as in `numerics.matmul.mixed_linear`.
    """
    with FastMatmul(mixed=mixed), model.running():
        network = model.meta_model.model
        return network(ids.to(model.device), use_cache=False).logits
