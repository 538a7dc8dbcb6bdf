"""Models with latents in one data plate, and everything that Pyro lets one put around them."""

from contextlib import nullcontext
from typing import Any

import pyro
import pyro.distributions as dist
import torch
from pyro import poutine
from pyro.infer import autoguide
from torch import Tensor

from tests.models.row import (
    ALONE,
    INDEX,
    JOINT,
    Context,
    Row,
    data,
    guided,
    handled,
    mask,
    normal,
    observe,
    pair,
    positive,
    real,
)

# One latent a datum, and everything that Pyro lets one put around it.


def local(x: Tensor, around: Context = nullcontext, dim: int = -1, **plate: Any) -> None:
    """A conjugate model in a data plate; ``around`` holds handlers of the latent site alone."""
    mu = real("mu", 0.3)
    with pyro.plate("data", len(x), dim=dim, **plate) as index:
        with around():
            z = normal("z", mu, 1.0)
        observe(z, at(x, index, dim))


def local_guide(x: Tensor, around: Context = nullcontext, dim: int = -1, **plate: Any) -> None:
    a, b, s = real("a", 0.4), real("b", 0.1), positive("s", 0.9)
    with pyro.plate("data", len(x), dim=dim, **plate) as index, around():
        normal("z", a * at(x, index, dim) + b, s)


def at(x: Tensor, index: Tensor, dim: int) -> Tensor:
    return x[index].reshape(-1, *[1] * (-dim - 1))


def subsampled(x: Tensor, index: Tensor) -> None:
    local(x, subsample=index)


def subsampled_guide(x: Tensor, index: Tensor) -> None:
    local_guide(x, subsample=index)


def no_plate(x: Tensor) -> None:
    observe(normal("z", real("mu", 0.3), 1.0), x)


def no_plate_guide(x: Tensor) -> None:
    normal("z", real("a", 0.2), positive("s", 0.9))


def masked(x: Tensor) -> None:
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Normal(real("mu", 0.3), 1.0).mask(mask()))
        pyro.sample("x", dist.Normal(z, 1.0).mask(mask()), obs=x)


def masked_guide(x: Tensor) -> None:
    with pyro.plate("data", len(x)):
        pyro.sample("z", dist.Normal(real("a", 0.4) * x, positive("s", 0.9)).mask(mask()))


def half_observed(x: Tensor) -> None:
    with pyro.plate("data", len(x)):
        z = normal("z", real("mu", 0.3), 1.0)
        pyro.sample("x", dist.Normal(z, 1.0), obs=x, obs_mask=mask())


def half_observed_guide(x: Tensor) -> None:
    with pyro.plate("data", len(x)):
        normal("z", real("a", 0.4) * x, positive("s", 0.9))
        with poutine.mask(mask=~mask()):
            normal("x_unobserved", real("c", 0.2), positive("t", 1.2))


def switched_off(x: Tensor) -> None:
    """A site without any density: its mask is False."""
    with pyro.plate("data", len(x)):
        z = normal("z", real("mu", 0.3), 1.0)
        with poutine.mask(mask=False):
            w = normal("w", 0.0, 1.0)
        observe(z + w, x)


def switched_off_guide(x: Tensor) -> None:
    with pyro.plate("data", len(x)):
        normal("z", real("a", 0.4) * x, positive("s", 0.9))
        with poutine.mask(mask=False):
            normal("w", real("c", 0.2), positive("t", 1.1))


# Sites that are no plain latent or observation.


def deterministic(x: Tensor) -> None:
    """The deterministic site stands in a plate of its own, further left than any other."""
    with pyro.plate("data", len(x), dim=-1):
        z = normal("z", real("mu", 0.3), 1.0)
        twice = pyro.deterministic("twice", 2 * z)
        observe(twice, x)
        with pyro.plate("copies", 2, dim=-2):
            pyro.deterministic("copied", z + torch.zeros(2, 1))


def factor(x: Tensor) -> None:
    with pyro.plate("data", len(x)):
        z = normal("z", real("mu", 0.3), 1.0)
        pyro.factor("likelihood", -0.5 * (x - z) ** 2)


def warped(x: Tensor) -> None:
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.LogNormal(real("mu", 0.3), 1.0))
        observe(z, x)


def factor_guide(x: Tensor) -> None:
    """A change of variables by hand: the Jacobian as a factor that moves with the parameters."""
    with pyro.plate("data", len(x)):
        u = normal("u", 0.0, 1.0, infer={"is_auxiliary": True})
        s = positive("s", 0.7)
        pyro.factor("jacobian", -(s.log() + real("a", 0.2) + s * u), has_rsample=True)
        value = (real("a", 0.2) + s * u).exp()
        pyro.sample("z", dist.Delta(value))


def delta_guide(x: Tensor) -> None:
    """The same with the Jacobian inside a Delta."""
    with pyro.plate("data", len(x)):
        u = normal("u", 0.0, 1.0, infer={"is_auxiliary": True})
        a, s = real("a", 0.2), positive("s", 0.7)
        logarithm = a + s * u
        pyro.sample("z", dist.Delta(logarithm.exp(), log_density=-(s.log() + logarithm)))


def outside_auxiliary_guide(x: Tensor) -> None:
    """An auxiliary site outside the data plate makes all data share one weight."""
    noise = normal("noise", real("c", 0.2), 0.6, infer={"is_auxiliary": True})
    with pyro.plate("data", len(x)):
        normal("z", real("a", 0.4) * x + 0.3 * noise, positive("s", 0.9))


def events(x: Tensor) -> None:
    """A matrix-normal like pair of sites: ``to_event`` and a full covariance."""
    with pyro.plate("data", len(x)):
        u = pyro.sample("u", dist.Normal(real("mu", 0.3), 1.0).expand([2, 3]).to_event(2))
        v = pyro.sample("v", dist.MultivariateNormal(u.sum(-1), 0.5 * torch.eye(2) + 0.5))
        pyro.sample("x", dist.Normal(v.sum(-1, keepdim=True), 1.0).to_event(1), obs=x[:, None])


def events_guide(x: Tensor) -> None:
    with pyro.plate("data", len(x)):
        loc = (real("a", 0.2) * x)[:, None, None].expand(-1, 2, 3)
        u = pyro.sample("u", dist.Normal(loc, positive("s", 0.8)).to_event(2))
        tril = torch.tensor([[0.8, 0.0], [0.2, 0.7]]) * positive("t", 1.0)
        mean = real("c", 0.6) * u.sum(-1) + 0.2 * x[:, None]
        pyro.sample("v", dist.MultivariateNormal(mean, scale_tril=tril))


def expanded(x: Tensor) -> None:
    """Batch shapes written out, one of them of size 1."""
    with pyro.plate("data", len(x), dim=-2):
        z = pyro.sample("z", dist.Normal(real("mu", 0.3), 1.0).expand([len(x), 1]))
        observe(z, x[:, None])


def expanded_guide(x: Tensor) -> None:
    with pyro.plate("data", len(x), dim=-2):
        pyro.sample("z", dist.Normal(real("a", 0.4) * x[:, None], positive("s", 0.9)))


def constrained(x: Tensor) -> None:
    """A positive and a simplex site for each datum."""
    with pyro.plate("data", len(x)):
        rate = pyro.sample("rate", dist.Gamma(2.0, 1.5))
        share = pyro.sample("share", dist.Dirichlet(torch.tensor([1.5, 2.0, 1.0])))
        pyro.sample("x", dist.Normal(share[..., 0] - share[..., 1], 1 / rate.sqrt()), obs=x)


def no_latents(x: Tensor) -> None:
    with pyro.plate("data", len(x)):
        pyro.sample("x", dist.Normal(real("mu", 0.3), positive("t", 1.2)), obs=x)


def empty_guide(x: Tensor) -> None:
    pass


# The table.


def annealed() -> Any:
    return poutine.scale(scale=0.3)


ROWS = [
    Row("no_plate", pair(no_plate, no_plate_guide), lambda: (data()[0],), **ALONE),
    Row("data_plate", pair(local, local_guide), other_args=lambda: (torch.linspace(-1.0, 1.0, 7),)),
    Row("size_one", pair(local, local_guide), lambda: (data()[:1],), plates=(1,)),
    Row("far_dim", pair(local, local_guide, dim=-3)),
    Row("subsample_size", pair(local, local_guide, subsample_size=2), plates=(2,)),
    Row(
        "explicit_subsample",
        pair(subsampled, subsampled_guide),
        lambda: (data(), torch.tensor(INDEX)),
        plates=(2,),
        other_args=lambda: (data(), torch.tensor([0, 1, 3])),
    ),
    Row("annealed", pair(local, local_guide, around=annealed)),
    Row(
        "annealed_subsample",
        pair(local, local_guide, around=annealed, subsample_size=2),
        plates=(2,),
    ),
    Row(
        "tensor_scale",
        pair(local, local_guide, around=lambda: poutine.scale(scale=data().abs())),
    ),
    Row("tempered", handled(poutine.scale, local, local_guide, scale=0.4)),
    Row("mask_handler", pair(local, local_guide, around=lambda: poutine.mask(mask=mask()))),
    Row("mask_method", pair(masked, masked_guide)),
    Row("mask_false", pair(switched_off, switched_off_guide)),
    Row("obs_mask", pair(half_observed, half_observed_guide)),
    Row("deterministic", pair(deterministic, local_guide)),
    Row("factor", pair(factor, local_guide)),
    Row("factor_in_guide", pair(warped, factor_guide), sites="delta"),
    Row("delta_log_density", pair(warped, delta_guide), sites="delta"),
    Row("auxiliary_outside", pair(local, outside_auxiliary_guide), **JOINT),
    Row("events", pair(events, events_guide)),
    Row("expanded", pair(expanded, expanded_guide)),
    Row("constrained", guided(constrained, autoguide.AutoNormal, init_scale=0.5)),
    Row("no_latents", pair(no_latents, empty_guide)),
]
