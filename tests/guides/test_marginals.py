"""Densities of some entries of a vector, the others integrated out."""

from collections.abc import Callable
from typing import Any

import pyro.distributions as dist
import pytest
import torch
from torch import Tensor

from pyro_recursive.guides.gaussian_families import Diagonal, Full, LowRank
from pyro_recursive.guides.marginals import log_density
from pyro_recursive.guides.mixture_distributions import ListMixture, StackedMixture

D = 4
KEEP = torch.tensor(
    [[True, False, True, True], [True] * D, [False] * D, [False, False, True, True]]
)
FAMILIES = {"diagonal": Diagonal(), "low rank": LowRank(2), "full": Full()}


def moments(of: Any) -> tuple[Tensor, Tensor]:
    covariance = of.variance.diag_embed() if isinstance(of, dist.Independent) else None
    return of.mean, of.covariance_matrix if covariance is None else covariance


def by_hand(of: Any, u: Tensor, keep: Tensor) -> Tensor:
    """Return the log-density of the normal of the entries that are kept, row by row."""
    loc, covariance = moments(of)
    rows = []
    for m, c, x, k in zip(loc, covariance, u, keep, strict=True):
        if k.any():
            rows.append(dist.MultivariateNormal(m[k], c[k][:, k]).log_prob(x[k]))
        else:
            rows.append(x.new_zeros(()))
    return torch.stack(rows)


def params_of(family: Any, *batch: int) -> Tensor:
    torch.manual_seed(1)
    return (0.5 * torch.randn(*batch, family.num_parameters(D))).requires_grad_()


@pytest.mark.parametrize("name", FAMILIES)
def test_normals(name: str) -> None:
    """Value and gradients, at several values of each row, too."""
    family = FAMILIES[name]
    params, u = params_of(family, 4), torch.randn(4, D, requires_grad=True)
    found = []
    for density in (log_density, by_hand):
        each = density(family(params, D), u, KEEP)
        grads = torch.autograd.grad((each * torch.arange(1.0, 5)).sum(), [params, u])
        found.append(torch.cat([each.detach(), *map(torch.flatten, grads)]))
    torch.testing.assert_close(*found)
    wide = torch.randn(3, 1, 4, D)
    of = family(params, D)
    expected = torch.stack([by_hand(of, each[0], KEEP) for each in wide]).unsqueeze(1)
    torch.testing.assert_close(log_density(of, wide, KEEP), expected)
    torch.testing.assert_close(log_density(of, wide, None), of.log_prob(wide))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_full_covariances_that_are_nearly_singular(dtype: torch.dtype) -> None:
    """The product of the factor with itself has no Cholesky factor in float32."""
    factor = torch.tensor([[1.0, 0.0, 0.0], [1.0, 1e-5, 0.0], [1.0, 1e-5, 1e-5]], dtype=dtype)
    of = dist.MultivariateNormal(torch.zeros(3, dtype=dtype), scale_tril=factor)
    u, keep = torch.tensor([0.5, 0.0, 0.50002], dtype=dtype), torch.tensor([True, False, True])
    # u_3 | u_1 ~ N(u_1, 2e-10)
    expected = dist.Normal(0.0, 1.0).log_prob(u[0]) + dist.Normal(0.0, 2e-10**0.5).log_prob(
        u[2] - u[0]
    )
    torch.testing.assert_close(log_density(of, u, keep), expected.to(dtype), rtol=1e-2, atol=0.0)


def stacked(log_weights: Tensor, params: Tensor) -> Any:
    return StackedMixture(log_weights, params, Full(), D)


def listed(log_weights: Tensor, params: Tensor) -> Any:
    return ListMixture(log_weights, [Full()(own, D) for own in params])


@pytest.mark.parametrize("make", [stacked, listed])
def test_mixtures(make: Callable) -> None:
    params, log_weights = params_of(Full(), 2, 4), torch.tensor([0.3, 0.7]).log().expand(4, 2)
    u = torch.randn(4, D)
    parts = torch.stack([by_hand(Full()(own, D), u, KEEP) for own in params], -1)
    mixture = make(log_weights, params)
    torch.testing.assert_close(mixture.table(u, KEEP), parts)
    torch.testing.assert_close(log_density(mixture, u, KEEP), (parts + log_weights).logsumexp(-1))


def test_other_distributions_by_whole_rows() -> None:
    of = dist.Dirichlet(torch.ones(D))
    u = of.sample((4,))
    rows = torch.tensor([True, False, True, False])
    expected = torch.where(rows, of.log_prob(u), 0.0)
    torch.testing.assert_close(log_density(of, u, rows[:, None].expand(4, D)), expected)
    with pytest.raises(NotImplementedError, match="Some latents of a row are masked"):
        log_density(of, u, KEEP)
