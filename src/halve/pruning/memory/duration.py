"""How long a run will take, by this machine's speed in products."""

import statistics
import time

import torch

from halve.numerics.matmul import linear
from halve.pruning.memory.forecast import Forecast

# A product to measure a machine by, and how often.
_SQUARE, _ROUNDS = 1024, 5
# Width of the model of which products take half the time, measured: docs/log.md. They
# grow with its square; what else is done with a token grows with the width itself.
_EVEN_WIDTH = 300


def estimate_seconds(forecast: Forecast, device: torch.device) -> float:
    """Return about how long a run will take, by this machine's speed in products.

    Costs a tenth of a second. What is no product (attention, copies, files) is allowed
    for by the width alone, so that a factor of two either way is to be expected.
    """
    square = torch.randn(_SQUARE, _SQUARE, device=device)
    times: list[float] = []
    for _ in range(_ROUNDS):
        started = time.perf_counter()
        float(linear(square, square)[0, 0])  # waits for the device
        times.append(time.perf_counter() - started)
    speed = 2 * _SQUARE**3 / statistics.median(times)
    return forecast.operations / speed * (1 + _EVEN_WIDTH / forecast.width)
