"""What the counts of all losses mean, and what is printed."""

from collections.abc import Callable

import pytest
import torch
from pyro import poutine
from pyro.infer.autoguide import AutoNormal

from pyro_recursive import MixtureGuide, MultiSampleELBO, RecursiveMixtureGuide, Schedule, bounds
from tests.models.losses import LOSSES, OF_MIXTURES
from tests.models.small import normal_rows

M, K, COMPONENTS = 2, 4, 3
X = torch.tensor([0.5, -1.0])


def guide_of(name: str) -> Callable:
    if name == "RecursiveMixture_ELBO":
        schedule = Schedule(first=1, propose=1, refine=1)
        return RecursiveMixtureGuide(normal_rows, COMPONENTS, schedule=schedule)
    if name in OF_MIXTURES:
        return MixtureGuide(normal_rows, COMPONENTS, plate="data")
    return AutoNormal(normal_rows)


@pytest.mark.parametrize("name", [*LOSSES, *OF_MIXTURES])
def test_counts_mean_the_same_everywhere(name: str) -> None:
    """M * K samples run, of each component where the guide is a mixture."""
    guide, counts = guide_of(name), []
    loss = (LOSSES | OF_MIXTURES)[name](M, K)
    assert (loss.num_estimates, loss.num_particles) == (M, K)
    loss.loss(normal_rows, guide, X)  # the guide's first call, and the structure

    def model(x: torch.Tensor) -> None:
        with poutine.trace() as seen:
            normal_rows(x)
        counts.append(seen.trace.nodes["z"]["value"].numel() // len(x))

    loss.loss(model, guide, X)
    members = len(guide.members) if name in OF_MIXTURES else 1
    assert counts[-1] == M * K * members
    assert f"num_estimates={M}, num_particles={K}, estimator=" in repr(loss)


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
