"""Errors of outputs: overall, and of each token by its own size."""

import pytest
import torch

from halve.pruning.observe.output_error import OutputDeviation, relative_squares


def problem(tokens=40, width=8, noise=0.1):
    torch.manual_seed(0)
    targets = torch.randn(2, tokens, width)
    return targets + noise * torch.randn(2, tokens, width), targets


def plain(outputs, targets):
    """Each token by itself, in float64."""
    return torch.tensor(
        [
            float((o - t).double().norm() / t.double().norm()) ** 2
            for o, t in zip(outputs.flatten(0, 1), targets.flatten(0, 1), strict=True)
        ]
    )


def test_the_errors_are_those_of_single_tokens():
    outputs, targets = problem()
    expected = plain(outputs, targets)
    found = relative_squares(outputs, targets)
    assert found.shape == (2, 40)
    assert torch.allclose(found.flatten(), expected, rtol=1e-5)
    error = OutputDeviation.of(outputs, targets)
    assert error.by_token == pytest.approx(float(expected.mean().sqrt()), rel=1e-5)
    overall = (outputs - targets).norm() / targets.norm()
    assert error.overall == pytest.approx(float(overall), rel=1e-6)


def test_scaling_tokens_changes_no_error():
    outputs, targets = problem()
    scales = torch.logspace(-2, 0, 80).view(2, 40, 1)
    found = relative_squares(scales * outputs, scales * targets)
    assert torch.allclose(found, relative_squares(outputs, targets), rtol=1e-4)


def test_a_large_token_hides_the_others_from_the_overall_error_only():
    outputs, targets = problem(noise=0.25)
    usual = OutputDeviation.of(outputs, targets)
    targets[0, 0] *= 300
    outputs[0, 0] = targets[0, 0]  # reproduced exactly
    found = OutputDeviation.of(outputs, targets)
    assert found.overall < 0.1 * usual.overall
    assert found.by_token == pytest.approx(usual.by_token, rel=0.02)


def test_tokens_of_zeros_have_finite_errors_and_gradients():
    outputs, targets = problem()
    targets[0, :3] = 0
    outputs[0, 1] = 0
    outputs.requires_grad_(True)
    found = relative_squares(outputs, targets)
    found.mean().backward()
    assert found.isfinite().all()
    assert outputs.grad is not None
    assert outputs.grad.isfinite().all()
    assert found[0, 1] == 0 < found[0, 0]
    nothing = torch.zeros(1, 4, 8)
    assert (relative_squares(nothing, nothing) == 0).all()
