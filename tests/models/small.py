"""Small models with known posteriors, for tests of one thing: functions of the data ``x``.

``*_rows`` have one latent a row in the plate "data"; ``x`` is ``[rows]`` or, where a network reads
it, ``[rows, 1]``. ``*_global`` have one latent for all rows; a scalar ``x`` is one observation in
no plate. `functools.partial` gives other scales, or a model without arguments.
"""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import pyro
import pyro.distributions as dist
import torch
from pyro import poutine
from torch import Tensor

from tests.oracles.quadrature import LOC, MU, SCALE, X


def plate_of(x: Tensor, size: int | None = None) -> AbstractContextManager:
    """Return the plate "data"; where ``size`` is given, ``x`` is a minibatch of so many rows."""
    if x.dim() == 0:
        return nullcontext()
    if size is None:
        return pyro.plate("data", len(x))
    return pyro.plate("data", size, subsample_size=len(x))


def in_rows(body: Callable[..., Any]) -> Callable[..., None]:
    """Return a program that runs a body, of few lines, in the plate of the rows of ``x``."""

    def program(x: Tensor, *args: Any, **options: Any) -> None:
        with plate_of(x):
            body(x, *args, **options)

    return program


def normal(name: str, loc: Any, scale: Any = 1.0, **options: Any) -> Tensor:
    return pyro.sample(name, dist.Normal(loc, scale), **options)


def column(x: Tensor) -> Tensor:
    return x[:, 0] if x.dim() == 2 else x


def prior_of(model: Callable) -> Callable:
    """Return a guide that draws the latents of a model from their priors."""
    return poutine.block(model, hide_fn=lambda msg: msg["type"] == "sample" and msg["is_observed"])


def normal_rows(x: Tensor, prior: float = 1.0, noise: float = 1.0, size: int | None = None) -> None:
    """z ~ N(0, prior), x | z ~ N(z, noise): by default z | x ~ N(x / 2, sqrt(1 / 2))."""
    with plate_of(x, size):
        z = pyro.sample("z", dist.Normal(0.0, prior))
        pyro.sample("x", dist.Normal(z, noise), obs=column(x))


def vector_rows(x: Tensor, prior: float = 1.0, noise: float = 1.0) -> None:
    """The same with vectors: ``x`` is ``[rows, dims]``."""
    with plate_of(x):
        z = pyro.sample("z", dist.Normal(torch.zeros(x.shape[-1]), prior).to_event(1))
        pyro.sample("x", dist.Normal(z, noise).to_event(1), obs=x)


def normal_loop(x: Tensor) -> None:
    """The model of `normal_rows` in a sequential plate."""
    for i in pyro.plate("data", len(x)):
        z = pyro.sample(f"z{i}", dist.Normal(0.0, 1.0))
        pyro.sample(f"x{i}", dist.Normal(z, 1.0), obs=x[i])


def normal_global(x: Tensor, prior: float = 2.0, noise: float = 1.0) -> None:
    """One mean for all rows."""
    z = pyro.sample("z", dist.Normal(0.0, prior))
    with plate_of(x):
        pyro.sample("x", dist.Normal(z, noise), obs=x)


def square_rows(x: Tensor, prior: float = 3.0, noise: float = 1.0) -> None:
    """x | z ~ N(z ** 2, noise): two modes near +-sqrt(x) in each row."""
    with plate_of(x):
        z = pyro.sample("z", dist.Normal(0.0, prior))
        pyro.sample("x", dist.Normal(z**2, noise), obs=column(x))


def square_global(x: Tensor, prior: float = 3.0, noise: float = 1.0) -> None:
    """The same with one latent for all rows."""
    z = pyro.sample("z", dist.Normal(0.0, prior))
    with plate_of(x):
        pyro.sample("x", dist.Normal(z**2, noise), obs=x)


def ring(x: Tensor, prior: float = 3.0, noise: float = 1.0) -> None:
    """Two global latents, whose squared norm is observed: the posterior is a ring."""
    z = pyro.sample("z", dist.Normal(torch.zeros(2), prior).to_event(1))
    pyro.sample("x", dist.Normal((z**2).sum(-1), noise), obs=x)


def poisson_rows(x: Tensor, shape: float = 2.0, rate: float = 1.0) -> None:
    """Counts with a rate each: rate | x ~ Gamma(shape + x, rate + 1)."""
    with plate_of(x):
        z = pyro.sample("rate", dist.Gamma(shape, rate))
        pyro.sample("x", dist.Poisson(z), obs=column(x))


def conjugate_model(copies: int = 1000) -> None:
    """Copies of the datum of `tests.oracles.quadrature`, a row each: z ~ N(mu, 1), x ~ N(z, 1)."""
    mu = pyro.param("mu", lambda: torch.tensor(MU))
    with pyro.plate("data", copies):
        z = pyro.sample("z", dist.Normal(mu, 1.0))
        pyro.sample("x", dist.Normal(z, 1.0), obs=torch.full((copies,), X))


def conjugate_guide(copies: int = 1000) -> None:
    """z ~ N(m, s), shared by all rows."""
    loc = pyro.param("m", lambda: torch.tensor(LOC))
    scale = pyro.param("s", lambda: torch.tensor(SCALE))
    with pyro.plate("data", copies):
        pyro.sample("z", dist.Normal(loc, scale))
