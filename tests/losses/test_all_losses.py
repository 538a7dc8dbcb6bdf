"""One table of all losses: what the counts mean, what is printed, and that nothing is kept."""

import inspect
import pickle
from collections.abc import Callable
from functools import partial

import pyro
import pytest
import torch
from pyro import poutine
from pyro.infer import ELBO
from pyro.infer.autoguide import AutoNormal

import pyro_recursive
from pyro_recursive import (
    CIWAE_ELBO,
    IWAE_ELBO,
    MAPA_ELBO,
    MISELBO,
    MIWAE_ELBO,
    PIWAE_ELBO,
    SIWAE_ELBO,
    MixtureGuide,
    MultiSampleELBO,
    RecursiveMixture_ELBO,
    RecursiveMixtureGuide,
    Schedule,
    Stratified_ELBO,
    bounds,
)
from pyro_recursive.losses.base import LogWeightELBO
from tests.models.small import normal_rows

M, K, COMPONENTS = 2, 4, 3
X = torch.tensor([0.5, -1.0])

# Each loss with M estimates of K samples.
LOSSES: dict[type[ELBO], Callable[[], LogWeightELBO]] = {
    MultiSampleELBO: partial(MultiSampleELBO, bounds.renyi(0.5), num_estimates=M, num_particles=K),
    IWAE_ELBO: partial(IWAE_ELBO, K, num_estimates=M),
    MIWAE_ELBO: partial(MIWAE_ELBO, M, K),
    PIWAE_ELBO: partial(PIWAE_ELBO, M, K),
    CIWAE_ELBO: partial(CIWAE_ELBO, K, num_estimates=M),
    MISELBO: partial(MISELBO, K, num_estimates=M),
    SIWAE_ELBO: partial(SIWAE_ELBO, K, num_estimates=M),
    Stratified_ELBO: partial(Stratified_ELBO, K, num_estimates=M),
    RecursiveMixture_ELBO: partial(RecursiveMixture_ELBO, K, num_estimates=M),
}
OF_MIXTURES = (MISELBO, SIWAE_ELBO, Stratified_ELBO, RecursiveMixture_ELBO)
KINDS = list(LOSSES)


def guide_of(kind: type[ELBO]) -> Callable:
    if kind is RecursiveMixture_ELBO:
        schedule = Schedule(first=1, propose=1, refine=1)
        return RecursiveMixtureGuide(normal_rows, COMPONENTS, schedule=schedule)
    if kind in OF_MIXTURES:
        return MixtureGuide(normal_rows, COMPONENTS, plate="data")
    return AutoNormal(normal_rows)


def test_the_table_has_every_loss() -> None:
    public = {getattr(pyro_recursive, name) for name in pyro_recursive.__all__}
    losses = {one for one in public if inspect.isclass(one) and issubclass(one, ELBO)}
    assert losses - set(LOSSES) == {MAPA_ELBO}  # which has one sample


@pytest.mark.parametrize("kind", KINDS)
def test_counts_mean_the_same_everywhere(kind: type[ELBO]) -> None:
    """M * K samples run, of each component where the guide is a mixture."""
    loss, guide, counts = LOSSES[kind](), guide_of(kind), []
    assert (loss.num_estimates, loss.num_particles) == (M, K)
    loss.loss(normal_rows, guide, X)  # the guide's first call, and the structure

    def model(x: torch.Tensor) -> None:
        with poutine.trace() as seen:
            normal_rows(x)
        counts.append(seen.trace.nodes["z"]["value"].numel() // len(x))

    loss.loss(model, guide, X)
    members = len(guide.members) if kind in OF_MIXTURES else 1
    assert counts[-1] == M * K * members
    assert f"num_estimates={M}, num_particles={K}, estimator=" in repr(loss)


@pytest.mark.parametrize("kind", KINDS)
def test_losses_keep_nothing_from_a_call(kind: type[ELBO]) -> None:
    loss, guide = LOSSES[kind](), guide_of(kind)
    before = pickle.dumps(loss)
    for _ in range(2):
        loss.loss_and_grads(normal_rows, guide, X)
        pyro.clear_param_store()
    assert pickle.dumps(loss) == before


@pytest.mark.parametrize(
    ("bound", "text"),
    [
        (bounds.iwae, "iwae"),
        (bounds.elbo, "elbo"),
        (bounds.renyi(0.5), "renyi(0.5)"),
        (bounds.ciwae(0.25), "ciwae(0.25)"),
        (bounds.jackknife, "jackknife"),
        (bounds.piwae, "Split(model_bound=Pooled(bound=iwae), guide_bound=iwae)"),
        (bounds.PowerMeans(((0.5, 0.0), (0.5, 0.5))), "PowerMeans(((0.5, 0.0), (0.5, 0.5)))"),
    ],
)
def test_a_loss_prints_its_bound(bound: bounds.Bound, text: str) -> None:
    loss = MultiSampleELBO(bound, num_particles=2)
    assert repr(loss).startswith(f"MultiSampleELBO(bound={text}, num_estimates=1")
