"""Where the memory of a device is exhausted: half of the batch, and go on."""

import gc
import warnings
from collections.abc import Callable
from dataclasses import replace
from typing import TypeVar

import torch

from halve.errors import HalveError, HalveWarning
from halve.runtime.blockwise_model import BlockwiseModel

Result = TypeVar("Result")


def with_smaller_batches(
    model: BlockwiseModel, length: int, work: Callable[[BlockwiseModel], Result]
) -> Result:
    """Do a piece of work; where memory is exhausted, again with half of the batch.

    Sums over batches are rounded otherwise then, and refining takes more steps, each on
    fewer tokens: the result is as good, but not the same to the bit.

    Args:
        model: As it is for the first attempt.
        length: Tokens in a window; a batch has one at least.
        work: Given a model; must be such that it can be begun anew.

    Raises:
        HalveError: The memory does not suffice for one window.

    Warns:
        HalveWarning: Of every halving.
    """
    while True:
        try:
            return work(model)
        except torch.OutOfMemoryError as error:
            if model.batch_tokens < 2 * length:
                raise HalveError(
                    f"The memory of {model.device} is exhausted by one window of "
                    f"{length} tokens.",
                    "Pass a shorter --seq-len, or --device cpu.",
                ) from error
        model = _halved(model)  # no sooner: the error holds the tensors of its frames


def _halved(model: BlockwiseModel) -> BlockwiseModel:
    gc.collect()
    if model.device.type == "cuda":
        torch.cuda.empty_cache()
    tokens = model.batch_tokens // 2
    warnings.warn(
        f"The memory of {model.device} is exhausted; going on with {tokens} tokens at "
        "once, half as many as before.",
        HalveWarning,
        stacklevel=3,
    )
    return replace(model, batch_tokens=tokens)
