"""Parameters and data of zero hide how a program treats samples and rows; they may change."""

from collections.abc import Callable
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.infer.autoguide import AutoNormal
from torch import Tensor

from pyro_recursive import IWAE_ELBO, AmortizedGuide, MultiSampleELBO, bounds, log_marginal

X = torch.linspace(-1.0, 2.0, 7, dtype=torch.float64)
Y = 0.8 * X + 0.3


class Mixing:
    """y_i ~ N(c b[0] x_i, 1): under a plate all samples would have the first one's b."""

    def __init__(self) -> None:
        self.factor = torch.zeros((), requires_grad=True)

    def __call__(self) -> None:
        b = pyro.sample("b", dist.Normal(torch.zeros(1), 1.0).to_event(1))
        with pyro.plate("data", len(X)):
            pyro.sample("y", dist.Normal(self.factor * b[0] * X, 1.0), obs=Y)

    def evidence(self) -> Tensor:
        slope = self.factor.detach() * X
        covariance = torch.eye(len(X)) + torch.outer(slope, slope)
        return dist.MultivariateNormal(torch.zeros(len(X)), covariance).log_prob(Y)


def test_a_weight_of_zero_hides_no_mixing() -> None:
    model = Mixing()
    guide = AutoNormal(model, init_scale=1.0)  # the prior
    loss = IWAE_ELBO(500)
    assert abs(loss.loss(model, guide) + model.evidence().item()) < 1e-6  # any b is as good
    model.factor.data.fill_(1.5)
    found = log_marginal(model, guide, num_particles=20_000, diagnostics=True)
    assert abs(found.log_marginal - model.evidence()) < 4 * found.standard_error + 1e-9


@pytest.mark.parametrize("factor", [0.0, 0.7])
def test_a_weight_of_zero_hides_no_dependence(factor: float) -> None:
    weight = torch.tensor(factor, requires_grad=True)

    def model() -> None:
        plate = pyro.plate("data", 3)
        with plate:
            z = pyro.sample("z", dist.Normal(torch.zeros(3), 1.0))
        g = pyro.sample("g", dist.Normal(0.0, 0.3))
        with plate:
            pyro.sample("x", dist.Normal(g + z, 1.0), obs=torch.full((3,), 3.0))

    def guide() -> None:
        with pyro.plate("data", 3):
            z = pyro.sample("z", dist.Normal(torch.zeros(3), 1.0))
        pyro.sample("g", dist.Normal(weight * z.mean(-1), 0.3))

    loss = MultiSampleELBO(bounds.iwae, num_particles=4, global_latents="elbo")
    with pytest.raises(ValueError, match="'g', outside plate 'data', depends on latents"):
        loss.loss(model, guide)
    assert weight.item() == factor


def normal(b: Tensor, x: Tensor, y: Tensor) -> None:
    with pyro.plate("data", len(x)):
        pyro.sample("y", dist.Normal(b[0] * x, 1.0), obs=y)


def poisson(b: Tensor, x: Tensor, y: Tensor) -> None:
    """Counts have no other values near them: the covariates change alone."""
    with pyro.plate("data", len(x)):
        pyro.sample("y", dist.Poisson((b[0] * x).exp()), obs=y)


def normal_pair(b: Tensor, x: dict[str, Tensor], y: Tensor) -> None:
    normal(b, x["slope"], y)
    with pyro.plate("others", len(y)):
        pyro.sample("n", dist.Poisson((b[0] * x["others"][0]).exp()), obs=y)


COUNTS = torch.tensor([0.0, 1.0, 3.0, 2.0])
COVARIATES = torch.tensor([-0.5, 0.2, 1.0, 0.4])
LIKELIHOODS: dict[str, tuple[Callable, Callable[[Tensor], Any]]] = {
    "normal": (normal, lambda x: x),
    "poisson": (poisson, lambda x: x),
    "in a dictionary": (normal_pair, lambda x: {"slope": x, "others": (x,)}),
}


@pytest.mark.quick(1)
@pytest.mark.parametrize("name", LIKELIHOODS)
def test_data_of_zero_hide_no_mixing(name: str) -> None:
    """Covariates are zero in the first call; the second is compared with quadrature."""
    likelihood, argument = LIKELIHOODS[name]

    def model(x: Any, y: Tensor) -> None:
        likelihood(pyro.sample("b", dist.Normal(torch.zeros(1), 1.0).to_event(1)), x, y)

    def guide(x: Any, y: Tensor) -> None:
        pyro.sample("b", dist.Normal(torch.full((1,), 0.7), 0.7).to_event(1))

    grid = torch.linspace(-7.0, 7.0, 401)
    for x in (torch.zeros(4), COVARIATES):
        before = x.clone()
        found = log_marginal(
            model, guide, argument(x), COUNTS, num_particles=4000, diagnostics=True
        )
        joint = torch.stack(
            [
                poutine.trace(poutine.condition(model, {"b": b[None]}))
                .get_trace(argument(x), COUNTS)
                .log_prob_sum()
                for b in grid
            ]
        )
        exact = joint.logsumexp(0) + (grid[1] - grid[0]).log()
        assert abs(found.log_marginal - exact) < 4 * found.standard_error + 1e-6
        assert torch.equal(x, before)


def test_data_of_zero_hide_no_dependence() -> None:
    """Rows share one weight, as their densities depend on all latents where x is not zero."""

    def model(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("y", dist.Normal(x * z.mean(-1, keepdim=True), 1.0), obs=x)

    def guide(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(torch.zeros(len(x)), 1.0))

    log_marginal(model, guide, torch.zeros(3), num_particles=10)
    x = torch.tensor([1.0, -2.0, 3.0])
    found = log_marginal(model, guide, x, num_particles=20_000, diagnostics=True)
    covariance = torch.eye(3) + torch.outer(x, x) / 3
    exact = dist.MultivariateNormal(torch.zeros(3), covariance).log_prob(x)
    assert found.log_marginal.shape == ()
    assert abs(found.log_marginal - exact) < 4 * found.standard_error


def test_a_guide_of_known_rows_is_not_told_of_other_data() -> None:
    """Its inputs have not changed: it would warn."""

    def model(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x)

    guide, x = AmortizedGuide(model, plate="data"), torch.zeros(3)
    for _ in range(2):
        IWAE_ELBO(5).loss(model, guide, x)
    with pytest.warns(UserWarning, match="its inputs have changed"):
        IWAE_ELBO(5).loss(model, guide, x + 1)
