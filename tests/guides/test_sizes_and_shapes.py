"""Batch dims without a plate, and plates whose size changes: told by name, or followed."""

from collections.abc import Callable
from functools import partial
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer import Trace_ELBO, TraceGraph_ELBO, TraceMeanField_ELBO
from pyro.infer.autoguide import AutoNormal
from torch import Tensor, nn

from pyro_recursive import (
    IWAE_ELBO,
    PIWAE_ELBO,
    AmortizedGuide,
    FlowGuide,
    MixtureGuide,
    RecursiveMixture_ELBO,
    RecursiveMixtureGuide,
    SemiAmortizedGuide,
    Stratified_ELBO,
    gaps,
    log_marginal,
)
from pyro_recursive.evaluation.search import Search

X = torch.linspace(-1.0, 2.0, 8, dtype=torch.float64)


def latent(x: Tensor) -> None:
    z = pyro.sample("z", dist.Normal(torch.zeros(len(x)), 1.0))
    pyro.sample("x", dist.Normal(z, 1.0).to_event(1), obs=x)


def observed(x: Tensor) -> None:
    z = pyro.sample("z", dist.Normal(0.0, 1.0))
    pyro.sample("x", dist.Normal(z, 1.0), obs=x)


def beside_a_plate(x: Tensor) -> None:
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Normal(torch.zeros(3, 1), 1.0))
        pyro.sample("x", dist.Normal(z.sum(-2), 1.0), obs=x)


def masked(x: Tensor) -> None:
    with pyro.poutine.mask(mask=x > 0):
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
    pyro.sample("x", dist.Normal(z, 1.0).expand([len(x)]).to_event(1), obs=x)


def column(x: Tensor) -> Tensor:
    return x[:, None]


def encoded(model: Callable) -> AmortizedGuide:
    return AmortizedGuide(model, nn.Linear(1, 2), inputs=column)


GUIDES: dict[str, Callable] = {
    "joint": AmortizedGuide,
    "full": partial(AmortizedGuide, family="full"),
    "table": partial(AmortizedGuide, plate="data"),
    "encoder": encoded,
    "mixture": lambda model: MixtureGuide(model, 2),
    "recursive": lambda model: RecursiveMixtureGuide(model, 2),
    "flow": FlowGuide,
    "refined": lambda model: SemiAmortizedGuide(model, encoded(model)),
    "mixture of Pyro's": lambda model: MixtureGuide(model, [AutoNormal(model), AutoNormal(model)]),
}
LOSSES = [
    *(Trace_ELBO(), TraceGraph_ELBO(), TraceMeanField_ELBO()),
    Trace_ELBO(3, vectorize_particles=True, max_plate_nesting=1),
    *(IWAE_ELBO(1), IWAE_ELBO(4), IWAE_ELBO(4, vectorize_particles=False), PIWAE_ELBO(2, 2)),
]


def losses_of(kind: str) -> list[Any]:
    mixtures = [Stratified_ELBO(2)] if "mixture" in kind or kind == "recursive" else []
    return [*LOSSES, *mixtures, *([RecursiveMixture_ELBO(2)] if kind == "recursive" else [])]


@pytest.mark.parametrize("validates", [True, False])
@pytest.mark.parametrize("model", [latent, beside_a_plate, masked])
@pytest.mark.parametrize("kind", GUIDES)
def test_a_batch_of_latents_without_a_plate_is_told_first(
    kind: str, model: Callable, validates: bool
) -> None:
    number, message = (-2, r"\(3, [18]\)") if model is beside_a_plate else (-1, r"\(8,\)")
    message = rf"Site 'z' has batch shape {message}, and dim {number} belongs to no plate: use py"
    with pyro.validation_enabled(validates):
        for loss in losses_of(kind):
            with pytest.raises(ValueError, match=message):
                loss.loss(model, GUIDES[kind](model), X)
        with pytest.raises(ValueError, match=message):
            log_marginal(model, GUIDES[kind](model), X, num_particles=2)
    assert not list(pyro.get_param_store())


@pytest.mark.parametrize("kind", ["joint", "mixture", "flow", "encoder"])
def test_a_batch_of_data_without_a_plate_is_told_first(kind: str) -> None:
    for loss in LOSSES:
        with pytest.raises(
            ValueError, match=r"Site 'x' has batch shape \(8,\), and dim -1 belongs"
        ):
            loss.loss(observed, GUIDES[kind](observed), X)


def test_data_without_a_plate_are_summed_without_validation() -> None:
    """By Pyro's loss, as for its own guides; at the posterior N(sum x / 9, 1 / 9), log p(x)."""
    guide, count = AmortizedGuide(observed), len(X) + 1
    exact = dist.MultivariateNormal(torch.zeros(8), torch.eye(8) + 1.0).log_prob(X)
    with pyro.validation_enabled(False):
        guide.prepare(X)
        guide.free_global.data[:] = torch.stack([X.sum() / count, torch.tensor(count**-0.5).log()])
        assert Trace_ELBO().loss(observed, guide, X) == pytest.approx(-exact.item())


# --- Sizes that change


def rows(x: Tensor) -> None:
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        pyro.sample("x", dist.Normal(z, 1.0), obs=x)


def groups(x: Tensor) -> None:
    """Two groups, whatever the rows."""
    with pyro.plate("groups", 2):
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
    with pyro.plate("data", len(x)):
        pyro.sample("x", dist.Normal(z.sum(-1, keepdim=True), 1.0), obs=x)


def of_number(size: int) -> None:
    with pyro.plate("data", size):
        pyro.sample("z", dist.Normal(0.0, 1.0))


@pytest.mark.parametrize("kind", ["joint", "full", "mixture", "recursive", "flow"])
def test_joint_guides_keep_their_size(kind: str) -> None:
    guide = GUIDES[kind](rows)
    guide(X[:3])
    message = "Plate 'data' has 5 entries now, and .* has one distribution for 3. Make a new guide"
    message += (
        r"|Plate 'data' has \d of 5 entries in the model and 3 of 3 in the guide, at site 'z': m"
    )
    for loss in (Trace_ELBO(), IWAE_ELBO(2), IWAE_ELBO(2, vectorize_particles=False)):
        with pytest.raises(ValueError, match=message):
            loss.loss(rows, guide, X[:5])
    assert guide(X[:3])["z"].shape == (3,)


def test_sizes_of_other_arguments_are_told_by_the_loss() -> None:
    guide = AmortizedGuide(of_number)
    guide(3)
    with pytest.raises(ValueError, match=r"in the model and 3 of 3 in the guide.*make a new guide"):
        IWAE_ELBO(2).loss(of_number, guide, 5)


def test_plates_of_other_things_keep_their_size() -> None:
    for kind in ("joint", "mixture", "flow"):
        guide = GUIDES[kind](groups)
        for x in (X[:2], X, X[:5]):
            assert IWAE_ELBO(2, estimator="vimco").loss(groups, guide, x) > 0
            assert guide(x)["z"].shape == (2,)


@pytest.mark.slow
def test_encoders_follow() -> None:
    """At the exact posteriors any loss is the exact one."""

    class Posterior(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return torch.cat([x / 2, torch.full_like(x, 0.5).log() / 2], -1)

    made: list[Any] = [AmortizedGuide(rows, Posterior(), inputs=column)]
    made.append(MixtureGuide(rows, [AmortizedGuide(rows, Posterior(), inputs=column)], name="m"))
    made.append(SemiAmortizedGuide(rows, AmortizedGuide(rows, Posterior(), inputs=column)))
    for guide in made:
        for x in (X[:3], X, X[:1]):
            exact = dist.Normal(0.0, 2**0.5).log_prob(x)
            for loss in (Trace_ELBO(), IWAE_ELBO(3)):
                assert loss.loss(rows, guide, x) == pytest.approx(-exact.sum().item(), rel=1e-6)
            found = log_marginal(rows, guide, x, num_particles=3)
            torch.testing.assert_close(found, exact, rtol=1e-6, atol=1e-6)
        found = gaps(rows, guide, X[:5], num_particles=10, search=Search(steps=1)).elbo
        exact = dist.Normal(0.0, 2**0.5).log_prob(X[:5])
        torch.testing.assert_close(found, exact, rtol=1e-6, atol=1e-6)


def test_plates_of_a_guide_have_the_device_of_the_model() -> None:
    def elsewhere(x: Tensor) -> None:
        with pyro.plate("data", 8, dim=-1, device="meta"):
            pyro.sample("z", dist.Normal(0.0, 1.0))

    index = pyro.poutine.trace(AmortizedGuide(elsewhere)).get_trace(X).nodes["data"]["value"]
    assert index.is_meta and index.shape == (8,)
