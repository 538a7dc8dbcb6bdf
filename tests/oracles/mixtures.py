"""Losses of mixture guides as integrals: every draw stands at a node of a grid, one node a row.

``z ~ N(theta, 1.3), x | z ~ N(z ** 2, 0.8)`` with ``x = 1.7``, and two normals for z. All
parameters have an entry for each row, so that rows, weighed like the nodes, sum up to exact
expectations.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any, NamedTuple
from unittest import mock

import pyro
import pyro.distributions as dist
import torch
from torch import Tensor

from pyro_recursive import AmortizedGuide, MixtureGuide, RecursiveMixtureGuide, Schedule
from pyro_recursive.tracing.handlers import current_assignment, is_dry_run
from tests.models.small import square_global
from tests.oracles.quadrature import Grid, log_normal, tensor_grid

THETA = torch.tensor(0.2, dtype=torch.float64)
PLACES = torch.tensor([[0.9, math.log(0.5)], [-0.6, math.log(0.7)]], dtype=torch.float64)
LOGITS = torch.tensor([0.3, -0.4], dtype=torch.float64)
FINE = torch.arange(-9.0, 9.0, 0.01, dtype=torch.float64)
ALIKE, UNLIKE = ("diagonal", "diagonal"), ("diagonal", "full")  # the same normals in one dimension
bimodal = partial(square_global, torch.tensor(4.0, dtype=torch.float64))  # modes near -2 and 2


def grid(size: int) -> Grid:
    """Return the trapezoidal rule for standard normals, exact to 1e-9 here."""
    points = torch.arange(-64, 65) * 0.125 if size == 1 else torch.arange(-40, 41) * 0.2
    return tensor_grid(points, (-0.5 * points**2).exp(), size)


@contextmanager
def pinned(noise: Tensor) -> Iterator[None]:
    """Give all normals this noise, ``[draws, rows]`` or ``[rows]``, in one pass or draw by draw."""
    modules = (torch.distributions.normal, torch.distributions.multivariate_normal)

    def standard(shape: Any, dtype: Any, device: Any) -> Tensor:
        assignment = current_assignment()
        if noise.dim() > 1 and assignment and assignment.particle is not None:
            return noise[assignment.particle].unsqueeze(-1).reshape(shape)
        if is_dry_run() or len(shape) <= noise.dim():  # a look at the plates
            return torch.zeros(shape)
        return noise.unsqueeze(-1).expand(shape)

    first, second = (mock.patch.object(m, "_standard_normal", standard) for m in modules)
    with first, second:
        yield


def log_joint(z: Tensor, theta: Tensor) -> Tensor:
    return log_normal(z, theta, 1.3) + log_normal(1.7, z**2, 0.8)


def log_component(z: Tensor, place: Tensor) -> Tensor:
    return log_normal(z, place[0], place[1].exp())


def log_q(z: Tensor, places: Tensor, log_weights: Tensor) -> Tensor:
    parts = torch.stack([log_component(z, place) for place in places], -1)
    return (parts + log_weights).logsumexp(-1)


def expectation(under: Tensor, of: Callable[[Tensor], Tensor]) -> Tensor:
    """Return an expectation under one normal, ``(loc, log scale)``, on the fine grid."""
    return (log_component(FINE, under).exp() * of(FINE)).sum() * 0.01


def mixture_elbo(
    theta: Tensor, places: Tensor, log_weights: Tensor, kl_weight: float = 1.0
) -> Tensor:
    """Return ``E_Q[log p(x | z) + kl_weight * (log p(z) - log Q(z))]``."""

    def gain(z: Tensor) -> Tensor:
        prior, likelihood = log_normal(z, theta, 1.3), log_normal(1.7, z**2, 0.8)
        return likelihood + kl_weight * (prior - log_q(z, places, log_weights))

    terms = [expectation(place, gain) for place in places]
    return (log_weights.exp() * torch.stack(terms)).sum()


class Derivatives(NamedTuple):
    """By theta, by (loc, log scale) of both components, and by the logits; None for no gradient."""

    theta: Tensor | None
    first: Tensor | None
    second: Tensor | None
    logits: Tensor | None


def assert_same(found: Derivatives, expected: Sequence[Tensor | None]) -> None:
    for name, one, other in zip(Derivatives._fields, found, expected, strict=True):
        assert (one is None) == (other is None), name
        if one is not None:
            torch.testing.assert_close(one, other, atol=1e-6, rtol=1e-6, msg=name)


def derivatives(
    function: Callable[[Tensor, Tensor, Tensor], Tensor], logits: Tensor = LOGITS
) -> Derivatives:
    """Differentiate a function of theta, places and logits, by what the logits are made of."""
    inputs = [tensor.clone().requires_grad_() for tensor in (THETA, PLACES, unbounded(logits))]
    value = function(*inputs[:2], 8 * torch.tanh(inputs[2] / 8))
    found = torch.autograd.grad(value, inputs, materialize_grads=True)
    return Derivatives(found[0].reshape(1), found[1][0], found[1][1], found[2])


class Setting(NamedTuple):
    """The model, a guide and theta, with ``rows`` copies of everything."""

    model: Callable
    guide: Any
    theta: Tensor

    def logits(self) -> Tensor:
        return next(self.guide.weights.parameters())

    def parameters(self) -> list[Tensor]:
        places = [self.guide.component(m).free_local for m in range(2)]
        return [self.theta, *places, self.logits()]

    def gradients(self, loss: Any, noise: Tensor, weight: Tensor) -> Derivatives:
        """Return the gradient of minus the loss, rows weighed."""
        for parameter in self.parameters():
            parameter.grad = None
        with pinned(noise):
            loss.loss_and_grads(self.model, self.guide)
        found = [
            None if p.grad is None else -(weight[:, None] * p.grad.reshape(len(weight), -1)).sum(0)
            for p in self.parameters()
        ]
        return Derivatives(*found)


def setting(
    rows: int,
    kind: type = MixtureGuide,
    families: Sequence[str] = ALIKE,
    progress: Sequence[int] | None = None,
    **options: Any,
) -> Setting:
    """Return model and guide at `THETA`, `PLACES` and `LOGITS`."""
    pyro.clear_param_store()
    theta = THETA.expand(rows).clone().requires_grad_()

    def model() -> None:
        with pyro.plate("data", rows):
            z = pyro.sample("z", dist.Normal(theta, 1.3))
            pyro.sample("x", dist.Normal(z**2, 0.8), obs=torch.full((rows,), 1.7))

    components = [AmortizedGuide(model, family=family) for family in families]
    if kind is RecursiveMixtureGuide:
        options = {"schedule": Schedule(first=9, propose=9, refine=9, joint=9), **options}
    guide = kind(model, components, plate="data", **options)
    guide.prepare()
    found = Setting(model, guide, theta)
    put(guide, PLACES)
    with torch.no_grad():
        found.logits().copy_(unbounded(LOGITS)[: found.logits().shape[-1]])
    if progress is not None:
        guide.progress.copy_(torch.tensor(progress))
    return found


def put(guide: Any, places: Any) -> None:
    """Set the ``(locations, log scales)`` of Gaussian components, the same in all rows."""
    with torch.no_grad():
        for m, place in enumerate(places):
            component = guide.component(m)
            free = component.free_local if guide.groups[-1].local else component.free_global
            free.copy_(torch.as_tensor(place))


def two_modes(parts: Sequence[Sequence[float]], prior: float = 4.0) -> Callable:
    """Return a model whose posterior is a mixture of normals ``(mass, location, scale)``."""

    def model() -> None:
        z = pyro.sample("z", dist.Normal(0.0, prior))
        pyro.factor("f", log_mixture_of(parts, z) - log_normal(z, 0.0, prior))

    return model


def log_mixture_of(parts: Sequence[Sequence[float]], z: Tensor) -> Tensor:
    masses, locs, scales = torch.tensor(parts).T
    return (log_normal(z[..., None], locs, scales) + masses.log()).logsumexp(-1)


def unbounded(logits: Tensor) -> Tensor:
    """Return what the guide's bounded logits are made of."""
    return 8 * torch.atanh(logits / 8)
