"""Estimate how long a run will take, from the speed of matrix products here."""

import statistics
import time
from functools import partial

import torch
from torch import Tensor

from halve.numerics.matmul import linear
from halve.pruning.memory.forecast import Forecast
from halve.runtime.cuda.clock import gpu_seconds

# Size of the square product that is timed, and how many times. On a GPU a small one
# would measure how long a launch takes.
_SIZE, _GPU_SIZE, _ROUNDS = 1024, 8192, 5
# Width of hidden states at which products take half the time of a run, measured:
# docs/log.md. Their operations grow with the square of the width; the rest (attention,
# copies, files) grows with the width.
_HALF_TIME_WIDTH = 300
# Imports, tokenizer and text, and the least that a block takes, measured in processor
# time with a model of 0.4 million weights: docs/log.md.
_START_SECONDS, _BLOCK_SECONDS = 10.0, 0.1


def estimate_seconds(forecast: Forecast, device: torch.device) -> float:
    """Return about how many seconds a run will take on this machine.

    What is not a product is accounted for by the width alone, so the estimate may be
    off by a factor of two either way.

    Cost:
        A tenth of a second; on a GPU a little more, and 768 MiB of its memory.
    """
    speed = _operations_per_second(device)
    computing = forecast.operations / speed * (1 + _HALF_TIME_WIDTH / forecast.width)
    return _START_SECONDS + _BLOCK_SECONDS * forecast.blocks + computing


def _operations_per_second(device: torch.device) -> float:
    """Return the multiplications and additions per second of a large product."""
    on_gpu = device.type == "cuda"
    size = _GPU_SIZE if on_gpu else _SIZE
    square = torch.randn(size, size, device=device)
    if on_gpu:
        multiply = partial(linear, square, square)
        multiply()  # sets up the library, and wakes the GPU
        times = [gpu_seconds(multiply, device) for _ in range(_ROUNDS)]
    else:
        times = [_seconds(square) for _ in range(_ROUNDS)]
    return 2 * size**3 / statistics.median(times)


def _seconds(square: Tensor) -> float:
    started = time.perf_counter()
    linear(square, square)
    return time.perf_counter() - started
