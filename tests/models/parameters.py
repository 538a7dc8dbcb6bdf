"""Parameters and the objects that hold them, discrete sites, and guides of Pyro's."""

from collections.abc import Callable
from functools import partial
from typing import Any

import pyro
import pyro.distributions as dist
import torch
from pyro import poutine
from pyro.contrib.easyguide import EasyGuide
from pyro.infer import autoguide
from pyro.infer.reparam import LocScaleReparam
from pyro.nn import PyroModule, PyroParam, pyro_method
from torch import Tensor
from torch.distributions import constraints

from tests.models import row as rows
from tests.models.data_plate import local, unsized
from tests.models.row import Programs, Row, normal, observe, pair, positive, real


class Net(torch.nn.Module):
    """A linear map whose parameters are the same in every test."""

    def __init__(self, weight: float = 0.4, bias: float = 0.1) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.tensor(weight))
        self.bias = torch.nn.Parameter(torch.tensor(bias))

    def forward(self, x: Tensor) -> Tensor:
        return self.weight * x + self.bias


def modules() -> Programs:
    """Plain modules, registered by `pyro.module`."""
    decoder, encoder = Net(0.9, -0.2), Net()

    def model(x: Tensor) -> None:
        pyro.module("decoder", decoder)
        with pyro.plate("data", len(x)):
            observe(decoder(normal("z", 0.0, 1.0)), x)

    def guide(x: Tensor) -> None:
        pyro.module("encoder", encoder)
        with pyro.plate("data", len(x)):
            normal("z", encoder(x), 0.8)

    return model, guide


class Decoder(PyroModule):
    """A `PyroModule` with a module, a parameter and a method of Pyro's."""

    def __init__(self) -> None:
        super().__init__()
        self.net = PyroModule[torch.nn.Linear](1, 1)
        self.scale = PyroParam(torch.tensor(1.1), constraint=constraints.positive)

    def forward(self, x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            pyro.sample("x", dist.Normal(self.decode(normal("z", 0.0, 1.0)), self.scale), obs=x)

    @pyro_method
    def decode(self, z: Tensor) -> Tensor:
        return self.net(z.unsqueeze(-1)).squeeze(-1)


class Encoder(PyroModule):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.s = PyroParam(torch.tensor(0.4)), PyroParam(torch.tensor(0.8))

    def forward(self, x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            normal("z", self.a * x, self.s)


def lazy_guide(x: Tensor) -> None:
    """Parameters whose first value is random, and made on the first call."""
    loc = pyro.param("loc", lambda: 0.3 * torch.randn(len(x)))
    with pyro.plate("data", len(x)):
        normal("z", loc, positive("s", 0.9))


# Sites that are not reparameterised.


def discrete(x: Tensor) -> None:
    with pyro.plate("data", len(x)):
        k = pyro.sample("k", dist.Categorical(torch.tensor([0.5, 0.3, 0.2])))
        observe(real("mu", 0.3) + k, x)


def discrete_guide(x: Tensor) -> None:
    logits = torch.stack([0.0 * x, real("a", 0.4) * x, real("b", -0.3) + 0.2 * x], -1)
    with pyro.plate("data", len(x)):
        pyro.sample("k", dist.Categorical(logits=logits))


def mixed(x: Tensor) -> None:
    with pyro.plate("data", len(x)):
        z = normal("z", real("mu", 0.3), 1.0)
        k = pyro.sample("k", dist.Bernoulli(0.35))
        observe(z + 2 * k - 1, x)


def mixed_above_guide(x: Tensor) -> None:
    """The reparameterised site stands above the discrete one."""
    with pyro.plate("data", len(x)):
        z = normal("z", real("a", 0.3) * x, positive("s", 0.8))
        pyro.sample("k", dist.Bernoulli(logits=real("b", 0.7) * z + real("c", -0.2)))


def mixed_below_guide(x: Tensor) -> None:
    """The discrete site stands above the reparameterised one."""
    with pyro.plate("data", len(x)):
        k = pyro.sample("k", dist.Bernoulli(logits=real("b", 0.7) * x + real("c", -0.2)))
        normal("z", real("a", 0.3) * x + (1 - 2 * k) * real("d", 0.4), positive("s", 0.8))


def mixed_global(x: Tensor, **plate: Any) -> None:
    w = normal("w", real("mu", 0.3), 1.0)
    with pyro.plate("data", len(x), **plate) as index:
        k = pyro.sample("k", dist.Bernoulli(0.35))
        observe(w + 2 * k - 1, x[index])


def mixed_global_guide(x: Tensor, **plate: Any) -> None:
    """A discrete local site below a reparameterised global one."""
    w = normal("w", real("a", 0.2), positive("s", 0.6))
    with pyro.plate("data", len(x), **plate) as index:
        pyro.sample("k", dist.Bernoulli(logits=real("b", 0.7) * w + real("c", 0.4) * x[index]))


# Guides of Pyro's.


def scales(x: Tensor) -> None:
    """A positive global latent and a real local one, as the autoguides see them."""
    scale = pyro.sample("scale", dist.Gamma(3.0, 2.0))
    with pyro.plate("data", len(x)):
        observe(normal("z", real("mu", 0.3), scale), x)


def guide_list() -> Programs:
    """One guide for the global latent, another for the local ones."""
    guide = autoguide.AutoGuideList(scales)
    guide.append(autoguide.AutoNormal(poutine.block(scales, expose=["scale"]), init_scale=0.4))
    guide.append(autoguide.AutoDelta(poutine.block(scales, expose=["z"])))
    return scales, guide


class Easy(EasyGuide):
    """One auxiliary site for all latents of the rows, in a plate with or without a size."""

    def __init__(self, model: Callable, sized: bool) -> None:
        super().__init__(model)
        self.sized = sized

    def guide(self, x: Tensor) -> None:
        loc = real("a", 0.4) * x + real("b", 0.1)
        with self.plate("data", len(x) if self.sized else None):
            fn = dist.Normal(loc.unsqueeze(-1), positive("s", 0.9)).to_event(1)
            self.group("z").sample("packed", fn)


def reparameterized() -> Programs:
    model = poutine.reparam(local, config={"z": LocScaleReparam(0.0)})
    return model, autoguide.AutoNormal(model, init_scale=0.7)


def other_rows() -> tuple:
    return (torch.linspace(-1.0, 1.0, 7),)


DISCRETE: dict[str, Any] = {"sites": "discrete"}
HALF = partial(local, subsample_size=2)

ROWS = [
    Row("modules", modules, other_args=other_rows),
    Row("pyro_modules", lambda: (Decoder(), Encoder())),
    Row("lazy_parameter", pair(local, lazy_guide)),
    Row("discrete", pair(discrete, discrete_guide), **DISCRETE),
    Row("mixed_above", pair(mixed, mixed_above_guide), **DISCRETE),
    Row("mixed_below", pair(mixed, mixed_below_guide), **DISCRETE),
    *(
        Row(f"{name}_{model.__name__}", rows.handled(handler, model, guide, **option), **DISCRETE)
        for name, handler, option in (
            ("annealed", poutine.scale, {"scale": 0.3}),
            ("masked", poutine.mask, {"mask": rows.mask()}),
        )
        for model, guide in ((discrete, discrete_guide), (mixed, mixed_above_guide))
    ),
    Row("mixed_global", pair(mixed_global, mixed_global_guide), **DISCRETE, **rows.JOINT),
    *(
        Row(f"auto_{name}", rows.guided(scales, make, **options), sites=sites, **rows.JOINT)
        for name, make, options, sites in (
            ("delta", autoguide.AutoDelta, {}, "delta"),
            ("normal_global", autoguide.AutoNormal, {"init_scale": 0.4}, "smooth"),
            ("multivariate", autoguide.AutoMultivariateNormal, {"init_scale": 0.4}, "smooth"),
            ("low_rank", autoguide.AutoLowRankMultivariateNormal, {"init_scale": 0.4}, "smooth"),
            ("iaf", autoguide.AutoIAFNormal, {}, "smooth"),
            ("gaussian", autoguide.AutoGaussian, {"init_scale": 0.4}, "delta"),
            ("messenger", autoguide.AutoNormalMessenger, {"init_scale": 0.4}, "smooth"),
        )
    ),
    Row("auto_delta_local", rows.guided(local, autoguide.AutoDelta), sites="delta"),
    Row("auto_normal", rows.guided(local, autoguide.AutoNormal, init_scale=0.7)),
    *(
        Row(f"{name}_subsample", rows.guided(HALF, make, init_scale=0.7), plates=(2,))
        for name, make in (
            ("auto_normal", autoguide.AutoNormal),
            ("messenger", autoguide.AutoNormalMessenger),
        )
    ),
    Row(
        "messenger_of_prior",
        rows.guided(local, autoguide.AutoHierarchicalNormalMessenger, init_scale=0.7),
        shared_parameter="mu",
    ),
    Row("guide_list", guide_list, sites="delta", **rows.JOINT),
    Row("easy_guide", rows.guided(local, Easy, sized=True), other_args=other_rows),
    Row("easy_unsized", rows.guided(unsized, Easy, sized=False)),
    Row("reparam", reparameterized),
]
