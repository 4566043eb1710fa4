"""Estimate how long a run will take, from the speed of matrix products here."""

import statistics
import time

import torch

from halve.numerics.matmul import linear
from halve.pruning.memory.forecast import Forecast

# Size of the square product that is timed, and how many times.
_SIZE, _ROUNDS = 1024, 5
# Width of hidden states at which products take half the time of a run, measured:
# docs/log.md. Their operations grow with the square of the width; the rest (attention,
# copies, files) grows with the width.
_HALF_TIME_WIDTH = 300


def estimate_seconds(forecast: Forecast, device: torch.device) -> float:
    """Return about how many seconds a run will take on this machine.

    What is not a product is accounted for by the width alone, so the estimate may be
    off by a factor of two either way.

    Cost:
        A tenth of a second.
    """
    square = torch.randn(_SIZE, _SIZE, device=device)
    times: list[float] = []
    for _ in range(_ROUNDS):
        started = time.perf_counter()
        float(linear(square, square)[0, 0])  # waits for the device
        times.append(time.perf_counter() - started)
    speed = 2 * _SIZE**3 / statistics.median(times)  # operations per second
    return forecast.operations / speed * (1 + _HALF_TIME_WIDTH / forecast.width)
