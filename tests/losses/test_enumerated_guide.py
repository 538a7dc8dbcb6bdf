"""Guides that enumerate latents: quadrature, every outcome of discrete samples, TraceEnum_ELBO."""

import itertools
import math
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.infer import SVI, Trace_ELBO, TraceEnum_ELBO, config_enumerate
from torch import Tensor, nn

from pyro_recursive import (
    CIWAE_ELBO,
    IWAE_ELBO,
    AmortizedGuide,
    CompiledSVI,
    MultiSampleELBO,
    SemiAmortizedGuide,
    bounds,
)
from pyro_recursive.losses.base import LogWeightELBO
from pyro_recursive.tracing.program import Program
from pyro_recursive.tracing.runs import run_particles
from pyro_recursive.tracing.sites import latent_sites
from pyro_recursive.training import KLWarmup
from tests.models.enumerated_guides import (
    LABELS,
    PARALLEL,
    PROGRAMS,
    SUPPORTED,
    Fixed,
    embed,
    outside,
    outside_guide,
    rows,
    rows_guide,
)
from tests.models.losses import BOUNDS, LOSSES
from tests.models.refusals import enumerated_below, enumerated_guide
from tests.models.row import data, normal, positive, real
from tests.oracles.enumeration import gradients
from tests.oracles.recordings import Pinned

Params = dict[str, Tensor]


def values_of(loss: LogWeightELBO, model: Callable, guide: Callable, *args: Any) -> Tensor:
    """Return the bound of each row, ``[rows]``."""
    with torch.no_grad():
        return loss._bounds(loss._evaluate(Program(model, guide, args)))


# A semi-supervised autoencoder of one datum. Each row of the data is the same datum with other
# noise, and has parameters of its own, so that one gradient holds the gradients for all noise.

START = {
    "prior": [0.3, -0.2, 0.1],
    "m": [-1.0, 0.4, 1.2],
    "w": [0.7, -0.5, 1.1],
    "b": [0.3, 0.0, -0.4],
    "c": [0.5, -0.3, 0.2],
    "a": [0.2, -0.1, 0.4],
    "h": [-0.4, 0.2, 0.5],
    "s": [-0.5, -0.45, -0.7],
}
X = 0.8


class Noise:
    """The noise of the K samples of each row, ``[K, rows]``, in one pass or one by one."""

    def __init__(self, eps: Tensor) -> None:
        self.eps, self.drawn = eps, 0

    def __call__(self, shape: torch.Size) -> Tensor:
        count = len(self.eps)
        if len(shape) > 1:
            return self.eps[torch.arange(shape[0]) % count]
        self.drawn += 1
        return self.eps[(self.drawn - 1) % count]


def autoencoder(params: Params, noise: Callable, one_hot: bool) -> tuple[Callable, Callable]:
    family = dist.OneHotCategorical if one_hot else dist.Categorical
    size = len(params["m"])

    class Given(dist.Normal):
        def rsample(self, sample_shape: Any = ()) -> Tensor:
            return self.loc + self.scale * noise(self.batch_shape)

    def at(name: str, y: Tensor) -> Tensor:
        y = y if one_hot else y.unsqueeze(-1) == torch.arange(3)
        return (params[name] * y).sum(-1)

    def model() -> None:
        with pyro.plate("data", size):
            y = pyro.sample("y", family(logits=params["prior"]))
            z = normal("z", at("m", y), 0.8)
            normal("x", at("w", y) * z + at("b", y), 0.6, obs=torch.full((size,), X))

    def guide() -> None:
        with pyro.plate("data", size):
            y = pyro.sample("y", family(logits=params["c"] * X), infer=PARALLEL)
            pyro.sample("z", Given(at("a", y) * X + at("h", y), at("s", y).exp()))

    return model, guide


def hermite(count: int) -> tuple[Tensor, Tensor]:
    nodes, weights = np.polynomial.hermite_e.hermegauss(count)
    return torch.tensor(nodes), torch.tensor(weights / weights.sum())


def by_quadrature(p: Params, K: int, count: int) -> Tensor:
    """Return the objective of one row, for parameters ``[3]``."""
    eps, weights = hermite(count)
    loc, sd = (p["a"] * X + p["h"]).unsqueeze(-1), p["s"].exp().unsqueeze(-1)
    z = loc + sd * eps
    log_p = dist.Normal(p["m"].unsqueeze(-1), 0.8).log_prob(z)
    mean = p["w"].unsqueeze(-1) * z + p["b"].unsqueeze(-1)
    log_p = log_p + dist.Normal(mean, 0.6).log_prob(torch.tensor(X))
    lw = log_p + p["prior"].log_softmax(-1).unsqueeze(-1) - dist.Normal(loc, sd).log_prob(z)
    if K == 1:
        each = lw @ weights
    else:
        pairs = torch.logaddexp(lw.unsqueeze(-1), lw.unsqueeze(-2)) - math.log(2)
        each = torch.einsum("i,j,cij->c", weights, weights, pairs)
    log_q = (p["c"] * X).log_softmax(-1)
    return (log_q.exp() * (each - log_q)).sum()


def on_nodes(K: int, count: int) -> tuple[Noise, Tensor]:
    """Return the noise of rows with all K-tuples of nodes, and the rows' weights."""
    nodes, weights = hermite(count)
    index = torch.tensor(list(itertools.product(range(count), repeat=K))).T
    return Noise(nodes[index]), weights[index].prod(0)


def of_rows(count: int) -> Params:
    start = {name: torch.tensor(value).expand(count, 3) for name, value in START.items()}
    return {name: each.clone().requires_grad_() for name, each in start.items()}


def row_gradients(loss: LogWeightELBO, programs: tuple, params: Params, weights: Tensor) -> Params:
    """Return minus the weighted mean of the rows' gradients."""
    value = loss.differentiable_loss(*programs)
    found = torch.autograd.grad(value, [*params.values()])
    return {
        name: -(weights.unsqueeze(-1) * each).sum(0)
        for name, each in zip(params, found, strict=True)
    }


@pytest.mark.parametrize("vectorize", [True, "vmap", False])
@pytest.mark.parametrize("one_hot", [True, False])
@pytest.mark.parametrize("K", [1, 2])
def test_quadrature_of_an_autoencoder(K: int, one_hot: bool, vectorize: bool | str) -> None:
    noise, weights = on_nodes(K, 40)
    params = of_rows(len(weights))
    programs = autoencoder(params, noise, one_hot)
    start = {name: torch.tensor(value).requires_grad_() for name, value in START.items()}
    exact = by_quadrature(start, K, 40)
    torch.testing.assert_close(exact, by_quadrature(start, K, 52), rtol=0, atol=1e-10)
    gradient = torch.autograd.grad(exact, [*start.values()])
    for estimator in ("pathwise", "dreg", "stl" if K == 1 else "dreg+vimco"):
        loss = IWAE_ELBO(K, estimator=estimator, vectorize_particles=vectorize)
        values_of(loss, *programs)  # finds the structure, with other runs
        noise.drawn = 0
        value = weights @ values_of(loss, *programs)
        torch.testing.assert_close(value, exact.detach(), rtol=0, atol=1e-11)
        noise.drawn = 0
        found = row_gradients(loss, programs, params, weights)
        for (name, one), other in zip(found.items(), gradient, strict=True):
            assert (one - other).abs().max() < 1e-8, name


# The same with binary latents: each row has one outcome of all samples.


def coins(params: Params, bits: Tensor) -> tuple[Callable, Callable]:
    """``bits`` are the values of z for each particle, ``[C * M * K, rows]``."""
    size, data = bits.shape[1], torch.tensor(0.7)

    class Given(dist.Bernoulli):
        def sample(self, sample_shape: Any = ()) -> Tensor:
            shape = self.batch_shape
            return bits[torch.arange(shape[0]) % len(bits)] if len(shape) > 1 else bits[0]

    def model() -> None:
        p = params["p"]
        with pyro.plate("data", size):
            y = pyro.sample("y", dist.Bernoulli(logits=p[:, 0]))
            z = pyro.sample("z", dist.Bernoulli(logits=p[:, 1] + p[:, 2] * y))
            normal("x", p[:, 3] * y + p[:, 4] * z - 0.5, 0.8, obs=data.expand(size))

    def guide() -> None:
        q = params["q"]
        with pyro.plate("data", size):
            y = pyro.sample("y", dist.Bernoulli(logits=q[:, 0]), infer=PARALLEL)
            pyro.sample("z", Given(logits=q[:, 1] + q[:, 2] * y))

    return model, guide


P, Q = [0.4, -0.3, 0.8, 1.4, -0.9], [0.2, 0.5, -0.7]


def tables_of(p: Tensor, q: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return log q(y), and log p(x, y, z) and log q(z | y) as ``[y, z]``."""
    y, z = torch.tensor([[0.0], [1.0]]), torch.tensor([[0.0, 1.0]])

    def coin(logits: Tensor, value: Tensor) -> Tensor:
        return dist.Bernoulli(logits=logits).log_prob(value)

    log_p = coin(p[0], y) + coin(p[1] + p[2] * y, z.expand(2, 2))
    log_p = log_p + dist.Normal(p[3] * y + p[4] * z - 0.5, 0.8).log_prob(torch.tensor(0.7))
    return coin(q[0], y)[:, 0], log_p, coin(q[1] + q[2] * y, z.expand(2, 2))


@pytest.mark.parametrize("estimator", ["score", "vimco", "dreg+vimco", "rws"])
@pytest.mark.parametrize("loss", LOSSES)
def test_every_outcome_of_binary_latents(loss: str, estimator: str) -> None:
    """Two estimates of two samples for each of two values: 256 outcomes."""
    M = K = 2
    outcomes = torch.tensor(list(itertools.product([0, 1], repeat=2 * M * K))).T  # [C M K, rows]
    params = {
        name: torch.tensor(each).repeat(256, 1).requires_grad_()
        for name, each in (("p", P), ("q", Q))
    }
    p, q = (torch.tensor(each).requires_grad_() for each in (P, Q))
    log_y, log_p, log_z = tables_of(p, q)
    index = outcomes.unflatten(0, (2, M, K))
    drawn = log_z[torch.arange(2).reshape(2, 1, 1, 1), index]
    joint = log_p[torch.arange(2).reshape(2, 1, 1, 1), index]
    chance = drawn.flatten(0, 2).sum(0).exp()  # of each row
    bound = BOUNDS[loss]
    lw = (joint - drawn).movedim(0, -1)  # [M, K, rows, C]

    def objective(bound: bounds.Bound) -> Tensor:
        return (chance * (log_y.exp() * (bound(lw) - log_y)).sum(-1)).sum()

    program = coins(params, outcomes.double())
    made = LOSSES[loss](M, K, estimator=estimator)
    found = values_of(made, *program) @ chance.detach()
    torch.testing.assert_close(found, objective(bound).detach(), rtol=0, atol=1e-12)
    if estimator == "rws":
        own = lw.detach().requires_grad_()
        of_samples = torch.autograd.grad(bound.guide(own).sum(), own)[0]
        values = bound.guide.estimate(lw).detach().softmax(-1)  # [M, rows, C]
        wake = (values.unsqueeze(1) * of_samples * drawn.movedim(0, -1)).sum((0, 1, 3))
        wake = wake + (values * log_y).mean(0).sum(-1)
        of_guide = (chance.detach() * wake).sum()
    else:
        of_guide = objective(bound.guide)
    expected = {
        "p": torch.autograd.grad(objective(bound), p, retain_graph=True)[0],
        "q": torch.autograd.grad(of_guide, q)[0],
    }
    for name, one in row_gradients(made, program, params, chance.detach()).items():
        torch.testing.assert_close(one, expected[name], rtol=0, atol=1e-12)


@pytest.mark.parametrize("M", [1, 2])
@pytest.mark.parametrize("estimator", ["score", "dreg+score"])
def test_every_outcome_of_a_coin_before_an_enumerated_one(estimator: str, M: int) -> None:
    """One sample for each estimate, with q(y | d): the entropy of y is downstream of d."""
    outcomes = torch.tensor(list(itertools.product([0.0, 1.0], repeat=M))).T  # [M, rows]
    size = outcomes.shape[1]
    p, q = (torch.tensor(each).requires_grad_() for each in (P, Q))
    of_rows = q.detach().expand(size, 3).clone().requires_grad_()

    class Given(dist.Bernoulli):
        def sample(self, sample_shape: Any = ()) -> Tensor:
            shape = self.batch_shape
            return outcomes[torch.arange(shape[0]) % M] if len(shape) > 1 else outcomes[0]

    def model() -> None:
        with pyro.plate("data", size):
            d = pyro.sample("d", dist.Bernoulli(logits=p[0]))
            y = pyro.sample("y", dist.Bernoulli(logits=p[1] + p[2] * d))
            normal("x", p[3] * d + p[4] * y - 0.5, 0.8, obs=torch.tensor(0.7).expand(size))

    def guide() -> None:
        with pyro.plate("data", size):
            d = pyro.sample("d", Given(logits=of_rows[:, 0]))
            logits = of_rows[:, 1] + of_rows[:, 2] * d
            pyro.sample("y", dist.Bernoulli(logits=logits), infer=PARALLEL)

    log_d, log_p, log_y = tables_of(p, q)
    log_q = log_d.unsqueeze(-1) + log_y
    (expected,) = torch.autograd.grad((log_q.exp() * (log_p - log_q)).sum(), q)
    chance = log_d.detach().exp()[outcomes.long()].prod(0)
    loss = IWAE_ELBO(1, num_estimates=M, estimator=estimator)
    found = row_gradients(loss, (model, guide), {"q": of_rows}, chance)["q"]
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("dead", [False, True])
@pytest.mark.parametrize("estimator", ["rws", "rws-dreg"])
def test_a_wake_phase_leaves_labelled_rows_out(estimator: str, dead: bool) -> None:
    """Also where q(y) is 0, which has no gradient."""
    x, prior = data(), torch.tensor([0.3, -0.2])
    logits = torch.tensor([[0.4, -0.1], [1.5, -0.3], [0.2, 0.9], [-0.6, 0.1]])
    logits = logits.where(torch.tensor(not dead), torch.tensor([0.0, -math.inf])).requires_grad_()

    def model() -> None:
        with pyro.plate("data", len(x)):
            fn = dist.Categorical(logits=prior)
            y = pyro.sample("y", fn, obs=LABELS, obs_mask=SUPPORTED)
            normal("x", y - 0.5, 0.7, obs=x)

    def guide() -> None:
        with pyro.plate("data", len(x)), poutine.mask(mask=~SUPPORTED):
            pyro.sample("y_unobserved", dist.Categorical(logits=logits), infer=PARALLEL)

    loss = IWAE_ELBO(2, num_estimates=2, estimator=estimator)
    (found,) = torch.autograd.grad(loss.differentiable_loss(model, guide), logits)
    log_p = prior + dist.Normal(torch.tensor([-0.5, 0.5]), 0.7).log_prob(x.unsqueeze(-1))
    expected = logits.detach().softmax(-1) - log_p.softmax(-1)
    expected[SUPPORTED | torch.tensor(dead)] = 0.0
    torch.testing.assert_close(found, expected)


# One sample: the value and the gradient of Pyro's loss from the same noise.

WARNS = {"outside": pytest.mark.filterwarnings("ignore:Plate 'data' encloses latent site")}
each_program = pytest.mark.parametrize(
    "name", [pytest.param(name, marks=WARNS.get(name, ())) for name in PROGRAMS]
)


def value_and_gradient(loss: Any, name: str) -> Tensor:
    pyro.clear_param_store()
    pyro.set_rng_seed(3)
    value = loss.differentiable_loss(*PROGRAMS[name], data())
    leaves = dict(sorted(pyro.get_param_store().named_parameters())).values()
    found = torch.autograd.grad(value, [*leaves], allow_unused=True, materialize_grads=True)
    return torch.cat([value.detach().reshape(1), *map(torch.flatten, found)])


@pytest.mark.parametrize("loss", LOSSES)
@each_program
def test_one_sample_equals_trace_enum_elbo(name: str, loss: str) -> None:
    if name == "sequential":  # where Pyro draws other numbers
        expected = value_and_gradient(LOSSES[loss](1, 1), "rows")
    else:
        expected = value_and_gradient(TraceEnum_ELBO(max_plate_nesting=2), name)
    found = value_and_gradient(LOSSES[loss](1, 1), name)
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-10)


@each_program
def test_ways_to_run(name: str) -> None:
    """The same noise gives the same value and gradient in one pass, under vmap, and one by one."""
    program = Program(*PROGRAMS[name], (data(),))
    size = (1, 1) if name == "chained" else (2, 3)
    particles, (run,) = run_particles(program, *size, by_value=True)
    drawn = {site["name"]: site["value"] for site in latent_sites(run.guide)}
    found = []
    for vectorize in (True, "vmap", False):
        loss = LOSSES["MIWAE_ELBO"](*size, estimator="dreg", vectorize_particles=vectorize)
        with Pinned(drawn, {}, 0 if vectorize else particles.total):
            value = loss.differentiable_loss(*PROGRAMS[name], data())
        found.append(torch.cat([value.detach().reshape(1), gradients(value)]))
    torch.testing.assert_close(found[1], found[0])
    torch.testing.assert_close(found[2], found[0])


def test_distance_to_the_sum_inside() -> None:
    """IWAE with the sum inside less this bound is a divergence of q(y), for each draw."""
    program = Program(rows, rows_guide, (data(),))
    loss = IWAE_ELBO(5)
    evaluation = loss._evaluate(program)
    found, local = loss._bounds(evaluation), evaluation.local
    inside = local.marginal_log_weights.logsumexp(1)[0] - math.log(5)
    each = local.log_weights.logsumexp(1)[0] - math.log(5)  # [rows, C]
    log_q = (data().unsqueeze(-1) * embed("c", 0.7, -0.2, 0.4)).log_softmax(-1)
    divergence = (log_q.exp() * (log_q - each.log_softmax(-1))).sum(-1)
    torch.testing.assert_close(inside - found, divergence)
    assert (divergence > 0.01).all()


def test_beside_a_refined_guide() -> None:
    """The sum inside is that of the guide alone, with the latent enumerated in the model."""
    model, x, plates = config_enumerate(rows), data(), dict[str, Any]()
    options: dict[str, Any] = {
        "inputs": lambda x: x.unsqueeze(-1),
        "create_plates": lambda x: plates.get("data") or pyro.plate("data", len(x)),
    }
    encoder = AmortizedGuide(model, nn.Linear(1, 2), **options)
    refined = SemiAmortizedGuide(model, encoder, steps=2, seed=0)

    def guide(x: Tensor) -> None:
        plates["data"] = pyro.plate("data", len(x))
        refined(x)
        with plates.pop("data"):
            logits = x.unsqueeze(-1) * embed("c", 0.7, -0.2, 0.4)
            pyro.sample("y", dist.Categorical(logits=logits), infer=PARALLEL)

    found = []
    for each in (refined, guide):
        pyro.set_rng_seed(0)
        local = IWAE_ELBO(1)._evaluate(Program(model, each, (x,))).local
        found.append(local.marginal_log_weights)
    torch.testing.assert_close(*found)


# Pyro's semi-supervised autoencoder.


def network() -> tuple[Callable, Callable]:
    size, digits = 3, 6
    decoder = nn.Sequential(nn.Linear(size + 2, 8), nn.Softplus(), nn.Linear(8, digits))
    encoder_y = nn.Sequential(nn.Linear(digits, 8), nn.Softplus(), nn.Linear(8, size))
    encoder_z = nn.Sequential(nn.Linear(size + digits, 8), nn.Softplus(), nn.Linear(8, 4))

    def joined(*tensors: Tensor) -> Tensor:
        batch = torch.broadcast_shapes(*(each.shape[:-1] for each in tensors))
        return torch.cat([each.expand(*batch, -1) for each in tensors], -1)

    def model(x: Tensor, y: Tensor | None = None) -> None:
        pyro.module("decoder", decoder)
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
            y = pyro.sample("y", dist.OneHotCategorical(torch.ones(size) / size), obs=y)
            logits = decoder(joined(z, y))
            pyro.sample("x", dist.Bernoulli(logits=logits).to_event(1), obs=x)

    def guide(x: Tensor, y: Tensor | None = None) -> None:
        pyro.module("encoder_y", encoder_y)
        pyro.module("encoder_z", encoder_z)
        with pyro.plate("data", len(x)):
            if y is None:
                y = pyro.sample("y", dist.OneHotCategorical(logits=encoder_y(x)))
            loc, scale = encoder_z(joined(x, y)).chunk(2, -1)
            pyro.sample("z", dist.Normal(loc, scale.exp()).to_event(1))

    return model, config_enumerate(guide)


def images() -> Tensor:
    return torch.rand(20, 6).round()


def gradient_of(loss: Any, programs: tuple, *args: Any) -> Tensor:
    pyro.set_rng_seed(3)
    value = loss.differentiable_loss(*programs, *args)
    return torch.cat([value.detach().reshape(1), gradients(value)])


def test_an_autoencoder_of_networks() -> None:
    programs, x = network(), images()
    labels = torch.eye(3)[torch.arange(20) % 3]
    for args, elbo in (((x,), TraceEnum_ELBO(max_plate_nesting=1)), ((x, labels), Trace_ELBO())):
        expected = gradient_of(elbo, programs, *args)
        for make in LOSSES.values():
            found = gradient_of(make(1, 1), programs, *args)
            torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-10)
        one, many = (IWAE_ELBO(K, num_estimates=50).loss(*programs, *args) for K in (1, 8))
        assert many < one - 0.05
    assert gradient_of(IWAE_ELBO(8, estimator="dreg"), programs, x).isfinite().all()


@pytest.mark.parametrize("K", [pytest.param(1, marks=pytest.mark.slow), 4])
def test_compiled_steps_are_those_of_svi(K: int) -> None:
    """Also where Pyro's own loss takes the eager ones."""
    x, found = images(), []
    estimator = "pathwise" if K == 1 else "dreg"
    compiled = partial(CompiledSVI, engine="graph", strict=True)
    loss = IWAE_ELBO(K, estimator=estimator)
    eager = TraceEnum_ELBO(max_plate_nesting=1) if K == 1 else loss
    for make, own in ((SVI, eager), (compiled, loss)):
        pyro.clear_param_store()
        pyro.set_rng_seed(4)
        svi = make(*network(), pyro.optim.Adam({"lr": 0.05}), own)
        losses = torch.tensor([svi.step(x) for _ in range(6)])
        params = [each.detach().flatten() for each in pyro.get_param_store().values()]
        found.append(torch.cat([losses, *params]))
    torch.testing.assert_close(found[1], found[0], rtol=1e-10, atol=1e-10)


def test_warmup_weighs_the_enumerated_latent() -> None:
    """As in Pyro's loss: log p(y) - log q(y) is a part of the divergence."""
    found = []
    for loss in (IWAE_ELBO(1), TraceEnum_ELBO(max_plate_nesting=2)):
        with KLWarmup(0.3):
            found.append(value_and_gradient(loss, "rows"))
    torch.testing.assert_close(*found)


# What has no such value.


def test_refusals() -> None:
    x = data()
    for infer, message in (({"num_samples": 4}, "num_samples': 4}.*Drop infer"),):
        guide = partial(rows_guide, infer={"enumerate": "parallel", **infer})
        with pytest.raises(NotImplementedError, match=message):
            IWAE_ELBO(2).loss(rows, guide, x)
    with pytest.raises(NotImplementedError, match="learn_beta=True needs a guide that samples"):
        CIWAE_ELBO(4, learn_beta=True).loss_and_grads(rows, rows_guide, x)
    pyro.clear_param_store()
    given = enumerated_below, enumerated_guide
    with pytest.raises(NotImplementedError, match=r"each of the 2 samples .*use num_particles=1"):
        IWAE_ELBO(2).loss(*given, x)
    with pytest.raises(NotImplementedError, match="use num_estimates=1, num_particles=1"):
        MultiSampleELBO(bounds.piwae, num_estimates=2).loss(*given, x)
    nested = IWAE_ELBO(2, num_globals=2, global_latents="elbo")
    with pytest.raises(NotImplementedError, match="num_globals=2 and a guide that enumerates"):
        nested.loss(*(partial(each, is_global=True) for each in given), x)

    def model(x: Tensor) -> None:
        normal("x", normal("z", 0.0, 1.0), 1.0, obs=x[0])

    def guide(x: Tensor) -> None:
        normal("z", 0.0, 1.0)

    with pytest.raises(NotImplementedError, match=r"Normal has no finite support. Drop infer="):
        IWAE_ELBO(2).loss(model, poutine.infer_config(guide, lambda site: PARALLEL), x)


def test_a_global_latent_beside_enumerated_ones() -> None:
    """With ``"elbo"`` each row has its own sum; with one sample it is Pyro's value."""

    def model(x: Tensor) -> None:
        g = normal("g", 0.0, 1.0)
        with pyro.plate("data", len(x)):
            y = pyro.sample("y", dist.Bernoulli(logits=g))
            normal("x", normal("z", y + g, 1.0), 0.7, obs=x)

    class One(dist.Normal):
        def rsample(self, sample_shape: Any = ()) -> Tensor:
            return self.loc + 0.7 * self.scale

    def guide(x: Tensor) -> None:
        g = pyro.sample("g", One(real("m", 0.3), positive("r", 0.5)))
        with pyro.plate("data", len(x)):
            y = pyro.sample("y", dist.Bernoulli(logits=g * x + real("c", 0.2)), infer=PARALLEL)
            pyro.sample("z", Fixed(y * real("a", 0.4) + g, positive("s", 0.9)))

    losses = [
        TraceEnum_ELBO(max_plate_nesting=1),
        *(
            IWAE_ELBO(K, num_estimates=M, global_latents="elbo")
            for M, K in ((1, 1), (2, 3))  # of the same noise
        ),
    ]
    expected, *found = [gradient_of(loss, (model, guide), data()) for loss in losses]
    for each in found:
        torch.testing.assert_close(each, expected)


@pytest.mark.filterwarnings("ignore:Plate 'data' encloses latent site")
def test_a_global_latent_that_is_enumerated() -> None:
    """It has no part of its own in ``"elbo"``: with one sample that is the joint weight."""

    def beside(program: Callable, x: Tensor) -> None:
        normal("g", real("g_loc", 0.2), 0.9)
        program(x)

    for programs in (
        (outside, outside_guide),
        tuple(partial(beside, each) for each in (outside, outside_guide)),
    ):
        loss = IWAE_ELBO(1, global_latents="elbo")
        joint, found = (gradient_of(each, programs, data()) for each in (IWAE_ELBO(1), loss))
        torch.testing.assert_close(found, joint)
        with pytest.raises(NotImplementedError, match="'y' is enumerated outside the plates of"):
            IWAE_ELBO(3, global_latents="elbo").loss(*programs, data())
        for K, message in ((1, "num_globals=2 and a guide"), (3, "'y' is enumerated outside")):
            loss = IWAE_ELBO(K, num_globals=2, global_latents="elbo")
            with pytest.raises(NotImplementedError, match=message):
                loss.loss(*programs, data())
        with pytest.warns(UserWarning, match="one joint weight.$"):  # without that remedy
            IWAE_ELBO(3).loss(*programs, data())
    marks = {"y": {"enumerate": None}}  # which may change from call to call
    guide = poutine.infer_config(outside_guide, lambda site: marks.get(site["name"], {}))
    loss = IWAE_ELBO(3, global_latents="elbo")
    assert math.isfinite(loss.loss(outside, guide, data()))
    marks.clear()
    with pytest.raises(NotImplementedError, match="'y' is enumerated outside the plates of"):
        loss.loss(outside, guide, data())


def test_many_combinations_warn_once() -> None:
    x = data()

    def program(is_guide: bool, x: Tensor) -> None:
        infer = PARALLEL if is_guide else {}
        with pyro.plate("data", len(x)):
            for i in range(6):
                pyro.sample(f"y{i}", dist.Categorical(logits=torch.zeros(4)), infer=infer)
            if not is_guide:
                normal("x", 0.0, 1.0, obs=x)

    loss, programs = IWAE_ELBO(1), (partial(program, False), partial(program, True))
    with pytest.warns(UserWarning, match="'y4', 'y5' have 4096 combinations of values"):
        value = loss.loss(*programs, x)
    exact = -dist.Normal(0.0, 1.0).log_prob(x).sum()
    torch.testing.assert_close(torch.tensor(value), exact)
    assert loss.loss(*programs, x) == value
