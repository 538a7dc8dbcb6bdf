"""Calls of the evaluation: unknown keywords raise before anything runs; looking changes nothing."""

import html
from collections.abc import Callable
from functools import partial
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.infer import SVI, Trace_ELBO
from pyro.infer.autoguide import AutoNormal
from pyro.nn import PyroModule
from pyro.optim import Adam
from torch import Tensor, nn

from pyro_recursive import AmortizedGuide, MixtureGuide, gaps, log_marginal
from pyro_recursive.evaluation import (
    active_units,
    calibration,
    calibration_by_fits,
    gradient_snr,
    gradient_snr_sweep,
    importance_weights,
    log_likelihoods,
    mixture_diversity,
    mutual_information,
    posterior_draws,
    predict,
    predictive_draws,
    prior_draws,
    rate_of,
)
from pyro_recursive.evaluation.arviz import mcmc_to_arviz, to_arviz
from pyro_recursive.evaluation.search import Search
from tests.models.small import normal_rows

X = torch.linspace(-1.0, 1.0, 4, dtype=torch.float64)


def named(x: Tensor, noise: float = 1.0) -> None:
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        pyro.sample("x", dist.Normal(z, noise), obs=x)


def guide(x: Tensor, noise: float = 1.0) -> None:
    with pyro.plate("data", len(x)):
        pyro.sample("z", dist.Normal(x / 2, 0.8))


class Module(PyroModule):
    def forward(self, x: Tensor, noise: float = 1.0) -> None:
        named(x, noise)


# --- Keywords


def encoded(model: Callable = named) -> AmortizedGuide:
    inputs = lambda x, noise=1.0: x[:, None]  # noqa: E731
    return AmortizedGuide(model, nn.Linear(1, 2), inputs=inputs)


def mixture() -> MixtureGuide:
    return MixtureGuide(named, [encoded(), encoded()])


DRAWS = partial(posterior_draws, named, guide, X, num_draws=3)
FUNCTIONS: dict[str, Callable[..., Any]] = {
    "log_marginal": partial(log_marginal, named, guide, X),
    "importance_weights": partial(importance_weights, named, guide, X),
    "gaps": partial(gaps, named, encoded(), X),
    "posterior_draws": DRAWS,
    "prior_draws": partial(prior_draws, named, X),
    "predictive_draws": lambda **options: predictive_draws(named, DRAWS(), X, **options),
    "log_likelihoods": lambda **options: log_likelihoods(named, DRAWS(), X, **options),
    "predict": partial(predict, named, guide, X),
    "to_arviz": partial(to_arviz, named, guide, X),
    "mcmc_to_arviz": partial(mcmc_to_arviz, None, named, X),
    "mutual_information": partial(mutual_information, guide, X),
    "rate_of": partial(rate_of, named, guide, X),
    "active_units": partial(active_units, encoded(), X),
    "mixture_diversity": partial(mixture_diversity, mixture(), X),
    "calibration": partial(calibration, named, guide, X),
    "calibration_by_fits": partial(calibration_by_fits, named, lambda x: guide, X),
    "gradient_snr": partial(gradient_snr, named, guide, Trace_ELBO(), X),
    "gradient_snr_sweep": partial(gradient_snr_sweep, named, guide, Trace_ELBO, X),
}


@pytest.mark.parametrize("name", FUNCTIONS)
def test_unknown_keywords_are_named(name: str) -> None:
    """Misspelt, or deleted: they would go to the model, some of them in silence."""
    for wrong in ({"chunk_sizes": 3}, {"num_partikles": 3}, {"shared": True}, {"progress": False}):
        (keyword,) = wrong
        with pytest.raises(TypeError, match=rf"{name} got '{keyword}', which the program does not"):
            FUNCTIONS[name](**wrong)


def test_the_nearest_option_is_named() -> None:
    with pytest.raises(TypeError, match=r"Did you mean 'num_particles'\?"):
        log_marginal(named, guide, X, num_particle=3)
    with pytest.raises(TypeError, match=r"Did you mean 'noise'\?"):
        log_marginal(named, guide, X, noize=3)


PROGRAMS: dict[str, Callable] = {
    "handlers": poutine.scale(poutine.block(named, hide=["w"]), 1.0),
    "partial": partial(named, noise=2.0),
    "module": Module(),
    "handlers_of_a_module": poutine.block(Module(), hide=["w"]),
    "method": Module().forward,
}


@pytest.mark.parametrize("kind", PROGRAMS)
def test_keywords_of_programs(kind: str) -> None:
    """Those that the model names reach it; others raise, whatever is around it."""
    ran: list[float] = []
    counted = poutine.infer_config(guide, lambda site: ran.append(1.0) or {})
    options = {"num_particles": 5}
    one, other = (log_marginal(PROGRAMS[kind], guide, X, noise=n, **options) for n in (1.0, 3.0))
    assert not torch.allclose(one, other)
    with pytest.raises(TypeError, match="log_marginal got 'nois'"):
        log_marginal(PROGRAMS[kind], counted, X, nois=1.0)
    assert not ran


def test_a_model_may_take_any_keyword() -> None:
    seen: list[Any] = []

    def model(x: Tensor, **options: Any) -> None:
        seen.append(options)
        named(x)

    log_marginal(model, lambda x, **options: guide(x), X, num_particles=3, anything=7)
    assert seen[0] == {"anything": 7}


@pytest.mark.parametrize("wrong", ["num_particle", "num_sample", "num_samples", "chunksize"])
def test_misspelt_options_do_not_vanish_in_a_model(wrong: str) -> None:
    """Nor do those of other functions; names that are far from all, or the program's, go to it."""

    def model(x: Tensor, **options: Any) -> None:
        named(x)

    def any_keyword(x: Tensor, **options: Any) -> None:
        guide(x)

    def naming(x: Tensor, num_particle: int = 1, num_sample: int = 1, **options: Any) -> None:
        guide(x)

    with pytest.raises(TypeError, match=f"log_marginal got '{wrong}'.* does not name"):
        log_marginal(model, any_keyword, X, **{wrong: 3})
    for name in ("num_rows", "num_layers", "mode", "group"):
        log_marginal(model, any_keyword, X, num_particles=3, **{name: 3})
    if wrong in ("num_particle", "num_sample"):
        log_marginal(model, naming, X, num_particles=3, **{wrong: 3})


RESULTS: dict[str, Callable[[], Any]] = {
    "weights": lambda: importance_weights(named, guide, X, num_particles=30),
    "gaps": lambda: gaps(named, encoded(), X, num_particles=10, search=Search(steps=2)),
    "prediction": lambda: predict(named, guide, X, num_draws=5),
    "calibration": lambda: calibration(normal_rows, guide, torch.zeros(30)),
}


@pytest.mark.parametrize("name", RESULTS)
def test_notebooks_show_what_print_shows(name: str) -> None:
    result = RESULTS[name]()
    shown = result._repr_html_()
    assert shown == f"<pre>{html.escape(str(result))}</pre>" and "tensor(" not in shown


# --- The random state


def learned(x: Tensor, noise: float = 1.0) -> None:
    loc = pyro.param("loc", lambda: torch.tensor(0.3))
    with pyro.plate("data", len(x)):
        pyro.sample("z", dist.Normal(loc, 0.8))


# Each returns a function that measures; its guide has been made.
MEASURES: dict[str, Callable[[], Callable[[], Tensor]]] = {
    "log_marginal": lambda: partial(log_marginal, named, guide, X, num_particles=20),
    "importance_weights": lambda: lambda: importance_weights(named, guide, X).ess,
    "mutual_information": lambda: partial(mutual_information, guide, X, num_draws=5),
    "rate_of": lambda: lambda: torch.stack(rate_of(named, guide, X, num_draws=5)),
    "active_units": lambda: lambda: active_units(guide, X, num_draws=5).variances["z"],
    "gradient_snr": lambda: lambda: gradient_snr(named, learned, Trace_ELBO(), X)["guide"].ratio,
    "calibration": lambda: lambda: calibration(normal_rows, guide, torch.zeros(30)).ranks["z"],
    "mixture_diversity": lambda: of_guide(mixture(), lambda g: mixture_diversity(g, X).divergence),
    "gaps": lambda: of_guide(encoded(), lambda g: gaps(named, g, X, search=Search(steps=2)).elbo),
}


def of_guide(guide: Any, measure: Callable[[Any], Tensor]) -> Callable[[], Tensor]:
    guide.prepare(X)
    return lambda: measure(guide)


@pytest.mark.parametrize("name", MEASURES)
def test_measuring_leaves_the_random_state(name: str) -> None:
    """The same call gives the same result, and another one after another draw."""
    measure, state = MEASURES[name](), torch.get_rng_state()
    found = [measure(), measure()]
    assert torch.equal(torch.get_rng_state(), state)
    torch.rand(1)
    found.append(measure())
    torch.testing.assert_close(found[0], found[1])
    assert not torch.equal(found[0], found[2])


def test_an_error_leaves_the_random_state() -> None:
    state = torch.get_rng_state()
    with pytest.raises(ValueError, match="guide does not sample"):
        log_marginal(named, lambda x: torch.rand(3).sum() and None, X)
    assert torch.equal(torch.get_rng_state(), state)


def test_minibatches_have_noise_of_their_own() -> None:
    """Else the errors of a sum over minibatches would not be independent."""
    noise: list[Tensor] = []

    def guide(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            noise.append(pyro.sample("z", dist.Normal(torch.zeros(len(x)), 1.0)))

    last = []
    for rows in (X[:2], X[2:], X[:2].clone()):
        log_marginal(named, guide, rows, num_particles=5, chunk_size=5)
        last.append(noise[-1])
    assert torch.equal(last[0], last[2]) and not torch.equal(last[0], last[1])


def test_looking_does_not_change_the_training() -> None:
    def train(look: Callable[[], Any]) -> Tensor:
        pyro.clear_param_store()
        pyro.set_rng_seed(1)
        svi = SVI(named, learned, Adam({"lr": 0.1}), Trace_ELBO())
        for _ in range(5):
            svi.step(X)
            look()
        return pyro.param("loc").detach().clone()

    expected = train(lambda: None)
    for name in ("log_marginal", "importance_weights", "mutual_information", "rate_of"):
        assert torch.equal(train(MEASURES[name]()), expected)


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_measuring_leaves_the_random_state_of_cuda() -> None:
    with torch.device("cuda"):
        torch.rand(1)
        states = torch.cuda.get_rng_state_all()
        log_marginal(named, guide, X.cuda(), num_particles=20)
    now = torch.cuda.get_rng_state_all()
    assert all(torch.equal(one, other) for one, other in zip(states, now, strict=True))


def test_draws_move_the_random_state() -> None:
    for draw in (DRAWS, partial(prior_draws, named, X, num_draws=3)):
        assert not torch.equal(draw()["z"], draw()["z"])
    autoguide = AutoNormal(named)
    autoguide(X)
    found = [predict(named, autoguide, X, num_draws=3)["x"] for _ in range(2)]
    assert not torch.equal(*found)


# --- Buffers


class Standardised(nn.Module):
    """Moves the statistics of a batch norm in training, and a counter in any mode."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(1)
        self.layer = nn.Linear(1, 2)
        self.register_buffer("count", torch.zeros((), dtype=torch.long))

    def forward(self, x: Tensor) -> Tensor:
        self.count += 1
        return self.layer(self.norm(x))


class Networks:
    """A model with a network, and guides with one."""

    def __init__(self) -> None:
        self.nets = nn.ModuleList([Standardised() for _ in range(4)])
        parts = [AmortizedGuide(self.model, net, inputs=lambda x: x[:, None]) for net in self.nets]
        self.amortized, self.mixture = parts[1], MixtureGuide(self.model, parts[2:])

    def model(self, x: Tensor) -> None:
        shift = pyro.module("decoder", self.nets[0])(x[:, None])[:, 0]
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("x", dist.Normal(z + shift, 1.0), obs=x)


KEEPING: dict[str, Callable[[Networks, Tensor], Any]] = {
    "log_marginal": lambda n, x: log_marginal(n.model, n.amortized, x, num_particles=5),
    "looped": lambda n, x: log_marginal(
        n.model, n.amortized, x, num_particles=2, vectorize_particles=False
    ),
    "importance_weights": lambda n, x: importance_weights(n.model, n.amortized, x),
    "gaps": lambda n, x: gaps(n.model, n.amortized, x, num_particles=5, search=Search(steps=2)),
    "prior_draws": lambda n, x: prior_draws(n.model, x, num_draws=3),
    "predict": lambda n, x: predict(n.model, n.amortized, x, num_draws=3),
    "to_arviz": lambda n, x: to_arviz(n.model, n.amortized, x, num_draws=3),
    "mutual_information": lambda n, x: mutual_information(n.amortized, x),
    "rate_of": lambda n, x: rate_of(n.model, n.amortized, x),
    "active_units": lambda n, x: active_units(n.amortized, x, num_draws=3),
    "mixture_diversity": lambda n, x: mixture_diversity(n.mixture, x, num_draws=3),
    "gradient_snr": lambda n, x: gradient_snr(n.model, n.amortized, Trace_ELBO(), x, num_draws=10),
}


@pytest.mark.parametrize("is_training", [True, False])
@pytest.mark.parametrize("name", KEEPING)
def test_looking_keeps_buffers(name: str, is_training: bool) -> None:
    """Also those of draws, their predictions and log-likelihoods, which `to_arviz` takes."""
    networks = Networks()
    for guide in (networks.amortized, networks.mixture):
        guide(X)
        guide.train(is_training)
    networks.nets.train(is_training)
    before = {n: (b, b.clone()) for n, b in networks.nets.named_buffers()}
    KEEPING[name](networks, X)
    for n, buffer in networks.nets.named_buffers():
        assert buffer is before[n][0] and torch.equal(buffer, before[n][1])
