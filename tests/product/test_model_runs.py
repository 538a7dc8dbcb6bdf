"""How often a call of a loss runs the user's model: for what it must find, then once."""

from collections.abc import Callable
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.infer import Trace_ELBO
from pyro.infer.autoguide import AutoNormal
from torch import Tensor, nn

from pyro_recursive import (
    IWAE_ELBO,
    AmortizedGuide,
    FlowGuide,
    MixtureGuide,
    RecursiveMixture_ELBO,
    RecursiveMixtureGuide,
    Schedule,
    SemiAmortizedGuide,
    Stratified_ELBO,
)

DATA = torch.tensor([[0.4], [-1.3], [0.9], [2.1], [1.6]], dtype=torch.float64)


class Counted:
    """A model that counts its runs."""

    def __init__(self, model: Callable) -> None:
        self.model, self.runs = model, 0

    def __call__(self, *args: Any) -> None:
        self.runs += 1
        self.model(*args)

    def runs_of(self, call: Callable) -> int:
        self.runs = 0
        call()
        return self.runs


def rows(x: Tensor) -> None:
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        pyro.sample("x", dist.Normal(z, 1.0), obs=x[:, 0])


def pooled(x: Tensor) -> None:
    mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Normal(mu, 1.0))
        pyro.sample("x", dist.Normal(z, 1.0), obs=x[:, 0])


def masked(x: Tensor) -> None:
    mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
    with pyro.plate("data", len(x)), poutine.mask(mask=x[:, 0] > 0):
        z = pyro.sample("z", dist.Normal(mu, 1.0))
        pyro.sample("x", dist.Normal(z, 1.0), obs=x[:, 0])


def bounded(x: Tensor) -> None:
    low = pyro.sample("low", dist.Normal(0.0, 1.0))
    mu = pyro.sample("mu", dist.Uniform(low, low + 2.0))
    with pyro.plate("data", len(x)):
        pyro.sample("x", dist.Normal(mu, 1.0), obs=x[:, 0])


def encoder(model: Callable, **options: Any) -> AmortizedGuide:
    return AmortizedGuide(model, nn.Linear(1, 2), **options)


def growing(model: Callable) -> RecursiveMixtureGuide:
    components = [encoder(model) for _ in range(2)]
    return RecursiveMixtureGuide(model, components, schedule=Schedule(4, 4, 4))


def refined(model: Callable) -> SemiAmortizedGuide:
    return SemiAmortizedGuide(model, encoder(model, name="start"), steps=2)


# (loss, model, guide, at most so many runs in the first call, and in a later one)
CASES = {
    "AutoNormal": (IWAE_ELBO(8), pooled, AutoNormal, 23, 1),
    "amortised": (IWAE_ELBO(8), pooled, AmortizedGuide, 26, 1),
    "encoder": (IWAE_ELBO(8), rows, encoder, 26, 1),
    "replayed": (IWAE_ELBO(8, estimator="dreg"), rows, encoder, 26, 1),
    "one_sample": (Trace_ELBO(), rows, encoder, 5, 1),
    "flow": (IWAE_ELBO(8), pooled, FlowGuide, 34, 1),
    "mixture": (Stratified_ELBO(2), pooled, lambda model: MixtureGuide(model, 3), 37, 1),
    "growing": (RecursiveMixture_ELBO(2), rows, growing, 30, 1),
    "refined": (Trace_ELBO(), rows, refined, 8, 3),
    "masked": (IWAE_ELBO(8), masked, AmortizedGuide, 100, 3),
    "masked_mixture": (Stratified_ELBO(2), masked, lambda model: MixtureGuide(model, 3), 111, 3),
    "masked_AutoNormal": (IWAE_ELBO(8), masked, AutoNormal, 25, 3),
    "bounded": (IWAE_ELBO(8), bounded, AmortizedGuide, 51, 2),
}


@pytest.mark.quick(7)
@pytest.mark.parametrize("name", CASES)
@pytest.mark.filterwarnings("ignore:Plate 'data' encloses latent site")
def test_runs_of_the_model(name: str) -> None:
    loss, model, make, first, later = CASES[name]
    counted = Counted(model)
    guide = make(counted)
    assert counted.runs_of(lambda: loss.loss_and_grads(counted, guide, DATA)) <= first
    for _ in range(2):
        assert counted.runs_of(lambda: loss.loss_and_grads(counted, guide, DATA)) == later
