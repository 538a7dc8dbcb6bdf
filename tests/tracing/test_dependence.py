"""Programs whose plates' entries are independent, and such as look alike and are not."""

import math
from collections.abc import Callable

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.infer import Trace_ELBO
from torch import Tensor, nn

from pyro_recursive import IWAE_ELBO, MIWAE_ELBO, log_marginal
from pyro_recursive.tracing.dependence import dependence_of
from pyro_recursive.tracing.program import Program
from tests.models import ROWS, Row, data, normal, observe, real
from tests.models.enumerated import ENUMERATED, Enumerated

ELBO = {"global_latents": "elbo"}


def dependence(model: Callable, guide: Callable, *args: Tensor) -> dict[str, tuple]:
    """Return what was found: plate -> (sites outside, coupled sites)."""
    found = dependence_of(Program(model, guide, args))
    return {name: (each.outside, set(each.coupled)) for name, each in found.items()}


INDEPENDENT: tuple[dict, set] = ({}, set())


# A global latent after local ones.


def mean(z: Tensor) -> Tensor:
    return z.mean(-1)


def mean_after(x: Tensor, through: Callable[[Tensor], Tensor] = mean) -> None:
    rows = pyro.plate("data", len(x))
    with rows:
        z = normal("z", 0.0, 1.0)
    g = normal("g", through(z), 1.0)
    with rows:
        observe(g, x)


def free_after(x: Tensor) -> None:
    """The same order without a dependence."""
    mean_after(x, lambda z: torch.zeros(()))


def global_first(x: Tensor) -> None:
    g = normal("g", 0.0, 1.0)
    with pyro.plate("data", len(x)):
        z = normal("z", g, 1.0)
        observe(z + g, x)


def mean_field(x: Tensor) -> None:
    with pyro.plate("data", len(x)):
        normal("z", real("a", 0.3) * x, 0.8)
    normal("g", real("b", 0.2), 0.7)


def dependent_guide(x: Tensor) -> None:
    with pyro.plate("data", len(x)):
        z = normal("z", real("a", 0.3) * x, 0.8)
    normal("g", real("b", 0.2) + z.max(), 0.7)


PROGRAMS = {
    "model": (mean_after, mean_field, {"g": "model"}),
    "guide": (free_after, dependent_guide, {"g": "guide"}),
    "both": (mean_after, dependent_guide, {"g": "guide"}),
    "neither": (free_after, mean_field, {}),
    "global_first": (global_first, mean_field, {}),
}


@pytest.mark.parametrize("rows", [1, 2, 4])
@pytest.mark.parametrize("name", PROGRAMS)
def test_a_global_density_that_depends_on_local_latents(name: str, rows: int) -> None:
    model, guide, outside = PROGRAMS[name]
    x = data()[:rows]
    assert dependence(model, guide, x) == {"data": (outside, set())}
    for vectorize in (True, False):
        loss = IWAE_ELBO(3, vectorize_particles=vectorize, **ELBO)
        if not outside:
            loss.loss_and_grads(model, guide, x)
            continue
        with pytest.raises(ValueError, match=r"density of 'g', outside plate 'data', depends on"):
            loss.loss_and_grads(model, guide, x)
    one = [IWAE_ELBO(1, **ELBO), IWAE_ELBO(1), Trace_ELBO()]  # the ELBO, whatever depends on what
    values = []
    for each in one:
        pyro.set_rng_seed(0)
        values.append(each.loss(model, guide, x))
    assert values == pytest.approx(values[:1] * 3)


# Coupled entries.


def centred(x: Tensor) -> None:
    with pyro.plate("data", len(x)):
        z = normal("z", 0.0, 1.0)
        observe(z - z.mean(-1, keepdim=True), x)


def walk(x: Tensor) -> None:
    """Increments in a plate over time."""
    with pyro.plate("data", len(x)):
        observe(normal("z", 0.0, 1.0).cumsum(-1), x)


def walk_in_loop(x: Tensor) -> None:
    total = torch.zeros(())
    for i in pyro.plate("data", len(x)):
        total = total + normal(f"z{i}", 0.0, 1.0)
        observe(total, x[i], f"x{i}")


def local_guide(x: Tensor) -> None:
    with pyro.plate("data", len(x)):
        normal("z", real("a", 0.3) * x, 0.6)


def loop_guide(x: Tensor) -> None:
    for i in pyro.plate("data", len(x)):
        normal(f"z{i}", real("a", 0.3) * x[i], 0.6)


def exact(matrix: Tensor, x: Tensor) -> Tensor:
    """log p(x) of x ~ N(A z, 1), z ~ N(0, 1)."""
    return dist.MultivariateNormal(
        torch.zeros(len(x)), torch.eye(len(x)) + matrix @ matrix.mT
    ).log_prob(x)


COUPLED = {
    "centred": (centred, local_guide, torch.eye(4) - 0.25),
    "walk": (walk, local_guide, torch.ones(4, 4).tril()),
    "walk_in_loop": (walk_in_loop, loop_guide, torch.ones(4, 4).tril()),
}


@pytest.mark.parametrize("name", COUPLED)
def test_coupled_entries_share_one_weight(name: str) -> None:
    """Weights of entries would be of no bound: their mean exceeded log p(x)."""
    model, guide, matrix = COUPLED[name]
    x = data()
    (outside, coupled) = dependence(model, guide, x)["data"]
    assert not outside and coupled and coupled <= {"x", *(f"x{i}" for i in range(4))}
    estimate = log_marginal(model, guide, x, num_particles=20_000)
    assert estimate.shape == ()
    assert estimate.item() == pytest.approx(exact(matrix.to(x), x).item(), abs=0.1)
    for vectorize in (True, False):
        with pytest.warns(UserWarning, match="Entries of plate 'data' are coupled"):
            IWAE_ELBO(2, vectorize_particles=vectorize).loss_and_grads(model, guide, x)


def test_coupled_entries_of_a_minibatch_are_refused() -> None:
    def model(x: Tensor) -> None:
        with pyro.plate("data", len(x), subsample_size=2) as index:
            z = normal("z", 0.0, 1.0)
            observe(z - z.mean(-1, keepdim=True), x[index])

    def guide(x: Tensor) -> None:
        with pyro.plate("data", len(x), subsample_size=2):
            normal("z", real("a", 0.3), 0.6)

    with pytest.raises(ValueError, match="the density of 'x' in one entry depends on others"):
        IWAE_ELBO(2).loss(model, guide, data())
    IWAE_ELBO(1).loss(model, guide, data())


# No false alarms.


@pytest.mark.quick(24)
@pytest.mark.parametrize("row", ROWS, ids=lambda row: row.name)
def test_all_models_of_the_table_are_independent(row: Row) -> None:
    programs, args = row.build(), row.args()
    Trace_ELBO().loss(*programs, *args)
    found = dependence_of(Program(*programs, args))
    assert {*row.shared} <= found.keys() or row.name == "no_latents"
    assert not any(found.values())


@pytest.mark.quick(6)
@pytest.mark.parametrize("row", ENUMERATED, ids=lambda row: row.name)
def test_enumerated_latents_inside_are_independent(row: Enumerated) -> None:
    poutine.trace(row.guide).get_trace(row.x())
    found = dependence_of(Program(row.model, row.guide, (row.x(),)))
    assert found or row.name in ("long_memory", "outside")
    assert not any(found.values())


def counted(x: Tensor) -> None:
    """A global latent after enumerated ones."""
    rows = pyro.plate("data", len(x))
    with rows:
        y = pyro.sample("y", dist.Bernoulli(0.3), infer={"enumerate": "parallel"})
        observe(normal("z", y, 1.0), x)
    normal("g", y.sum(-1, keepdim=True), 1.0)


def counted_guide(x: Tensor) -> None:
    with pyro.plate("data", len(x)):
        normal("z", real("a", 0.3) * x, 0.8)
    normal("g", real("b", 0.2).expand(1), 0.7)


@pytest.mark.parametrize("options", [{}, ELBO])
@pytest.mark.parametrize("size", [1, 3])
def test_a_global_density_that_depends_on_enumerated_latents(options: dict, size: int) -> None:
    """No order of sites repairs that: they have to be sampled."""
    message = r"'g', outside plate 'data', .*ed.* Sample 'y' in the guide"
    with pytest.raises(ValueError, match=message):
        IWAE_ELBO(size, **options).loss(counted, counted_guide, data())


@pytest.mark.parametrize("training", [True, False])
def test_modules_with_noise_and_batch_normalisation(training: bool) -> None:
    """Dropout draws the same units for both runs; batch norm counts as in eval mode."""
    decoder = nn.Sequential(nn.Linear(1, 8), nn.BatchNorm1d(8), nn.Dropout(0.5), nn.Linear(8, 1))
    encoder = nn.Sequential(nn.Linear(1, 8), nn.BatchNorm1d(8), nn.Linear(8, 1))
    decoder.train(training), encoder.train(training)

    def model(x: Tensor) -> None:
        with pyro.plate("data", len(x), subsample_size=3) as index:
            z = normal("z", 0.0, 1.0)
            noise = torch.randn(())  # of the model's own
            observe(decoder(z.unsqueeze(-1)).squeeze(-1) + noise, x[index])

    def guide(x: Tensor) -> None:
        with pyro.plate("data", len(x), subsample_size=3) as index:
            normal("z", encoder(x[index].unsqueeze(-1)).squeeze(-1), 0.8)

    before = {name: each.clone() for name, each in decoder.state_dict().items()}
    state = torch.get_rng_state()
    assert dependence(model, guide, data()) == {"data": INDEPENDENT}
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(each, before[name]) for name, each in decoder.state_dict().items())
    assert all(module.training is training for module in decoder.modules())


def test_a_program_that_is_never_the_same_is_not_judged() -> None:
    """Noise that no seed controls must not pass for a dependence."""
    count = iter(range(1000))

    def model(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            observe(normal("z", float(next(count)), 1.0), x)

    assert dependence(model, local_guide, data()) == {}


def test_values_that_the_model_draws_itself_are_not_judged() -> None:
    """A sampler by rejection uses more random numbers for some values than for others."""

    def model(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            z = normal("z", 0.0, 1.0)
            pyro.sample("y", dist.Gamma(z.exp(), 1.0))

    assert dependence(model, local_guide, data()) == {}


# Discrete latents.


def discrete(through: Callable[[Tensor], Tensor]) -> tuple[Callable, Callable]:
    def model(x: Tensor) -> None:
        rows = pyro.plate("data", len(x))
        with rows:
            k = pyro.sample("k", dist.Bernoulli(0.02))
        normal("g", through(k), 1.0)
        with rows:
            observe(k, x)

    def guide(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            pyro.sample("k", dist.Bernoulli(real("p", 0.02)))
        normal("g", real("b", 0.2), 1.0)

    return model, guide


STEPS = {
    "sum": lambda k: k.sum(),
    "any": lambda k: k.max(),
    "all": lambda k: k.prod(0) + k.max() * 0.5,
    "majority": lambda k: (k.sum() > 0.6 * len(k)).to(k),
    "first": lambda k: k[0],
}


@pytest.mark.parametrize("rows", [1, 4])
@pytest.mark.parametrize("step", STEPS)
def test_steps_of_rare_discrete_latents(step: str, rows: int) -> None:
    x = data()[:rows]
    for _ in range(5):
        pyro.clear_param_store()
        model, guide = discrete(STEPS[step])
        assert dependence(model, guide, x) == {"data": ({"g": "model"}, set())}
        model, guide = discrete(lambda k: torch.zeros(()))
        assert dependence(model, guide, x) == {"data": INDEPENDENT}


@pytest.mark.parametrize(
    "prior",
    [dist.Categorical(torch.tensor([0.98, 0.01, 0.01])), dist.Poisson(0.01), dist.Geometric(0.99)],
    ids=str,
)
def test_one_row_with_a_rare_count(prior: dist.Distribution) -> None:
    def model(x: Tensor) -> None:
        rows = pyro.plate("data", 1)
        with rows:
            k = pyro.sample("k", prior)
        normal("g", k.sum() * 0.3, 1.0)
        with rows:
            observe(0.0 * k, x)

    def guide(x: Tensor) -> None:
        with pyro.plate("data", 1):
            pyro.sample("k", prior)
        normal("g", real("b", 0.2), 1.0)

    assert dependence(model, guide, data()[:1]) == {"data": ({"g": "model"}, set())}


# What the reports were about.


def test_a_mean_field_guide_cannot_exceed_the_evidence() -> None:
    """N = 3, s = 0.3: log p(x) = -9.114, and the nested value went to -6.26 with training."""

    def model(x: Tensor) -> None:
        rows = pyro.plate("data", 3)
        with rows:
            z = normal("z", 0.0, 1.0)
        g = normal("g", z.mean(-1, keepdim=True), 0.3)
        with rows:
            observe(g, x)

    x = torch.full((3,), 3.0)
    covariance = torch.eye(3) + 1 / 3 + 0.09
    exact = dist.MultivariateNormal(torch.zeros(3), covariance).log_prob(x).item()
    assert exact == pytest.approx(-9.114, abs=5e-4)
    with pytest.raises(ValueError, match=r"in the model\), so this value could exceed log p"):
        MIWAE_ELBO(2, 8, **ELBO).loss(model, mean_field, x)
    with pytest.warns(UserWarning, match="share one joint weight.$"):
        value = -MIWAE_ELBO(500, 8).loss(model, mean_field, x)
    assert value < exact and not math.isnan(value)
