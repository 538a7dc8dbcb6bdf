"""Semi-amortised guides by oracles: models with closed forms, and refinement in plain torch."""

import math
import weakref
from collections.abc import Callable, Sequence
from typing import Any

import pyro
import pyro.distributions as dist
import torch
from pyro import poutine
from pyro.infer import RenyiELBO, Trace_ELBO, TraceGraph_ELBO, TraceMeanField_ELBO
from torch import Tensor, nn

from pyro_recursive import (
    MIWAE_ELBO,
    AmortizedGuide,
    FlowGuide,
    MixtureGuide,
    MultiSampleELBO,
    SemiAmortizedGuide,
    bounds,
)
from pyro_recursive.guides.gaussian_families import LowRank
from pyro_recursive.guides.semi_amortized.updates import GradientUpdate

ROWS, SIZE = 4, 2  # rows of data, and dims of z


def network() -> nn.Sequential:
    return nn.Sequential(nn.Linear(SIZE, 5), nn.Tanh(), nn.Linear(5, 3))


def model_of(net: nn.Module, full: int | None = None, **plate: Any) -> Callable:
    """Return the model; with ``full`` its rows are a minibatch of so many.

    With a size or indices for the plate it takes a minibatch of its data itself.
    """

    def model(x: Tensor) -> None:
        pyro.module("net", net)
        with pyro.plate("data", full or len(x), **plate or {"subsample_size": len(x)}) as index:
            z = pyro.sample("z", dist.Normal(torch.zeros(SIZE), 1.0).to_event(1))
            obs = x[index] if plate else x
            pyro.sample("x", dist.Normal(net(z), 0.5).to_event(1), obs=obs)

    return model


def log_normal(x: Tensor, loc: Tensor | float, scale: Tensor | float) -> Tensor:
    return dist.Normal(loc, scale).log_prob(x).sum(-1)


def row_gain(net: nn.Module, x: Tensor, z: Tensor, q: Sequence[Tensor], weight: float) -> Tensor:
    """Return ``log p(x | z) + weight * (log p(z) - log q(z))``, ``[*s, B, D]`` to ``[*s, B]``."""
    latent = log_normal(z, 0.0, 1.0) - log_normal(z, q[0], q[1].exp())
    return log_normal(x, net(z), 0.5) + weight * latent


def row_gradient(
    net: nn.Module, x: Tensor, params: Tensor, noise: Tensor, estimator: str, weight: float = 1.0
) -> Tensor:
    """Differentiate the rows' ELBO by their parameters, ``[B, 2 D]``, with noise ``[S, B, D]``."""
    params = params.detach().requires_grad_()
    q = params.chunk(2, -1)
    z = q[0] + q[1].exp() * noise
    if estimator == "stl":
        q = [part.detach() for part in q]
    gain = row_gain(net, x, z, q, weight).mean(0).sum()
    return torch.autograd.grad(gain, params)[0]


def way(
    net: nn.Module, x: Tensor, start: Tensor, noise: Tensor, update: GradientUpdate, **options: Any
) -> tuple[list[Tensor], list[Tensor]]:
    """Return the parameters at the start and after each step, and the gradients, step by step."""
    params, velocity, gradients = [start.detach()], torch.zeros(()), []
    for each in noise:
        gradients.append(row_gradient(net, x, params[-1], each, **options))
        blocks = gradients[-1].chunk(2, -1)
        clipped = [b * (update.clip / b.norm(dim=-1, keepdim=True)).clamp_max(1) for b in blocks]
        velocity = update.momentum * velocity + torch.cat(clipped, -1)
        params.append(params[-1] + update.rate * velocity)
    return params, gradients


def fixed_noise(seed: int, steps: int, draws: int, size: int = SIZE) -> Tensor:
    """Return what a guide with this seed draws, ``[T, S, 1, D]``: the same for all rows."""
    generator = torch.Generator().manual_seed(seed)
    noise = torch.randn(steps * draws, 1, 1, size, generator=generator)
    return noise.reshape(steps, draws, 1, size)


def semi(model: Callable, encoder: Any = None, **options: Any) -> SemiAmortizedGuide:
    """Return a guide over a linear encoder of three features."""
    encoder = nn.Linear(3, 2 * SIZE) if encoder is None else encoder
    return SemiAmortizedGuide(model, AmortizedGuide(model, encoder), **options)


def params_in(guide: Any, *args: Any) -> Tensor:
    """Return the variational parameters of the rows of a call, with their graph."""
    guide.prepare(*args)
    return guide.variational_params(guide.groups[-1], guide.new_call(args, {}))


def trained(
    loss: Any, model: Callable, guide: Callable, x: Tensor, parameters: Sequence[Tensor]
) -> tuple[Tensor, list[Tensor]]:
    """Return a loss from one seed and its gradients, as a step of training finds them."""
    for parameter in parameters:
        parameter.grad = None
    pyro.set_rng_seed(3)
    value = loss.loss_and_grads(model, guide, x)
    found = [torch.zeros_like(p) if p.grad is None else p.grad.clone() for p in parameters]
    return torch.tensor(value), found


def reached(guide: Any, *args: Any) -> Tensor:
    """Return the same without a graph."""
    with torch.no_grad():
        return params_in(guide, *args).clone()


def gradients(loss: Tensor, parameters: Sequence[Tensor]) -> list[Tensor]:
    return list(torch.autograd.grad(loss, parameters, materialize_grads=True, retain_graph=True))


def assert_all_close(found: Sequence[Tensor], expected: Sequence[Tensor], **tolerance: Any) -> None:
    tolerance = tolerance or {"atol": 1e-10, "rtol": 1e-10}
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, **tolerance)


W, NOISE = 1.4, 0.8
V = 1 / (1 + W**2 / NOISE**2)  # the posterior's variance
X = torch.tensor([0.5, -1.0, 2.0], dtype=torch.float64)
POSTERIOR = V * W / NOISE**2 * X


def conjugate(x: Tensor) -> None:
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        pyro.sample("x", dist.Normal(W * z, NOISE), obs=x)


def evidence(x: Tensor) -> Tensor:
    return dist.Normal(0.0, math.sqrt(W**2 + NOISE**2)).log_prob(x)


def at_params(
    loss: Any, model: Callable, net: nn.Module, params: Tensor, x: Tensor
) -> tuple[Tensor, list[Tensor], Tensor]:
    """Return a loss at these parameters of rows, and its gradients by the model and by them."""
    start = nn.Parameter(params.detach().clone())
    held = AmortizedGuide(model, Leaf(start), name="held")
    held.prepare(x)
    value, (*direct, by_params) = trained(loss, model, held, x, [*net.parameters(), start])
    return value, direct, by_params


class Leaf(nn.Module):
    """An encoder whose output is a parameter."""

    def __init__(self, params: nn.Parameter) -> None:
        super().__init__()
        self.params = params

    def forward(self, x: Tensor) -> Tensor:
        return self.params[: len(x)]


BASES = {
    "diagonal": lambda model: AmortizedGuide(model, nn.Linear(3, 4)),
    "full": lambda model: AmortizedGuide(model, nn.Linear(3, 5), family="full"),
    "low_rank": lambda model: AmortizedGuide(model, nn.Linear(3, 6), family=LowRank(1)),
    "table": lambda model: AmortizedGuide(model, plate="data", init_scale=0.5),
    "mixture": lambda model: MixtureGuide(
        model, [AmortizedGuide(model, nn.Linear(3, 4)) for _ in range(2)]
    ),
    "unlike": lambda model: MixtureGuide(
        model, [AmortizedGuide(model, nn.Linear(3, 4)), flow_of(model)], trunk=nn.Linear(3, 3)
    ),
    "coupling": lambda model: flow_of(model),
    "maf": lambda model: flow_of(model, "maf"),
}


def shake(guide: nn.Module) -> None:
    """Leave the points where flows start, some of whose second derivatives jump there."""
    with torch.no_grad():
        for parameter in guide.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))


def flow_of(model: Callable, kind: str = "coupling") -> FlowGuide:
    encoder = nn.Linear(3, 2)
    return FlowGuide(model, kind, encoder=encoder, transforms=2, hidden=(3,), init_scale=0.5)


class Watched(nn.Module):
    """Counts its calls, and notes what it returns as long as a graph holds it."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net, self.calls = net, 0
        self.held: list[weakref.ref] = []

    def forward(self, z: Tensor) -> Tensor:
        self.calls += 1
        hidden = self.net[0](z).tanh()
        self.held.append(weakref.ref(hidden))
        return self.net[2](hidden)

    def alive(self) -> int:
        return sum(each() is not None for each in self.held)


TAKEN_UP = {
    "trace": lambda: Trace_ELBO(),
    "trace_vectorised": lambda: Trace_ELBO(3, vectorize_particles=True, max_plate_nesting=1),
    "trace_looped": lambda: Trace_ELBO(3),
    "graph": lambda: TraceGraph_ELBO(num_particles=2),
    "mean_field": lambda: TraceMeanField_ELBO(num_particles=2),
    "renyi": lambda: RenyiELBO(alpha=0.5, num_particles=3),
    "pathwise": lambda: MIWAE_ELBO(2, 3),
    "dreg": lambda: MIWAE_ELBO(2, 3, estimator="dreg"),
    "stl": lambda: MIWAE_ELBO(2, 3, estimator="stl"),
    "dreg_looped": lambda: MIWAE_ELBO(2, 3, estimator="dreg", vectorize_particles=False),
    "stl_single": lambda: MultiSampleELBO(bounds.elbo, estimator="stl"),
}


def kl(first: Tensor, second: Tensor) -> Tensor:
    """Return KL(first || second) of diagonal normals in nats, row by row."""
    (m, log_s), (n, log_t) = first.chunk(2, -1), second.chunk(2, -1)
    ratio = ((m - n) ** 2 + (2 * log_s).exp()) / (2 * log_t).exp()
    return (log_t - log_s + ratio / 2 - 0.5).sum(-1)


def masked(x: Tensor) -> None:
    with pyro.plate("data", len(x), dim=-2):
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        with poutine.mask(mask=x[:, None] > 0):
            pyro.sample("x", dist.Normal(W * z, NOISE), obs=x[:, None])


def hierarchy(x: Tensor) -> None:
    w = pyro.sample("w", dist.Normal(0.3, 1.0))
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Normal(w, 0.8))
        pyro.sample("x", dist.Normal(z, 1.0), obs=x)
