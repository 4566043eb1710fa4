"""The sizes of steps: by the scale of each parameter, and by how much is done."""

import math

import pytest
import torch

from halve.numerics.learning_rate import parameter_scales, rate_factor


@pytest.mark.parametrize("steps", [1, 2, 9, 10, 11, 100])
def test_rates_rise_over_a_tenth_of_the_steps_and_end_at_a_twentieth(steps):
    rates = [rate_factor((step + 1) / steps) for step in range(steps)]
    peak = rates.index(max(rates))
    assert peak <= steps / 10
    assert min(rates) > 0  # no step does nothing
    assert rates[: peak + 1] == sorted(rates[: peak + 1])
    assert rates[peak:] == sorted(rates[peak:], reverse=True)
    assert rates[-1] == pytest.approx(0.05)
    assert max(rates) <= 1


def test_scales_are_those_of_weights_that_are_kept():
    weight = torch.tensor([[3.0, 0.0], [0.0, -4.0]])
    values = {"w": weight, "small": weight / 10, "norm": torch.full((2,), 30.0)}
    values["bias"] = torch.zeros(2)
    scales = parameter_scales(values, {"w", "small"})
    root = math.sqrt((9 + 16) / 2)
    expected = {"w": root, "small": root / 10, "norm": 30.0, "bias": root / 10}
    assert scales == pytest.approx(expected)


def test_without_matrices_all_vectors_move():
    values = {"norm": torch.tensor([0.0, 0.5]), "bias": torch.zeros(3)}
    assert parameter_scales(values, ()) == {"norm": 0.5, "bias": 0.5}
