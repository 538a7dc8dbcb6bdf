"""Parameters of zero hide how a program treats samples and rows; they need not stay zero."""

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer.autoguide import AutoNormal
from torch import Tensor

from pyro_recursive import IWAE_ELBO, MultiSampleELBO, bounds, log_marginal

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
