"""Losses of models with enumerated latents: the sums by hand, Pyro's TraceEnum_ELBO, quadrature."""

import math
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.infer import ELBO, TraceEnum_ELBO
from torch import Tensor

from pyro_recursive.bounds.estimators import ESTIMATORS
from pyro_recursive.tracing.densities import densities
from pyro_recursive.tracing.plates import layout_of
from pyro_recursive.tracing.program import Program
from pyro_recursive.tracing.runs import run_particles
from tests.models.enumerated import ENUMERATED, Enumerated
from tests.models.losses import LOSSES, that_differ

slow = partial(pytest.param, marks=pytest.mark.slow)
over = pytest.mark.parametrize("row", ENUMERATED, ids=lambda row: row.name)


# Where Pyro's own loss has no such value or gradient.
DIFFERS = {
    "sequential": "does not enumerate so in the model",
    "weighted_rows": "takes scalar scales alone",
    "masked_rows": "adds log C for masked entries of C values",
    **dict.fromkeys(("mixed", "above"), "has another baseline"),
}


@contextmanager
def expected_warnings(row: Enumerated) -> Iterator[None]:
    with warnings.catch_warnings():
        if row.joint:
            warnings.filterwarnings("ignore", "Plate '.*' encloses latent site")
        yield


def value_and_gradient(loss: ELBO, model: Callable, guide: Callable, x: Tensor) -> Tensor:
    """Return both as one vector, of parameters by name."""
    pyro.clear_param_store()
    pyro.set_rng_seed(3)
    value = loss.differentiable_loss(model, guide, x)
    leaves = dict(sorted(pyro.get_param_store().named_parameters())).values()
    found = torch.autograd.grad(value, [*leaves], allow_unused=True, materialize_grads=True)
    return torch.cat([value.detach().reshape(1), *map(torch.flatten, found)])


def check_collapsed(row: Enumerated, make: Callable[..., ELBO], **options: Any) -> None:
    """The enumerated model has the value and the gradient of the model with the sums by hand."""
    with expected_warnings(row):
        loss = make(2, 3, **options)
        found, expected = (
            value_and_gradient(loss, model, row.guide, row.x())
            for model in (row.model, row.collapsed)
        )
    assert found.isfinite().all() and (found != 0).any()
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-10)


def estimators_of(row: Enumerated) -> list[str]:
    without = ("pathwise", "stl", "dreg", "rws-dreg") if row.discrete else ()
    differ = that_differ(ESTIMATORS, has_scores=row.discrete)
    return [name for name in differ if name not in without]


@over
@pytest.mark.parametrize("vectorize", [True, False, "vmap"])
def test_sums_by_hand(row: Enumerated, vectorize: bool | str) -> None:
    for estimator in estimators_of(row):
        check_collapsed(
            row, LOSSES["MIWAE_ELBO"], estimator=estimator, vectorize_particles=vectorize
        )


@pytest.mark.parametrize("loss", LOSSES)
@over
def test_sums_by_hand_of_every_loss(row: Enumerated, loss: str) -> None:
    check_collapsed(row, LOSSES[loss], estimator="vimco" if row.discrete else "dreg+vimco")


@pytest.mark.parametrize("loss", ["IWAE_ELBO", "PIWAE_ELBO", "MultiSampleELBO"])
@over
def test_one_sample_equals_trace_enum_elbo(row: Enumerated, loss: str) -> None:
    if row.name in DIFFERS:
        pytest.skip(f"Pyro {DIFFERS[row.name]}")
    found, expected = (
        value_and_gradient(each, row.model, row.guide, row.x())
        for each in (LOSSES[loss](1, 1), TraceEnum_ELBO(max_plate_nesting=2))
    )
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-10)


# Values and gradients of expectations, by quadrature over the guide's latents.


def leaf(*values: float) -> Tensor:
    return torch.tensor(values).requires_grad_()


def log_weights_at(model: Callable, guide: Callable, count: int) -> Tensor:
    """Return log-weights with a graph at the nodes that a guide gives, ``[count, *plates]``."""
    particles, runs = run_particles(Program(model, guide), 1, count)
    layout = layout_of(particles, [run.table for run in runs])
    return densities(runs, layout).reparameterized[0]


def iwae(log_weights: Tensor, q: Tensor, K: int) -> Tensor:
    """Return the IWAE for nodes that have the probabilities q, ``[count]``, under the guide."""
    if K == 1:
        return (q @ log_weights).sum()
    pairs = torch.logaddexp(log_weights[:, None], log_weights[None]) - math.log(2)
    return torch.einsum("i,j,ij...->...", q, q, pairs).sum()


def check_gradients(value: Tensor, *expected: tuple[Tensor, list[float]]) -> None:
    found = torch.autograd.grad(value, [each for each, _ in expected], retain_graph=True)
    for one, (_, other) in zip(found, expected, strict=True):
        torch.testing.assert_close(one, torch.tensor(other).reshape(one.shape), rtol=0, atol=2e-10)


def hermite(count: int) -> tuple[Tensor, Tensor]:
    nodes, weights = np.polynomial.hermite_e.hermegauss(count)
    return torch.tensor(nodes), torch.tensor(weights / weights.sum())


def unit_interval(count: int) -> tuple[Tensor, Tensor]:
    """Return nodes and weights for functions with roots at the ends."""
    nodes, weights = map(torch.tensor, np.polynomial.legendre.leggauss(count))
    angle = math.pi / 4 * (1 + nodes)
    return angle.sin() ** 2, math.pi / 4 * (2 * angle).sin() * weights


class NodeNormal(dist.Normal):
    """Draws quadrature nodes where there is a dim for them."""

    def rsample(self, sample_shape: Any = ()) -> Tensor:
        if len(self.batch_shape) < 2:
            return super().rsample(sample_shape)
        return self.loc + self.scale * hermite(len(self.loc))[0].unsqueeze(-1)


class NodeDirichlet(dist.Dirichlet):
    def rsample(self, sample_shape: Any = ()) -> Tensor:
        if len(self.batch_shape) < 2:
            return super().rsample(sample_shape)
        theta, _ = unit_interval(len(self.concentration))
        return torch.stack([theta, 1 - theta], -1).reshape(self.concentration.shape)


def test_quadrature_of_a_mixture() -> None:
    x = torch.tensor([-2.1, -1.7, 0.3, 1.9, 2.4])
    locs, a, b, log_s = leaf(-1.5, 0.2, 2.0), leaf(0.6), leaf(0.1), leaf(math.log(0.6))
    log_noise = leaf(math.log(0.7))

    def model() -> None:
        with pyro.plate("data", 5):
            fn = dist.Categorical(torch.tensor([0.2, 0.3, 0.5]))
            y = pyro.sample("y", fn, infer={"enumerate": "parallel"})
            z = pyro.sample("z", dist.Normal(locs[y], 1.0))
            pyro.sample("x", dist.Normal(z, log_noise.exp()), obs=x)

    def guide() -> None:
        with pyro.plate("data", 5):
            pyro.sample("z", NodeNormal(a * x + b, log_s.exp()))

    log_weights, q = log_weights_at(model, guide, 60), hermite(60)[1]
    evidence = (log_weights + q.log().unsqueeze(-1)).logsumexp(0).sum()
    one, two = (iwae(log_weights, q, K) for K in (1, 2))
    expected = torch.tensor([-9.9920409250, -11.8300777575, -11.1279819319])
    torch.testing.assert_close(torch.stack([evidence, one, two]), expected, rtol=0, atol=2e-10)
    check_gradients(one, (a, [12.1724364072]), (b, [0.6681611697]))
    check_gradients(two, (a, [8.2354245346]), (b, [0.4480942872]))
    check_gradients(two, (locs, [0.2827221541, -0.3535189827, -0.9090518268]))
    check_gradients(two, (log_noise, [1.6378283745]), (log_s, [1.7477827201]))


def test_quadrature_of_padded_chains() -> None:
    x = torch.tensor([[0.5, 1.5], [-1.0, 0.3], [1.2, 0.0]])
    start, transitions = torch.tensor([0.6, 0.4]), torch.tensor([[0.8, 0.2], [0.35, 0.65]])
    locs, m, s = leaf(-0.5, 1.3), leaf(0.1, 0.2), leaf(0.5, 0.6)

    def model() -> None:
        with pyro.plate("data", 2):
            b = pyro.sample("b", dist.Normal(0.0, 0.7))
            y: Any = None
            for t in pyro.markov(range(3)):
                with poutine.mask(mask=t < torch.tensor([3, 2])):
                    fn = dist.Categorical(transitions[y] if t else start)
                    y = pyro.sample(f"y{t}", fn, infer={"enumerate": "parallel"})
                    pyro.sample(f"x{t}", dist.Normal(locs[y] + b, 0.8), obs=x[t])

    def guide() -> None:
        with pyro.plate("data", 2):
            pyro.sample("b", NodeNormal(m, s))

    log_weights, q = log_weights_at(model, guide, 80), hermite(80)[1]
    evidence = (log_weights + q.log().unsqueeze(-1)).logsumexp(0)
    expected = torch.tensor([-4.8861634805, -2.9858187440])
    torch.testing.assert_close(evidence, expected, rtol=0, atol=2e-10)
    one, two = (iwae(log_weights, q, K) for K in (1, 2))
    expected = torch.tensor([-7.8934501361, -7.8838912899])
    torch.testing.assert_close(torch.stack([one, two]), expected, rtol=0, atol=2e-10)
    check_gradients(
        one,
        (m, [-0.0584908726, 0.0392793340]),
        (s, [0.3285920996, 0.0805734763]),
        (locs, [1.3486650164, -0.7556316571]),
    )
    check_gradients(
        two,
        (m, [-0.0496870767, 0.0188500674]),
        (s, [0.2133269425, 0.0564472144]),
        (locs, [1.3154523723, -0.7338782783]),
    )


def test_quadrature_of_topics() -> None:
    phi, c = torch.tensor([[0.8, 0.2], [0.3, 0.7]]), leaf(2.0, 1.8)

    def model() -> None:
        with pyro.plate("documents", 1):
            theta = pyro.sample("theta", dist.Dirichlet(torch.tensor([1.5, 1.2])))
            with pyro.plate("words", 3, dim=-2):
                topic = pyro.sample("y", dist.Categorical(theta), infer={"enumerate": "parallel"})
                words = torch.tensor([[0], [1], [1]])
                pyro.sample("x", dist.Categorical(phi[topic]), obs=words)

    def guide() -> None:
        with pyro.plate("documents", 1):
            pyro.sample("theta", NodeDirichlet(c))

    log_weights = log_weights_at(model, guide, 240)
    theta, weights = unit_interval(240)
    q = weights * dist.Dirichlet(c).log_prob(torch.stack([theta, 1 - theta], -1)).exp()
    evidence = (log_weights + q.log().unsqueeze(-1)).logsumexp(0).sum()
    one, two = (iwae(log_weights, q, K) for K in (1, 2))
    expected = torch.tensor([-2.3211761103, -2.3660881807, -2.3472646485])
    torch.testing.assert_close(torch.stack([evidence, one, two]), expected, rtol=0, atol=2e-10)
    check_gradients(one, (c, [-0.1560547410, 0.1146762488]))
    check_gradients(two, (c, [-0.0974628774, 0.0638039838]))
