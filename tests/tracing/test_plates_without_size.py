"""``pyro.plate("data")`` without a size, as in Pyro's semi-supervised VAE."""

from collections.abc import Callable
from functools import partial
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.infer import SVI, Predictive, Trace_ELBO
from pyro.infer.autoguide import AutoNormal
from torch import Tensor, nn

from pyro_recursive import (
    IWAE_ELBO,
    MIWAE_ELBO,
    AmortizedGuide,
    FlowGuide,
    MixtureGuide,
    RecursiveMixtureGuide,
    SemiAmortizedGuide,
    Stratified_ELBO,
    fit,
    gaps,
    log_marginal,
)
from pyro_recursive.evaluation import posterior_draws
from pyro_recursive.evaluation.search import Search
from tests.models.plates import exact_level_guide, exact_unsized

X = torch.tensor([0.4, -1.2, 2.0, 0.9, -0.3], dtype=torch.float64)
EXACT = dist.Normal(0.0, 2**0.5).log_prob(X)


def model(x: Tensor) -> None:
    exact_unsized(x)


class Posterior(nn.Module):
    """The parameters of N(x / 2, 1 / 2), moved by ``shift``."""

    def __init__(self, shift: float = 0.0) -> None:
        super().__init__()
        self.shift = nn.Parameter(torch.tensor(shift, dtype=torch.float64))

    def forward(self, x: Tensor) -> Tensor:
        loc = x / 2 + self.shift
        return torch.stack([loc, torch.full_like(loc, 0.5).log() / 2], -1)


def encoded(shift: float = 0.0) -> AmortizedGuide:
    return AmortizedGuide(model, Posterior(shift))


def mixture() -> MixtureGuide:
    return MixtureGuide(model, [encoded(), encoded()], weights="shared")


MAKE: dict[str, Callable[[], Any]] = {
    "encoder": encoded,
    "mixture": mixture,
    "refined": lambda: SemiAmortizedGuide(model, encoded(), steps=2),
    "own plate": lambda: AmortizedGuide(
        model, Posterior(), create_plates=lambda x: pyro.plate("data", dim=-1)
    ),
}


@pytest.mark.quick(1)
@pytest.mark.parametrize("kind", MAKE)
def test_losses_and_evaluation_are_exact(kind: str) -> None:
    guide = MAKE[kind]()
    for x, exact in ((X, EXACT), (X[:3], EXACT[:3]), (X[1:], EXACT[1:])):  # sizes that change
        for loss in (Trace_ELBO(), IWAE_ELBO(3), MIWAE_ELBO(2, 3, vectorize_particles=False)):
            assert loss.loss(model, guide, x) == pytest.approx(-exact.sum().item(), rel=1e-6)
        found = log_marginal(model, guide, x, num_particles=4)
        torch.testing.assert_close(found, exact, rtol=1e-6, atol=1e-6)
        found = gaps(model, guide, x, num_particles=10, search=Search(steps=1))
        torch.testing.assert_close(found.elbo, exact, rtol=1e-6, atol=1e-6)
    if kind == "mixture":
        assert Stratified_ELBO(2).loss(model, guide, X) == pytest.approx(-EXACT.sum().item())
    assert posterior_draws(model, guide, X, num_draws=3)["z"].shape == (3, 5)
    assert Predictive(model, guide=guide, num_samples=3)(X)["z"].shape == (3, 5)


def test_a_latent_that_the_entries_share_is_counted_once() -> None:
    """It is not broadcast, and so outside of the plate: one joint weight, as in Pyro's ELBO."""
    level = partial(exact_unsized, level=True)
    size = len(X)
    joint = dist.MultivariateNormal(torch.zeros(size), 2 * torch.eye(size) + 1.0)
    exact = joint.log_prob(X).item()
    with pytest.warns(UserWarning, match="Plate 'data' encloses latent site 'z' but not 'w'"):
        assert IWAE_ELBO(3).loss(level, exact_level_guide, X) == pytest.approx(-exact)
    assert Trace_ELBO().loss(level, exact_level_guide, X) == pytest.approx(-exact)
    elbo = IWAE_ELBO(3, global_latents="elbo").loss(level, exact_level_guide, X)
    assert elbo == pytest.approx(-exact)


FREE: dict[str, Callable[[], Any]] = {
    "joint": lambda: AmortizedGuide(model, family="full"),
    "table": lambda: AmortizedGuide(model, plate="data"),
    "flow": lambda: FlowGuide(model, transforms=1, hidden=(4,)),
    "recursive": lambda: RecursiveMixtureGuide(model, 2, plate="data"),
    "encoder": lambda: encoded(0.8),
}


@pytest.mark.quick(1)
@pytest.mark.parametrize("kind", FREE)
def test_other_guides_train(kind: str) -> None:
    guide = FREE[kind]()
    svi = SVI(model, guide, pyro.optim.Adam({"lr": 0.05}), Trace_ELBO(8, vectorize_particles=True))
    losses = [svi.step(X) for _ in range(150)]
    assert sum(losses[-20:]) / 20 == pytest.approx(-EXACT.sum().item(), abs=0.6)


def test_rows_of_minibatches_have_their_own_parameters() -> None:
    guide = AmortizedGuide(model, plate="data")
    options = {"loss": Trace_ELBO(), "batch_size": 2, "progress": False}
    still = partial(torch.optim.SGD, lr=0.0)
    fit(model, guide, X, epochs=1, optimizer=still, **options)
    with torch.no_grad():
        guide.free_local.copy_(Posterior()(X))
    history = fit(model, guide, X, epochs=3, optimizer=still, **options)
    assert history.loss == pytest.approx([-EXACT.sum().item() / 3] * 3)
    torch.testing.assert_close(log_marginal(model, guide, X, num_particles=2), EXACT)


def test_a_batch_taken_for_all_data_is_told() -> None:
    def of_batch(x: Tensor) -> None:
        mean = pyro.sample("mean", dist.Normal(x.new_zeros(()), 1.0))
        with pyro.plate("data"):
            pyro.sample("x", dist.Normal(mean, 1.0), obs=x)

    with pytest.warns(UserWarning, match="Plate 'data' has 2 rows, those of a batch, of 5"):
        fit(of_batch, AutoNormal(of_batch), X, loss=Trace_ELBO(), epochs=1, batch_size=2)


def test_a_mixtures_autoguide_of_pyro_needs_the_size() -> None:
    own = {"create_plates": lambda x: pyro.plate("data", len(x), dim=-1)}
    with pytest.raises(ValueError, match="'data' has no size, which AutoNormal needs"):
        MixtureGuide(model, [AutoNormal(model)], name="other")(X)
    guide = MixtureGuide(model, [AutoNormal(model, **own), encoded()], weights="shared")
    trace = poutine.trace(guide).get_trace(X)
    assert trace.nodes["z"]["value"].shape == X.shape
