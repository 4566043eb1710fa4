"""Retry with smaller batches when the memory of a device is exhausted."""

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
    """Run a piece of work; on an out-of-memory error, retry with half the batch size.

    After a retry, sums over batches are rounded differently, and block reconstruction
    takes more steps on fewer tokens each: the result is as good, but not the same to
    the bit.

    Args:
        model: The model, with the batch size of the first attempt.
        length: The number of tokens in a window; a batch has at least one window.
        work: What to run; it is called with a model and must support being restarted.

    Raises:
        HalveError: The memory does not suffice for a single window.

    Warns:
        HalveWarning: Whenever the batch size is halved.
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
        # Outside the handler, where the error still references the tensors of its
        # frames.
        model = _with_half_the_batch(model)


def _with_half_the_batch(model: BlockwiseModel) -> BlockwiseModel:
    gc.collect()
    if model.device.type == "cuda":
        torch.cuda.empty_cache()
    tokens = model.batch_tokens // 2
    warnings.warn(
        f"The memory of {model.device} is exhausted; retrying with {tokens} tokens per "
        "batch, half as many as before.",
        HalveWarning,
        stacklevel=3,
    )
    # Hidden states leave the GPU as well: on the host they cost little time.
    return replace(model, batch_tokens=tokens, reserve=None)
