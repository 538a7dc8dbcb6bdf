"""Gaussians by importance weights: where a known density has more mass than a mixture."""

import math

import pytest
import torch
from torch.distributions import Independent, MultivariateNormal, Normal

from pyro_recursive.bounds.missing_mass import missing_gaussians
from tests.oracles.quadrature import log_normal


def normals(loc: list[float], scale: list[float]) -> Independent:
    return Independent(Normal(torch.tensor(loc), torch.tensor(scale)), 1)


def test_the_missing_part_of_a_mixture_is_found() -> None:
    """Its place, covariance and the divergence with it, beside Q."""
    torch.manual_seed(0)
    q = normals([0.0, 0.0], [1.0, 1.0])
    part = MultivariateNormal(torch.tensor([1.5, -1.0]), torch.tensor([[0.16, 0.12], [0.12, 0.25]]))
    u = q.sample((4000,))
    log_q = q.log_prob(u)
    log_p = torch.logaddexp(log_q + math.log(0.7), part.log_prob(u) + math.log(0.3))
    loc, scale_tril = missing_gaussians(u, log_p + 5.0, log_q, 8)
    assert loc.shape == (8, 2) and scale_tril.shape == (8, 2, 2)
    covariance = scale_tril @ scale_tril.mT
    torch.testing.assert_close(loc, part.mean.expand(8, -1), atol=0.12, rtol=0.0)
    torch.testing.assert_close(
        covariance, part.covariance_matrix.expand(8, -1, -1), atol=0.08, rtol=0.0
    )


def test_two_missing_parts_are_both_among_those_found() -> None:
    torch.manual_seed(1)
    u = 2 * torch.randn(4000, 1)
    log_q, ends = log_normal(u[:, 0], 0.0, 2.0), torch.tensor([-3.0, 3.0])
    parts = log_normal(u, ends, 0.3)
    log_p = torch.cat([log_q[:, None] + math.log(0.8), parts + math.log(0.1)], -1).logsumexp(-1)
    loc, scale_tril = missing_gaussians(u, log_p, log_q, 16)
    distance = (loc - ends).abs()
    assert (distance.amin(0) < 0.15).all() and (distance.amin(1) < 0.5).all()
    assert (scale_tril.flatten() - 0.3).abs().max() < 0.15


def test_equal_densities_lack_nothing() -> None:
    u = torch.randn(1000, 3)
    log_q = Normal(0.0, 1.0).log_prob(u).sum(-1)
    assert missing_gaussians(u, log_q - 3.0, log_q, 4) is None


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_few_draws_in_many_dims_have_a_covariance(dtype: torch.dtype) -> None:
    u = torch.randn(60, 40, dtype=dtype)
    log_q = Normal(0.0, 1.0).log_prob(u).sum(-1)
    log_p = torch.where(u[:, 0] > 1.0, log_q + 5.0, log_q)
    log_p[:5] = -math.inf
    loc, scale_tril = missing_gaussians(u, log_p, log_q, 4)
    assert loc.dtype == dtype and scale_tril.diagonal(dim1=-2, dim2=-1).min() > 0.05
    assert loc[:, 0].min() > 0.9


def test_units_of_coordinates_change_nothing() -> None:
    torch.manual_seed(0)
    v = torch.randn(2000, 2)
    normal = torch.distributions.Normal(torch.zeros(2), 1.0)
    other = torch.distributions.Normal(torch.full((2,), 1.5), 0.3)
    log_q, log_other = (each.log_prob(v).sum(-1) for each in (normal, other))
    found = []
    for units in (torch.ones(2), torch.tensor([1e-2, 1e3])):
        torch.manual_seed(1)
        log_p = torch.logaddexp(log_q, log_other)
        gaussians = missing_gaussians(v * units, log_p, log_q - units.log().sum(), 4)
        assert gaussians is not None
        found.append((gaussians[0] / units, gaussians[1] / units[:, None]))
    for one, two in zip(*found, strict=True):
        assert torch.allclose(one, two, rtol=1e-3, atol=1e-3)
    assert missing_gaussians(v[:2], log_p[:2], torch.tensor([0.0, 9.0]), 4) is None
