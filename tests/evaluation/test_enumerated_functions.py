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
from torch import Tensor

from pyro_recursive import IWAE_ELBO, AmortizedGuide, MixtureGuide, evaluation
from pyro_recursive.evaluation import arviz
from pyro_recursive.evaluation.search import Search
from tests.models.enumerated import ENUMERATED, PARALLEL, Enumerated
from tests.models.row import normal

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
HERE = {"predict", "calibration", "calibration_by_fits"}
OF_NUMBERS = {  # which no model is given
    *("effective_sample_size", "jensen_shannon", "pareto_k_threshold", "psis", "signal_to_noise"),
    *("plot_ecdf_difference", "plot_gaps", "plot_gradient_snr", "plot_history", "plot_pareto_k"),
    "plot_ranks",
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


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row.name)
def test_new_rows(row: Enumerated) -> None:
    """Local latents from their prior: the enumerated ones are drawn, or summed by hand."""
    options = {"num_draws": 4000, "plate": PLATE[row.name]}
    found = [of.predict(m, row.guide, row.x(), **options) for m in (row.model, row.collapsed)]
    one, other = (each.log_p for each in found)
    error = (found[0].standard_error ** 2 + found[1].standard_error ** 2).sqrt()
    assert ((one - other).abs() < 4.5 * error).all() and error.max() < 0.1


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
