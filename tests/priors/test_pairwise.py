"""Likelihoods of all pairs of data and codes by products of matrices."""

import pyro.distributions as dist
import pytest
import torch
from torch import Tensor

from pyro_recursive.priors.pairwise import PairwiseLikelihood, pairwise

FAMILIES = {
    "logits": lambda y: dist.Bernoulli(logits=y),
    "probs": lambda y: dist.Bernoulli(y.sigmoid()),
    "normal": lambda y: dist.Normal(y, 0.7),
    "scales": lambda y: dist.Normal(y, y.exp()),
}


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("batch", [(5, 1), (2, 5, 1), (5, 1, 1)])
@pytest.mark.parametrize("event", [(20,), (4, 5)])
def test_pairs_equal_broadcasting(family: str, batch: tuple, event: tuple) -> None:
    dim = -2 if batch == (5, 1, 1) else -1
    y = torch.randn(*batch, *event, requires_grad=True)
    plain = FAMILIES[family](y).to_event(len(event))
    full = list(batch)
    full[dim] = 3
    plain = plain.expand(full)
    pairs = pairwise(plain, dim)
    assert isinstance(pairs, PairwiseLikelihood)
    x = torch.rand(3, *[1] * (-dim - 1), *event).round()
    found, expected = pairs.log_prob(x), plain.log_prob(x)
    torch.testing.assert_close(found, expected)
    weights = torch.randn(found.shape)
    (mine,) = torch.autograd.grad((weights * found).sum(), y, retain_graph=True)
    (theirs,) = torch.autograd.grad((weights * expected).sum(), y)
    torch.testing.assert_close(mine, theirs)
    assert pairs._decoded() is not None  # and not by broadcasting


def test_pairs_fall_back() -> None:
    """Rows with distributions of their own, and values with more dims, are broadcast."""
    x = torch.rand(3, 20).round()
    own = dist.Bernoulli(logits=torch.randn(5, 3, 20)).to_event(1)
    assert (pairwise(own, -1).log_prob(x) == own.log_prob(x)).all()
    shared = dist.Bernoulli(logits=torch.randn(5, 1, 20)).to_event(1).expand([5, 3])
    many = torch.rand(5, 3, 20).round()
    assert (pairwise(shared, -1).log_prob(many) == shared.log_prob(many)).all()
    for left in (dist.Poisson(torch.ones(5, 1, 20)).to_event(1), dist.Normal(torch.ones(5, 3), 1)):
        assert pairwise(left, -1) is left
    with pytest.raises(ValueError, match="outside of the support"):
        pairwise(shared, -1).log_prob(x + 0.5)


class Sharper(dist.Bernoulli):
    """A distribution with another density than that of its base class."""

    def log_prob(self, value: Tensor) -> Tensor:
        return 2 * super().log_prob(value)


def test_pairs_leave_subclasses_alone() -> None:
    fn = Sharper(logits=torch.randn(5, 1, 20)).to_event(1)
    assert pairwise(fn, -1) is fn
