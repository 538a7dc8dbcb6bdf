"""Models with one or two latents a row, whose priors are not standard normals, and encoders."""

from collections.abc import Callable
from dataclasses import dataclass

import pyro
import pyro.distributions as dist
import torch
from pyro import poutine
from torch import Tensor, nn

ROWS = 2000  # half of them held out


def growth(x: Tensor) -> None:
    """Counts on five days that grow exponentially: intercepts and slopes of plants."""
    prior = dist.Normal(torch.tensor([1.0, 0.3]), torch.tensor([0.7, 0.3])).to_event(1)
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", prior)
        rate = (z[..., :1] + z[..., 1:] * torch.arange(5.0)).exp()
        pyro.sample("x", dist.Poisson(rate).to_event(1), obs=x)


def far(x: Tensor) -> None:
    """A mean around 1000."""
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Normal(1000.0, 1.0))
        pyro.sample("x", dist.Normal(z, 0.5), obs=x[:, 0])


def rates(x: Tensor) -> None:
    """Four counts at a rate around 1000."""
    with pyro.plate("data", len(x)):
        rate = pyro.sample("rate", dist.Gamma(50.0, 0.05)).unsqueeze(-1)
        pyro.sample("x", dist.Poisson(rate.expand(*rate.shape[:-1], 4)).to_event(1), obs=x)


def scales(x: Tensor) -> None:
    """Six numbers with a scale around 0.02."""
    with pyro.plate("data", len(x)):
        scale = pyro.sample("scale", dist.LogNormal(-4.0, 0.7)).unsqueeze(-1)
        normal = dist.Normal(0.0, scale.expand(*scale.shape[:-1], 6))
        pyro.sample("x", normal.to_event(1), obs=x)


def rare(x: Tensor) -> None:
    """A small probability, of 50 trials."""
    with pyro.plate("data", len(x)):
        p = pyro.sample("p", dist.Beta(0.5, 20.0))
        pyro.sample("x", dist.Binomial(50, p), obs=x[:, 0])


WEIGHT = torch.randn(2, 8, generator=torch.Generator().manual_seed(3))


def standard(x: Tensor) -> None:
    """Binary data of two standard normal factors."""
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
        pyro.sample("x", dist.Bernoulli(logits=2 * z @ WEIGHT).to_event(1), obs=x)


@dataclass(frozen=True)
class Encoded:
    """A model, the shapes of its data and latents, and the inputs of the encoder."""

    model: Callable[[Tensor], None]
    width: int
    latents: int
    inputs: Callable[[Tensor], Tensor]
    epochs: int = 30

    def data(self) -> Tensor:
        """Return rows that the model generates, ``[rows, width]``."""
        trace = poutine.trace(poutine.uncondition(self.model)).get_trace(
            torch.zeros(ROWS, self.width)
        )
        return trace.nodes["x"]["value"].reshape(ROWS, self.width)

    def encoder(self) -> nn.Module:
        """Return a network to locations and logarithms of scales."""
        first, second = nn.Linear(self.width, 64), nn.Linear(64, 64)
        return nn.Sequential(first, nn.ReLU(), second, nn.ReLU(), nn.Linear(64, 2 * self.latents))


MODELS = {
    "growth": Encoded(growth, 5, 2, lambda x: (x + 0.5).log(), epochs=60),
    "far": Encoded(far, 1, 1, lambda x: x - 1000.0),
    "rates": Encoded(rates, 4, 1, lambda x: (x - 1000.0) / 140.0),
    "rates, log inputs": Encoded(rates, 4, 1, lambda x: (x + 0.5).log()),
    "scales": Encoded(scales, 6, 1, lambda x: x / 0.02),
    "rare": Encoded(rare, 1, 1, lambda x: x / 5.0),
    "standard": Encoded(standard, 8, 2, lambda x: x),
}
