"""Every public function of the evaluation on models with enumerated latents.

Most have one value on a model and on the same model with its sums by hand; the others are compared
with exact values here or in the files named beside them.
"""

import types
from collections.abc import Callable
from functools import partial
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.infer import config_enumerate
from torch import Tensor

from pyro_recursive import IWAE_ELBO, AmortizedGuide, MixtureGuide, evaluation
from pyro_recursive.evaluation import arviz
from pyro_recursive.evaluation.search import Search
from tests.models.enumerated import ENUMERATED, PARALLEL, Enumerated
from tests.models.enumerated_guides import rows, rows_guide
from tests.models.row import data, mask, normal
from tests.oracles.arviz_objects import pointwise

ROWS = [row for row in ENUMERATED if row.name in ("gmm", "hmm", "lda")]
PLATE = {"gmm": "data", "hmm": "data", "lda": "documents"}
of = evaluation


def made(row: Enumerated, model: Callable, make: Callable, state: dict) -> Any:
    """Return a guide of the package, with the same parameters for both models."""
    guide = make(model, plate=PLATE[row.name])
    guide(row.x())
    guide.load_state_dict(state.setdefault("of guide", guide.state_dict()))
    pyro.set_rng_seed(2)
    return guide


def gaps(row: Enumerated, model: Callable, state: dict) -> Any:
    guide = made(row, model, AmortizedGuide, state)
    found = of.gaps(model, guide, row.x(), num_particles=20, search=Search(steps=3, lr=0.1))
    return [each for each in found if each is not None]


def diversity(row: Enumerated, model: Callable, state: dict) -> Any:
    guide = made(row, model, partial(MixtureGuide, components=2), state)
    return [*of.mixture_diversity(guide, row.x(), num_draws=10)]


def snr(row: Enumerated, model: Callable, state: dict) -> Any:
    found = of.gradient_snr(model, row.guide, IWAE_ELBO(3), row.x(), num_draws=10)
    return [found["guide"].ratio]


def sweep(row: Enumerated, model: Callable, state: dict) -> Any:
    sizes: dict[str, Any] = {"num_particles": (1, 2), "num_draws": 10}
    make = lambda m, k: IWAE_ELBO(k, num_estimates=m)  # noqa: E731
    found = of.gradient_snr_sweep(model, row.guide, make, row.x(), **sizes)
    return [found.ratio["guide"]]


def in_parallel(row: Enumerated, model: Callable, state: dict) -> Any:
    x, other = row.x(), row.x().T if row.x().dim() == 2 else row.x()
    assert len(other) == x.shape[-1]  # rows are the last dim

    def evidence(rows: Tensor) -> Tensor:
        rows = rows.T if x.dim() == 2 else rows
        return of.log_marginal(model, row.guide, rows, num_particles=50)

    return [of.evaluate_in_parallel(evidence, other)]


def program(function: Callable, values: Callable, **options: Any) -> Callable:
    def run(row: Enumerated, model: Callable, state: dict) -> Any:
        return values(function(model, row.guide, row.x(), **options))

    return run


def of_guide(function: Callable, values: Callable) -> Callable:
    def run(row: Enumerated, model: Callable, state: dict) -> Any:
        return values(function(row.guide, row.x()))

    return run


# Functions whose values on both models are one, from the same seed.
SAME: dict[str, Callable] = {
    "log_marginal": program(of.log_marginal, lambda each: [each], num_particles=50),
    "importance_weights": program(
        of.importance_weights, lambda each: [each.log_weights], num_particles=50
    ),
    "rate_of": program(of.rate_of, list, num_draws=20),
    "mutual_information": of_guide(of.mutual_information, lambda each: [each]),
    "active_units": of_guide(of.active_units, lambda each: [each.variances["z"]]),
    "gaps": gaps,
    "mixture_diversity": diversity,
    "gradient_snr": snr,
    "gradient_snr_sweep": sweep,
    "evaluate_in_parallel": in_parallel,
}
DRAWS = {  # test_enumerated.py, test_enumerated_arviz.py
    *("posterior_draws", "predictive_draws", "prior_draws", "log_likelihoods"),
    *("to_arviz", "mcmc_to_arviz", "loo"),
}
HERE = {"predict", "calibration", "calibration_by_fits", "saliency"}
OF_NUMBERS = {  # which no model is given
    *("effective_sample_size", "jensen_shannon", "pareto_k_threshold", "psis", "signal_to_noise"),
    *("plot_ecdf_difference", "plot_gaps", "plot_gradient_snr", "plot_history", "plot_pareto_k"),
    *("plot_ranks", "plot_saliency"),
}


def test_no_public_function_is_missing() -> None:
    public = {(module, name) for module in (of, arviz) for name in module.__all__}
    found = {
        name for module, name in public if isinstance(getattr(module, name), types.FunctionType)
    }
    assert found == {*SAME, *DRAWS, *HERE, *OF_NUMBERS}


@pytest.mark.parametrize("name", SAME)
@pytest.mark.parametrize("row", ROWS, ids=lambda row: row.name)
@pytest.mark.filterwarnings("ignore:Plate '.*' encloses latent site")
def test_values_are_those_of_the_sums_by_hand(row: Enumerated, name: str) -> None:
    found, state = [], dict[str, Any]()
    for model in (row.model, row.collapsed):
        pyro.clear_param_store()
        pyro.set_rng_seed(2)
        found.append(SAME[name](row, model, state))
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-8, atol=1e-9, equal_nan=True)


@pytest.mark.parametrize("from_prior", [False, True])
@pytest.mark.parametrize("row", ROWS, ids=lambda row: row.name)
def test_new_rows(row: Enumerated, from_prior: bool) -> None:
    """Local latents from their prior, and the guide or not: with the noise of sums by hand."""
    options: dict[str, Any] = {"num_draws": 4000, "plate": PLATE[row.name]}
    models, guide = (row.model, row.collapsed), row.guide
    if from_prior:
        guide = of.posterior_draws(row.model, row.guide, row.x(), num_draws=4000)
    found = [of.predict(m, guide, row.x(), **options) for m in models]
    one, other = (each.log_p for each in found)
    error = (found[0].standard_error ** 2 + found[1].standard_error ** 2).sqrt()
    assert ((one - other).abs() < 4.5 * error).all() and error.max() < 0.1
    ratio = found[0].standard_error / found[1].standard_error
    assert (ratio.log().abs() < 0.1).all()


@pytest.mark.parametrize("vectorize", [True, False])
def test_new_rows_of_enumerated_latents_alone(vectorize: bool) -> None:
    """No noise but that of the global latent; masked data are missing, other data no part."""
    weights, locs, seen = torch.tensor([0.4, 0.6]), torch.tensor([-1.5, 2.0]), mask()

    def model(x: Tensor) -> None:
        mu = normal("mu", 0.0, 1.0)
        normal("before", mu, 1.0, obs=torch.tensor(0.3))
        with pyro.plate("data", len(x)):
            y = pyro.sample("y", dist.Categorical(weights), infer=PARALLEL)
            with poutine.mask(mask=seen):
                normal("x", locs[y] + mu, 0.8, obs=x)

    x, options = data(), {"vectorize_particles": vectorize, "plate": "data"}
    draws = of.posterior_draws(model, lambda x: normal("mu", 0.2, 0.5), x, num_draws=30)
    found = of.predict(model, draws, x, **options)
    each = dist.Normal(locs + draws["mu"][:, None, None], 0.8).log_prob(x.unsqueeze(-1))
    expected = (weights.log() + each).logsumexp(-1).where(seen, 0.0)
    expected = expected.logsumexp(0) - torch.tensor(30.0).log()
    torch.testing.assert_close(found.log_p, expected.double())


def exact_guide(x: Tensor, width: float = 1.0) -> None:
    """The posterior of the locations of rows: a mixture; and what is narrower."""
    locs, weights = torch.tensor([-1.5, 2.0]), torch.tensor([0.4, 0.6])
    log_p = weights.log() + dist.Normal(locs, 1.0).log_prob(x.unsqueeze(-1))
    precision = 1 / 0.36 + 1 / 0.64
    loc = (locs / 0.36 + x.unsqueeze(-1) / 0.64) / precision
    with pyro.plate("data", len(x)):
        parts = dist.Categorical(logits=log_p), dist.Normal(loc, width * precision**-0.5)
        pyro.sample("z", dist.MixtureSameFamily(*parts))


def mixture(x: Tensor, **options: Any) -> None:
    with pyro.plate("data", len(x)):
        y = pyro.sample("y", dist.Categorical(torch.tensor([0.4, 0.6])), infer=PARALLEL)
        z = normal("z", torch.tensor([-1.5, 2.0])[y], 0.6)
        normal("x", z, 0.8, obs=x)


@pytest.mark.parametrize("width", [1.0, 0.5])
def test_calibration_ranks_what_the_guide_draws(width: float) -> None:
    guide, x = partial(exact_guide, width=width), torch.zeros(500)
    rows = of.calibration(mixture, guide, x)
    fits = of.calibration_by_fits(mixture, lambda x: guide, x[:4], num_datasets=100)
    for found in (rows, fits):
        assert set(found.ranks) == {"z"} and found.is_calibrated() == (width == 1.0)
    with pytest.raises(ValueError, match=r"'y' has shape \(500, 1\) in the model, no draws in"):
        of.calibration(mixture, guide, x, names=["y"])


# Guides that enumerate: one value from the same seed with the mark and without it, where what is
# marked is drawn as any other latent.


def densities_of(draws: of.draws.Draws) -> list[Tensor]:
    return [draws["z"], draws["y"], *draws.log_densities]


def from_draws(values: Callable) -> Callable:
    def run(guide: Callable, x: Tensor) -> Any:
        pyro.set_rng_seed(2)
        draws = of.posterior_draws(rows, guide, x, num_draws=20)
        return values(draws, x)

    return run


def arrays(guide: Callable, x: Tensor) -> list[Tensor]:
    data = arviz.to_arviz(rows, guide, x, num_draws=50, prior_predictive=True)
    found = [torch.from_numpy(each.values) for each in data["posterior"].data_vars.values()]
    return [*found, pointwise(arviz.loo(data))]


DRAWN: dict[str, Callable] = {
    "posterior_draws": from_draws(lambda draws, x: densities_of(draws)),
    "predictive_draws": from_draws(lambda draws, x: [of.predictive_draws(rows, draws, x)["x"]]),
    "log_likelihoods": from_draws(lambda draws, x: [of.log_likelihoods(rows, draws, x)["x"]]),
    "to_arviz, loo": arrays,
    "predict": lambda guide, x: [of.predict(rows, guide, x, num_draws=20).log_p],
    "rate_of": lambda guide, x: [*of.rate_of(rows, guide, x, num_draws=20)],
    "mutual_information": lambda guide, x: [of.mutual_information(guide, x)],
    "active_units": lambda guide, x: [of.active_units(guide, x).variances["z"]],
    "calibration": lambda guide, x: [
        of.calibration(rows, guide, x.repeat(50), num_draws=20, names=["z"]).ranks["z"]
    ],
    "gradient_snr": lambda guide, x: [
        of.gradient_snr(rows, guide, IWAE_ELBO(1, estimator="score"), x, num_draws=20)[
            "model"
        ].ratio.isfinite()
    ],
}  # others: test_enumerated_guides.py


@pytest.mark.parametrize("name", DRAWN)
@pytest.mark.filterwarnings("ignore:.*k-hat")
def test_marks_in_the_guide(name: str) -> None:
    found, bare = [], partial(rows_guide, infer={})
    for guide in (bare, config_enumerate(bare)):
        pyro.clear_param_store()
        pyro.set_rng_seed(2)
        found.append(DRAWN[name](guide, data()))
    torch.testing.assert_close(*found)


def classifier(x: Tensor, width: float = 1.0) -> None:
    """Any distribution of the label, and the posterior given it, or a wider one."""
    with pyro.plate("data", len(x)):
        y = pyro.sample("y", dist.Categorical(logits=x.unsqueeze(-1) * torch.tensor([0.4, 1.0])))
        loc = (torch.tensor([-1.5, 2.0])[y] / 0.36 + x / 0.64) / (1 / 0.36 + 1 / 0.64)
        normal("z", loc, width * (1 / 0.36 + 1 / 0.64) ** -0.5)


@pytest.mark.filterwarnings("ignore:.*k-hat")
@pytest.mark.parametrize("resample", [None, "psis"])
def test_objects_of_guides_that_enumerate(resample: str | None) -> None:
    """Leave-one-out is the evidence, as latents are local; predictions are the posterior's."""
    x, locs = torch.tensor([-1.0, 0.3, 1.6]), torch.tensor([-1.5, 2.0])
    log_p = torch.tensor([0.4, 0.6]).log() + dist.Normal(locs, 1.0).log_prob(x.unsqueeze(-1))
    guide = config_enumerate(partial(classifier, width=1.25 if resample is None else 1.0))
    data = arviz.to_arviz(mixture, guide, x, num_draws=8000, resample=resample)
    stats, groups = data["sample_stats"], ("posterior", "posterior_predictive")
    (y, z), new = (
        [torch.from_numpy(data[group][name].values[0]) for name in names]
        for group, names in zip(groups, (("y", "z"), ("x",)), strict=True)
    )
    weights = torch.ones(8000, 3) / 8000
    if resample is None:
        weights = torch.from_numpy(stats["log_weight"].values[0]).softmax(0)
    label = log_p.softmax(-1)[:, 1]
    mean = (locs / 0.36 + x.unsqueeze(-1) / 0.64) / (1 / 0.36 + 1 / 0.64) * log_p.softmax(-1)
    for each, exact in ((y, label), (z, mean.sum(-1)), (new[0], mean.sum(-1))):
        error = (weights**2 * (each - exact) ** 2).sum(0).sqrt()
        assert (((weights * each).sum(0) - exact).abs() < 4.5 * error).all() and error.max() < 0.05
    if resample is None:
        found = pointwise(arviz.loo(data))
        assert (found - log_p.logsumexp(-1)).abs().max() < 0.04
    else:
        log_weights = torch.from_numpy((stats["log_p"] - stats["log_q"]).values[0])
        torch.testing.assert_close(log_weights, log_p.logsumexp(-1).expand(8000, 3))


def test_rows_that_an_enumerated_latent_couples_have_no_prior_of_their_own() -> None:
    def model(x: Tensor) -> None:
        y = pyro.sample("y", dist.Bernoulli(0.4), infer=PARALLEL)
        with pyro.plate("data", len(x)):
            normal("x", normal("z", y, 1.0), 1.0, obs=x)

    def guide(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            normal("z", x / 2, 0.7)

    with pytest.raises(ValueError, match=r"prior of 'z' is summed .* outside plate 'data'"):
        of.rate_of(model, guide, torch.zeros(3))


def test_saliency_needs_draws_of_every_latent() -> None:
    """A summed latent has none: the model would draw it from its prior."""

    def model(x: Tensor) -> None:
        with pyro.plate("rows", len(x)):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            y = pyro.sample("y", dist.Bernoulli(0.3), infer={"enumerate": "parallel"})
            pyro.sample("x", dist.Normal(z + 2 * y, 1.0), obs=x)

    guide = AmortizedGuide(model, torch.nn.Linear(1, 2), inputs=lambda x: x[:, None])
    with pytest.raises(ValueError, match="no site 'y', whose draws saliency needs"):
        of.saliency(model, guide, torch.zeros(3))
