"""Several global samples with local samples each, in one logarithm: `num_globals`."""

import itertools
import math
import warnings
from collections.abc import Callable
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.infer import Trace_ELBO
from torch import Tensor

from pyro_recursive import CIWAE_ELBO, IWAE_ELBO, MIWAE_ELBO, PIWAE_ELBO, bounds
from pyro_recursive.tracing.plates import outer_shape
from tests.models import data, hierarchy, hierarchy_guide, normal, observe, real
from tests.models.enumerated import PARALLEL, gaussian, param, summed
from tests.oracles.enumeration import Given, gradients
from tests.oracles.quadrature import Grid, normal_grid
from tests.oracles.recordings import Pinned, record

ELBO: dict[str, Any] = {"global_latents": "elbo"}
M, S, K = 2, 3, 2


# A global coin above two local ones: all outcomes of S global and S * K local samples.

PAIR = torch.tensor([0.9, -0.4], dtype=torch.float64)
EXACT = {  # by S, with K = 2: value, gradient in a, b, c
    1: (-3.5171572535, (-0.4155421280, 0.0792650346, -0.2406458218, -0.2877830517)),
    2: (-3.2240873475, (-0.2692270290, 0.0843711437, -0.0703234467, -0.0936293983)),
}


def coin(name: str, logits: Any) -> Tensor:
    return pyro.sample(name, dist.Bernoulli(logits=torch.as_tensor(logits)))


def coins(x: Tensor) -> None:
    g = coin("g", -0.8)
    with pyro.plate("data", len(x)):
        y = coin("y", 0.4)
        pyro.sample("x", dist.Normal(g + 2 * y - 1, 1.0), obs=x)


def coins_guide(x: Tensor) -> None:
    g = coin("g", real("a", 0.3))
    with pyro.plate("data", len(x)):
        coin("y", param("b", 0.2, -0.5) + real("c", 0.6) * g)


def bernoulli(logits: Any, value: Tensor) -> Tensor:
    return dist.Bernoulli(logits=torch.as_tensor(logits)).log_prob(value)


def states() -> tuple[list[list[dict[str, Tensor]]], Tensor, Tensor]:
    """Return all values of a global coin with two times two local ones, log q and t of each."""
    bits = torch.tensor(list(itertools.product((0.0, 1.0), repeat=5)))
    g, y = bits[:, :1], bits[:, 1:].unflatten(1, (2, 2))  # [states, K, rows]
    a, b, c = real("a", 0.3), param("b", 0.2, -0.5), real("c", 0.6)
    of_g, of_y = bernoulli(a, g), bernoulli(b + c * g.unsqueeze(-1), y)
    log_p = bernoulli(0.4, y) + gaussian(g.unsqueeze(-1) + 2 * y - 1, PAIR)
    inside = (log_p - of_y).logsumexp(1) - math.log(2)
    t = (bernoulli(-0.8, g) - of_g).squeeze(1) + inside.sum(1)
    values = [[{"g": one[0], "y": two} for two in pair] for one, pair in zip(g, y, strict=True)]
    return values, (of_g + of_y.sum((1, 2), keepdim=True).squeeze(1)).squeeze(1), t


@pytest.mark.parametrize("number", EXACT)
def test_every_outcome(number: int) -> None:
    """The mean over all outcomes is the bound, and the loss has its value at each."""
    values, log_q, t = states()
    chosen = torch.tensor(list(itertools.product(range(32), repeat=number)))
    joint = t[chosen].logsumexp(1) - math.log(number)
    expected = (log_q[chosen].sum(1).exp() * joint).sum()
    assert expected.item() == pytest.approx(EXACT[number][0], abs=1e-10)
    assert gradients(expected).tolist() == pytest.approx(EXACT[number][1], abs=1e-10)
    for vectorize in (True, False):
        loss = IWAE_ELBO(2, num_globals=number, vectorize_particles=vectorize, **ELBO)
        for row in range(0, len(chosen), len(chosen) // 16):
            particles = [each for state in chosen[row] for each in values[state]]
            with Given(particles, -2 if vectorize else None):
                found = -loss.loss(coins, coins_guide, PAIR)
            assert found == pytest.approx(joint[row].item(), abs=1e-12)


# The formula, draw by draw.


def log_normal(value: Tensor, loc: Any, scale: Any) -> Tensor:
    return dist.Normal(loc, scale).log_prob(value)


def by_hand(values: dict[str, Tensor], x: Tensor) -> Tensor:
    """Return the bound in plain torch, from ``[M S K]`` global and ``[M S K, N]`` local samples."""
    mu, c, t, a, b, s = (pyro.param(name) for name in ("mu", "c", "t", "a", "b", "s"))
    w = values["w"].reshape(M, S, K, 1)[:, :, :1]
    z = values["z"].reshape(M, S, K, -1)
    log_weights = log_normal(z, w, 0.8) + log_normal(x, z, 1.0) - log_normal(z, a * x + b * w, s)
    shared = (log_normal(w, mu, 1.0) - log_normal(w, c, t)).reshape(M, S)
    inside = (log_weights.logsumexp(2) - math.log(K)).sum(-1)
    return ((shared + inside).logsumexp(1) - math.log(S)).mean()


@pytest.mark.parametrize("vectorize", [True, False, "vmap"])
def test_value_and_pathwise_gradient(vectorize: bool | str) -> None:
    x, programs = data(), (hierarchy, hierarchy_guide)
    Trace_ELBO().loss(*programs, x)
    recording = record(programs, (x,), M * S, K)
    loss = MIWAE_ELBO(M, K, num_globals=S, vectorize_particles=vectorize, **ELBO)
    with Pinned(*recording, total=0 if vectorize else M * S * K):
        value = loss.differentiable_loss(*programs, x)
    expected = -by_hand(recording[0], x)
    torch.testing.assert_close(value, expected)
    torch.testing.assert_close(gradients(value), gradients(expected))


@pytest.mark.parametrize("estimator", ["pathwise", "dreg"])
def test_one_global_sample_is_the_elbo(estimator: str) -> None:
    found = []
    for options in ({}, {"num_globals": 1}):
        pyro.clear_param_store()
        pyro.set_rng_seed(0)
        loss = MIWAE_ELBO(3, K, estimator=estimator, **ELBO, **options)
        value = loss.differentiable_loss(hierarchy, hierarchy_guide, data())
        found.append([value, gradients(value)])
    assert torch.equal(found[0][0], found[1][0]) and torch.equal(found[0][1], found[1][1])


# Doubly reparameterised gradients, by quadrature over all samples: S = 2.


class Quadrature:
    """Guides whose particles are the nodes of a grid, with parameters of each particle's own.

    So the gradients of each estimate are known, and are summed with the grid's weights.
    """

    def __init__(self, sizes: dict[str, int], num_particles: int, nodes: int) -> None:
        """``sizes`` has how many samples there are of each site."""
        grid: Grid = normal_grid(sum(sizes.values()), nodes)
        self.weight, self.group = grid.weight, 2 * num_particles
        self.total = self.group * len(grid.weight)
        rows = iter(grid.eps)
        self.noise = {
            name: torch.stack(
                # The first of the local samples stands for a shared one.
                [each for each in itertools.islice(rows, size) for _ in range(self.group // size)],
                -1,
            ).reshape(-1, 1)
            for name, size in sizes.items()
        }
        self.leaves: dict[str, Tensor] = {}

    def param(self, name: str, value: float) -> Tensor:
        if name not in self.leaves:
            self.leaves[name] = torch.full((self.total, 1), value, requires_grad=True)
        shape, leaf = outer_shape(), self.leaves[name]
        return leaf if shape[:1] == leaf.shape[:1] else torch.full(shape, value)

    def normal(self, name: str, loc: Tensor, scale: Any) -> Tensor:
        return pyro.sample(name, _OfNodes(loc, scale, self.noise[name]))

    def mean_gradient(self, loss: Any, *programs: Callable) -> Tensor:
        """Return the expectation of a loss's gradient, one number for each parameter."""
        value = loss.differentiable_loss(*programs)
        found = torch.autograd.grad(value, list(self.leaves.values()))
        rows = [each.reshape(len(self.weight), -1).sum(1) for each in found]
        return torch.stack(rows) @ self.weight * len(self.weight)


class _OfNodes(dist.Normal):
    def __init__(self, loc: Tensor, scale: Any, noise: Tensor) -> None:
        super().__init__(loc, scale)
        self.noise = noise

    def expand(self, batch_shape: Any, _instance: Any = None) -> "_OfNodes":
        return _OfNodes(self.loc.expand(batch_shape), self.scale.expand(batch_shape), self.noise)

    def rsample(self, sample_shape: Any = ()) -> Tensor:
        if self.batch_shape[:1] != self.noise.shape[:1]:
            return super().rsample(sample_shape)
        return self.loc + self.scale * self.noise


def plain(q: Quadrature, scale: float = 1.0) -> tuple[Callable, Callable]:
    def model() -> None:
        with poutine.scale(scale=scale):
            w = normal("w", 0.3, 1.0)
        with pyro.plate("data", 1), poutine.scale(scale=scale):
            observe(normal("z", w, 0.8), torch.tensor([0.9]))

    def guide() -> None:
        with poutine.scale(scale=scale):
            w = q.normal("w", q.param("c", 0.9), q.param("log_t", -0.3).exp())
        with pyro.plate("data", 1), poutine.scale(scale=scale):
            loc = q.param("a", 0.35) + q.param("b", 0.3) * w
            q.normal("z", loc, q.param("log_s", -0.4).exp())

    return model, guide


def tempered(q: Quadrature) -> tuple[Callable, Callable]:
    """Densities in the weights that the samples do not come from."""
    return plain(q, 0.7)


def two_globals(q: Quadrature) -> tuple[Callable, Callable]:
    """One global latent above another, both above the local one."""

    def model() -> None:
        v = normal("v", 0.2, 1.0)
        w = normal("w", 0.6 * v, 0.9)
        with pyro.plate("data", 1):
            observe(normal("z", w + 0.3 * v, 0.8), torch.tensor([0.9]))

    def guide() -> None:
        v = q.normal("v", q.param("d", 0.4), q.param("log_r", -0.2).exp())
        w = q.normal("w", q.param("c", 0.1) + q.param("e", 0.4) * v, q.param("log_t", -0.3).exp())
        with pyro.plate("data", 1):
            loc = q.param("a", 0.3) + q.param("b", 0.3) * w + q.param("f", 0.2) * v
            q.normal("z", loc, q.param("log_s", -0.4).exp())

    return model, guide


OF_QUADRATURE = {  # with the number of samples of each site, and K
    "plain": (plain, {"w": 2, "z": 4}, 2),
    "tempered": (tempered, {"w": 2, "z": 4}, 2),
    "two_globals": (two_globals, {"v": 2, "w": 2, "z": 2}, 1),
}


@pytest.mark.quick("plain")
@pytest.mark.parametrize("name", OF_QUADRATURE)
def test_dreg_has_the_mean_of_the_pathwise_gradient(name: str) -> None:
    programs, sizes, size = OF_QUADRATURE[name]
    q = Quadrature(sizes, size, 7)
    model, guide = programs(q)
    pathwise, dreg = (
        q.mean_gradient(
            MIWAE_ELBO(len(q.weight), size, estimator=each, num_globals=2, **ELBO), model, guide
        )
        for each in ("pathwise", "dreg")
    )
    assert (pathwise.abs() > 0.01).sum() >= 4
    torch.testing.assert_close(dreg, pathwise, rtol=0, atol=1e-4)


def test_dreg_is_less_noisy() -> None:
    Trace_ELBO().loss(hierarchy, hierarchy_guide, data())
    means, variances = [], []
    for estimator in ("pathwise", "dreg"):
        pyro.set_rng_seed(0)
        loss = MIWAE_ELBO(100, 4, estimator=estimator, num_globals=8, **ELBO)
        draws = [
            gradients(loss.differentiable_loss(hierarchy, hierarchy_guide, data()))
            for _ in range(40)
        ]
        stacked = torch.stack(draws)
        means.append(stacked.mean(0))
        variances.append(stacked.var(0) / len(draws))
    assert ((means[0] - means[1]).abs() < 4.5 * (variances[0] + variances[1]).sqrt()).all()
    of_guide = [0, 1, 2, 4, 5]  # all but the model's mu
    assert (variances[1][of_guide] < 0.5 * variances[0][of_guide]).all()


# Enumerated sites inside, and where global and local sites are not separated.


def mixture(x: Tensor, collapsed: bool) -> None:
    mu, locs = normal("mu", 0.0, 1.0), param("locs", -1.0, 1.5)
    with pyro.plate("data", len(x)):
        z = normal("z", mu, 1.0)
        if collapsed:
            two = gaussian(z.unsqueeze(-1) + locs, x.unsqueeze(-1))
            pyro.factor("x", summed(torch.tensor([0.4, 0.6]).log(), two))
        else:
            y = pyro.sample("y", dist.Categorical(torch.tensor([0.4, 0.6])), infer=PARALLEL)
            normal("x", z + locs[y], 1.0, obs=x)


def mixture_guide(x: Tensor, collapsed: bool) -> None:
    mu = normal("mu", real("m", 0.2), 0.5)
    with pyro.plate("data", len(x)):
        normal("z", real("a", 0.4) * x + real("b", 0.3) * mu, 0.7)


@pytest.mark.parametrize("estimator", ["pathwise", "dreg"])
@pytest.mark.parametrize("vectorize", [True, False, "vmap"])
def test_enumerated_sites_inside(estimator: str, vectorize: bool | str) -> None:
    found = []
    for collapsed in (False, True):
        pyro.clear_param_store()
        Trace_ELBO().loss(mixture, mixture_guide, data(), True)
        pyro.set_rng_seed(0)
        options: dict[str, Any] = {"estimator": estimator, "vectorize_particles": vectorize}
        loss = MIWAE_ELBO(M, K, num_globals=S, **options, **ELBO)
        value = loss.differentiable_loss(mixture, mixture_guide, data(), collapsed)
        found.append(torch.cat([value.reshape(1), gradients(value)]))
    torch.testing.assert_close(found[0], found[1], rtol=1e-10, atol=1e-10)


def global_last(x: Tensor) -> None:
    rows = pyro.plate("data", len(x))
    with rows:
        z = normal("z", 0.0, 1.0)
    w = normal("w", z.mean(-1, keepdim=True), 1.0)
    with rows:
        observe(w, x)


def global_last_guide(x: Tensor) -> None:
    with pyro.plate("data", len(x)):
        normal("z", real("a", 0.3) * x, 0.8)
    normal("w", real("b", 0.2).expand(1), 0.7)


def enumerated_above(x: Tensor) -> None:
    y = pyro.sample("y", dist.Bernoulli(0.4), infer=PARALLEL)
    with pyro.plate("data", len(x)):
        observe(normal("z", y, 0.9), x)


def rows_guide(x: Tensor) -> None:
    with pyro.plate("data", len(x)):
        normal("z", real("a", 0.3) * x, 0.8)


@pytest.mark.parametrize("estimator", ["pathwise", "dreg"])
@pytest.mark.parametrize(
    "programs", [(global_last, global_last_guide), (enumerated_above, rows_guide)]
)
def test_one_local_sample_for_each_global_one(programs: Any, estimator: str) -> None:
    """It is the joint bound of S samples, whatever depends on what."""
    found = []
    for loss in (
        MIWAE_ELBO(M, 1, num_globals=S, estimator=estimator, **ELBO),
        MIWAE_ELBO(M, S, estimator=estimator),
    ):
        pyro.clear_param_store()
        Trace_ELBO().loss(*programs, data()) if programs[0] is global_last else None
        pyro.set_rng_seed(0)
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "Plate 'data' encloses latent site")
            value = loss.differentiable_loss(*programs, data())
        found.append(torch.cat([value.reshape(1), gradients(value)]))
    assert torch.equal(found[0], found[1])


def test_no_local_latents() -> None:
    """The importance-weighted bound of the global latent."""

    def model(x: Tensor) -> None:
        w = normal("w", 0.0, 1.0)
        with pyro.plate("data", len(x)):
            observe(w, x)

    def guide(x: Tensor) -> None:
        normal("w", real("a", 0.3), 0.7)

    values = []
    for loss in (MIWAE_ELBO(M, 1, num_globals=S, **ELBO), MIWAE_ELBO(M, S)):
        pyro.set_rng_seed(0)
        values.append(loss.loss(model, guide, data()))
    assert values[0] == pytest.approx(values[1], rel=1e-14)


def test_samples_of_zero_density() -> None:
    """A dead global sample has no share, and no bound is left where all are dead."""

    def model(x: Tensor) -> None:
        w = normal("w", 0.0, 1.0)
        with pyro.plate("data", len(x)):
            observe(normal("z", w, 1.0), x)
            pyro.factor("positive", torch.where(w > 0, 0.0, -math.inf))

    def guide(x: Tensor) -> None:
        w = normal("w", real("m", loc), 0.5)
        with pyro.plate("data", len(x)):
            normal("z", real("a", 0.5) * x + 0.3 * w, 0.7)

    for loc in (0.1, -9.0):
        pyro.clear_param_store()
        pyro.set_rng_seed(0)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            loss = IWAE_ELBO(2, num_globals=8, estimator="dreg", **ELBO)
            value = loss.differentiable_loss(model, guide, data())
        assert gradients(value).isfinite().all()
        is_dead = loc < 0
        assert value.isposinf() if is_dead else value.isfinite()
        assert any("bound is -inf" in str(each.message) for each in caught) is is_dead


# Conjugate data: what the samples buy.


def conjugate(number: int) -> tuple[Callable, Callable, float]:
    """Return mu -> z_i -> x_i, a guide slightly off, and log p(x)."""
    x = torch.linspace(-1.0, 2.0, number)

    def model() -> None:
        mu = normal("mu", 0.0, 1.0)
        with pyro.plate("data", number):
            observe(normal("z", mu, 1.0), x)

    loc, scale = x.sum() / (number + 2), (1 + number / 2) ** -0.5  # of the posterior of mu

    def guide() -> None:
        mu = normal("mu", loc + 0.4 * scale, 1.3 * scale)
        with pyro.plate("data", number):
            normal("z", (x + mu) / 2 + 0.05, 0.85)

    covariance = 2 * torch.eye(number) + 1
    exact = dist.MultivariateNormal(torch.zeros(number), covariance).log_prob(x)
    return model, guide, exact.item()


def test_tighter_than_either_alone() -> None:
    model, guide, exact = conjugate(50)
    gaps, errors = [], []
    for S, K in ((8, 8), (1, 64), (64, 1)):
        pyro.set_rng_seed(0)
        loss = IWAE_ELBO(K, num_globals=S, num_estimates=50, **ELBO)
        draws = -torch.tensor([loss.loss(model, guide) for _ in range(20)])
        gaps.append(exact - draws.mean().item())
        errors.append(draws.std().item() / 20**0.5)
    nested, *others = gaps
    assert nested > -3 * errors[0]
    assert all(nested < 0.7 * other for other in others)


# What is refused.


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: IWAE_ELBO(2, num_globals=2), "num_globals=2 needs global_latents='elbo'"),
        (lambda: IWAE_ELBO(2, num_globals=0, **ELBO), "num_globals must be an integer >= 1, got 0"),
        (
            lambda: IWAE_ELBO(2, num_globals=2, estimator="vimco", **ELBO),
            "num_globals > 1 has estimators pathwise, dreg; got 'vimco'",
        ),
        (lambda: CIWAE_ELBO(4, num_globals=2, **ELBO), r"bound iwae, .* exponential of ciwae\(0.5"),
        (lambda: PIWAE_ELBO(4, 2, num_globals=2, **ELBO), "not PIWAE"),
    ],
)
def test_wrong_options(make: Callable, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()


def test_minibatches_are_refused() -> None:
    """Also where a call before had all data."""

    def model(x: Tensor, size: int) -> None:
        w = normal("w", 0.0, 1.0)
        with pyro.plate("data", 4, subsample_size=size) as index:
            observe(normal("z", w, 1.0), x[index])

    def guide(x: Tensor, size: int) -> None:
        normal("w", real("a", 0.3), 0.7)
        with pyro.plate("data", 4, subsample_size=size) as index:
            normal("z", x[index] / 2, 0.7)

    for size in (1, 2):
        loss = IWAE_ELBO(size, num_globals=8, **ELBO)
        loss.loss(model, guide, data(), 4)
        with pytest.raises(ValueError, match=r"num_globals=8 .*'data' is subsampled \(2 of 4\)"):
            loss.loss(model, guide, data(), 2)


def test_the_options_are_shown() -> None:
    loss = IWAE_ELBO(2, num_globals=3, **ELBO)
    assert repr(loss).endswith("global_latents='elbo', num_globals=3)")
    assert loss.bound == bounds.iwae
