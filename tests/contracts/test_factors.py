"""The factor of an inverse, in one piece and in several."""

import pytest
import torch

from halve.solvers import factors

# Columns, the largest square for LAPACK, and a strip, of which that is a multiple.
CUTS = [(1, 64, 16), (40, 64, 16), (64, 64, 16), (65, 64, 16), (200, 64, 32)]


def positive(columns):
    generator = torch.Generator().manual_seed(columns)
    inputs = torch.randn(2 * columns, columns, generator=generator)
    return inputs.T @ inputs + columns * torch.eye(columns)


@pytest.fixture(params=CUTS, ids=str)
def matrix(request, monkeypatch):
    columns, square, strip = request.param
    monkeypatch.setattr(factors, "_SQUARE", square)
    monkeypatch.setattr(factors, "_STRIP", strip)
    return positive(columns)


def test_the_factor_is_that_of_the_inverse_and_lies_in_its_place(matrix):
    own = matrix.clone()
    found = factors.inverse_factor(own)
    assert found is not None
    assert found.data_ptr() == own.data_ptr()
    assert torch.equal(found, found.triu())
    wanted = torch.linalg.cholesky(torch.linalg.inv(matrix.double())).mT
    assert torch.allclose(found.abs().double(), wanted.abs(), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("where", [0, 0.5, -1])
def test_what_is_not_positive_keeps_all_below_its_diagonal(matrix, where):
    place = int(where * len(matrix)) if where > 0 else where
    matrix[place, place] = -5
    own = matrix.clone()
    assert factors.inverse_factor(own) is None
    assert torch.equal(own.tril(-1), matrix.tril(-1))
