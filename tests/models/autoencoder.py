"""A small autoencoder of data on a curve, with the evidence of each row over its codes."""

import math
from collections.abc import Callable
from typing import Any

import pyro
import pyro.distributions as dist
import torch
from torch import Tensor, nn

from pyro_recursive.mapa import MAPA_ELBO, MAPAGuide, Table
from pyro_recursive.mapa.kernels import Gaussian

N, D = 9, 2  # rows of data, and latents of each


def decoding(decode: Callable, likelihood: Callable[[Tensor], Any], zeros: Any = None) -> Callable:
    """Return the model ``z ~ N(0, I)``, ``x ~ likelihood(decode(z))``; ``zeros`` is the mean."""

    def model(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            loc = torch.zeros(D) if zeros is None else zeros
            z = pyro.sample("z", dist.Normal(loc, 1.0).to_event(1))
            pyro.sample("x", likelihood(decode(z)), obs=x.to(loc.device))

    return model


class Curve:
    """Data on a curve, an encoder and a decoder."""

    def __init__(self, scale: float = 0.4, rows: int = N) -> None:
        self.scale = scale
        t = torch.linspace(-1.5, 1.5, rows)[:, None]
        self.x = torch.cat([t, t**2], -1) + 0.2 * torch.randn(rows, 2)
        self.encoder, self.decoder = nn.Linear(2, D), nn.Sequential(nn.Linear(D, 2), nn.Tanh())

    @property
    def parameters(self) -> list[nn.Parameter]:
        return [*self.encoder.parameters(), *self.decoder.parameters()]

    def model(self, x: Tensor | None, rows: int = N) -> None:
        pyro.module("decoder", self.decoder)
        with pyro.plate("data", rows if x is None else len(x)):
            z = pyro.sample("z", dist.Normal(torch.zeros(D), 1.0).to_event(1))
            pyro.sample("x", dist.Normal(self.decoder(z), self.scale).to_event(1), obs=x)

    def minibatches(self, x: Tensor, size: int = 3) -> None:
        pyro.module("decoder", self.decoder)
        with pyro.plate("data", len(x), subsample_size=size) as index:
            z = pyro.sample("z", dist.Normal(torch.zeros(D), 1.0).to_event(1))
            pyro.sample("x", dist.Normal(self.decoder(z), self.scale).to_event(1), obs=x[index])

    def log_probs(self, x: Tensor | None = None, codes: Tensor | None = None) -> Tensor:
        """Return log p(x_n | c_i), ``[n, i]``; by default of all data and their codes."""
        codes = self.encoder(self.x) if codes is None else codes
        x = self.x if x is None else x
        return dist.Normal(self.decoder(codes), self.scale).to_event(1).log_prob(x[:, None])

    def exact(self) -> Tensor:
        """Return the evidence of each row under the empirical prior."""
        return self.log_probs().logsumexp(-1) - math.log(len(self.x))

    def own(self) -> Tensor:
        """Return each row's term of its own code: an autoencoder's loss but for the sign."""
        return self.log_probs().diagonal() - math.log(len(self.x))

    def evidence(self, prior: Any) -> Tensor:
        """Return that of each row under a continuous prior, by a sum over a grid."""
        grid = torch.cartesian_prod(*[torch.linspace(-6, 6, 241)] * 2)
        joint = self.log_probs(codes=grid) + prior.log_prob(grid)
        return (joint + 2 * math.log(12 / 240)).logsumexp(-1).detach()

    def guide(self, **options: Any) -> MAPAGuide:
        return MAPAGuide(self.model, self.encoder, self.x, **options)

    def table(self) -> Table:
        return Table.from_log_weights(Gaussian(self.scale)(self.x, self.x))

    def bound(self, guide: MAPAGuide) -> float:
        return -MAPA_ELBO().loss(self.model, guide, self.x)


def with_global(x: Tensor) -> None:
    """A latent beside the plate moves all rows."""
    shift = pyro.sample("shift", dist.Normal(0.0, 1.0))
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        pyro.sample("x", dist.Normal(z + shift, 0.5), obs=x)
