"""Models with latents in one data plate, and everything that Pyro lets one put around them."""

from contextlib import nullcontext
from functools import partial
from typing import Any

import pyro
import pyro.distributions as dist
import torch
from pyro import poutine
from pyro.infer import autoguide
from torch import Tensor

from tests.models import row as rows
from tests.models.row import Context, Row, data, mask, normal, observe, pair, positive, real


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


def unsized(x: Tensor) -> None:
    """A plate without a size, which broadcasts nothing."""
    with pyro.plate("data"):
        z = normal("z", real("mu", 0.3).expand(len(x)), 1.0)
        observe(z, x)


def unsized_guide(x: Tensor) -> None:
    with pyro.plate("data"):
        normal("z", real("a", 0.4) * x + real("b", 0.1), positive("s", 0.9))


def subsampled(x: Tensor, index: Tensor) -> None:
    local(x, subsample=index)


def subsampled_guide(x: Tensor, index: Tensor) -> None:
    local_guide(x, subsample=index)


def no_plate(x: Tensor) -> None:
    observe(normal("z", real("mu", 0.3), 1.0), x)


def scalar_guide(x: Tensor) -> None:
    normal("z", real("a", 0.2), positive("s", 0.9))


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
        observe(pyro.sample("z", dist.LogNormal(real("mu", 0.3), 1.0)), x)


def factor_guide(x: Tensor, in_delta: bool = False) -> None:
    """A change of variables by hand, its Jacobian as a factor or inside of a Delta."""
    with pyro.plate("data", len(x)):
        u = normal("u", 0.0, 1.0, infer={"is_auxiliary": True})
        a, s = real("a", 0.2), positive("s", 0.7)
        log_z = a + s * u
        jacobian = -(s.log() + log_z)
        if in_delta:
            pyro.sample("z", dist.Delta(log_z.exp(), log_density=jacobian))
        else:
            pyro.factor("jacobian", jacobian, has_rsample=True)
            pyro.sample("z", dist.Delta(log_z.exp()))


def events(x: Tensor) -> None:
    """A matrix-normal like pair of sites: ``to_event`` and a full covariance."""
    with pyro.plate("data", len(x)):
        u = pyro.sample("u", dist.Normal(real("mu", 0.3), 1.0).expand([2, 3]).to_event(2))
        v = pyro.sample("v", dist.MultivariateNormal(u.sum(-1), 0.5 * torch.eye(2) + 0.5))
        pyro.sample("x", dist.Normal(v.sum(-1, keepdim=True), 1.0).to_event(1), obs=x[:, None])


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


ANNEALED = partial(poutine.scale, scale=0.3)


def both(**options: Any) -> Any:
    return pair(local, local_guide, **options)


ROWS = [
    Row("no_plate", pair(no_plate, scalar_guide), lambda: (data()[0],), **rows.ALONE),
    Row("data_plate", both(), other_args=lambda: (torch.linspace(-1.0, 1.0, 7),)),
    Row("size_one", both(), lambda: (data()[:1],), plates=(1,)),
    Row("far_dim", both(dim=-3)),
    Row(
        "unsized",
        pair(unsized, unsized_guide),
        other_args=lambda: (torch.linspace(-1.0, 1.0, 7),),
    ),
    Row("unsized_guide", pair(local, unsized_guide)),
    Row("subsample_size", both(subsample_size=2), plates=(2,)),
    Row(
        "explicit_subsample",
        pair(subsampled, subsampled_guide),
        lambda: (data(), torch.tensor(rows.INDEX)),
        plates=(2,),
        other_args=lambda: (data(), torch.tensor([0, 1, 3])),
    ),
    Row("annealed", both(around=ANNEALED)),
    Row("tensor_scale", both(around=lambda: poutine.scale(scale=data().abs()))),
    Row("tempered", rows.handled(poutine.scale, local, local_guide, scale=0.4)),
    Row("mask_handler", both(around=lambda: poutine.mask(mask=mask()))),
    Row("mask_false", pair(switched_off, switched_off_guide)),
    Row("obs_mask", pair(half_observed, half_observed_guide)),
    Row("deterministic", pair(deterministic, local_guide)),
    Row("factor", pair(factor, local_guide)),
    Row("factor_in_guide", pair(warped, factor_guide), sites="delta"),
    Row("delta_log_density", lambda: (warped, lambda x: factor_guide(x, True)), sites="delta"),
    Row("events", rows.guided(events, autoguide.AutoNormal, init_scale=0.5)),
    Row("constrained", rows.guided(constrained, autoguide.AutoNormal, init_scale=0.5)),
    Row("no_latents", pair(no_latents, empty_guide)),
]
