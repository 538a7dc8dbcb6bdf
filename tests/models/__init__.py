"""The table of small Pyro models that the tests of every loss and every guide run over.

A `Row` is one way to write a Pyro program; it says what must work on it and what must be refused.
A `Refusal` is a program that no multi-sample bound can be right for. Guides are neither exact nor
wild: their log-weights vary, so that a scale, a mask or a plate in the wrong place changes numbers.
Rows with ``evidence`` are the exception: their guide is the exact posterior.
"""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any

import pyro
import pyro.distributions as dist
import torch
from pyro import poutine
from pyro.infer import autoguide
from pyro.infer.reparam import LocScaleReparam
from pyro.nn import PyroModule, PyroParam, pyro_method
from torch import Tensor
from torch.distributions import constraints

Programs = tuple[Callable, Callable]


@dataclass(frozen=True)
class Row:
    """A model with a guide: what they are called with, and what is true of them.

    ``build`` makes both afresh. ``shared`` names the plates that enclose every site, in the order
    of the log-weights' dims, and ``plates`` their sizes. ``sites`` is the kind of the guide's
    sites: "smooth" (all reparameterised), "discrete" (at least one is not) or "delta" (at least
    one is computed from parameters). ``joint`` marks rows that warn that one weight covers all
    data, ``shared_parameter`` a parameter of both programs. ``other_args`` are a second call's, of
    another size or structure. ``evidence`` is log p(x), ``[*plates]``, where the guide is the
    posterior.
    """

    name: str
    build: Callable[[], Programs]
    args: Callable[[], tuple] = lambda: (data(),)
    shared: tuple[str, ...] = ("data",)
    plates: tuple[int, ...] = (4,)
    sites: str = "smooth"
    joint: bool = False
    shared_parameter: str | None = None
    other_args: Callable[[], tuple] | None = None
    evidence: Callable[[], Tensor] | None = None

    def refusal(self, loss: str, estimator: str) -> tuple[type[Exception], str] | None:
        """Return the error that a loss with an estimator must raise here, and its message."""
        if self.sites == "discrete" and estimator in ("pathwise", "stl", "dreg", "rws-dreg"):
            return NotImplementedError, r"Guide site 'k\w*' is not reparam.*estimator='vimco'"
        if self.sites == "delta" and estimator.startswith("rws"):
            return NotImplementedError, r"Guide site '\w+' is computed from.*estimator='dreg'"
        split = loss == "PIWAE_ELBO" or estimator.startswith("rws")
        if self.shared_parameter and split:
            return ValueError, f"Parameter '{self.shared_parameter}' belongs to model and guide"
        return None


@dataclass(frozen=True)
class Refusal:
    """A program that raises for K > 1, whatever the loss."""

    name: str
    build: Callable[[], Programs]
    error: type[Exception]
    message: str
    args: Callable[[], tuple] = lambda: (data(),)
    estimator: str = "pathwise"
    options: dict[str, Any] | None = None


def data() -> Tensor:
    return torch.tensor([1.1, -0.4, 0.7, 2.0])


def table() -> Tensor:
    return torch.tensor([[1.1, -0.4, 0.7], [2.0, 0.3, -1.0]])


def mask() -> Tensor:
    return torch.tensor([True, False, True, True])


def real(name: str, value: float) -> Tensor:
    return pyro.param(name, lambda: torch.tensor(value))


def positive(name: str, value: float) -> Tensor:
    return pyro.param(name, lambda: torch.tensor(value), constraint=constraints.positive)


def normal(name: str, loc: Any, scale: Any, **options: Any) -> Tensor:
    return pyro.sample(name, dist.Normal(loc, scale), **options)


def observe(loc: Tensor, value: Tensor, name: str = "x") -> None:
    pyro.sample(name, dist.Normal(loc, 1.0), obs=value)


Context = Callable[[], AbstractContextManager]


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


def locals_with(**options: Any) -> Callable[[], Programs]:
    return lambda: (partial(local, **options), partial(local_guide, **options))


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


# Plates of every kind.


def nested(x: Tensor) -> None:
    """A latent for each group and one for each item: a weight for each group."""
    with pyro.plate("group", x.shape[0], dim=-2):
        w = normal("w", real("mu", 0.3), 1.0)
        with pyro.plate("item", x.shape[1], dim=-1):
            observe(normal("z", w, 0.7), x)


def nested_guide(x: Tensor) -> None:
    with pyro.plate("group", x.shape[0], dim=-2):
        loc = real("a", 0.4) * x.mean(-1, keepdim=True)
        w = normal("w", loc, positive("s", 0.7))
        with pyro.plate("item", x.shape[1], dim=-1):
            normal("z", real("b", 0.5) * w + real("c", 0.3) * x, positive("t", 0.6))


def grid(x: Tensor, dims: tuple[int, int] = (-2, -1)) -> None:
    """Two plates around every site; ``dims`` may leave gaps and come in either order."""
    left, right = dims
    with pyro.plate("row", x.shape[0], dim=left), pyro.plate("column", x.shape[1], dim=right):
        observe(normal("z", real("mu", 0.3), 1.0), placed(x, dims))


def grid_guide(x: Tensor, dims: tuple[int, int] = (-2, -1)) -> None:
    left, right = dims
    with pyro.plate("column", x.shape[1], dim=right), pyro.plate("row", x.shape[0], dim=left):
        normal("z", real("a", 0.4) * placed(x, dims), positive("s", 0.8))


def placed(x: Tensor, dims: tuple[int, int]) -> Tensor:
    """Put the rows and columns of a matrix at two dims."""
    x = x if dims[0] < dims[1] else x.mT
    gap = abs(dims[0] - dims[1]) - 1
    return x.reshape(x.shape[0], *[1] * gap, x.shape[1], *[1] * (-max(dims) - 1))


def crossed(x: Tensor) -> None:
    """A latent for each row and for each column: nothing encloses both."""
    rows, columns = pyro.plate("row", x.shape[0], dim=-2), pyro.plate("column", x.shape[1], dim=-1)
    with rows:
        r = normal("r", real("mu", 0.3), 1.0)
    with columns:
        c = normal("c", 0.0, 1.0)
    with rows, columns:
        observe(r + c, x)


def crossed_guide(x: Tensor) -> None:
    s = positive("s", 0.6)
    with pyro.plate("row", x.shape[0], dim=-2):
        normal("r", real("a", 0.5) * x.mean(1, keepdim=True), s)
    with pyro.plate("column", x.shape[1], dim=-1):
        normal("c", real("b", 0.3) * x.mean(0), s)


def sequential(x: Tensor, twice: bool = False, **plate: Any) -> None:
    """A loop over data; ``twice`` runs over the plate once for the latents, once for the data."""
    mu = real("mu", 0.3)
    loop = pyro.plate("data", len(x), **plate)
    latent = {}
    for i in loop:
        latent[i] = normal(f"z{i}", mu, 1.0)
        if not twice:
            observe(latent[i], x[i], f"x{i}")
    for i in loop if twice else ():
        observe(latent[i], x[i], f"x{i}")


def sequential_guide(x: Tensor, twice: bool = False, **plate: Any) -> None:
    a, s = real("a", 0.4), positive("s", 0.9)
    for i in pyro.plate("data", len(x), **plate):
        normal(f"z{i}", a * x[i] + 0.1 * i, s)


def sequential_global(x: Tensor) -> None:
    w = normal("w", real("mu", 0.3), 1.0)
    for i in pyro.plate("data", len(x)):
        observe(normal(f"z{i}", w, 0.7), x[i], f"x{i}")


def sequential_global_guide(x: Tensor) -> None:
    w = normal("w", real("b", 0.4), positive("t", 0.5))
    for i in pyro.plate("data", len(x)):
        normal(f"z{i}", real("a", 0.4) * x[i] + 0.3 * w, positive("s", 0.6))


def sequential_of_vectorized(x: Tensor) -> None:
    mu, items = real("mu", 0.3), pyro.plate("item", x.shape[1])
    for i in pyro.plate("group", x.shape[0]):
        with items:
            observe(normal(f"z{i}", mu, 1.0), x[i], f"x{i}")


def sequential_of_vectorized_guide(x: Tensor) -> None:
    items = pyro.plate("item", x.shape[1])
    for i in pyro.plate("group", x.shape[0]):
        with items:
            normal(f"z{i}", real("a", 0.4) * x[i], positive("s", 0.9))


def vectorized_of_sequential(x: Tensor) -> None:
    """The same with the loop inside: the order of the dims must not follow the nesting."""
    mu = real("mu", 0.3)
    with pyro.plate("item", x.shape[1]):
        for i in pyro.plate("group", x.shape[0]):
            observe(normal(f"z{i}", mu, 1.0), x[i], f"x{i}")


def vectorized_of_sequential_guide(x: Tensor) -> None:
    with pyro.plate("item", x.shape[1]):
        for i in pyro.plate("group", x.shape[0]):
            normal(f"z{i}", real("a", 0.4) * x[i], positive("s", 0.9))


def sequential_mixed(x: Tensor) -> None:
    """Every other datum has a discrete latent: not every kind of site is in every iteration."""
    for i in pyro.plate("data", len(x)):
        z = normal("z0", 0.0, 1.0) if i == 0 else pyro.sample(f"k{i}", dist.Bernoulli(0.4))
        observe(z + real("mu", 0.3), x[i], f"x{i}")


def sequential_mixed_guide(x: Tensor) -> None:
    for i in pyro.plate("data", len(x)):
        if i == 0:
            normal("z0", real("a", 0.4), positive("s", 0.9))
        else:
            pyro.sample(f"k{i}", dist.Bernoulli(logits=real("b", 0.5) * x[i]))


def deeper(x: Tensor, depth: int) -> None:
    """A model whose plate nesting depends on its arguments."""
    mu = real("mu", 0.3)
    with pyro.plate("data", len(x), dim=-1):
        if depth == 1:
            observe(normal("z", mu, 1.0), x)
        else:
            with pyro.plate("copy", depth, dim=-2):
                observe(normal("z", mu, 1.0), x + torch.arange(1.0 * depth)[:, None])


def deeper_guide(x: Tensor, depth: int) -> None:
    a, s = real("a", 0.4), positive("s", 0.9)
    with pyro.plate("data", len(x), dim=-1):
        if depth == 1:
            normal("z", a * x, s)
        else:
            with pyro.plate("copy", depth, dim=-2):
                normal("z", a * x + torch.arange(1.0 * depth)[:, None], s)


def markov(x: Tensor) -> None:
    """A time series for each datum: ``pyro.markov`` inside a data plate."""
    z, mu = torch.zeros(()), real("mu", 0.3)
    with pyro.plate("data", x.shape[0]):
        for t in pyro.markov(range(x.shape[1])):
            z = normal(f"z{t}", 0.8 * z + mu, 0.7)
            observe(z, x[:, t], f"x{t}")


def markov_guide(x: Tensor) -> None:
    z = torch.zeros(())
    a, b, s = real("a", 0.4), real("b", 0.5), positive("s", 0.6)
    with pyro.plate("data", x.shape[0]):
        for t in pyro.markov(range(x.shape[1])):
            z = normal(f"z{t}", a * x[:, t] + b * z, s)


def unequal(x: Tensor) -> None:
    """Two latents, one below the other in the guide, each with a scale or a mask of its own."""
    with pyro.plate("data", x.shape[0]):
        with poutine.scale(scale=0.3):
            z = normal("z", real("mu", 0.3), 1.0)
        with poutine.mask(mask=torch.tensor([True, False])):
            w = normal("w", z, 0.8)
        observe(z, x[:, 0])
        observe(w, x[:, 1], "y")


def unequal_guide(x: Tensor) -> None:
    with pyro.plate("data", x.shape[0]):
        with poutine.scale(scale=0.3):
            z = normal("z", real("a", 0.4) * x[:, 0], positive("s", 0.8))
        w = dist.Normal(real("b", 0.5) * z + real("c", 0.3) * x[:, 1], positive("t", 0.6))
        pyro.sample("w", w.mask(torch.tensor([True, False])))


# Latents outside the data plate.


def hierarchy(x: Tensor, **plate: Any) -> None:
    """A global and a local latent."""
    w = normal("w", real("mu", 0.3), 1.0)
    with pyro.plate("data", len(x), **plate) as index:
        observe(normal("z", w, 0.8), x[index])


def hierarchy_guide(x: Tensor, **plate: Any) -> None:
    """The local latent's location depends on the global one."""
    w = normal("w", real("c", 0.5), positive("t", 0.6))
    with pyro.plate("data", len(x), **plate) as index:
        normal("z", real("a", 0.5) * x[index] + real("b", 0.3) * w, positive("s", 0.7))


def scales(x: Tensor) -> None:
    """A positive global latent and a real local one, as the autoguides see them."""
    scale = pyro.sample("scale", dist.Gamma(3.0, 2.0))
    with pyro.plate("data", len(x)):
        observe(normal("z", real("mu", 0.3), scale), x)


# Parameters, and the objects that hold them.


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


class Methods(torch.nn.Module):
    """A model and a guide as bound methods of one object."""

    def __init__(self) -> None:
        super().__init__()
        self.decoder, self.encoder = Net(0.9, -0.2), Net()

    def model(self, x: Tensor) -> None:
        pyro.module("decoder", self.decoder)
        with pyro.plate("data", len(x)):
            observe(self.decoder(normal("z", 0.0, 1.0)), x)

    def guide(self, x: Tensor) -> None:
        pyro.module("encoder", self.encoder)
        with pyro.plate("data", len(x)):
            normal("z", self.encoder(x), 0.8)


def methods() -> Programs:
    pair = Methods()
    return pair.model, pair.guide


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


def shared_parameter_guide(x: Tensor) -> None:
    """The prior's location is the guide's too."""
    with pyro.plate("data", len(x)):
        normal("z", 0.4 * x + real("mu", 0.3), positive("s", 0.9))


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


def mixed_global_guide(x: Tensor, **plate: Any) -> None:
    """A discrete local site below a reparameterised global one."""
    w = normal("w", real("a", 0.2), positive("s", 0.6))
    with pyro.plate("data", len(x), **plate) as index:
        pyro.sample("k", dist.Bernoulli(logits=real("b", 0.7) * w + real("c", 0.4) * x[index]))


def mixed_global(x: Tensor, **plate: Any) -> None:
    w = normal("w", real("mu", 0.3), 1.0)
    with pyro.plate("data", len(x), **plate) as index:
        k = pyro.sample("k", dist.Bernoulli(0.35))
        observe(w + 2 * k - 1, x[index])


def mixture_guide(x: Tensor) -> None:
    """A mixture distribution has a density and no reparameterised samples."""
    logits = torch.stack([0.0 * x, real("b", 0.3) + 0.0 * x], -1)
    locs = torch.stack([real("a", 0.2) * x, real("c", 0.8) * x], -1)
    parts = dist.Normal(locs, positive("s", 0.7))
    with pyro.plate("data", len(x)):
        pyro.sample("k_z", dist.MixtureSameFamily(dist.Categorical(logits=logits), parts))


def mixture_latent(x: Tensor) -> None:
    with pyro.plate("data", len(x)):
        observe(normal("k_z", real("mu", 0.3), 1.0), x)


# Guides of Pyro's.


def guided(model: Callable, make: Callable, **options: Any) -> Callable[[], Programs]:
    return lambda: (model, make(model, **options))


def guide_list() -> Programs:
    """One guide for the global latent, another for the local ones."""
    guide = autoguide.AutoGuideList(scales)
    guide.append(autoguide.AutoNormal(poutine.block(scales, expose=["scale"]), init_scale=0.4))
    guide.append(autoguide.AutoDelta(poutine.block(scales, expose=["z"])))
    return scales, guide


def reparameterized() -> Programs:
    model = poutine.reparam(local, config={"z": LocScaleReparam(0.0)})
    return model, autoguide.AutoNormal(model, init_scale=0.7)


def conditioned() -> Programs:
    """A latent site that a handler turns into data."""

    def prior(_: Tensor) -> None:
        with pyro.plate("data", 4):
            normal("x", normal("z", real("mu", 0.3), 1.0), 1.0)

    return poutine.condition(prior, data={"x": data()}), local_guide


# Exact posteriors: z ~ N(0, 1), x ~ N(z, 1), so that z | x ~ N(x / 2, 1 / 2).


def evidence(x: Tensor) -> Tensor:
    return dist.Normal(0.0, 2**0.5).log_prob(x)


def exact(layout: Callable[[Tensor], Iterator]) -> Callable[[], Programs]:
    """Make a model and its posterior from a function that yields the sites' plates and data."""

    def model(x: Tensor) -> None:
        for name, value in layout(x):
            observe(normal(f"z{name}", 0.0, 1.0), value, f"x{name}")

    def guide(x: Tensor) -> None:
        half, scale = real("half", 0.5), positive("scale", 0.5**0.5)
        for name, value in layout(x):
            normal(f"z{name}", half * value, scale)

    return lambda: (model, guide)


def in_no_plate(x: Tensor) -> Iterator:
    yield "", x


def in_plate(x: Tensor, dim: int = -1, **plate: Any) -> Iterator:
    with pyro.plate("data", len(x), dim=dim, **plate) as index:
        yield "", at(x, index, dim)


def in_grid(x: Tensor, dims: tuple[int, int]) -> Iterator:
    left, right = dims
    with pyro.plate("row", x.shape[0], dim=left), pyro.plate("column", x.shape[1], dim=right):
        yield "", placed(x, dims)


def in_loop(x: Tensor) -> Iterator:
    for i in pyro.plate("data", len(x)):
        yield i, x[i]


def in_loop_of_plate(x: Tensor) -> Iterator:
    columns = pyro.plate("column", x.shape[1])
    for i in pyro.plate("row", x.shape[0]):
        with columns:
            yield i, x[i]


def exact_groups(x: Tensor) -> None:
    """One latent for each group of items; the items' plate is summed inside each weight."""
    with pyro.plate("group", x.shape[0], dim=-2):
        z = normal("z", 0.0, 1.0)
        with pyro.plate("item", x.shape[1], dim=-1):
            observe(z, x)


def exact_groups_guide(x: Tensor) -> None:
    count = x.shape[1] + 1
    with pyro.plate("group", x.shape[0], dim=-2):
        loc = real("half", 1.0) * x.sum(-1, keepdim=True) / count
        normal("z", loc, positive("scale", count**-0.5))


def exact_global(x: Tensor) -> None:
    """One latent for all data: a single weight, and nothing to warn about."""
    z = normal("z", 0.0, 1.0)
    with pyro.plate("data", len(x)):
        observe(z, x)


def exact_global_guide(x: Tensor) -> None:
    count = len(x) + 1
    normal("z", real("half", 1.0) * x.sum() / count, positive("scale", count**-0.5))


def joint_evidence(x: Tensor) -> Tensor:
    """log p(x) of the last dim, whose entries share one latent."""
    size = x.shape[-1]
    return dist.MultivariateNormal(torch.zeros(size), torch.eye(size) + 1.0).log_prob(x)


def exact_masked(x: Tensor) -> None:
    with pyro.plate("data", len(x)):
        z = normal("z", 0.0, 1.0)
        with poutine.mask(mask=mask()):
            observe(z, x)


def exact_masked_guide(x: Tensor) -> None:
    loc = torch.where(mask(), real("half", 0.5) * x, torch.zeros(()))
    scale = torch.where(mask(), positive("scale", 0.5**0.5), torch.ones(()))
    with pyro.plate("data", len(x)):
        normal("z", loc, scale)


INDEX = (0, 2)

# Guides with a scale of their own: their log q is not the density that they draw from.
SCALED = {
    "annealed", "annealed_subsample", "tensor_scale", "tempered", "annealed_discrete",
    "annealed_mixed", "unequal_scales",
}  # fmt: skip

ROWS = [
    Row("no_plate", lambda: (no_plate, no_plate_guide), lambda: (data()[0],), (), ()),
    Row("data_plate", locals_with(), other_args=lambda: (torch.linspace(-1.0, 1.0, 7),)),
    Row("size_one", locals_with(), lambda: (data()[:1],), plates=(1,)),
    Row("far_dim", locals_with(dim=-3)),
    Row("subsample_size", locals_with(subsample_size=2), plates=(2,)),
    Row(
        "explicit_subsample",
        lambda: (subsampled, subsampled_guide),
        lambda: (data(), torch.tensor(INDEX)),
        plates=(2,),
        other_args=lambda: (data(), torch.tensor([0, 1, 3])),
    ),
    Row("annealed", locals_with(around=lambda: poutine.scale(scale=0.3))),
    Row(
        "annealed_subsample",
        locals_with(around=lambda: poutine.scale(scale=0.3), subsample_size=2),
        plates=(2,),
    ),
    Row("tensor_scale", locals_with(around=lambda: poutine.scale(scale=data().abs()))),
    Row("tempered", lambda: tuple(poutine.scale(f, scale=0.4) for f in locals_with()())),
    Row("mask_handler", locals_with(around=lambda: poutine.mask(mask=mask()))),
    Row("mask_method", lambda: (masked, masked_guide)),
    Row("mask_false", lambda: (switched_off, switched_off_guide)),
    Row("obs_mask", lambda: (half_observed, half_observed_guide)),
    Row("deterministic", lambda: (deterministic, local_guide)),
    Row("factor", lambda: (factor, local_guide)),
    Row("factor_in_guide", lambda: (warped, factor_guide), sites="delta"),
    Row("delta_log_density", lambda: (warped, delta_guide), sites="delta"),
    Row(
        "auxiliary_outside",
        lambda: (local, outside_auxiliary_guide),
        shared=(),
        plates=(),
        joint=True,
    ),
    Row("events", lambda: (events, events_guide)),
    Row("expanded", lambda: (expanded, expanded_guide)),
    Row("constrained", guided(constrained, autoguide.AutoNormal, init_scale=0.5)),
    Row("no_latents", lambda: (no_latents, empty_guide)),
    Row("nested", lambda: (nested, nested_guide), lambda: (table(),), ("group",), (2,)),
    Row("grid", lambda: (grid, grid_guide), lambda: (table(),), ("row", "column"), (2, 3)),
    Row(
        "grid_with_gap",
        lambda: (partial(grid, dims=(-4, -2)), partial(grid_guide, dims=(-4, -2))),
        lambda: (table(),),
        ("row", "column"),
        (2, 3),
    ),
    Row(
        "grid_reversed",
        lambda: (partial(grid, dims=(-1, -3)), partial(grid_guide, dims=(-1, -3))),
        lambda: (table(),),
        ("column", "row"),
        (3, 2),
    ),
    Row("crossed", lambda: (crossed, crossed_guide), lambda: (table(),), (), (), joint=True),
    Row("sequential", lambda: (sequential, sequential_guide)),
    Row(
        "sequential_twice",
        lambda: (partial(sequential, twice=True), partial(sequential_guide, twice=True)),
    ),
    Row(
        "sequential_subsample",
        lambda: (
            partial(sequential, subsample_size=2),
            partial(sequential_guide, subsample_size=2),
        ),
        plates=(2,),
    ),
    Row(
        "sequential_global",
        lambda: (sequential_global, sequential_global_guide),
        shared=(),
        plates=(),
        joint=True,
    ),
    Row(
        "sequential_of_vectorized",
        lambda: (sequential_of_vectorized, sequential_of_vectorized_guide),
        lambda: (table(),),
        ("group", "item"),
        (2, 3),
    ),
    Row(
        "vectorized_of_sequential",
        lambda: (vectorized_of_sequential, vectorized_of_sequential_guide),
        lambda: (table(),),
        ("group", "item"),
        (2, 3),
    ),
    Row("sequential_mixed", lambda: (sequential_mixed, sequential_mixed_guide), sites="discrete"),
    Row(
        "deeper",
        lambda: (deeper, deeper_guide),
        lambda: (data(), 1),
        other_args=lambda: (data(), 3),
    ),
    Row("markov", lambda: (markov, markov_guide), lambda: (table(),), plates=(2,)),
    Row("hierarchy", lambda: (hierarchy, hierarchy_guide), shared=(), plates=(), joint=True),
    Row("modules", modules, other_args=lambda: (torch.linspace(-1.0, 1.0, 7),)),
    Row("methods", methods, other_args=lambda: (torch.linspace(-1.0, 1.0, 7),)),
    Row("pyro_modules", lambda: (Decoder(), Encoder())),
    Row("shared_parameter", lambda: (local, shared_parameter_guide), shared_parameter="mu"),
    Row("lazy_parameter", lambda: (local, lazy_guide)),
    Row("discrete", lambda: (discrete, discrete_guide), sites="discrete"),
    Row("mixed_above", lambda: (mixed, mixed_above_guide), sites="discrete"),
    Row("mixed_below", lambda: (mixed, mixed_below_guide), sites="discrete"),
    *(
        Row(
            f"{name}_{program.__name__}",
            lambda program=program, guide=guide, handler=handler: (
                handler(program),
                handler(guide),
            ),
            sites="discrete",
        )
        for name, handler in (
            ("annealed", lambda f: poutine.scale(f, scale=0.3)),
            ("masked", lambda f: poutine.mask(f, mask=mask())),
        )
        for program, guide in ((discrete, discrete_guide), (mixed, mixed_above_guide))
    ),
    Row(
        "unequal_scales",
        lambda: (unequal, unequal_guide),
        lambda: (table(),),
        plates=(2,),
    ),
    Row("mixture", lambda: (mixture_latent, mixture_guide), sites="discrete"),
    Row(
        "mixed_global",
        lambda: (mixed_global, mixed_global_guide),
        shared=(),
        plates=(),
        joint=True,
        sites="discrete",
    ),
    Row("auto_normal", guided(local, autoguide.AutoNormal, init_scale=0.7)),
    Row(
        "auto_normal_subsample",
        guided(partial(local, subsample_size=2), autoguide.AutoNormal, init_scale=0.7),
        plates=(2,),
    ),
    Row(
        "auto_delta",
        guided(scales, autoguide.AutoDelta),
        shared=(),
        plates=(),
        joint=True,
        sites="delta",
    ),
    Row("auto_delta_local", guided(local, autoguide.AutoDelta), sites="delta"),
    *(
        Row(
            f"auto_{name}",
            guided(scales, make, **options),
            shared=(),
            plates=(),
            joint=True,
            sites=sites,
        )
        for name, make, options, sites in (
            ("normal_global", autoguide.AutoNormal, {"init_scale": 0.4}, "smooth"),
            ("multivariate", autoguide.AutoMultivariateNormal, {"init_scale": 0.4}, "smooth"),
            ("low_rank", autoguide.AutoLowRankMultivariateNormal, {"init_scale": 0.4}, "smooth"),
            ("iaf", autoguide.AutoIAFNormal, {}, "smooth"),
            ("gaussian", autoguide.AutoGaussian, {"init_scale": 0.4}, "delta"),
            ("messenger", autoguide.AutoNormalMessenger, {"init_scale": 0.4}, "smooth"),
        )
    ),
    Row("guide_list", guide_list, shared=(), plates=(), joint=True, sites="delta"),
    Row("messenger_local", guided(local, autoguide.AutoNormalMessenger, init_scale=0.7)),
    Row(
        "messenger_of_prior",
        guided(local, autoguide.AutoHierarchicalNormalMessenger, init_scale=0.7),
        shared_parameter="mu",
    ),
    Row(
        "messenger_subsample",
        guided(partial(local, subsample_size=2), autoguide.AutoNormalMessenger, init_scale=0.7),
        plates=(2,),
    ),
    Row("reparam", reparameterized),
    Row("condition", conditioned),
    Row(
        "exact_no_plate",
        exact(in_no_plate),
        lambda: (data()[0],),
        (),
        (),
        evidence=lambda: evidence(data()[0]),
    ),
    Row("exact_plate", exact(in_plate), evidence=lambda: evidence(data())),
    Row("exact_far_dim", exact(partial(in_plate, dim=-3)), evidence=lambda: evidence(data())),
    Row(
        "exact_subsample",
        exact(partial(in_plate, subsample=torch.tensor(INDEX))),
        plates=(2,),
        evidence=lambda: evidence(data()[list(INDEX)]),
    ),
    Row(
        "exact_grid",
        exact(partial(in_grid, dims=(-2, -1))),
        lambda: (table(),),
        ("row", "column"),
        (2, 3),
        evidence=lambda: evidence(table()),
    ),
    Row(
        "exact_grid_reversed",
        exact(partial(in_grid, dims=(-1, -3))),
        lambda: (table(),),
        ("column", "row"),
        (3, 2),
        evidence=lambda: evidence(table().mT),
    ),
    Row("exact_loop", exact(in_loop), evidence=lambda: evidence(data())),
    Row(
        "exact_loop_of_plate",
        exact(in_loop_of_plate),
        lambda: (table(),),
        ("row", "column"),
        (2, 3),
        evidence=lambda: evidence(table()),
    ),
    Row(
        "exact_groups",
        lambda: (exact_groups, exact_groups_guide),
        lambda: (table(),),
        ("group",),
        (2,),
        evidence=lambda: joint_evidence(table()),
    ),
    Row(
        "exact_global",
        lambda: (exact_global, exact_global_guide),
        shared=(),
        plates=(),
        evidence=lambda: joint_evidence(data()),
    ),
    Row(
        "exact_masked",
        lambda: (exact_masked, exact_masked_guide),
        evidence=lambda: evidence(data()) * mask(),
    ),
]


# What no multi-sample bound can be right for.


def batch_without_plate(x: Tensor) -> None:
    observe(normal("z", torch.zeros(len(x)), 1.0), x)


def batch_without_plate_guide(x: Tensor) -> None:
    normal("z", real("a", 0.4) * x, 1.0)


def data_without_plate(x: Tensor) -> None:
    observe(normal("z", 0.0, 1.0), x)


def scalar_guide(x: Tensor) -> None:
    normal("z", real("a", 0.4), 1.0)


def masked_scalar_guide(x: Tensor) -> None:
    with poutine.mask(mask=mask()):
        normal("z", real("a", 0.4), 1.0)


def mask_without_plate(x: Tensor) -> None:
    with poutine.mask(mask=mask()):
        z = normal("z", 0.0, 1.0)
    observe(z, x[0])


def scale_without_plate(x: Tensor) -> None:
    with poutine.scale(scale=data().abs()):
        z = normal("z", 0.0, 1.0)
    observe(z, x[0])


def enumerated(x: Tensor) -> None:
    with pyro.plate("data", len(x)):
        k = pyro.sample("k", dist.Bernoulli(0.35), infer={"enumerate": "parallel"})
        observe(k + real("mu", 0.3), x)


def enumerated_guide(x: Tensor) -> None:
    with pyro.plate("data", len(x)):
        k = dist.Bernoulli(logits=real("a", 0.4) * x)
        pyro.sample("k", k, infer={"enumerate": "parallel"})


def extra_site_guide(x: Tensor) -> None:
    local_guide(x)
    normal("extra", 0.0, 1.0)


def uniform_guide(x: Tensor) -> None:
    """A density without a derivative in its value."""
    with pyro.plate("data", len(x)):
        pyro.sample("z", dist.Uniform(-positive("s", 2.0), positive("t", 3.0)))


def two_data_sets(x: Tensor) -> None:
    with pyro.plate("first", len(x)):
        observe(normal("z", 0.0, 1.0), x)
    observe(normal("w", 0.0, 1.0), x[0], "y")


def two_data_sets_guide(x: Tensor) -> None:
    with pyro.plate("first", len(x)):
        normal("z", real("a", 0.4) * x, 1.0)
    normal("w", real("b", 0.4), 1.0)


def score_global_guide(x: Tensor) -> None:
    """A discrete site among the global latents."""
    pyro.sample("k", dist.Bernoulli(logits=real("a", 0.4)))
    local_guide(x)


def score_global(x: Tensor) -> None:
    pyro.sample("k", dist.Bernoulli(0.3))
    local(x)


SUBSAMPLED = r"Plate 'data' is subsampled \(2 of 4\).*site 'w'.*global_latents='elbo'.*Trace_ELBO"
NO_PLATE = r"Site '{}' .*dim -1 belongs to no plate.*pyro\.plate.*to_event"

REFUSALS = [
    Refusal(
        "subsampled_below_global",
        lambda: (partial(hierarchy, subsample_size=2), partial(hierarchy_guide, subsample_size=2)),
        ValueError,
        SUBSAMPLED,
    ),
    Refusal(
        "subsampled_observations",
        lambda: (
            partial(mixed_global, subsample_size=2),
            partial(mixed_global_guide, subsample_size=2),
        ),
        ValueError,
        SUBSAMPLED,
        estimator="vimco",
    ),
    *(
        Refusal(name, lambda pair=pair: pair, ValueError, NO_PLATE.format(site))
        for name, pair, site in (
            ("batch_without_plate", (batch_without_plate, batch_without_plate_guide), "z"),
            ("data_without_plate", (data_without_plate, scalar_guide), "x"),
            ("mask_without_plate", (mask_without_plate, masked_scalar_guide), "z"),
            ("scale_without_plate", (scale_without_plate, scalar_guide), "z"),
        )
    ),
    Refusal(
        "enumerated_in_model",
        lambda: (enumerated, empty_guide),
        NotImplementedError,
        r"Model site 'k' is to be enumerated.*TraceEnum_ELBO",
    ),
    Refusal(
        "enumerated_in_guide",
        lambda: (enumerated, enumerated_guide),
        NotImplementedError,
        r"Guide site 'k' asks for enumeration.*TraceEnum_ELBO",
    ),
    Refusal(
        "missing_in_guide",
        lambda: (local, empty_guide),
        ValueError,
        r"Model site 'z' is latent and the guide does not sample it.*Sample it in the guide",
    ),
    Refusal(
        "missing_in_model",
        lambda: (local, extra_site_guide),
        ValueError,
        r"Guide site 'extra' is no latent site of the model.*is_auxiliary",
    ),
    Refusal(
        "density_not_smooth",
        lambda: (local, uniform_guide),
        ValueError,
        r"Guide site 'z'.*does not depend smoothly.*estimator='pathwise'",
        estimator="dreg",
    ),
    Refusal(
        "no_data_plate",
        lambda: (two_data_sets, two_data_sets_guide),
        ValueError,
        r"global_latents='elbo' needs a plate that encloses every observed site",
        options={"global_latents": "elbo"},
    ),
    Refusal(
        "discrete_global",
        lambda: (score_global, score_global_guide),
        NotImplementedError,
        r"needs reparameterised global latents, and 'k' is not",
        estimator="vimco",
        options={"global_latents": "elbo"},
    ),
]
