"""What the guides and their losses refuse, each with a remedy."""

from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer import autoguide
from torch import Tensor, nn

from pyro_recursive import (
    AmortizedGuide,
    MixtureGuide,
    RecursiveMixture_ELBO,
    RecursiveMixtureGuide,
    Stratified_ELBO,
)
from tests import models
from tests.models.guides import Encoder, quiet


def encoded(n: int = 2, **options: Any) -> AmortizedGuide:
    return AmortizedGuide(models.local, Encoder(1, n), **options)


def stopped(x: Tensor) -> None:
    """A guide that lacks a site."""


REFUSED = {
    "encoder_size": (
        lambda x: encoded(3)(x),
        ValueError,
        r"encoder returned shape \(4, 3\).*\['z'\] in plate 'data' need \(4, 2\).*inputs=",
    ),
    "linear_weights": (
        lambda x: MixtureGuide(models.local, [encoded(), encoded()])(x),
        ValueError,
        "weights='linear' needs inputs that are one tensor.*weights='shared'",
    ),
    "linear_weights_of_a_dict": (
        lambda x: MixtureGuide(
            models.local,
            [encoded(inputs=lambda x: {"x": x}), encoded()],
            weights="linear",
        )(x),
        ValueError,
        "weights='linear' needs inputs that are one tensor",
    ),
    "unknown_weights": (
        lambda x: MixtureGuide(models.local, 2, weights="best"),
        ValueError,
        "weights must be one of",
    ),
    "unknown_family": (
        lambda x: AmortizedGuide(models.local, family="banana"),
        ValueError,
        r"family must be one of .*LowRank\(2\)",
    ),
    "unknown_plate": (
        lambda x: AmortizedGuide(models.local, plate="rows")(x),
        ValueError,
        r"No latent site is inside a vectorised plate 'rows'; those of the latents are \['data'\]",
    ),
    "no_components": (
        lambda x: MixtureGuide(models.local, []),
        ValueError,
        "at least one component",
    ),
    "nested_mixture": (
        lambda x: MixtureGuide(models.local, [MixtureGuide(models.local, 2), encoded()]),
        ValueError,
        "cannot be a component of a mixture",
    ),
    "auto_delta": (
        lambda x: MixtureGuide(models.local, [autoguide.AutoDelta(models.local)] * 2)(x),
        NotImplementedError,
        "AutoDelta, does not sample site 'z'.*Use AmortizedGuide",
    ),
    "missing_site": (
        lambda x: MixtureGuide(models.local, [stopped, models.local_guide])(x),
        ValueError,
        r"stopped, does not sample \['z'\]",
    ),
    "other_sites": (
        lambda x: MixtureGuide(
            models.hierarchy,
            [autoguide.AutoDiagonalNormal(models.hierarchy), encoded_hierarchy()],
            weights="shared",
        )(x),
        ValueError,
        "AutoDiagonalNormal has one joint density over .*leave out plate=",
    ),
    "explicit_subsample": (
        lambda x: AmortizedGuide(models.subsampled, plate="data")(x, torch.tensor([0, 2])),
        ValueError,
        r"is given the minibatch of plate 'data' \(subsample=\).*create_plates=",
    ),
    "not_a_mixture": (
        lambda x: Stratified_ELBO(2).loss(models.local, encoded(), x),
        TypeError,
        "needs a mixture guide.*got AmortizedGuide",
    ),
    "not_recursive": (
        lambda x: RecursiveMixture_ELBO(2).loss_and_grads(
            models.local, MixtureGuide(models.local, 2), x
        ),
        TypeError,
        "needs a RecursiveMixtureGuide, got MixtureGuide",
    ),
    "recursive_by_hand": (
        lambda x: RecursiveMixtureGuide(models.local, [encoded(), models.local_guide]),
        TypeError,
        "must be AmortizedGuide or FlowGuide",
    ),
    "recursive_of_one": (
        lambda x: RecursiveMixtureGuide(models.local, 1),
        ValueError,
        "at least 2 components, got 1",
    ),
}


def encoded_hierarchy() -> AmortizedGuide:
    return AmortizedGuide(models.hierarchy, Encoder(1, 2))


@pytest.mark.parametrize("name", REFUSED)
def test_refused_with_a_remedy(name: str) -> None:
    run, error, message = REFUSED[name]
    with pytest.raises(error, match=message), quiet():
        run(models.data())


def test_bounds_of_their_own_in_each_row_are_refused() -> None:
    def model(x: Tensor, high: Tensor) -> None:
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Uniform(torch.zeros(()), high))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x[:, 0])

    x = torch.randn(4, 1)
    with pytest.raises(NotImplementedError, match="'z' has bounds of its own in each row"):
        AmortizedGuide(model, nn.Linear(1, 2))(x, torch.arange(1.0, 5.0))
    assert AmortizedGuide(model, nn.Linear(1, 2), name="b")(x, torch.ones(4))["z"].shape == (4,)
