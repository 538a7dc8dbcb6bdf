"""Models, most of them written for one sample, and how their samples run."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.infer.autoguide import AutoNormal
from pyro.nn import PyroModule, PyroSample
from torch import Tensor, nn

N, D = 6, 3


X = torch.tensor(
    [
        0.3,
        -1.2,
        0.5,
        1.1,
        0.4,
        -0.7,
        -0.8,
        0.9,
        1.3,
        0.2,
        0.1,
        -0.4,
        1.7,
        -0.6,
        0.8,
        -1.4,
        0.7,
        0.6,
    ],
    dtype=torch.float64,
).reshape(N, D)


Y = torch.tensor([0.4, 1.9, -1.1, 0.3, 2.2, -0.9], dtype=torch.float64)


GROUP = torch.tensor([0, 2, 1, 2, 0, 1])


def weights(size: int = D, name: str = "b") -> Tensor:
    return pyro.sample(name, dist.Normal(torch.zeros(size), 1.0).to_event(1))


def observe(loc: Any, y: Tensor = Y, scale: Any = 1.0) -> None:
    with pyro.plate("data", len(y)):
        pyro.sample("y", dist.Normal(loc, scale), obs=y)


def matmul() -> None:
    observe(X @ weights())


def groups() -> Tensor:
    with pyro.plate("groups", 3):
        return pyro.sample("b", dist.Normal(0.0, 1.0))


class Network(PyroModule):
    """A Bayesian network of `torch.nn.Linear` layers whose weights are latents."""

    def __init__(self) -> None:
        super().__init__()
        self.hidden = PyroModule[nn.Linear](D, 4)
        self.hidden.weight = PyroSample(dist.Normal(0.0, 1.0).expand([4, D]).to_event(2))
        self.hidden.bias = PyroSample(dist.Normal(0.0, 1.0).expand([4]).to_event(1))
        self.out = PyroModule[nn.Linear](4, 1)
        self.out.weight = PyroSample(dist.Normal(0.0, 1.0).expand([1, 4]).to_event(2))

    def forward(self) -> None:
        observe(self.out(self.hidden(X).tanh()).squeeze(-1))


def process() -> None:
    """A Gaussian process with a latent length scale."""
    length = pyro.sample("b", dist.LogNormal(torch.zeros(()), 0.5))
    kernel = torch.exp(-0.5 * ((X[:, :1] - X[:, 0]) / length) ** 2) + 0.1 * torch.eye(N)
    chol = torch.linalg.cholesky(kernel)
    pyro.sample("y", dist.MultivariateNormal(torch.zeros(N), scale_tril=chol), obs=Y)


def correlated() -> None:
    chol = pyro.sample("b", dist.LKJCholesky(2, 1.5))
    with pyro.plate("data", 3):
        fn = dist.MultivariateNormal(torch.zeros(2), scale_tril=chol)
        pyro.sample("y", fn, obs=Y.reshape(3, 2))


def mixture() -> None:
    """Weights on the simplex, a scale, a mask, a factor and a deterministic site."""
    w = pyro.sample("w", dist.Dirichlet(torch.full((D,), 2.0)))
    b = weights()
    pyro.deterministic("sum", b.sum())
    pyro.deterministic("rows", X @ b, event_dim=0)  # dims that no plate has
    pyro.factor("factor", -(b[0] ** 2))
    fn = dist.MixtureSameFamily(dist.Categorical(w), dist.Normal(b, 1.0))
    with pyro.plate("data", N), poutine.scale(scale=1 + w[0]), poutine.mask(mask=Y > -1):
        pyro.sample("y", fn.expand([N]), obs=Y)


def discrete() -> None:
    locs = weights()
    with pyro.plate("data", N):
        z = pyro.sample("z", dist.Categorical(torch.tensor([0.2, 0.3, 0.5])))
        pyro.sample("y", dist.Normal(locs[z], 1.0), obs=Y)


def discrete_guide() -> None:
    weights_guide()
    logits = pyro.param("logits", lambda: torch.linspace(-1, 1, D).expand(N, D).clone())
    with pyro.plate("data", N):
        pyro.sample("z", dist.Categorical(logits=logits))


def weights_guide() -> None:
    loc = pyro.param("loc", lambda: torch.tensor([0.3, -0.2, 0.4]))
    pyro.sample("b", dist.Normal(loc, 0.5).to_event(1))


def walk() -> None:
    observe(weights(N).cumsum(0))


def one_entry() -> None:
    """A batch dim of size 1, in no plate."""
    observe(X @ pyro.sample("b", dist.Normal(torch.zeros(1), 1.0)).expand(D))


def subsampled() -> None:
    """A minibatch of a plate of the model's own."""
    b = weights()
    with pyro.plate("data", N, subsample_size=4) as index:
        pyro.sample("y", dist.Normal(X[index] @ b, 1.0), obs=Y[index])


def local(x: Tensor) -> None:
    """A minibatch that the guide draws, of rows with latents of their own."""
    with pyro.plate("data", N, subsample_size=4) as index:
        z = pyro.sample("z", dist.Normal(0.0, 1.0).expand([4]))
        b = torch.stack([z, z * z])
        pyro.sample("y", dist.Normal((x[:2, 0] @ b).exp(), 1.0), obs=Y[index])


def local_guide(x: Tensor) -> None:
    loc = pyro.param("loc", lambda: torch.linspace(-1, 1, N))
    with pyro.plate("data", N, subsample_size=4) as index:
        pyro.sample("z", dist.Normal(loc[index], 0.7))


def branching() -> None:
    b = weights()
    observe(X @ b if b[0] > 0 else X[:, 0])


def recurrent() -> Callable:
    lstm = nn.LSTM(D, 2)
    return lambda: observe(lstm(X * weights())[0].sum(-1))


class Counting(nn.Module):
    """A module that exchanges a buffer in each run."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("mean", torch.zeros(D))

    def forward(self) -> None:
        b = weights()
        self.mean = 0.9 * self.mean + 0.1 * b.detach()
        observe(X @ b)


class Normalized(nn.Module):
    """Rows that are normalised together, in training."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(1)

    def forward(self) -> None:
        observe(self.norm((X @ weights()).reshape(-1, 1)).reshape(-1))


def careless_guide() -> None:
    loc = pyro.param("loc", lambda: torch.tensor([0.3, -0.2, 0.4]))
    if pyro.sample("u", dist.Normal(0.0, 1.0), infer={"is_auxiliary": True}) > 0:
        loc = loc + 1
    pyro.sample("b", dist.Normal(loc, 0.5).to_event(1))


def dropout(left: bool) -> Callable:
    net = nn.Sequential(nn.Linear(D, 8), nn.Dropout(0.5), nn.Linear(8, 1))
    if left:
        return lambda: observe(net(X).squeeze(-1) + weights().sum())
    return lambda: observe(net(X).squeeze(-1) + weights(1)[..., 0])


@dataclass(frozen=True)
class Case:
    name: str
    mode: str
    make: Callable[[], Callable]
    guide: Callable | None = None
    args: tuple = ()
    cause: str = ""
    is_noisy: bool = False

    def programs(self) -> tuple[Callable, Callable]:
        model = self.make()
        guide = partial(self.guide) if self.guide else AutoNormal(model, init_scale=0.5)
        guide(*self.args)
        return model, guide


def case(name: str, mode: str, model: Callable, **options: Any) -> Case:
    return Case(name, mode, lambda: partial(model), **options)


CASES = [
    case("right", "plate", lambda: observe((X * weights()).sum(-1))),
    case("rows", "plate", lambda: observe(groups()[..., GROUP])),
    case("none", "plate", lambda: observe(0.0), guide=lambda: None),
    Case("dropout", "plate", lambda: dropout(left=False), is_noisy=True),
    case("first", "vmap", lambda: observe(weights(1)[0] * X[:, 0])),
    case("matmul", "vmap", matmul),
    case("square", "vmap", lambda: observe(X[:D] @ weights(), Y[:D])),
    case("whole sum", "vmap", lambda: observe(weights().sum())),
    case("mean", "vmap", lambda: observe(weights().mean(0))),
    case("scaled", "vmap", lambda: observe(0.0, scale=weights().exp().sum(0))),
    case("group", "vmap", lambda: observe(groups()[GROUP])),
    case("softmax", "vmap", lambda: observe((X * weights().softmax(0)).sum(-1))),
    case("detached", "vmap", lambda: observe(weights().detach()[0] * X[:, 0])),
    case("one entry", "vmap", one_entry),
    Case("network", "vmap", Network),
    case("process", "vmap", process),
    case("correlated", "plate", correlated),
    case("mixture", "vmap", mixture),
    case("discrete", "vmap", discrete, guide=discrete_guide),
    case("walk", "vmap", walk),
    case("subsampled", "vmap", subsampled, guide=weights_guide),
    case("local", "vmap", local, guide=local_guide, args=(X,)),
    Case("noisy", "vmap", lambda: dropout(left=True), is_noisy=True),
    case("branching", "loop", branching, cause="model raises RuntimeError"),
    Case("recurrent", "loop", recurrent, cause="model raises"),
    Case("buffer", "loop", Counting, cause=r"buffer Counting\.mean"),
    Case("normalized", "loop", Normalized, cause="model raises"),
    case(
        "guide", "loop", lambda: observe(X @ weights()), guide=careless_guide, cause="guide raises"
    ),
]


CASE = {each.name: each for each in CASES}


each_case = pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)


vmapped = pytest.mark.parametrize(
    "case", [each for each in CASES if each.mode == "vmap"], ids=lambda case: case.name
)


@contextmanager
def looping(case: Case) -> Iterator[None]:
    """Expect the one warning of a loop."""
    if case.mode != "loop":
        yield
    else:
        with pytest.warns(UserWarning, match=f"one by one .*{case.cause}"):
            yield


def differentiate(loss: Tensor) -> Tensor:
    """Return the value and its gradient in all parameters, flattened."""
    store = pyro.get_param_store()
    leaves = [store[name].unconstrained() for name in sorted(store.keys())]
    leaves = [leaf for leaf in leaves if leaf.requires_grad]
    grads = torch.autograd.grad(loss, leaves, allow_unused=True, retain_graph=True)
    pairs = zip(leaves, grads, strict=True)
    found = [torch.zeros_like(p) if grad is None else grad for p, grad in pairs]
    return torch.cat([loss.reshape(1), *map(torch.flatten, found)]).detach()
