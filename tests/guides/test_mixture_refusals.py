"""What mixtures refuse because it would be ignored, or would move what should be held."""

import pyro
import pyro.distributions as dist
import pytest
import torch
from torch import Tensor, nn

from pyro_recursive import (
    AmortizedGuide,
    FlowGuide,
    MixtureGuide,
    RecursiveMixture_ELBO,
    RecursiveMixtureGuide,
    Schedule,
)
from pyro_recursive.bounds.mixture_objectives import gain


def rows(x: Tensor) -> None:
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Normal(0.0, 2.0))
        pyro.sample("x", dist.Normal(z**2, 1.0), obs=x[:, 0])


def test_components_must_not_share_parameters() -> None:
    body, heads = nn.Linear(2, 4), [nn.Linear(4, 2) for _ in range(2)]
    shared = [AmortizedGuide(rows, nn.Sequential(body, head)) for head in heads]
    with pytest.raises(ValueError, match=r"share parameter 'encoder.0.weight'.*trunk="):
        RecursiveMixtureGuide(rows, shared)
    apart = [AmortizedGuide(rows, head) for head in heads]
    with pytest.raises(ValueError, match=r"share parameter '0.weight'"):
        RecursiveMixtureGuide(rows, apart, weights=nn.Sequential(heads[0], nn.Linear(2, 1)))
    apart = [AmortizedGuide(rows, nn.Linear(4, 2)) for _ in range(2)]
    RecursiveMixtureGuide(rows, apart, trunk=body)(torch.randn(3, 2))


def test_a_component_has_the_inputs_and_the_plate_of_the_mixture() -> None:
    one = AmortizedGuide(rows, nn.Linear(2, 2))
    other = AmortizedGuide(rows, nn.Linear(2, 2), inputs=lambda x: -x)
    with pytest.raises(ValueError, match="A component has inputs= of its own"):
        MixtureGuide(rows, [one, other], weights="shared")(torch.randn(3, 2))
    alike = [AmortizedGuide(rows, nn.Linear(1, 2), inputs=lambda x: x[:, :1]) for _ in range(2)]
    MixtureGuide(rows, alike, weights="shared")(torch.randn(3, 2))
    both = [AmortizedGuide(rows, plate="data") for _ in range(2)]
    with pytest.raises(ValueError, match="A component has plate='data', and the mixture has none"):
        MixtureGuide(rows, both)(torch.randn(3, 2))
    MixtureGuide(rows, both, plate="data")(torch.randn(3, 2))


def test_a_flow_without_an_encoder_has_no_rows() -> None:
    flows = [FlowGuide(rows) for _ in range(2)]
    with pytest.raises(ValueError, match="A flow for each row of plate 'data' needs an encoder="):
        MixtureGuide(rows, flows, plate="data")(torch.randn(3, 2))


def test_one_joint_posterior_can_have_a_holdout() -> None:
    """There are no rows whose spread could count."""

    def model(x: Tensor) -> None:
        z = pyro.sample("z", dist.Normal(0.0, 3.0))
        with pyro.plate("data", len(x)):
            pyro.sample("x", dist.Normal(z**2, 1.0), obs=x)

    x = torch.tensor([4.0, 4.2])
    guide = RecursiveMixtureGuide(model, 2, schedule=Schedule(first=1, propose=1, refine=1))
    guide.prepare(x)
    guide.end_stage(), guide.end_stage()
    found = RecursiveMixture_ELBO(2, holdout=(x,)).gain(model, guide, x)
    assert 0 < found.standard_error < torch.inf
    draws = torch.randn(40, 2, 1)
    args = (draws, draws - 1, draws - 2, draws - 3, torch.tensor([[0.5, 0.5]]).log())
    assert gain(*args, rows_are_a_sample=True) == gain(*args)


def test_all_rows_in_another_order_have_their_own_parameters() -> None:
    def shuffled(x: Tensor, rows: Tensor) -> None:
        with plate(x, rows):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x[rows])

    def plate(x: Tensor, rows: Tensor) -> pyro.plate:
        return pyro.plate("data", len(x), subsample=rows)

    guide = AmortizedGuide(shuffled, plate="data", create_plates=plate)
    x, order = torch.zeros(4), torch.tensor([2, 0, 3, 1])
    guide.prepare(x, order)
    numbers = torch.stack([torch.arange(4.0), torch.full((4,), -30.0)], -1)
    guide.free_local.data.copy_(numbers)
    torch.testing.assert_close(guide(x, order)["z"].detach(), order.to(x))
