"""Semi-amortised guides: refined numbers, and what encoder and model learn, by oracles.

Oracles are closed forms on a conjugate model, refinement written out in plain torch, and finite
differences of the whole pipeline with fixed noise.
"""

import copy
import math
import pickle
import warnings
import weakref
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.infer import (
    SVI,
    Predictive,
    RenyiELBO,
    Trace_ELBO,
    TraceEnum_ELBO,
    TraceGraph_ELBO,
    TraceMeanField_ELBO,
)
from pyro.infer.autoguide import AutoNormal
from pyro.nn import PyroModule
from torch import Tensor, nn

from pyro_recursive import (
    IWAE_ELBO,
    MIWAE_ELBO,
    AmortizedGuide,
    FlowGuide,
    MixtureGuide,
    MultiSampleELBO,
    SemiAmortizedGuide,
    Stratified_ELBO,
    bounds,
    log_marginal,
)
from pyro_recursive.guides.gaussian_families import FAMILIES, LowRank
from pyro_recursive.guides.row_families import GaussianRows, MixtureRows
from pyro_recursive.guides.semi_amortized import guide as semi_amortized
from pyro_recursive.guides.semi_amortized.guide import MODES, divergence
from pyro_recursive.guides.semi_amortized.row_elbo import LocalBound
from pyro_recursive.guides.semi_amortized.updates import FixedStart, GradientUpdate, LearnedUpdate
from pyro_recursive.tracing.handlers import KLWarmup

ROWS, SIZE = 4, 2  # rows of data, and numbers of z in a row


# A model whose log-density is written out: z ~ N(0, I), x | z ~ N(net(z), 0.5).


def network() -> nn.Sequential:
    return nn.Sequential(nn.Linear(SIZE, 5), nn.Tanh(), nn.Linear(5, 3))


def model_of(net: nn.Module, full: int | None = None) -> Callable:
    """Return the model; with ``full`` its rows are a minibatch of so many."""

    def model(x: Tensor) -> None:
        pyro.module("net", net)
        with pyro.plate("data", full or len(x), subsample_size=len(x)):
            z = pyro.sample("z", dist.Normal(torch.zeros(SIZE), 1.0).to_event(1))
            pyro.sample("x", dist.Normal(net(z), 0.5).to_event(1), obs=x)

    return model


def log_normal(x: Tensor, loc: Tensor | float, scale: Tensor | float) -> Tensor:
    return dist.Normal(loc, scale).log_prob(x).sum(-1)


def row_gain(net: nn.Module, x: Tensor, z: Tensor, q: Sequence[Tensor], weight: float) -> Tensor:
    """Return ``log p(x | z) + weight * (log p(z) - log q(z))``, ``[*s, B, D]`` to ``[*s, B]``."""
    latent = log_normal(z, 0.0, 1.0) - log_normal(z, q[0], q[1].exp())
    return log_normal(x, net(z), 0.5) + weight * latent


def row_gradient(
    net: nn.Module, x: Tensor, numbers: Tensor, noise: Tensor, estimator: str, weight: float = 1.0
) -> Tensor:
    """Differentiate the rows' ELBO by their numbers, ``[B, 2 D]``, with noise ``[S, B, D]``."""
    numbers = numbers.detach().requires_grad_()
    q = numbers.chunk(2, -1)
    z = q[0] + q[1].exp() * noise
    if estimator == "stl":
        q = [part.detach() for part in q]
    gain = row_gain(net, x, z, q, weight).mean(0).sum()
    return torch.autograd.grad(gain, numbers)[0]


def way(
    net: nn.Module, x: Tensor, start: Tensor, noise: Tensor, update: GradientUpdate, **options: Any
) -> tuple[list[Tensor], list[Tensor]]:
    """Return the numbers at the start and after each step, and the gradients, step by step."""
    numbers, velocity, gradients = [start.detach()], torch.zeros(()), []
    for each in noise:
        gradients.append(row_gradient(net, x, numbers[-1], each, **options))
        blocks = gradients[-1].chunk(2, -1)
        clipped = [b * (update.clip / b.norm(dim=-1, keepdim=True)).clamp_max(1) for b in blocks]
        velocity = update.momentum * velocity + torch.cat(clipped, -1)
        numbers.append(numbers[-1] + update.rate * velocity)
    return numbers, gradients


def fixed_noise(seed: int, steps: int, draws: int, size: int = SIZE) -> Tensor:
    """Return what a guide with this seed draws, ``[T, S, 1, D]``: the same for all rows."""
    generator = torch.Generator().manual_seed(seed)
    noise = torch.randn(steps * draws, 1, 1, size, generator=generator)
    return noise.reshape(steps, draws, 1, size)


def semi(model: Callable, encoder: Any = None, **options: Any) -> SemiAmortizedGuide:
    """Return a guide over a linear encoder of three numbers."""
    encoder = nn.Linear(3, 2 * SIZE) if encoder is None else encoder
    return SemiAmortizedGuide(model, AmortizedGuide(model, encoder), **options)


def numbers_in(guide: Any, *args: Any) -> Tensor:
    """Return the numbers of the rows of a call, with their graph."""
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
        return numbers_in(guide, *args).clone()


def gradients(loss: Tensor, parameters: Sequence[Tensor]) -> list[Tensor]:
    return list(torch.autograd.grad(loss, parameters, materialize_grads=True, retain_graph=True))


def assert_all_close(found: Sequence[Tensor], expected: Sequence[Tensor], **tolerance: Any) -> None:
    tolerance = tolerance or {"atol": 1e-10, "rtol": 1e-10}
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, **tolerance)


# --- The contraction law: z ~ N(0, 1), x ~ N(W z, NOISE ** 2)

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


class Held(GradientUpdate):
    """Moves locations alone."""

    def forward(self, numbers: Tensor, gradient: Tensor, *rest: Any) -> tuple[Tensor, Any]:
        loc, log_scale = gradient.chunk(2, -1)
        return super().forward(numbers, torch.cat([loc, 0 * log_scale], -1), *rest)


def contracted(steps: int, scale: float, rate: float, momentum: float, estimator: str) -> Tensor:
    """Return where the table's locations are, how far they come, and their derivative."""
    guide = SemiAmortizedGuide(
        conjugate,
        AmortizedGuide(conjugate, plate="data"),
        steps=steps,
        mode="second_order",
        update=Held(rate, momentum, clip=math.inf),
        estimator=estimator,
    )
    guide.prepare(X)
    table = guide.guide.free_local
    with torch.no_grad():
        table[:, 1] = math.log(scale)
    reached = numbers_in(guide, X)[:, 0]
    (slope,) = torch.autograd.grad(reached.sum(), table)
    return torch.stack([table[:, 0].detach(), reached.detach(), slope[:, 0]])


def predicted(steps: int, rate: float, momentum: float) -> Tensor:
    """Return how much of the distance from the optimum is left, by powers of the dynamics."""
    step = torch.tensor([[1 - rate / V, rate * momentum], [-1 / V, momentum]])
    return torch.linalg.matrix_power(step, steps)[0, 0]


@pytest.mark.parametrize("momentum", [0.0, 0.6])
@pytest.mark.parametrize("steps", [1, 2, 7])
def test_contraction(steps: int, momentum: float) -> None:
    rate = 0.6 * V
    expected = predicted(steps, rate, momentum)
    if not momentum:
        assert expected == pytest.approx((1 - rate / V) ** steps)
    # At the posterior's scale the gradient of "stl" has no noise.
    start, end, slope = contracted(steps, math.sqrt(V), rate, momentum, "stl")
    assert_all_close([end - POSTERIOR], [expected * (start - POSTERIOR)], atol=1e-8, rtol=0)
    assert_all_close([slope], [expected.expand(3)], atol=1e-8, rtol=0)
    # At any scale the derivative of "pathwise" has none.
    start, end, slope = contracted(steps, 0.3, rate, momentum, "pathwise")
    assert_all_close([slope], [expected.expand(3)], atol=1e-8, rtol=0)
    assert (end - POSTERIOR - expected * (start - POSTERIOR)).abs().min() > 1e-4


@pytest.mark.parametrize("momentum", [0.0, 0.5])
@pytest.mark.parametrize(("stable", "share"), [(True, 0.95), (False, 1.05)])
def test_the_stable_range(momentum: float, stable: bool, share: float) -> None:
    rate = share * 2 * (1 + momentum) * V
    start, end, slope = contracted(80, math.sqrt(V), rate, momentum, "stl")
    assert (slope.abs() < 1e-3).all() if stable else (slope.abs() > 1e3).all()
    closer = (end - POSTERIOR).abs() < (start - POSTERIOR).abs()
    assert closer.all() if stable else not closer.any()


def test_many_steps_reach_the_evidence() -> None:
    """Locations and scales; "stl" leaves no noise at the posterior."""
    guide = semi(conjugate, nn.Linear(1, 2), update=GradientUpdate(rate=0.1), test_steps=250)
    guide.guide.inputs = guide.inputs = lambda x: x[:, None]
    guide.eval()
    found = guide.refine(X)
    assert_all_close([found.elbo], [evidence(X)], atol=1e-10, rtol=0)
    assert (found.elbo_start < evidence(X) - 0.05).all()
    exact = torch.stack([POSTERIOR, torch.full((3,), 0.5 * math.log(V))], -1)
    assert_all_close([found.numbers], [exact], atol=1e-10, rtol=0)
    assert -Trace_ELBO().loss(conjugate, guide, X) == pytest.approx(evidence(X).sum().item())


# --- Without steps it is the guide that it was given


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize(
    "loss", [Trace_ELBO(2), IWAE_ELBO(3, estimator="dreg"), MIWAE_ELBO(1, 1, estimator="stl")]
)
def test_no_steps(loss: Any, mode: str) -> None:
    net, encoder, x = network(), nn.Linear(3, 2 * SIZE), torch.randn(ROWS, 3)
    model, results = model_of(net), []
    for refined in (False, True):
        pyro.clear_param_store()
        guide = AmortizedGuide(model, encoder)
        if refined:
            guide = SemiAmortizedGuide(model, guide, steps=0, mode=mode)
        guide.prepare(x)
        net.zero_grad()
        encoder.zero_grad()
        pyro.set_rng_seed(1)
        value = loss.loss_and_grads(model, guide, x)
        found = [p.grad.clone() for p in (*encoder.parameters(), *net.parameters())]
        results.append([torch.tensor(value), *found])
    assert all(map(torch.equal, *results))


# --- Second order: finite differences of the whole pipeline


def slopes(function: Callable[[], Tensor], parameters: Sequence[Tensor]) -> list[float]:
    """Return central differences of a function, along a random direction in each parameter."""
    found = []
    for parameter in parameters:
        torch.manual_seed(7)
        way, step = torch.randn_like(parameter), 1e-5
        values = []
        with torch.no_grad():
            for sign in (1, -2):
                parameter.add_(sign * step * way)
                values.append(float(function().detach()))
            parameter.add_(step * way)
        found.append((values[0] - values[1]) / (2 * step))
    return found


def assert_slopes(
    found: Sequence[Tensor], function: Callable[[], Tensor], parameters: Sequence[Tensor]
) -> None:
    along = []
    for gradient in found:
        torch.manual_seed(7)
        along.append((gradient * torch.randn_like(gradient)).sum().item())
    assert along == pytest.approx(slopes(function, parameters), rel=2e-6, abs=1e-6)


def unrolled(model: Callable, guide: Any, **options: Any) -> SemiAmortizedGuide:
    update = GradientUpdate(rate=0.02, momentum=0.6, clip=8.0, learn_rate=True)
    settings = {"steps": 3, "draws": 2, "mode": "second_order", "direct": 0.0, "update": update}
    return SemiAmortizedGuide(model, guide, **{**settings, **options})


@pytest.mark.parametrize(
    ("estimator", "checkpoint"), [("stl", False), ("pathwise", False), ("stl", True)]
)
def test_second_order_is_the_derivative_of_the_pipeline(estimator: str, checkpoint: bool) -> None:
    net, encoder, x = network(), nn.Linear(3, 2 * SIZE), 2 * torch.randn(ROWS, 3)
    model = model_of(net)
    guide = unrolled(
        model, AmortizedGuide(model, encoder), estimator=estimator, checkpoint=checkpoint
    )
    clipped = guide.refine(x).clipped  # some rows, some steps
    assert 0 < clipped.mean() < 1
    parameters = [*encoder.parameters(), *net.parameters(), guide.update.log_rate]
    for loss in (Trace_ELBO(2), IWAE_ELBO(3)):

        def value(loss: Any = loss) -> Tensor:
            pyro.set_rng_seed(3)
            return loss.differentiable_loss(model, guide, x)

        found = gradients(value(), parameters)
        assert all(g.ne(0).any() for g in found)
        assert_slopes(found, value, parameters)


LOSSES = [
    MIWAE_ELBO(2, 1, estimator="stl"),
    IWAE_ELBO(3, estimator="dreg"),
    IWAE_ELBO(2, estimator="dreg", vectorize_particles=False),
]


@pytest.mark.parametrize("loss", LOSSES)
def test_second_order_under_other_estimators(loss: Any) -> None:
    """What they say at the numbers that are reached, times the derivative of these."""
    net, encoder, x = network(), nn.Linear(3, 2 * SIZE), torch.randn(ROWS, 3)
    model = model_of(net)
    guide = unrolled(model, AmortizedGuide(model, encoder), seed=5)
    guide.prepare(x)
    parameters = [*encoder.parameters(), *net.parameters(), guide.update.log_rate]
    _, found = trained(loss, model, guide, x, parameters)
    _, direct, by_numbers = at_numbers(loss, model, net, numbers_in(guide, x), x)

    def ahead() -> Tensor:
        return (by_numbers * numbers_in(guide, x)).sum()

    for place, own in enumerate(direct, start=2):
        found[place] -= own
    assert_slopes(found, ahead, parameters)


def at_numbers(
    loss: Any, model: Callable, net: nn.Module, numbers: Tensor, x: Tensor
) -> tuple[Tensor, list[Tensor], Tensor]:
    """Return a loss where rows have these numbers, its gradients by the model, by the numbers."""
    start = nn.Parameter(numbers.detach().clone())
    held = AmortizedGuide(model, Leaf(start), name="held")
    held.prepare(x)
    value, (*direct, by_numbers) = trained(loss, model, held, x, [*net.parameters(), start])
    return value, direct, by_numbers


class Leaf(nn.Module):
    """An encoder whose output is a parameter."""

    def __init__(self, numbers: nn.Parameter) -> None:
        super().__init__()
        self.numbers = numbers

    def forward(self, x: Tensor) -> Tensor:
        return self.numbers[: len(x)]


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


@pytest.mark.parametrize("base", BASES)
def test_draws_have_the_density_of_their_family(base: str) -> None:
    """By the change of variables from the noise, or by mean and covariance; parts one by one."""
    x = torch.randn(1, 3)
    model = model_of(network())
    guide = SemiAmortizedGuide(model, BASES[base](model))
    guide.prepare(x)
    shake(guide)
    whole, numbers = guide.row_family(guide.groups[-1]), reached(guide.guide, x)[0]
    noise = torch.randn(whole.parts, whole.noise_dim)

    def draw(noise: Tensor) -> Tensor:
        return whole.draw(numbers, noise[None])[0]

    slope = torch.autograd.functional.jacobian(draw, noise)
    members = getattr(whole, "members", (whole,))
    sizes = [sum(member.blocks) for member in members]
    split = numbers.split([*sizes, len(numbers) - sum(sizes)])[: len(members)]
    for j, (member, own) in enumerate(zip(members, split, strict=True)):
        others = [i for i in range(whole.parts) if i != j]
        assert slope[j][:, others].eq(0).all()
        own_slope = slope[j][:, j, : member.noise_dim]
        u = draw(noise)[j]
        if base == "low_rank":
            found = member.distribution(own)
            assert_all_close([own_slope @ own_slope.mT], [found.covariance_matrix])
            assert_all_close([draw(0 * noise)[j]], [found.mean])
            continue
        expected = log_normal(noise[j], 0.0, 1.0) - own_slope.det().abs().log()
        assert_all_close([member.log_prob(own, u)], [expected])
        scored = member.scored_draw(own, noise[None, j : j + 1, : member.noise_dim])
        assert_all_close([part[0, 0] for part in scored], [u, expected])


def shake(guide: nn.Module) -> None:
    """Leave the points where flows start, some of whose second derivatives jump there."""
    with torch.no_grad():
        for parameter in guide.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))


def flow_of(model: Callable, kind: str = "coupling") -> FlowGuide:
    encoder = nn.Linear(3, 2)
    return FlowGuide(model, kind, encoder=encoder, transforms=2, hidden=(3,), init_scale=0.5)


LONGER = {"low_rank", "unlike", "maf"}


@pytest.mark.parametrize("estimator", ["stl", "pathwise"])
@pytest.mark.parametrize(
    "base", [pytest.param(b, marks=[pytest.mark.slow] if b in LONGER else []) for b in BASES]
)
def test_second_order_of_every_family(base: str, estimator: str) -> None:
    """The derivative of the numbers that are reached by every parameter of guide and model."""
    net, x = network(), torch.randn(ROWS, 3)
    model = model_of(net)
    guide = unrolled(model, BASES[base](model), seed=5, estimator=estimator, steps=2)
    guide.prepare(x)
    shake(guide)
    parameters = [*guide.parameters(), *net.parameters()]
    direction = torch.randn_like(numbers_in(guide, x))

    def ahead() -> Tensor:
        return (direction * numbers_in(guide, x)).sum()

    found = gradients(ahead(), parameters)
    assert all(g.ne(0).any() for g in found)
    assert_slopes(found, ahead, parameters)


@pytest.mark.slow
def test_second_order_of_a_flow_and_its_loss() -> None:
    net, x = network(), torch.randn(ROWS, 3)
    model = model_of(net)
    guide = unrolled(model, flow_of(model))
    guide.prepare(x)
    shake(guide)
    parameters = [*guide.parameters(), *net.parameters()]

    def value() -> Tensor:
        pyro.set_rng_seed(3)
        return Trace_ELBO(2).differentiable_loss(model, guide, x)

    assert_slopes(gradients(value(), parameters), value, parameters)


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


def test_checkpoints_hold_no_more_for_more_steps() -> None:
    net, x = network(), torch.randn(ROWS, 3)
    encoder, found = nn.Linear(3, 2 * SIZE), {}
    for steps in (2, 6):
        for checkpoint in (False, True):
            pyro.clear_param_store()
            watched = Watched(net)
            model = model_of(watched)
            guide = unrolled(
                model, AmortizedGuide(model, encoder), steps=steps, checkpoint=checkpoint
            )
            guide.prepare(x)
            watched.calls, watched.held = 0, []
            pyro.set_rng_seed(1)
            loss = Trace_ELBO(max_plate_nesting=1).differentiable_loss(model, guide, x)
            assert checkpoint or watched.calls == steps + 1
            alive = watched.alive()
            results = gradients(loss, [*encoder.parameters(), *net.parameters()])
            found[steps, checkpoint] = (alive, [loss, *results], torch.randn(()))
    assert [found[key][0] for key in found] == [3, 1, 7, 1]
    for steps in (2, 6):
        assert_all_close(found[steps, False][1], found[steps, True][1], atol=0, rtol=1e-12)
        assert found[steps, False][2] == found[steps, True][2]  # the random state goes on alike


# --- First order: by what encoder and model learn


class Case:
    """A guide with fixed draws, its numbers along the way by hand, and the loss at their end."""

    def __init__(
        self, loss: Any, full: int | None = None, around: Callable = nullcontext, **options: Any
    ) -> None:
        self.net, self.encoder = network(), nn.Linear(3, 2 * SIZE)
        self.x, self.model, self.loss = torch.randn(ROWS, 3), model_of(self.net, full), loss
        self.around = around
        self.update = GradientUpdate(rate=0.04, momentum=0.5, clip=6.0)
        options = {"steps": 4, "draws": 2, "direct": 0.3, **options}
        self.guide = semi(self.model, self.encoder, update=self.update, seed=5, **options)
        self.guide.prepare(self.x)
        self.parameters = [*self.encoder.parameters(), *self.net.parameters()]

    def gradients(self) -> tuple[Tensor, list[Tensor], list[Tensor]]:
        """Return the loss, and its gradients by encoder and by model."""
        with self.around():
            loss, found = trained(self.loss, self.model, self.guide, self.x, self.parameters)
            pyro.set_rng_seed(3)
            assert self.loss.loss(self.model, self.guide, self.x) == pytest.approx(loss.item())
        return loss, found[:2], found[2:]

    def expected(
        self, direct: float = 0.3, weight: float = 1.0, scale: float = 1.0
    ) -> tuple[Tensor, list[Tensor], list[Tensor]]:
        """Return the same: the gradients at the end of the way, and ``direct`` at its start."""
        noise = fixed_noise(5, self.guide.steps, self.guide.draws)
        options = {"estimator": self.guide.estimator, "weight": weight}
        start = self.encoder(self.x)
        numbers, found = way(self.net, self.x, start, noise, self.update, **options)
        with self.around():
            loss, by_model, by_numbers = at_numbers_of(self, numbers[-1])
        upward = by_numbers - direct * scale * found[0]
        return loss, list(torch.autograd.grad(start, self.encoder.parameters(), upward)), by_model


def at_numbers_of(case: Case, numbers: Tensor) -> tuple[Tensor, list[Tensor], Tensor]:
    return at_numbers(case.loss, case.model, case.net, numbers, case.x)


def assert_as_expected(case: Case, **options: Any) -> None:
    for found, expected in zip(case.gradients(), case.expected(**options), strict=True):
        torch.testing.assert_close(found, expected, atol=1e-9, rtol=1e-9)


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


@pytest.mark.parametrize("full", [None, 12])
@pytest.mark.parametrize("loss", TAKEN_UP)
def test_first_order(loss: str, full: int | None) -> None:
    """The gradient at the end, straight to the encoder, and that of the start; not of the steps.

    As part of 12 rows each counts three times.
    """
    assert_as_expected(Case(TAKEN_UP[loss](), full), scale=(full or ROWS) / ROWS)


@pytest.mark.parametrize("loss", ["trace", "dreg", "mean_field"])
def test_first_order_under_a_scale(loss: str) -> None:
    """A scale on guide and model is none of the rows' business, and scales what they climb."""
    case = Case(TAKEN_UP[loss]())
    case.around = lambda: poutine.scale(scale=0.25)
    assert_as_expected(case, scale=0.25)


@pytest.mark.parametrize("loss", ["trace", "stl_single"])
def test_first_order_with_scaled_programs(loss: str) -> None:
    case = Case(TAKEN_UP[loss]())
    bare = case.gradients()
    case.model, case.guide = (poutine.scale(f, scale=0.25) for f in (case.model, case.guide))
    for found, expected in zip(case.gradients(), bare, strict=True):
        one, other = (each if isinstance(each, list) else [each] for each in (found, expected))
        assert_all_close(one, [0.25 * tensor for tensor in other])


@pytest.mark.parametrize("loss", ["trace", "dreg", "mean_field"])
def test_first_order_under_kl_warmup(loss: str) -> None:
    """Rows climb the bound that is being trained, and so does the encoder by its start."""
    case = Case(TAKEN_UP[loss](), around=lambda: KLWarmup(0.2))
    assert_as_expected(case, weight=0.2)


@pytest.mark.parametrize("estimator", ["stl", "pathwise"])
def test_the_first_step_has_an_estimator_of_its_own(estimator: str) -> None:
    assert_as_expected(Case(Trace_ELBO(), estimator=estimator))


def test_without_the_direct_term() -> None:
    case = Case(Trace_ELBO(), direct=0.0)
    assert_as_expected(case, direct=0.0)
    names = poutine.trace(case.guide).get_trace(case.x).nodes
    assert not [name for name in names if name.endswith("_direct")]


def test_the_direct_term_does_not_change_the_loss() -> None:
    values = []
    for direct in (0.0, 0.1, 3.0):
        pyro.clear_param_store()
        pyro.set_rng_seed(0)
        case = Case(IWAE_ELBO(2, estimator="dreg"), direct=direct)
        values.append(case.gradients()[0])
    assert values[0] == values[1] == values[2]


def kl(first: Tensor, second: Tensor) -> Tensor:
    """Return KL(first || second) of diagonal normals in nats, row by row."""
    (m, log_s), (n, log_t) = first.chunk(2, -1), second.chunk(2, -1)
    ratio = ((m - n) ** 2 + (2 * log_s).exp()) / (2 * log_t).exp()
    return (log_t - log_s + ratio / 2 - 0.5).sum(-1)


@pytest.mark.parametrize("loss", ["trace", "mean_field", "renyi", "dreg"])
@pytest.mark.parametrize("mode", ["distill", "distill_reverse", "vae_svi", "svi"])
def test_other_modes(mode: str, loss: str) -> None:
    """The encoder learns from a term of its own, the model from the bound where rows end."""
    case = Case(TAKEN_UP[loss](), full=12, mode=mode, direct=None)
    noise = fixed_noise(5, 4, 2)
    start = case.encoder(case.x)
    numbers, steps = way(case.net, case.x, start, noise, case.update, estimator="stl")
    expected_loss, by_model, _ = at_numbers_of(case, numbers[-1])
    terms = {
        "distill": kl(start, numbers[-1]).sum(),
        "distill_reverse": kl(numbers[-1], start).sum(),
        "vae_svi": -(start * steps[0]).sum(),
        "svi": 0 * start.sum(),
    }
    expected = torch.autograd.grad(12 / ROWS * terms[mode], case.encoder.parameters())
    value, by_encoder, found = case.gradients()
    assert value.item() == pytest.approx(expected_loss.item())
    assert_all_close(found, by_model)
    assert_all_close(by_encoder, expected)


def test_divergence_of_mixtures() -> None:
    """Without a closed form: from draws, by quadrature."""
    family = MixtureRows((GaussianRows(FAMILIES["diagonal"], 1),) * 2)
    first, second = torch.tensor([[-0.5, -0.3, 1.0, 0.2, 0.4, -0.1]]), torch.randn(1, 6)
    points = torch.arange(-12, 12, 0.01)[:, None, None]
    log_p, log_q = (family.log_prob(numbers, points) for numbers in (first, second))
    expected = (log_p.exp() * (log_p - log_q)).sum(0) * 0.01
    draws = torch.stack(
        [divergence(family, first, second, noise) for noise in torch.randn(400, 50, 2, 1, 1)]
    )
    error = (draws.mean(0) - expected) / (draws.std(0) / len(draws) ** 0.5)
    assert error.abs().max() < 4
    assert draws.std(0) < expected  # they tell it from zero


@pytest.mark.parametrize("seed", [None, 3])
def test_a_divergence_has_draws_of_its_own(seed: int | None, monkeypatch: Any) -> None:
    """Where they had moved the rows, it would be biased."""
    model, seen = model_of(network()), []
    guide = SemiAmortizedGuide(model, BASES["mixture"](model), mode="distill", seed=seed, steps=1)

    def noted(family: Any, first: Tensor, second: Tensor, noise: Tensor) -> Tensor:
        seen.append(noise)
        return divergence(family, first, second, noise)

    def step(bound: Any, numbers: Tensor, noise: Tensor, **options: Any) -> Tensor:
        seen.append(noise)
        return torch.zeros_like(numbers)

    monkeypatch.setattr(semi_amortized, "divergence", noted)
    monkeypatch.setattr(LocalBound, "gradient", step)
    guide(torch.randn(ROWS, 3))
    step_noise, own = seen
    assert not (own == step_noise).any()


# --- Rows do not see each other


@pytest.mark.parametrize("seed", [5, None])
@pytest.mark.parametrize("base", ["diagonal", "mixture", "coupling"])
def test_a_row_does_not_depend_on_its_minibatch(
    base: str, seed: int | None, monkeypatch: Any
) -> None:
    net, x = network(), torch.randn(6, 3)
    x[1] *= 30  # its gradient is clipped more often than theirs
    model = model_of(net)
    update = GradientUpdate(0.03, clip=20.0)
    guide = SemiAmortizedGuide(model, BASES[base](model), update=update, draws=2, seed=seed)
    guide.prepare(x)
    if seed is None:
        family = guide.row_family(guide.groups[-1])
        noise = torch.randn(10, family.parts, 6, family.noise_dim)
        rows = iter([slice(0, 6), slice(0, 2), slice(2, 6)])
        drawn = LocalBound.noise
        monkeypatch.setattr(LocalBound, "noise", lambda *args: noise[:, :, next(rows)])
        together, *parts = (numbers_in(guide, each) for each in (x, x[:2], x[2:]))
        monkeypatch.setattr(LocalBound, "noise", drawn)
    else:
        together, *parts = (reached(guide, each) for each in (x, x[:2], x[2:]))
        clipped = guide.refine(x).clipped
        assert clipped[1] > clipped.min()
    assert_all_close([torch.cat(parts)], [together], atol=1e-12, rtol=1e-12)
    assert (together[0] - together[2]).abs().min() > 1e-3


def test_an_outlier_leaves_the_others_alone() -> None:
    x, results = torch.randn(3, 3), []
    update = GradientUpdate(0.05, clip=2.0)
    guide = semi(model_of(network()), FixedStart(4), seed=5, update=update)
    for size in (1.0, 1e6):
        results.append(guide.refine(torch.cat([x[:1], size * x[1:2], x[2:]])))
    one, other = (found.numbers for found in results)
    assert (one == other).all(-1).tolist() == [True, False, True]
    assert (other[1].norm() <= 5 * 0.05 / (1 - update.momentum) * 2 * 2**0.5).all()
    assert [found.clipped[1] == 1 for found in results] == [False, True]


def test_the_share_of_clipped_steps() -> None:
    net, encoder, x = network(), nn.Linear(3, 2 * SIZE), torch.randn(ROWS, 3)
    x *= torch.logspace(-1, 2, ROWS)[:, None]
    update = GradientUpdate(0.05, clip=8.0)
    guide = semi(model_of(net), encoder, steps=6, seed=5, update=update)
    found = guide.refine(x)
    _, steps = way(net, x, encoder(x), fixed_noise(5, 6, 1), update, estimator="stl")
    norms = torch.stack([torch.stack([b.norm(dim=-1) for b in g.chunk(2, -1)]) for g in steps])
    expected = (norms.amax(1) > 8).double().mean(0)
    assert len(expected.unique()) > 1
    assert_all_close([found.clipped], [expected])


def subsampled(net: nn.Module, size: int, **plate: Any) -> Callable:
    """Return the model with a minibatch of its own choice."""

    def model(x: Tensor) -> None:
        pyro.module("net", net)
        with pyro.plate("data", len(x), subsample_size=size, **plate) as index:
            z = pyro.sample("z", dist.Normal(torch.zeros(SIZE), 1.0).to_event(1))
            pyro.sample("x", dist.Normal(net(z), 0.5).to_event(1), obs=x[index])

    return model


def test_rows_do_not_know_how_many_they_are() -> None:
    """No subsample scale in what they climb, wherever the minibatch is taken."""
    net, encoder, x = network(), nn.Linear(3, 2 * SIZE), torch.randn(6, 3)
    expected = reached(semi(model_of(net), encoder, seed=5), x)
    outside = reached(semi(model_of(net, full=600), encoder, seed=5), x[:3])
    assert_all_close([outside], [expected[:3]], atol=1e-12, rtol=1e-12)
    guide = semi(subsampled(net, 2), encoder, seed=5)
    seen = set()
    for _ in range(4):
        guide.prepare(x)
        call = guide.new_call((x,), {})
        index = call.plates["data"].indices
        found = guide.variational_params(guide.groups[-1], call)
        assert_all_close([found], [expected[index]], atol=1e-12, rtol=1e-12)
        seen |= set(index.tolist())
    assert len(seen) > 2


# --- "svi"


def test_svi_keeps_rows_by_their_place_in_the_data() -> None:
    net, x = network(), torch.randn(6, 3)
    index = torch.tensor([4, 1])
    model = subsampled(net, 2, subsample=index)
    table = AmortizedGuide(
        model,
        plate="data",
        create_plates=lambda x: pyro.plate("data", len(x), subsample=index),
        init_scale=0.5,
    )
    update = GradientUpdate(0.02)
    guide = SemiAmortizedGuide(model, table, mode="svi", seed=5, update=update, steps=3)
    svi = SVI(model, guide, pyro.optim.SGD({"lr": 0.0}), Trace_ELBO(max_plate_nesting=1))
    guide.prepare(x)
    noise = fixed_noise(5, 3, 1)
    before = table.free_local.detach().clone()
    numbers, _ = way(net, x[index], before[index], noise, update, estimator="stl")

    svi.evaluate_loss(x)
    guide.refine(x)
    with torch.no_grad():
        guide(x)
    guide.eval()
    svi.step(x)
    assert torch.equal(table.free_local, before)

    guide.train()
    svi.step(x)
    others = torch.tensor([0, 2, 3, 5])
    assert torch.equal(table.free_local[others], before[others])
    assert_all_close([table.free_local[index]], [numbers[-1]])


def test_svi_keeps_rows_of_two_plates() -> None:
    x = torch.randn(3, 4)

    def model(x: Tensor) -> None:
        with pyro.plate("row", 3, subsample_size=2, dim=-2) as i, pyro.plate("column", 4, dim=-1):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x[i])

    table = AmortizedGuide(model, plate="row")
    guide = SemiAmortizedGuide(model, table, mode="svi", update=GradientUpdate(0.1), steps=200)
    guide.prepare(x)
    before = table.free_local.detach().clone()
    index = poutine.trace(guide).get_trace(x).nodes["row"]["value"]
    assert len(index) == 2
    for row in range(3):
        if row in index:
            exact = torch.stack([x[row] / 2, torch.full((4,), -0.5 * math.log(2))], -1)
            assert_all_close([table.free_local[row]], [exact])
        else:
            assert torch.equal(table.free_local[row], before[row])


def test_svi_comes_to_the_posterior() -> None:
    def model(x: Tensor) -> None:
        with pyro.plate("data", len(x), subsample_size=2) as index:
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("x", dist.Normal(W * z, NOISE), obs=x[index])

    table = AmortizedGuide(model, plate="data")
    guide = SemiAmortizedGuide(model, table, mode="svi", update=GradientUpdate(0.1))
    svi = SVI(model, guide, pyro.optim.Adam({"lr": 0.1}), Trace_ELBO())
    for _ in range(60):
        svi.step(X)
    exact = torch.stack([POSTERIOR, torch.full((3,), 0.5 * math.log(V))], -1)
    assert_all_close([table.free_local], [exact], atol=1e-6, rtol=0)


def test_svi_keeps_the_mean_over_particles() -> None:
    """Each has rows of its own where it has global values of its own."""
    x, base = torch.randn(4), AmortizedGuide(hierarchy, plate="data", init_scale=1.0)
    update = GradientUpdate(0.1)
    guide = SemiAmortizedGuide(hierarchy, base, mode="svi", update=update, steps=200)
    guide.prepare(x)
    with pyro.plate("particles", 5, dim=-2):
        w = guide(x)["w"]
    exact = (w.mean() / 0.64 + x) / (1 / 0.64 + 1)
    assert_all_close([base.free_local[:, 0]], [exact], atol=1e-6, rtol=0)


def test_a_fixed_start_is_the_same_for_all_rows() -> None:
    start, x = torch.tensor([0.5, -0.5, -1.0, -1.0]), torch.randn(ROWS, 3)
    model = model_of(network())
    guide = semi(model, FixedStart(4, start), mode="svi", seed=5)
    for _ in range(2):
        found = guide.refine(x, steps=2)
        assert torch.equal(found.start, start.expand(ROWS, -1))
        assert (found.numbers[0] != found.numbers[1]).all()
        Trace_ELBO().loss_and_grads(model, guide, x)  # nothing is kept


# --- Learned updates


@pytest.mark.slow
def test_a_learned_update_beats_a_gradient() -> None:
    """Trained for 300 steps on other data; three refinements each."""
    x, new = 1.6 * torch.randn(2, 64)
    start = AmortizedGuide(conjugate, FixedStart(2))
    learned = SemiAmortizedGuide(
        conjugate, start, steps=3, update=LearnedUpdate(hidden=(32,)), name="learned"
    )
    fixed = SemiAmortizedGuide(conjugate, AmortizedGuide(conjugate, FixedStart(2)), steps=3)
    svi = SVI(conjugate, learned, pyro.optim.Adam({"lr": 0.01}), Trace_ELBO(max_plate_nesting=1))
    for _ in range(300):
        svi.step(x)
    one, other = (guide.refine(new) for guide in (learned, fixed))
    gap, theirs = ((evidence(new) - found.elbo).mean() for found in (one, other))
    assert 0 <= gap < 0.05 * theirs
    assert (one.elbo > one.elbo_start).double().mean() > 0.9


@pytest.mark.parametrize("loss", ["trace", "dreg"])
def test_what_a_learned_update_learns(loss: str) -> None:
    """Each step climbs the bound that it leads to; what it is fed with are constants."""
    net, x = network(), torch.randn(ROWS, 3)
    model, encoder = model_of(net), nn.Linear(3, 2 * SIZE)
    update = LearnedUpdate(hidden=(6,))
    guide = semi(model, encoder, update=update, steps=3, seed=5)
    guide.prepare(x)
    shake(update)
    parameters = [*encoder.parameters(), *update.parameters()]
    found = trained(TAKEN_UP[loss](), model, guide, x, parameters)[1]
    numbers = encoder(x)
    climbed = torch.zeros(())
    for each in fixed_noise(5, 3, 1):
        gradient = row_gradient(net, x, numbers, each, "stl")
        climbed = climbed + (numbers * gradient).sum()
        numbers, _ = update(numbers.detach(), gradient, None, (SIZE, SIZE), x)
    _, _, by_numbers = at_numbers(TAKEN_UP[loss](), model, net, numbers, x)
    expected = torch.autograd.grad((numbers * by_numbers).sum() - climbed, parameters)
    assert all(e.ne(0).any() for e in expected)
    assert_all_close(found, expected)


def test_a_learned_update_from_a_fixed_start_in_second_order() -> None:
    net, x = network(), torch.randn(ROWS, 3)
    model = model_of(net)
    update = LearnedUpdate(hidden=(4,), features=nn.Linear(3, 2))
    base = AmortizedGuide(model, FixedStart(2 * SIZE))
    guide = unrolled(model, base, update=update)
    guide.prepare(x)
    shake(update)
    parameters = [*update.parameters(), *net.parameters()]

    def value() -> Tensor:
        pyro.set_rng_seed(3)
        return Trace_ELBO().differentiable_loss(model, guide, x)

    found = gradients(value(), parameters)
    assert all(g.ne(0).any() for g in found)
    assert_slopes(found, value, parameters)


class Network(nn.Linear):
    """Notes what it is told of the rows."""

    def forward(self, inputs: Tensor) -> Tensor:
        self.told = inputs.detach()
        return super().forward(inputs)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_row_without_data(dtype: torch.dtype) -> None:
    """It starts at its posterior, with a gradient of exactly zero."""
    torch.set_default_dtype(dtype)
    x = torch.tensor([1.0, -1.0])  # the second one is masked
    network = Network(1 + 2 * 2 + 2, 4)
    for name, update in {"": GradientUpdate(), "learned": LearnedUpdate(network=network)}.items():
        guide = SemiAmortizedGuide(
            masked,
            AmortizedGuide(masked, FixedStart(2)),
            update=update,
            mode="second_order",
            steps=1,
            name=name or None,
        )
        found = numbers_in(guide, x).squeeze(-2)
        if not name:
            assert found[1].eq(0).all() and found[0].ne(0).all()
    told = network.told.reshape(2, -1)
    assert told[1, [3, 5]].eq(0).all()
    assert (told[1, [4, 6]] > -20).all() and (told[1, [4, 6]] < -7).all()
    assert (found.abs() < 20).all()


class Counts(nn.Module):
    """An encoder of integers."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.table = nn.Embedding(5, size)

    def forward(self, x: Any) -> Tensor:
        return self.table(x["codes"] if isinstance(x, dict) else x).sum(-2)


def test_features_of_inputs_that_are_no_real_numbers() -> None:
    net = network()

    def model(x: Tensor) -> None:
        model_of(net)(x.double())

    x = torch.randint(5, (ROWS, 3))
    with pytest.raises(ValueError, match=r"inputs of type torch.int64\. .*features="):
        semi(model, Counts(4), update=LearnedUpdate())(x)
    base = AmortizedGuide(model, Counts(4), inputs=lambda x: {"codes": x})
    with pytest.raises(ValueError, match=r"inputs of type dict\. .*features="):
        SemiAmortizedGuide(model, base, update=LearnedUpdate())(x)
    features = Counts(2)
    guide = semi(model, Counts(4), update=LearnedUpdate((5,), features), name="counts")
    guide.prepare(x)
    shake(guide)
    trained(Trace_ELBO(), model, guide, x, list(guide.parameters()))
    assert features.table.weight.grad.ne(0).any()


# --- Nobody notices the runs of the model


def steps_of(net: nn.Module, x: Tensor, mode: str, **options: Any) -> tuple[Any, Any]:
    """Return traces of guide and model, after a call of a guide with three steps."""
    model = model_of(net)
    guide = semi(model, steps=3, mode=mode, name="refined", **options)
    net.eval()
    guide.prepare(x)
    net.train()
    trace = poutine.trace(guide).get_trace(x)
    return trace, poutine.trace(poutine.replay(model, trace=trace)).get_trace(x)


@pytest.mark.parametrize("norm", [nn.BatchNorm1d, PyroModule[nn.BatchNorm1d]])
@pytest.mark.parametrize("mode", ["first_order", "second_order"])
@pytest.mark.parametrize("checkpoint", [False, True])
def test_batch_norms_see_the_outer_run_alone(mode: str, norm: type, checkpoint: bool) -> None:
    net, x = nn.Sequential(nn.Linear(SIZE, 5), norm(5), nn.Linear(5, 3)), torch.randn(ROWS, 3)
    fresh = copy.deepcopy(net)
    _, trace = steps_of(net, x, mode, checkpoint=checkpoint)
    trace.log_prob_sum().backward()  # a checkpoint runs the model again
    fresh(trace.nodes["z"]["value"])
    assert fresh[1].num_batches_tracked == 1
    for name, buffer in fresh.named_buffers():
        assert torch.equal(buffer, net.get_buffer(name)), name


class Dropout(nn.Module):
    """Notes its masks."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net
        self.masks: list[Tensor] = []

    def forward(self, z: Tensor) -> Tensor:
        self.masks.append(torch.rand_like(z) < 0.5)
        return self.net(2 * self.masks[-1] * z)


@pytest.mark.parametrize("checkpoint", [False, True])
@pytest.mark.parametrize("draws", [1, 2])
def test_dropout_is_the_same_in_all_steps(draws: int, checkpoint: bool) -> None:
    net, x = Dropout(network()), torch.randn(50, 3)
    options = {"draws": draws, "checkpoint": checkpoint, "steps": 3}
    guide = semi(model_of(net), mode="second_order", **options)
    guide.prepare(x)
    for _ in range(2):
        net.masks.clear()
        Trace_ELBO(max_plate_nesting=1).loss_and_grads(guide._model.model, guide, x)
        same = [torch.equal(mask, net.masks[0]) for mask in net.masks]
        assert same.count(False) == 1  # the outer run
        assert same.index(False) == (3 if not checkpoint else 6)
    assert len(net.masks) == (4 if not checkpoint else 10)


@pytest.mark.parametrize("seed", [None, 5])
@pytest.mark.parametrize("mode", MODES)
def test_only_the_guide_is_seen(mode: str, seed: int | None) -> None:
    net, x = Dropout(network()), torch.randn(ROWS, 3)
    trace, _ = steps_of(net, x, mode, seed=seed)
    samples = [name for name, site in trace.nodes.items() if site["type"] == "sample"]
    also = [] if mode == "svi" else ["refined_direct"]
    assert sorted(samples) == sorted(["data", "z", *also])
    params = {name for name, site in trace.nodes.items() if site["type"] == "param"}
    assert params == {f"refined.guide.encoder$$${name}" for name in ("weight", "bias")}
    assert all(parameter.grad is None for parameter in net.parameters())
    value = (
        trace.log_prob_sum() + trace.nodes["z"]["value"].sum() + torch.zeros((), requires_grad=True)
    )
    reached = torch.autograd.grad(value, list(net.parameters()), allow_unused=True)
    assert all((g is not None) == (mode == "second_order") for g in reached)


@pytest.mark.parametrize("draws", [1, 3])
@pytest.mark.parametrize("seed", [None, 5])
def test_the_sample_has_noise_of_its_own(seed: int | None, draws: int, monkeypatch: Any) -> None:
    inner: list[Tensor] = []
    outer: list[Tensor] = []

    def noting(function: Callable, found: list[Tensor]) -> Callable:
        def noted(*args: Any, **kwargs: Any) -> Tensor:
            found.append(function(*args, **kwargs))
            return found[-1]

        return noted

    guide, x = semi(model_of(Dropout(network())), seed=seed, draws=draws), torch.randn(ROWS, 3)
    guide.prepare(x)
    normal = torch.distributions.normal
    monkeypatch.setattr(LocalBound, "noise", noting(LocalBound.noise, inner))
    monkeypatch.setattr(normal, "_standard_normal", noting(normal._standard_normal, outer))
    for _ in range(2):
        guide(x)
    assert len(inner) == len(outer) == 2
    assert not (outer[0] == outer[1]).any()
    assert torch.equal(*inner) == (seed is not None)
    assert not any((noise == eps).any() for noise in inner for eps in outer)


def test_the_minibatch_is_drawn_once() -> None:
    seen = []
    x = torch.randn(9, 3)

    def model(x: Tensor) -> None:
        with pyro.plate("data", 9, subsample_size=3) as index:
            seen.append(index)
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x[index, 0])

    svi = SVI(
        model,
        semi(model, nn.Linear(3, 2), steps=3),
        pyro.optim.SGD({"lr": 0.1}),
        MIWAE_ELBO(2, 2, estimator="dreg"),
    )
    svi.step(x)
    for _ in range(2):
        seen.clear()
        svi.step(x)
        assert len(seen) == 4
        assert all(torch.equal(index, seen[0]) for index in seen)


# --- How often the model is run


@pytest.mark.parametrize("estimator", ["pathwise", "stl", "dreg"])
@pytest.mark.parametrize("vectorize", [True, False])
def test_refinement_once_in_a_step(estimator: str, vectorize: bool) -> None:
    """Also where the loss runs the guide twice; looped particles are refined one by one."""
    net, x = Watched(network()), torch.randn(ROWS, 3)
    model = model_of(net)
    guide = semi(model, steps=3, draws=2)
    loss = IWAE_ELBO(2, estimator=estimator, vectorize_particles=vectorize)
    loss.loss(model, guide, x)  # has a look at the plates
    net.calls = 0
    loss.loss_and_grads(model, guide, x)
    assert net.calls == (3 + 1 if vectorize else 2 * (3 + 1))


# --- Evaluation


def test_steps_in_evaluation() -> None:
    net, encoder, x = network(), nn.Linear(3, 2 * SIZE), torch.randn(ROWS, 3)
    guide = semi(model_of(net), encoder, steps=2, test_steps=4, seed=5)
    guide.prepare(x)
    noise = fixed_noise(5, 4, 1)
    expected = {True: 2, False: 4}
    for training, steps in expected.items():
        guide.train(training)
        # More steps have other noise: fixed draws are drawn at once.
        own = noise if steps == 4 else fixed_noise(5, 2, 1)
        numbers, _ = way(net, x, encoder(x), own, guide.update, estimator="stl")
        assert_all_close([reached(guide, x)], [numbers[-1]])
        assert_all_close([numbers_in(guide, x)], [numbers[-1]])
        assert_all_close([guide.refine(x).numbers], [numbers[-1]])
    for steps in (0, 1):
        numbers, _ = way(
            net, x, encoder(x), fixed_noise(5, 1, 1)[:steps], guide.update, estimator="stl"
        )
        assert_all_close([guide.refine(x, steps=steps).numbers], [numbers[-1]])


def test_inference_mode_is_refused() -> None:
    guide, x = semi(model_of(network()), test_steps=0), torch.randn(ROWS, 3)
    with torch.inference_mode(), pytest.raises(RuntimeError, match=r"Use torch\.no_grad\(\)"):
        guide(x)
    guide.eval()
    with torch.inference_mode():
        assert guide(x)["z"].shape == (ROWS, SIZE)


# --- Models of other forms


def test_what_refine_returns() -> None:
    """The bounds are those of start and end, from draws."""
    x = torch.randn(400)
    guide = SemiAmortizedGuide(conjugate, AmortizedGuide(conjugate, FixedStart(2)), steps=3)
    found = guide.refine(x)
    assert [part.shape for part in found] == [(400, 2), (400, 2), (400,), (400,), (400,)]
    assert not found.numbers.requires_grad
    exact = torch.stack([V * W / NOISE**2 * x, torch.full((400,), 0.5 * math.log(V))], -1)
    for numbers, elbo in ((found.start, found.elbo_start), (found.numbers, found.elbo)):
        error = elbo - (evidence(x) - kl(numbers, exact))
        assert abs(error.mean()) < 4 * error.std() / 400**0.5 < 0.1
    assert (found.elbo - found.elbo_start).mean() > 0.3
    guide.train()
    assert all(p.grad is None for p in guide.parameters())


def grid(x: Tensor) -> None:
    with pyro.plate("column", x.shape[1], dim=-2), pyro.plate("row", x.shape[0], dim=-1):
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        pyro.sample("x", dist.Normal(W * z, NOISE), obs=x.mT)


def groups(x: Tensor) -> None:
    """A latent of each group, and one of each of its items, further left."""
    with pyro.plate("group", x.shape[0], dim=-1):
        w = pyro.sample("w", dist.Normal(0.3, 1.0))
        with pyro.plate("item", x.shape[1], dim=-2):
            z = pyro.sample("z", dist.Normal(w, 0.7))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x.mT)


def groups_of_data(x: Tensor) -> None:
    """Observations in a plate, further left, that no latent has."""
    with pyro.plate("group", x.shape[0], dim=-1):
        w = pyro.sample("w", dist.Normal(0.3, 1.0))
        with pyro.plate("item", x.shape[1], dim=-2):
            pyro.sample("x", dist.Normal(w, 1.2), obs=x.mT)


def masked(x: Tensor) -> None:
    with pyro.plate("data", len(x), dim=-2):
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        with poutine.mask(mask=x[:, None] > 0):
            pyro.sample("x", dist.Normal(W * z, NOISE), obs=x[:, None])


def evidence_of_groups(x: Tensor, within: float) -> Tensor:
    covariance = within * torch.eye(x.shape[1]) + 1
    return dist.MultivariateNormal(torch.full((x.shape[1],), 0.3), covariance).log_prob(x)


FORMS = {
    "grid": (grid, 2, lambda x: evidence(x).mT, {"inputs": lambda x: x.mT[..., None]}),
    "groups": (groups, 14, lambda x: evidence_of_groups(x, 1.49), {"family": "full"}),
    "groups_of_data": (groups_of_data, 2, lambda x: evidence_of_groups(x, 1.44), {}),
    "masked": (masked, 2, lambda x: evidence(x) * (x > 0), {}),
}


@pytest.mark.parametrize("form", FORMS)
def test_rows_of_other_forms_reach_the_evidence(form: str) -> None:
    model, size, exact, options = FORMS[form]
    x = torch.randn(5) if form == "masked" else torch.randn(4, 3)
    start = FixedStart(size, row_dims=2 if form == "grid" else 1)
    guide = SemiAmortizedGuide(
        model,
        AmortizedGuide(model, start, **options),
        update=GradientUpdate(0.1 if size == 2 else 0.05),
        steps=150 if size == 2 else 300,
        draws=1 if form == "masked" else 2,
    )
    found, expected = guide.refine(x), exact(x)
    assert found.numbers.shape == (*expected.shape, size)
    assert found.clipped.shape == expected.shape
    assert_all_close([found.elbo], [expected], atol=1e-4, rtol=0)
    assert (found.elbo_start < found.elbo).any()


@pytest.mark.parametrize("weight", [1.0, 0.3])
@pytest.mark.slow
def test_a_positive_latent(weight: float, monkeypatch: Any) -> None:
    """The ELBO of log-normals for Gamma and Poisson has a closed form: so has its optimum."""

    def model(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            rate = pyro.sample("rate", dist.Gamma(2.0, 1.0))
            pyro.sample("x", dist.Poisson(rate), obs=x)

    x = torch.tensor([0.0, 1.0, 5.0])
    quantiles = dist.Normal(0.0, 1.0).icdf((torch.arange(1000) + 0.5) / 1000)

    def even(bound: Any, numbers: Tensor, draws: int, seed: Any = None) -> Tensor:
        return quantiles.repeat(draws // 1000).reshape(-1, 1, 1, 1).expand(-1, 1, 3, 1)

    monkeypatch.setattr(LocalBound, "noise", even)
    guide = SemiAmortizedGuide(
        model,
        AmortizedGuide(model, FixedStart(2)),
        update=GradientUpdate(0.1),
        steps=80,
        draws=1000,
        estimator="pathwise",
    )
    guide.prepare(x)
    with KLWarmup(weight):
        found = reached(guide, x)
    scale = (weight / (x + 2 * weight)).sqrt()
    loc = ((x + 2 * weight) / (1 + weight)).log() - scale**2 / 2
    assert_all_close([found], [torch.stack([loc, scale.log()], -1)], atol=5e-3, rtol=0)
    if weight == 1:
        gain = (x + 2) * loc - 2 * (loc + scale**2 / 2).exp() + scale.log()
        constant = 0.5 * math.log(2 * math.pi * math.e) - torch.lgamma(x + 1)
        assert_all_close([guide.refine(x).elbo], [gain + constant], atol=2e-3, rtol=0)


# --- Latents outside the plate of the rows


def hierarchy(x: Tensor) -> None:
    w = pyro.sample("w", dist.Normal(0.3, 1.0))
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Normal(w, 0.8))
        pyro.sample("x", dist.Normal(z, 1.0), obs=x)


@pytest.mark.parametrize("particles", [0, 3])
def test_rows_are_given_the_global_values_of_their_particle(particles: int) -> None:
    """After many steps they have the posterior given these; of each particle its own."""
    x = torch.randn(4)
    guide = SemiAmortizedGuide(
        hierarchy,
        AmortizedGuide(hierarchy, nn.Linear(1, 2), inputs=lambda x: x[:, None], init_scale=2.0),
        update=GradientUpdate(0.1),
        steps=200,
    )
    guide.prepare(x)
    with pyro.plate("particles", particles, dim=-2) if particles else nullcontext():
        trace = poutine.trace(guide).get_trace(x)
    w, z = (trace.nodes[name] for name in ("w", "z"))
    precision = 1 / 0.64 + 1
    exact = dist.Normal((w["value"] / 0.64 + x) / precision, precision**-0.5)
    assert z["value"].shape == ((particles, 4) if particles else (4,))
    assert not particles or w["value"].std() > 0.1
    assert_all_close(
        [z["fn"].log_prob(z["value"])], [exact.log_prob(z["value"])], atol=1e-6, rtol=0
    )


@pytest.mark.parametrize("vectorize", [True, False])
def test_second_order_through_global_values(vectorize: bool) -> None:
    x = torch.randn(4)
    base = AmortizedGuide(hierarchy, nn.Linear(1, 2), inputs=lambda x: x[:, None])
    guide = unrolled(hierarchy, base)
    guide.prepare(x)
    parameters = list(guide.parameters())
    loss = MIWAE_ELBO(2, 1, vectorize_particles=vectorize)

    def value() -> Tensor:
        pyro.set_rng_seed(3)
        return loss.differentiable_loss(hierarchy, guide, x)

    found = gradients(value(), parameters)
    assert all(g.ne(0).any() for g in found)
    assert_slopes(found, value, parameters)


@pytest.mark.parametrize("mode", ["first_order", "second_order", "distill"])
@pytest.mark.parametrize("estimator", ["pathwise", "dreg"])
def test_looped_particles_equal_one_pass(estimator: str, mode: str) -> None:
    """Each with its own global values, steps, and what the encoder learns beside the bound."""
    x, noise = torch.randn(4), torch.randn(6, 5)
    base = AmortizedGuide(hierarchy, nn.Linear(1, 2), inputs=lambda x: x[:, None])
    guide = SemiAmortizedGuide(hierarchy, base, mode=mode, seed=5)
    guide.prepare(x)
    shake(guide)
    results = []
    for vectorize in (True, False):
        loss = MIWAE_ELBO(3, 2, estimator=estimator, vectorize_particles=vectorize)
        runs = 1 if estimator == "pathwise" else 2  # a second run of the guide draws again
        drawn = iter([each for each in ([noise] if vectorize else noise) for _ in range(runs)])
        current: dict[str, Tensor] = {}

        def standard(shape: Any, drawn: Any = drawn, current: dict = current, **_: Any) -> Tensor:
            if math.prod(shape[-2:]) == 1:  # the global latent is the first of a particle
                current["noise"] = next(drawn)
                return current["noise"][..., 0].reshape(shape)
            return current["noise"][..., 1:].reshape(shape)

        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "Plate 'data' encloses")
            loss.loss(hierarchy, guide, x)  # has a look at the plates
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(torch.distributions.normal, "_standard_normal", standard)
                value, found = trained(loss, hierarchy, guide, x, list(guide.parameters()))
        results.append([value, *found])
    assert all(each.ne(0).any() for each in results[0])
    assert_all_close(*results)


@pytest.mark.parametrize("mode", ["first_order", "second_order"])
def test_sticking_the_landing_through_global_values(mode: str) -> None:
    """A second run of the guide refines again: its rows depend on what stands for the globals."""
    x, encoder = torch.randn(4), nn.Linear(1, 2)
    base = AmortizedGuide(hierarchy, encoder, inputs=lambda x: x[:, None])
    update = GradientUpdate(0.1, clip=math.inf)
    guide = SemiAmortizedGuide(
        hierarchy, base, mode=mode, update=update, steps=3, seed=5, direct=0.0
    )
    guide.prepare(x)
    parameters = [*encoder.parameters(), base.free_global]
    outer = {1: torch.randn(1), 4: torch.randn(4, 1)}

    def refined(w: Tensor, numbers: Tensor) -> Tensor:
        start, velocity = numbers, torch.zeros(())
        for noise in fixed_noise(5, 3, 1, size=1):
            path, density = numbers.view_as(numbers), numbers.view_as(numbers)
            loc, log_scale = path.unbind(-1)
            z = loc + log_scale.exp() * noise[..., 0]
            gain = log_joint_of_hierarchy(w, z, x) - log_q(density, z)
            (found,) = torch.autograd.grad(gain.sum(), path, create_graph=True)
            velocity = update.momentum * velocity + found
            numbers = numbers + update.rate * velocity
        return numbers if mode == "second_order" else start + (numbers - start).detach()

    free = base.free_global
    w = free[0] + free[1].exp() * outer[1]
    start = encoder(x[:, None])
    loc, log_scale = refined(w, start).unbind(-1)
    z = loc + log_scale.exp() * outer[4][:, 0]
    constant = start.detach().requires_grad_()
    held = log_q(refined(w, constant), z).sum() + log_q(free.detach()[None], w).sum()
    prior = dist.Normal(0.3, 1.0).log_prob(w).sum()
    value = prior + log_joint_of_hierarchy(w, z, x).sum() - held
    expected = [-g for g in gradients(value, parameters)]

    def standard(shape: Any, dtype: Any, device: Any) -> Tensor:
        return outer[len(torch.empty(shape).squeeze(-1).flatten())].reshape(shape)

    loss = MIWAE_ELBO(1, 1, estimator="stl")
    loss.loss(hierarchy, guide, x)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.distributions.normal, "_standard_normal", standard)
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "Plate 'data' encloses")
            found = trained(loss, hierarchy, guide, x, parameters)[1]
    assert_all_close(found, expected)


def log_joint_of_hierarchy(w: Tensor, z: Tensor, x: Tensor) -> Tensor:
    return dist.Normal(w, 0.8).log_prob(z) + dist.Normal(z, 1.0).log_prob(x)


def log_q(numbers: Tensor, z: Tensor) -> Tensor:
    loc, log_scale = numbers.unbind(-1)
    return dist.Normal(loc, log_scale.exp()).log_prob(z)


def coupled(x: Tensor, full: int | None = None) -> None:
    """A site beside the rows that depends on all of them."""
    with pyro.plate("data", full or len(x), subsample_size=len(x)):
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        pyro.sample("x", dist.Normal(z, 1.0), obs=x)
    pyro.sample("total", dist.Normal(z.sum(-1, keepdim=True), 0.7), obs=torch.tensor([1.0]))


@pytest.mark.parametrize("full", [None, 20])
def test_a_site_that_couples_rows(full: int | None) -> None:
    """Beside a minibatch it counts for as much as beside all rows: their share is what counts."""
    x = torch.randn(5)
    start = torch.tensor([0.2, -0.3])
    update = GradientUpdate(0.05, momentum=0.0, clip=math.inf)
    guide = SemiAmortizedGuide(
        lambda x: coupled(x, full),
        AmortizedGuide(lambda x: coupled(x, full), FixedStart(2, start), plate="data"),
        update=update,
        draws=3,
        seed=5,
    )
    numbers = start.expand(5, -1)
    for noise in fixed_noise(5, 5, 3, size=1):
        numbers = numbers.detach().requires_grad_()
        loc, log_scale = numbers.unbind(-1)
        z = loc + log_scale.exp() * noise[..., 0]
        q = dist.Normal(loc.detach(), log_scale.detach().exp())
        gain = dist.Normal(0.0, 1.0).log_prob(z) + dist.Normal(z, 1.0).log_prob(x) - q.log_prob(z)
        total = dist.Normal(z.sum(-1), 0.7).log_prob(torch.tensor(1.0))
        value = gain.sum(-1).mean() + 5 / (full or 5) * total.mean()
        numbers = numbers + 0.05 * torch.autograd.grad(value, numbers)[0]
    assert_all_close([reached(guide, x)], [numbers.detach()])


def test_a_site_without_the_plate_of_the_draws_is_refused() -> None:
    def model(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
        pyro.sample("total", dist.Normal(z.sum(-1), 0.7), obs=x.sum(-1))

    x = torch.randn(3)
    for draws in (1, 3):
        pyro.clear_param_store()
        base = AmortizedGuide(model, FixedStart(2), plate="data")
        guide = SemiAmortizedGuide(model, base, draws=draws)
        if draws == 1:
            assert guide.refine(x).numbers.shape == (3, 2)
            continue
        with pytest.raises(ValueError, match=r"'total' has batch shape .*no plate.*draws=1"):
            guide.refine(x)


@pytest.mark.parametrize("draws", [1, 3])
def test_latents_have_the_shapes_of_the_model(draws: int) -> None:
    """Without a dim for a plate further left that they are not in."""
    shapes = []

    def model(x: Tensor) -> None:
        with pyro.plate("data", len(x), dim=-1):
            z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
            shapes.append(z.shape)
            with pyro.plate("copy", 3, dim=-2):
                pyro.sample("x", dist.Normal(z.sum(-1), 1.0), obs=x.mT)

    guide, x = semi(model, draws=draws), torch.randn(ROWS, 3)
    guide.prepare(x)
    shapes.clear()
    guide(x)
    assert shapes == [(ROWS, 2) if draws == 1 else (3, 1, ROWS, 2)] * 5


# --- Losses and predictions


def test_predictions_for_data_of_another_size() -> None:
    net, x = network(), torch.randn(ROWS, 3)
    model = model_of(net)
    guide = semi(model)
    SVI(model, guide, pyro.optim.SGD({"lr": 0.01}), Trace_ELBO()).step(x)
    new = torch.randn(9, 3)
    for parallel in (False, True):
        predict = Predictive(model, guide=guide, num_samples=5, parallel=parallel)
        drawn = predict(new)
        assert drawn["z"].shape == (5, 9, SIZE)
        assert drawn["z"].std(0).min() > 0
    assert math.isfinite(IWAE_ELBO(3).loss(model, guide, new))


@pytest.mark.slow
def test_a_mixture_is_refined_as_a_whole() -> None:
    """Two posteriors of z given z ** 2: both places, and their weights."""

    def model(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(0.3, 3.0))
            pyro.sample("x", dist.Normal(z**2, 0.5), obs=x)

    x = torch.tensor([4.0, 9.0])
    starts = [FixedStart(2, torch.tensor([place, -1.0])) for place in (1.0, -1.0)]
    parts = [AmortizedGuide(model, start) for start in starts]
    mixture = MixtureGuide(model, parts, weights="shared")
    update = GradientUpdate(0.005, clip=10.0)
    guide = SemiAmortizedGuide(model, mixture, steps=500, draws=4, update=update)
    found = guide.refine(x)
    points = torch.arange(-6, 6, 0.001)[:, None]
    joint = dist.Normal(0.3, 3.0).log_prob(points) + dist.Normal(points**2, 0.5).log_prob(x)
    exact = joint.logsumexp(0) + math.log(0.001)
    assert (exact - found.elbo).max() < 0.05
    logits = found.numbers[:, -2:].softmax(-1)
    left = (joint[points[:, 0] < 0].logsumexp(0) - joint.logsumexp(0)).exp()
    assert_all_close([logits[:, 1]], [left], atol=0.02, rtol=0)
    loss = IWAE_ELBO(4, estimator="dreg+vimco")
    assert loss.loss_and_grads(model, guide, x) == pytest.approx(-exact.sum().item(), abs=0.3)
    with pytest.raises(TypeError, match=r"needs a mixture guide .* got SemiAmortizedGuide"):
        Stratified_ELBO(2).loss(model, guide, x)


# --- Saved, copied, converted


def test_copies_share_the_model_and_pickles_leave_it_out() -> None:
    net, x = network(), torch.randn(ROWS, 3)
    model = model_of(net)  # a closure: pickle would refuse it
    guide = semi(model, seed=5)
    expected = reached(guide, x)
    twin = copy.deepcopy(guide)
    assert twin._model.model is model
    assert torch.equal(reached(twin, x), expected)
    with torch.no_grad():
        twin.guide.encoder.bias.add_(1.0)
    assert torch.equal(reached(guide, x), expected)
    assert (reached(twin, x) != expected).any()

    loaded = pickle.loads(pickle.dumps(guide))
    with pytest.raises(RuntimeError, match=r"without its model.*guide\.attach\(model\)"):
        loaded(x)
    loaded.test_steps = 0
    assert loaded.eval()(x)["z"].shape == (ROWS, SIZE)
    loaded.train().attach(model)
    assert torch.equal(reached(loaded, x), expected)


@pytest.mark.parametrize("update", [lambda: GradientUpdate(learn_rate=True), LearnedUpdate])
def test_state_dict_and_param_store(update: Callable, tmp_path: Any) -> None:
    net, x = network(), torch.randn(ROWS, 3)
    model = model_of(net)

    def build() -> SemiAmortizedGuide:
        guide = semi(model, nn.Linear(3, 4), update=update(), seed=5)
        guide.prepare(x)
        shake(guide)
        return guide

    guide = build()
    guide(x)
    expected = reached(guide, x)
    other = build()
    assert (reached(other, x) != expected).any()
    other.load_state_dict(guide.state_dict())
    assert torch.equal(reached(other, x), expected)

    store = pyro.get_param_store()
    assert {name.split("$$$")[0] for name in store if "Semi" in name} == {
        "SemiAmortizedGuide.guide.encoder",
        "SemiAmortizedGuide.update",
    }
    store.save(tmp_path / "store")
    pyro.clear_param_store()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        store.load(tmp_path / "store")
    loaded = build()
    loaded(x)
    assert torch.equal(reached(loaded, x), expected)


@pytest.mark.parametrize("update", [GradientUpdate, LearnedUpdate])
@pytest.mark.parametrize("mode", ["first_order", "second_order"])
def test_float32(mode: str, update: Callable) -> None:
    net, x = network(), torch.randn(ROWS, 3)
    model = model_of(net)
    guide = semi(model, nn.Linear(3, 4), update=update(), mode=mode)
    guide.prepare(x)
    shake(guide)
    net.float()
    guide.to(torch.float32)
    x, parameters = x.float(), [*guide.parameters(), *net.parameters()]
    torch.set_default_dtype(torch.float32)
    assert guide.refine(x).elbo.dtype == torch.float32
    found = trained(Trace_ELBO(), model, guide, x, parameters)[1]
    assert {g.dtype for g in found} == {torch.float32}
    assert all(g.isfinite().all() and g.ne(0).any() for g in found)


@pytest.mark.parametrize("base", ["diagonal", "table", "coupling"])
def test_a_guide_that_was_trained_before(base: str) -> None:
    model, x = model_of(network()), torch.randn(ROWS, 3)
    trained_guide = BASES[base](model)
    optimizer, loss = pyro.optim.SGD({"lr": 0.01}), Trace_ELBO(max_plate_nesting=1)
    SVI(model, trained_guide, optimizer, loss).step(x)
    start = numbers_in(trained_guide, x).detach().clone()
    guide = SemiAmortizedGuide(model, trained_guide)
    found = guide.refine(x, steps=0)
    assert torch.equal(found.start, start)
    SVI(model, guide, optimizer, loss).step(x)
    assert (numbers_in(guide.guide, x) != start).any(-1).all()
    assert torch.equal(found.start, start)  # it is no view of a table


# --- Errors


def test_two_guides_of_one_name_are_told_apart() -> None:
    x, model = torch.randn(ROWS, 3), model_of(network())
    first, second = semi(model), semi(model)
    first(x)
    with pytest.raises(ValueError, match=r"Another guide named 'SemiAmortizedGuide'.*name="):
        second(x)
    semi(model, name="other")(x)


WRONG: dict[str, tuple[Callable[[Callable], Any], type[Exception], str]] = {
    "mode": (
        lambda model: semi(model, mode="third_order"),
        ValueError,
        r"mode must be one of \('first_order'.*got 'third_order'",
    ),
    "steps": (lambda model: semi(model, steps=-1), ValueError, "steps must be .*>= 0, got -1"),
    "steps_float": (lambda model: semi(model, steps=2.0), ValueError, "integer >= 0, got 2.0"),
    "test_steps": (lambda model: semi(model, test_steps=-2), ValueError, "test_steps .*got -2"),
    "draws": (lambda model: semi(model, draws=0), ValueError, "draws must .*>= 1, got 0"),
    "direct": (lambda model: semi(model, direct=-0.1), ValueError, "direct must .*got -0.1"),
    "direct_mode": (
        lambda model: semi(model, mode="distill", direct=0.1),
        ValueError,
        "direct is for the modes .*mode='distill' has its own term",
    ),
    "estimator": (
        lambda model: semi(model, estimator="dreg"),
        ValueError,
        r"estimator must be one of \('stl', 'pathwise'\), got 'dreg'",
    ),
    "learned_mode": (
        lambda model: semi(model, mode="svi", update=LearnedUpdate()),
        ValueError,
        "LearnedUpdate learns its steps from the bound.*got 'svi'",
    ),
    "rate": (lambda model: GradientUpdate(rate=0.0), ValueError, "rate must .*got 0.0"),
    "momentum": (lambda model: GradientUpdate(momentum=1.0), ValueError, "momentum .*got 1.0"),
    "clip": (lambda model: GradientUpdate(clip=0.0), ValueError, "clip must .*got 0.0"),
    "guide": (
        lambda model: SemiAmortizedGuide(model, AutoNormal(model)),
        TypeError,
        "AmortizedGuide, FlowGuide or a MixtureGuide of those; got AutoNormal",
    ),
    "twice": (
        lambda model: SemiAmortizedGuide(model, semi(model)),
        TypeError,
        "got SemiAmortizedGuide",
    ),
    "component": (
        lambda model: MixtureGuide(model, [semi(model), AmortizedGuide(model, nn.Linear(3, 4))]),
        ValueError,
        "SemiAmortizedGuide cannot be a component of a mixture.*Refine the mixture as a whole",
    ),
    "used_before": (
        lambda model: SemiAmortizedGuide(model, used(model)),
        ValueError,
        "has run on its own before.*load_state_dict",
    ),
    "autoguides": (
        lambda model: SemiAmortizedGuide(
            model, MixtureGuide(model, [AutoNormal(model)] * 2, weights="shared", plate="data")
        )(torch.randn(ROWS, 3)),
        TypeError,
        "component of the mixture is AutoNormal.*Use AmortizedGuide or FlowGuide",
    ),
    "no_rows": (
        lambda model: SemiAmortizedGuide(model, AmortizedGuide(model))(torch.randn(ROWS, 3)),
        ValueError,
        "refines the parameters of each row.*plate= for a table",
    ),
    "mixture_of_tables": (
        lambda model: SemiAmortizedGuide(model, MixtureGuide(model, 2, plate="data"), mode="svi")(
            torch.randn(ROWS, 3)
        ),
        NotImplementedError,
        "MixtureGuide has no table to keep rows in",
    ),
}


def used(model: Callable) -> MixtureGuide:
    guide = MixtureGuide(model, [AmortizedGuide(model, nn.Linear(3, 4)) for _ in range(2)])
    guide(torch.randn(ROWS, 3))
    return guide


@pytest.mark.parametrize("name", WRONG)
def test_refused_with_what_was_got(name: str) -> None:
    make, error, message = WRONG[name]
    with pytest.raises(error, match=message):
        make(model_of(network()))


def test_discrete_latents_are_refused() -> None:
    def model(x: Tensor, enumerate: str | None = None) -> None:
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            k = pyro.sample("k", dist.Bernoulli(0.4), infer={"enumerate": enumerate})
            pyro.sample("x", dist.Normal(z + k, 1.0), obs=x[:, 0])

    x = torch.randn(ROWS, 3)
    with pytest.raises(NotImplementedError, match=r"'k' is discrete.*Marginalise it"):
        semi(model, nn.Linear(3, 2))(x)
    guide = semi(model, nn.Linear(3, 2), name="other")
    with pytest.raises(NotImplementedError, match=r"'k' is not this guide's.*Marginalise it"):
        TraceEnum_ELBO(max_plate_nesting=1).loss(model, guide, x, enumerate="parallel")


# --- On a device


class Recurrent(nn.Module):
    """Notes whether cuDNN was on."""

    def __init__(self) -> None:
        super().__init__()
        self.lstm, self.out = nn.LSTM(SIZE, 6, batch_first=True), nn.Linear(6, 1)
        self.cudnn: list[bool] = []

    def forward(self, z: Tensor) -> Tensor:
        hidden, _ = self.lstm(z.unsqueeze(-2).expand(-1, 3, -1))
        self.cudnn.append(torch.backends.cudnn.enabled)
        return self.out(hidden).squeeze(-1)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("mode", ["first_order", "second_order"])
def test_where_cudnn_is_left_out(mode: str, training: bool) -> None:
    net, x = Recurrent(), torch.randn(ROWS, 3)
    guide = semi(model_of(net), mode=mode, steps=2)
    guide.prepare(x)
    net.train(training)
    net.cudnn.clear()
    Trace_ELBO(max_plate_nesting=1).loss_and_grads(guide._model.model, guide, x)
    assert net.cudnn == [training and mode == "first_order"] * 2 + [True]


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("mode", ["first_order", "second_order"])
def test_recurrent_networks_on_cuda(mode: str, training: bool) -> None:
    """cuDNN's cannot be differentiated twice, nor at all in eval mode: torch's own are used."""

    net, encoder, x = Recurrent(), nn.Linear(3, 2 * SIZE), torch.randn(ROWS, 3)
    found = []
    for device in ("cpu", "cuda"):
        pyro.clear_param_store()
        net.to(device)
        encoder.to(device)
        torch.set_default_device(device)
        try:
            model = model_of(net)
            guide = semi(model, encoder, mode=mode, seed=5)
            guide.prepare(x.to(device))
            net.train(training)
            parameters = [*encoder.parameters(), *net.parameters()]
            numbers = numbers_in(guide, x.to(device))
            gradient = gradients(numbers.square().sum(), parameters)
            refined = guide.refine(x.to(device)).numbers
            found.append([each.cpu() for each in (numbers.detach(), refined, *gradient)])
        finally:
            torch.set_default_device(None)
    assert torch.backends.cudnn.enabled
    assert_all_close(found[0], found[1], atol=1e-8, rtol=1e-8)


def test_a_look_does_not_move_the_table() -> None:
    x = torch.randn(ROWS, 3)
    model = model_of(network())
    guide = SemiAmortizedGuide(model, AmortizedGuide(model, plate="data"), mode="svi")
    guide.prepare(x)
    before = guide.guide.free_local.detach().clone()
    log_marginal(model, guide, x, num_particles=10)
    IWAE_ELBO(2).loss(model, guide, x)
    assert_all_close([guide.guide.free_local], [before], atol=0, rtol=0)
    IWAE_ELBO(2).loss_and_grads(model, guide, x)
    assert (guide.guide.free_local != before).any()


class Attention(nn.Module):
    """A decoder that fused attention would run in."""

    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(4, 2, batch_first=True)
        self.wide, self.last = nn.Linear(SIZE, 8), nn.Linear(8, 3)

    def forward(self, z: Tensor) -> Tensor:
        words = self.wide(z).unflatten(-1, (2, 4)).reshape(-1, 2, 4)
        seen = self.attention(words, words, words, need_weights=False)[0]
        return self.last(seen.reshape(*z.shape[:-1], 8))


def test_second_order_through_attention() -> None:
    x, net = torch.randn(ROWS, 3), Attention()
    guide = semi(model_of(net), mode="second_order", steps=2, seed=1)
    Trace_ELBO().loss_and_grads(model_of(net), guide, x)
    assert all(bool(p.grad.isfinite().all()) for p in guide.parameters())


def test_fixed_start_follows_the_rows() -> None:
    with_zeros = FixedStart(4).to(torch.float32)
    assert with_zeros(torch.ones(2, 3)).dtype == torch.float64
    assert with_zeros(torch.ones(2, 3, dtype=torch.long)).dtype == torch.float32


def test_refine_leaves_the_encoders_statistics() -> None:
    x = torch.randn(ROWS, 3)
    norm = nn.BatchNorm1d(3)
    guide = semi(model_of(network()), nn.Sequential(norm, nn.Linear(3, 2 * SIZE)))
    guide.refine(x)
    assert norm.num_batches_tracked == 0
