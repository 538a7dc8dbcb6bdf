"""`median` and `quantiles` of Gaussian guides, as Pyro's autoguides have them."""

from collections.abc import Callable
from functools import partial

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer.autoguide import AutoDiagonalNormal
from torch import Tensor
from torch.distributions import AffineTransform, constraints

from pyro_recursive import AmortizedGuide, FlowGuide, MixtureGuide, SemiAmortizedGuide
from pyro_recursive.guides.gaussian_families import LowRank

LEVELS = [0.05, 0.3, 0.5, 0.9]


class Below(dist.TransformedDistribution):
    """Values below 2; torch takes the support of an affine map for the real line."""

    support = constraints.less_than(2.0)


def model(x: Tensor) -> None:
    """Supports of every direction, inside and outside of a plate, and an inner plate."""
    pyro.sample("real", dist.Normal(0.0, 1.0))
    pyro.sample("below", Below(dist.LogNormal(0.0, 1.0), AffineTransform(2.0, -1.0)))
    pyro.sample("share", dist.Dirichlet(torch.ones(3)))
    with pyro.plate("data", len(x)):
        pyro.sample("positive", dist.Gamma(2.0, 1.0))
        with pyro.plate("copies", 2, dim=-2):
            unit = pyro.sample("unit", dist.Beta(2.0, 2.0))
        pyro.sample("x", dist.Normal(unit.sum(-2), 1.0), obs=x)


MAKE: dict[str, Callable] = {
    "joint": AmortizedGuide,
    "full": partial(AmortizedGuide, family="full"),
    "low rank": partial(AmortizedGuide, family=LowRank(1)),
    "rows": partial(AmortizedGuide, plate="data"),
}
X = torch.tensor([0.1, 0.7, -0.4], dtype=torch.float64)


@pytest.mark.parametrize("kind", MAKE)
def test_quantiles_are_those_of_draws(kind: str) -> None:
    guide = MAKE[kind](model, init_scale=0.8)
    guide.prepare(X)
    with torch.no_grad():
        for parameter in guide.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    found, draws = guide.quantiles(LEVELS, X), 4000
    with pyro.plate("draws", draws, dim=-3):
        sampled = guide(X)
    assert found.keys() == sampled.keys() == guide(X).keys()
    for name, value in guide(X).items():
        assert found[name].shape == (len(LEVELS), *value.shape)
        if name == "share":  # of its coordinates, not of itself
            continue
        flat = sampled[name].reshape(draws, -1)
        for level, quantile in zip(LEVELS, found[name], strict=True):
            share = (flat <= quantile.reshape(-1)).double().mean(0)
            error = (level * (1 - level) / draws) ** 0.5
            assert ((share - level).abs() < 4.5 * error).all(), name
    assert all(torch.equal(found[name][2], value) for name, value in guide.median(X).items())


def test_medians_are_pyros() -> None:
    ours, theirs = AmortizedGuide(model), AutoDiagonalNormal(model)
    ours(X), theirs(X)
    own = [slot.name for slot in ours.groups[0].slots]
    assert own == list(theirs.median(X))
    theirs.loc.data.copy_(ours.free_global[: len(theirs.loc)])
    for name, value in theirs.median(X).items():
        torch.testing.assert_close(ours.median(X)[name], value)


def test_others_have_none_in_closed_form() -> None:
    table = AmortizedGuide(model, plate="data")
    for guide in (MixtureGuide(model, 2), FlowGuide(model), SemiAmortizedGuide(model, table)):
        with pytest.raises(NotImplementedError, match="no quantiles in closed form"):
            guide.median(X)


def test_quantiles_zero_and_one_are_the_ends_of_supports() -> None:
    """Also where the model's supports are those of a call."""

    def bounded(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Uniform(x, x + 2.0))

    guide = AmortizedGuide(bounded)
    found = guide.quantiles(iter([0.0, 0.5, 1.0]), X)["z"]
    torch.testing.assert_close(found[0], X)
    torch.testing.assert_close(found[2], X + 2.0)
    assert ((found[0] < found[1]) & (found[1] < found[2])).all()


@pytest.mark.parametrize("bound", ["later block", "own block"])
def test_bounds_that_depend_on_other_latents_are_refused(bound: str) -> None:
    def bounded(x: Tensor) -> None:
        scale = pyro.sample("scale", dist.Gamma(1.0, 1.0))
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Uniform(0.0, scale))

    guide = AmortizedGuide(bounded, plate="data" if bound == "later block" else None)
    with pytest.raises(NotImplementedError, match=r"bounds of latent site 'z' depend on other"):
        guide.median(X)


@pytest.mark.parametrize("kind", ["table", "encoder"])
def test_quantiles_are_of_all_rows(kind: str) -> None:
    """Where the model subsamples; the call leaves random state and buffers as they were."""
    x = torch.arange(10.0)[:, None]

    def subsampled(x: Tensor) -> None:
        scale = pyro.sample("scale", dist.Uniform(0.0, x.max()))  # bounds that each call reads
        with pyro.plate("data", 10, subsample_size=3) as rows:
            z = pyro.sample("z", dist.Normal(0.0, scale))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x[rows, 0])

    encoder = torch.nn.Sequential(torch.nn.Linear(1, 2), torch.nn.BatchNorm1d(2))
    options = {"encoder": encoder} if kind == "encoder" else {"plate": "data"}
    guide = AmortizedGuide(subsampled, **options)
    guide.prepare(x)
    if kind == "table":
        guide.free_local.data[:, 0] = x[:, 0]
    state, buffer = torch.get_rng_state(), encoder[1].running_mean.clone()
    found = guide.median(x)["z"]
    torch.testing.assert_close(found, x[:, 0] if kind == "table" else encoder(x)[:, 0])
    encoder[1].running_mean.copy_(buffer)
    assert torch.equal(guide.median(x)["z"], found)
    assert torch.equal(encoder[1].running_mean, buffer)
    assert torch.equal(torch.get_rng_state(), state)


def test_minibatches_with_bounds_of_their_own_are_refused() -> None:
    def subsampled(x: Tensor) -> None:
        with pyro.plate("data", 3, subsample_size=2) as rows:
            pyro.sample("z", dist.Uniform(x[rows], x[rows] + 1.0))

    with pytest.raises(NotImplementedError, match="one minibatch at a time"):
        AmortizedGuide(subsampled, plate="data").median(X)


def test_observed_sites_have_no_quantiles() -> None:
    def labelled(x: Tensor, y: Tensor | None = None) -> None:
        with pyro.plate("data", len(x)):
            pyro.sample(
                "x", dist.Normal(pyro.sample("y", dist.Normal(0.0, 1.0), obs=y), 1.0), obs=x
            )
            pyro.sample("z", dist.Normal(0.0, 1.0))

    guide = AmortizedGuide(labelled)
    assert guide.median(X).keys() == {"y", "z"}
    assert guide.median(X, X).keys() == {"z"}


def test_a_guide_is_read_beside_another_of_its_name() -> None:
    """Its parameters are its own, although Pyro's store has those of the other."""

    def model() -> None:
        pyro.sample("z", dist.Normal(0.0, 1.0))

    first = AmortizedGuide(model)
    first()
    expected = first.median()["z"]
    pyro.clear_param_store()
    second = AmortizedGuide(model)
    second()
    with torch.no_grad():
        for parameter in second.parameters():
            parameter.add_(1.0)
    torch.testing.assert_close(first.median()["z"], expected)
    torch.testing.assert_close(second.median()["z"], expected + 1)
