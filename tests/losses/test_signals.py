"""Signals of the score function by plate, summed over every outcome: no Monte Carlo."""

import itertools
from functools import partial
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer import Trace_ELBO, TraceEnum_ELBO
from torch import Tensor

from pyro_recursive import IWAE_ELBO, MIWAE_ELBO, MultiSampleELBO, bounds
from pyro_recursive.losses import base
from tests.models import normal, observe, real
from tests.oracles.enumeration import (
    Given,
    Programs,
    enumerate_outcomes,
    exact_value,
    gradients,
    mean_gradient,
    mean_over,
)

ENUMERATED = {"enumerate": "parallel"}


def coin(name: str, logits: Any, infer: Any = None) -> Tensor:
    return pyro.sample(name, dist.Bernoulli(logits=torch.as_tensor(logits)), infer=infer)


def vector(name: str, *values: float) -> Tensor:
    return pyro.param(name, lambda: torch.tensor(values))


# A global coin above two local ones.


def mixture(x: Tensor) -> None:
    g = coin("g", -0.8)
    with pyro.plate("data", len(x)):
        y = coin("y", 0.4)
        pyro.sample("x", dist.Normal(g + 2 * y - 1, 1.0), obs=x)


def mixture_guide(x: Tensor) -> None:
    g = coin("g", real("a", 0.3))
    with pyro.plate("data", len(x)):
        coin("y", vector("b", 0.2, -0.5)[: len(x)] + real("c", 0.6) * g)


# Dependences that no plate shows: the whole log-weight is the signal.


def outside_last(x: Tensor) -> None:
    """The outside coin's prior depends on the inside ones: no split by entry."""
    rows = pyro.plate("data", len(x))
    with rows:
        y = coin("y", 0.4)
    g = coin("g", 2.0 * y.sum(-1, keepdim=True) - 1.2)
    with rows:
        pyro.sample("x", dist.Normal(1.5 * g + y - 1, 1.0), obs=x)


def outside_last_guide(x: Tensor) -> None:
    with pyro.plate("data", len(x)):
        coin("y", vector("b", 0.2, -0.5))
    coin("g", real("a", 0.3).expand(1))


def coupled(x: Tensor) -> None:
    with pyro.plate("data", len(x)):
        y = coin("y", 0.4)
        pyro.sample("x", dist.Normal(2 * y - y.sum(-1, keepdim=True), 1.0), obs=x)


def coupled_guide(x: Tensor) -> None:
    with pyro.plate("data", len(x)):
        coin("y", vector("b", 0.2, -0.5))


# Sums over an enumerated coin above the sampled ones, which depend on each other by it.


def summed_outside(x: Tensor, collapsed: bool = False) -> None:
    """The data share the enumerated coin: the whole sum is downstream of each sampled one."""
    y: Any = None if collapsed else coin("y", -0.3, ENUMERATED)
    with pyro.plate("data", len(x)):
        k = coin("k", 0.4)
        pyro.sample("own", dist.Normal(1.5 * k, 1.0), obs=-x)
        if not collapsed:
            pyro.sample("x", dist.Normal(2.5 * y - k, 0.7), obs=x)
    if collapsed:
        two = dist.Normal(torch.tensor([[0.0], [2.5]]) - k.unsqueeze(-2), 0.7).log_prob(x).sum(-1)
        prior = dist.Bernoulli(logits=torch.tensor(-0.3)).log_prob(torch.tensor([0.0, 1.0]))
        pyro.factor("x", (two + prior).logsumexp(-1))


def summed_outside_guide(x: Tensor, **options: Any) -> None:
    with pyro.plate("data", len(x)):
        coin("k", vector("b", 0.2, -0.5))


def summed_between(x: Tensor, collapsed: bool = False) -> None:
    """A sum for each group, over a coin above those of the group's items."""
    g = coin("g", 0.3)
    with pyro.plate("group", 2, dim=-2):
        y: Any = None if collapsed else coin("y", -0.3, ENUMERATED)
        with pyro.plate("item", x.shape[1], dim=-1):
            k = coin("k", 0.4 - 0.6 * g)
            if not collapsed:
                pyro.sample("x", dist.Normal(2.5 * y - k + g, 0.7), obs=x)
        if collapsed:
            loc = torch.tensor([0.0, 2.5]) - (k - g).unsqueeze(-1)
            two = dist.Normal(loc, 0.7).log_prob(x.unsqueeze(-1)).sum(-2, keepdim=True)
            prior = dist.Bernoulli(logits=torch.tensor(-0.3)).log_prob(torch.tensor([0.0, 1.0]))
            pyro.factor("x", (two + prior).logsumexp(-1))


def summed_between_guide(x: Tensor, **options: Any) -> None:
    g = coin("g", real("a", 0.2))
    with pyro.plate("group", 2, dim=-2), pyro.plate("item", x.shape[1], dim=-1):
        coin("k", real("c", 0.4) * x + real("d", -0.6) * g)


# Plates inside plates, and a plate in a loop.


def nested(x: Tensor) -> None:
    g = coin("g", 0.3)
    with pyro.plate("group", 2, dim=-2):
        w = coin("w", 0.5 * g - 0.2)
        with pyro.plate("item", x.shape[1], dim=-1):
            y = coin("y", 0.3 + 0.7 * w)
            pyro.sample("x", dist.Normal(y + w - g, 0.8), obs=x)


def nested_guide(x: Tensor) -> None:
    g = coin("g", real("a", 0.2))
    with pyro.plate("group", 2, dim=-2):
        w = coin("w", vector("b", 0.1, -0.4).unsqueeze(-1) + 0.3 * g)
        with pyro.plate("item", x.shape[1], dim=-1):
            coin("y", real("c", 0.4) * x + real("d", -0.6) * w)


def sequential(x: Tensor) -> None:
    g = coin("g", -0.8)
    for i in pyro.plate("data", len(x)):
        y = coin(f"y{i}", 0.4)
        pyro.sample(f"x{i}", dist.Normal(g + 2 * y - 1, 1.0), obs=x[i])


def sequential_guide(x: Tensor) -> None:
    g = coin("g", real("a", 0.3))
    for i in pyro.plate("data", len(x)):
        coin(f"y{i}", vector("b", 0.2, -0.5)[i] + real("c", 0.6) * g)


def crossed(x: Tensor) -> None:
    in_rows, in_columns = pyro.plate("row", x.shape[0], dim=-2), pyro.plate("column", x.shape[1])
    with in_rows:
        r = coin("r", 0.3)
    with in_columns:
        c = coin("c", -0.2)
    with in_rows, in_columns:
        pyro.sample("x", dist.Normal(r + 2 * c - r * c, 1.0), obs=x)


def crossed_guide(x: Tensor) -> None:
    with pyro.plate("row", x.shape[0], dim=-2):
        coin("r", vector("a", 0.2, -0.3).unsqueeze(-1))
    with pyro.plate("column", x.shape[1]):
        coin("c", vector("b", 0.5, -0.1))


PAIR = torch.tensor([0.9, -0.4], dtype=torch.float64)
TABLE = torch.tensor([[0.9, -0.4], [0.2, 1.3]], dtype=torch.float64)
PROGRAMS: dict[str, tuple[Programs, Tensor, int]] = {  # with the number of dims of plates
    "mixture": ((mixture, mixture_guide), PAIR, 1),
    "sequential": ((sequential, sequential_guide), PAIR, 0),
    "nested": ((nested, nested_guide), TABLE[:, :1], 2),
    "crossed": ((crossed, crossed_guide), TABLE, 2),
    "outside_last": ((outside_last, outside_last_guide), PAIR, 1),
    "coupled": ((coupled, coupled_guide), PAIR, 1),
    "summed_outside": ((summed_outside, summed_outside_guide), PAIR, 1),
    "summed_between": ((summed_between, summed_between_guide), TABLE, 2),
}
COLLAPSED = ("summed_outside", "summed_between")  # have their sums by hand with an option
EXACT = {  # mixture: value, gradient in a, b, c
    "elbo": (-3.8018297553, (-0.445054262129, 0.136937764798, -0.348129741572, -0.431857795066)),
    "iwae": (-3.3909892774, (-0.302839561022, 0.168940221257, -0.154574614431, -0.202474664278)),
}


@pytest.mark.parametrize("bound", EXACT)
def test_the_oracle(bound: str) -> None:
    value = exact_value(enumerate_outcomes(*PROGRAMS["mixture"][:2]), getattr(bounds, bound), 2)
    assert value.item() == pytest.approx(EXACT[bound][0], abs=1e-10)
    assert gradients(value).tolist() == pytest.approx(EXACT[bound][1], abs=1e-12)


def by_hand(name: str) -> Programs:
    """Return programs without enumerated sites."""
    model, guide = PROGRAMS[name][0]
    return (partial(model, collapsed=True) if name in COLLAPSED else model), guide


BOUNDS = {"elbo": bounds.elbo, "iwae": bounds.iwae, "renyi": bounds.renyi(0.5)}
BOUNDS |= {"jackknife": bounds.jackknife, "ciwae": bounds.ciwae(0.3)}
CASES = [
    ("mixture", "iwae", 2, "vimco", True),
    ("mixture", "iwae", 2, "score", True),
    ("mixture", "iwae", 2, "dreg+vimco", False),
    ("mixture", "elbo", 1, "score", True),
    ("mixture", "renyi", 2, "vimco", True),
    ("mixture", "jackknife", 2, "vimco", True),
    ("mixture", "ciwae", 2, "score", False),
    ("sequential", "iwae", 2, "vimco", True),
    ("sequential", "iwae", 2, "score", False),
    ("nested", "elbo", 1, "score", True),
    ("crossed", "elbo", 1, "score", True),
    ("outside_last", "iwae", 2, "vimco", True),
    ("outside_last", "elbo", 1, "score", True),
    ("coupled", "iwae", 2, "vimco", True),
    ("coupled", "elbo", 1, "score", True),
    ("summed_outside", "iwae", 2, "vimco", True),
    ("summed_outside", "elbo", 1, "score", True),
    ("summed_between", "elbo", 1, "score", True),
]
SLOW = [("nested", "iwae", 2, "vimco", True), ("crossed", "iwae", 2, "vimco", True)]


@pytest.mark.quick(3)
@pytest.mark.filterwarnings("ignore:Plate .* encloses", "ignore:Entries of plate")
@pytest.mark.parametrize(
    ("name", "bound", "size", "estimator", "vectorize"),
    [*CASES, *(pytest.param(*case, marks=pytest.mark.slow) for case in SLOW)],
)
def test_mean_gradient(name: str, bound: str, size: int, estimator: str, vectorize: bool) -> None:
    programs, x, depth = PROGRAMS[name]
    table = enumerate_outcomes(by_hand(name), x)
    exact = gradients(exact_value(table, BOUNDS[bound], size))
    loss = MultiSampleELBO(
        BOUNDS[bound], num_particles=size, estimator=estimator, vectorize_particles=vectorize
    )
    mean = mean_gradient(loss, programs, x, table, size, depth)
    torch.testing.assert_close(mean, exact, atol=1e-12, rtol=0)


def test_pyros_gradient_of_a_sum_over_rows() -> None:
    """`TraceEnum_ELBO` leaves the sum out of what is downstream of the sampled coins."""
    programs, x, depth = PROGRAMS["summed_outside"]
    table = enumerate_outcomes(by_hand("summed_outside"), x)
    exact = gradients(exact_value(table, bounds.elbo, 1))
    found = mean_gradient(TraceEnum_ELBO(max_plate_nesting=1), programs, x, table, 1, depth)
    assert (found - exact).abs().max() > 0.5


# A global site under the ELBO, local ones under a bound.

SEPARATE = (-3.5171572535, (-0.4155421280, 0.0792650346, -0.2406458218, -0.2877830517))


@pytest.mark.parametrize("estimator", ["score", "vimco", "dreg+vimco"])
@pytest.mark.parametrize("vectorize", [True, False])
def test_a_discrete_global_site_under_the_elbo(estimator: str, vectorize: bool) -> None:
    """One global sample for K = 2 local ones; value and gradient over all outcomes."""
    programs, x, _ = PROGRAMS["mixture"]
    loss = IWAE_ELBO(2, estimator=estimator, vectorize_particles=vectorize, global_latents="elbo")
    table = enumerate_outcomes(programs, x)
    log_global = dist.Bernoulli(logits=real("a", 0.3)).log_prob(torch.tensor([0.0, 1.0]))
    samples, log_weights = [], []
    for i, j in itertools.product(range(8), repeat=2):
        g, other = (int(table.outcomes[each]["g"]) for each in (i, j))
        if g == other:
            samples.append([table.outcomes[i], table.outcomes[j]])
            log_weights.append(table.log_q[i] + table.log_q[j] - log_global[g])
    weights = torch.stack(log_weights).exp().detach()
    values = []
    for each in samples:
        with Given(each, -2 if vectorize else None):
            values.append(-loss.loss(*programs, x))
    assert (weights @ torch.tensor(values)).item() == pytest.approx(SEPARATE[0], abs=1e-10)
    mean = mean_over(samples, weights, loss, programs, x, 1)
    assert mean.tolist() == pytest.approx(SEPARATE[1], abs=1e-10)


@pytest.mark.parametrize("estimator", ["score", "vimco", "dreg+vimco"])
def test_several_estimates_of_a_discrete_global_site(estimator: str) -> None:
    """Each of M = 2 global samples has K = 2 local ones; the mean of one is that of both."""
    (model, guide), x = PROGRAMS["mixture"][0], PAIR[:1]
    table = enumerate_outcomes((model, guide), x)
    log_global = dist.Bernoulli(logits=real("a", 0.3)).log_prob(torch.tensor([0.0, 1.0]))
    samples, log_q, values = [], [], []
    for i, j in itertools.product(range(4), repeat=2):
        g, other = (int(table.outcomes[each]["g"]) for each in (i, j))
        if g == other:
            samples.append([table.outcomes[i], table.outcomes[j]])
            log_q.append(table.log_q[i] + table.log_q[j] - log_global[g])
            values.append(bounds.iwae((table.log_p - table.log_q)[torch.tensor([[i, j]])]))
    q = torch.stack(log_q).exp()
    exact = gradients(q @ torch.stack(values))
    pairs = list(itertools.product(range(len(samples)), repeat=2))
    weights = torch.stack([q[i] * q[j] for i, j in pairs]).detach()
    both = [samples[i] + samples[j] for i, j in pairs]
    loss = MIWAE_ELBO(2, 2, estimator=estimator, global_latents="elbo")
    mean = mean_over(both, weights, loss, (model, guide), x, 1)
    torch.testing.assert_close(mean, exact, atol=1e-12, rtol=0)


def test_a_discrete_global_site_of_minibatches() -> None:
    """Estimates of a part of the data have the mean of all: here over the two minibatches."""
    x = torch.tensor([0.9, -0.4, 0.3, 1.2])
    whole = []
    for subsample in ([0, 1, 2, 3], [0, 2], [1, 3]):
        programs = tuple(
            partial(each, subsample=torch.tensor(subsample)) for each in (coins, coins_guide)
        )
        Trace_ELBO().loss(*programs, x)
        pyro.set_rng_seed(0)
        loss = MIWAE_ELBO(4000, 2, estimator="vimco", global_latents="elbo")
        draws = [gradients(loss.differentiable_loss(*programs, x)) for _ in range(12)]
        stacked = torch.stack(draws)
        whole.append((stacked.mean(0), stacked.var(0) / 12))
    (full, first), (one, second), (other, third) = whole
    error = (first + (second + third) / 4).sqrt()
    assert (((one + other) / 2 - full).abs() < 4.5 * error).all()
    assert (full.abs() > 9 * first.sqrt()).any()


def coins(x: Tensor, subsample: Tensor) -> None:
    g = coin("g", -0.8)
    with pyro.plate("data", len(x), subsample=subsample) as index:
        y = coin("y", 0.4)
        pyro.sample("x", dist.Normal(g + 2 * y - 1, 1.0), obs=x[index])


def coins_guide(x: Tensor, subsample: Tensor) -> None:
    g = coin("g", real("a", 0.3))
    with pyro.plate("data", len(x), subsample=subsample) as index:
        coin("y", real("b", 0.2) * x[index] + real("c", 0.6) * g)


# Discrete and reparameterised sites together, where no sum over outcomes is exact.


def chain(x: Tensor) -> None:
    w = normal("w", 0.2, 1.0)
    with pyro.plate("data", len(x)):
        v = normal("v", w, 0.8)
        k = coin("k", 0.5 * v)
        z = normal("z", w + k, 0.6)
        observe(z - k, x)


def chain_guide(x: Tensor) -> None:
    """A coin below two reparameterised sites, global and local, and above another one."""
    w = normal("w", real("c", 0.1), 0.5)
    with pyro.plate("data", len(x)):
        v = normal("v", real("a", 0.3) * x + 0.4 * w, 0.7)
        k = coin("k", real("b", 0.6) * v + real("d", -0.3) * w)
        normal("z", real("e", 0.4) * x + k * real("f", 0.5), 0.8)


@pytest.mark.quick(1)
@pytest.mark.filterwarnings("ignore:Plate 'data' encloses")
@pytest.mark.parametrize(
    ("estimator", "size"), [("score", 1), ("score", 3), ("vimco", 3), ("dreg+vimco", 3)]
)
def test_mixed_guides_have_the_mean_of_joint_signals(
    estimator: str, size: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    x = torch.tensor([0.9, -0.4, 0.3])
    Trace_ELBO().loss(chain, chain_guide, x)
    loss = MIWAE_ELBO(400, size, estimator=estimator)
    means = []
    for _ in range(2):
        draws = [gradients(loss.differentiable_loss(chain, chain_guide, x)) for _ in range(40)]
        stacked = torch.stack(draws)
        means.append((stacked.mean(0), stacked.var(0) / len(draws)))
        monkeypatch.setattr(base, "independent_plates", lambda program: frozenset())
    (by_plate, first), (joint, second) = means
    assert ((by_plate - joint).abs() < 4.5 * (first + second).sqrt()).all()
    assert (by_plate.abs() > 4 * first.sqrt()).sum() >= 5  # of 6 parameters


# Noise.

EIGHT: dict[str, Any] = {"num_particles": 8, "estimator": "vimco"}


def rows_of(number: int, constant: float = 0.0) -> tuple[Programs, Tensor]:
    """A reparameterised global latent and a coin a row, whose logits are parameters.

    Each row has -constant ** 2 / 2 nats that no latent changes.
    """
    x = torch.linspace(-1.5, 2.5, number)

    def model(x: Tensor) -> None:
        mu = normal("mu", 0.0, 1.0)
        with pyro.plate("data", len(x)):
            observe(mu + 2 * coin("k", -0.6) - 1, x)
            observe(torch.zeros(len(x)), torch.full_like(x, constant), "y")

    def guide(x: Tensor) -> None:
        normal("mu", real("m", 0.2), 0.1)
        logits = pyro.param("lo", lambda: torch.zeros(number))
        with pyro.plate("data", len(x)):
            coin("k", logits)

    return (model, guide), x


def spread(loss: Any, programs: Programs, x: Tensor, calls: int) -> float:
    """Return the standard deviation of one row's gradient, as a root mean square over rows."""
    pyro.set_rng_seed(0)
    draws = []
    for _ in range(calls):
        value = loss.differentiable_loss(*programs, x)
        (found,) = torch.autograd.grad(value, [pyro.param("lo").unconstrained()])
        draws.append(found)
    return torch.stack(draws).var(0).mean().sqrt().item()


@pytest.mark.quick("20")
@pytest.mark.filterwarnings("ignore:Plate 'data' encloses")
@pytest.mark.parametrize("number", [20, 200])
def test_noise_of_local_parameters(number: int) -> None:
    """It does not grow with the number of other rows, and is at most that of Pyro's ELBO."""
    programs, x = rows_of(number)
    Trace_ELBO().loss(*programs, x)
    calls = 60
    pyro_s = spread(Trace_ELBO(), programs, x, calls)
    pyro_8 = Trace_ELBO(num_particles=8, vectorize_particles=True, max_plate_nesting=1)
    assert spread(IWAE_ELBO(1, estimator="score"), programs, x, calls) < 1.2 * pyro_s
    eight = spread(pyro_8, programs, x, calls)
    for loss in (
        MIWAE_ELBO(8, 1, estimator="score"),
        MultiSampleELBO(bounds.elbo, num_particles=8, estimator="vimco"),
        IWAE_ELBO(8, estimator="vimco", global_latents="elbo"),
    ):
        assert spread(loss, programs, x, calls) < 1.2 * eight
    assert spread(IWAE_ELBO(8, estimator="vimco"), programs, x, calls) < 1.0


@pytest.mark.filterwarnings("ignore:Plate 'data' encloses")
def test_float32_sums_of_many_rows() -> None:
    """A row's signal is not lost in the rounding of the whole log-weight, which is near -10^7."""
    found = []
    for dtype in (torch.float32, torch.float64):
        torch.set_default_dtype(dtype)
        pyro.clear_param_store()
        programs, x = rows_of(2000, constant=100.0)
        Trace_ELBO().loss(*programs, x)
        found.append(spread(MultiSampleELBO(bounds.renyi(0.9), **EIGHT), programs, x, 5))
    assert found[0] == pytest.approx(found[1], rel=0.1)
