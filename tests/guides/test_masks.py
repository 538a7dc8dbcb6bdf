"""What masked entries of latents matter to, found out in each call."""

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

from pyro_recursive import IWAE_ELBO, AmortizedGuide

SEEN = torch.tensor([True, False, True, True, False, True])
ALL = torch.ones(6, dtype=torch.bool)
NOISE = 0.7


def data() -> Tensor:
    return torch.tensor([0.4, -1.7, 1.2, 0.3, 2.2, -0.6])


def model(x: Tensor, of_latent: Tensor | None, of_data: Tensor = ALL) -> None:
    with pyro.plate("data", len(x)):
        with poutine.mask(mask=ALL if of_latent is None else of_latent):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
        with poutine.mask(mask=of_data):
            pyro.sample("x", dist.Normal(z, NOISE), obs=x)


def posterior(x: Tensor, seen: Tensor) -> tuple[Tensor, Tensor]:
    """Return its means and scales, under a flat prior where a row is not seen."""
    precision = seen + NOISE**-2
    return x * NOISE**-2 / precision, precision.rsqrt()


def log_evidence(x: Tensor, seen: Tensor) -> Tensor:
    """Return log p(x) of each row; of those not seen 0, under a flat prior or masked data."""
    return torch.where(seen, dist.Normal(0.0, (1 + NOISE**2) ** 0.5).log_prob(x), 0.0)


class Posterior(nn.Module):
    """The exact parameters of each row: those of the latents that matter."""

    def forward(self, x: Tensor) -> Tensor:
        loc, scale = posterior(x, SEEN)
        return torch.stack([loc, scale.log()], -1)


def by_hand(x: Tensor, *masks: Tensor) -> None:
    loc, scale = posterior(x, SEEN)
    with pyro.plate("data", len(x)):
        pyro.sample("z", dist.Normal(loc, scale))


GUIDES: dict[str, Callable[[], Any]] = {
    "encoder": lambda: AmortizedGuide(model, Posterior()),
    "by hand": lambda: by_hand,
}
OF_DATA = {"unused": SEEN, "used": ALL}
ORDERS = [("unused", "used", "unused"), ("used", "unused", "used")]


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("name", GUIDES)
def test_masked_data_of_each_call(name: str, order: tuple[str, ...]) -> None:
    """With arguments of one form the same entries may have a flat prior, or no influence."""
    guide, x = GUIDES[name](), data()
    exact = -log_evidence(x, SEEN).sum().item()
    losses = [IWAE_ELBO(3), IWAE_ELBO(3, vectorize_particles=False), IWAE_ELBO(1)]
    if name == "encoder":
        losses.append(Trace_ELBO())
    for loss in losses:
        for role in order:
            found = loss.loss(model, guide, x, SEEN, OF_DATA[role])
            assert found == pytest.approx(exact, abs=1e-9), role


@pytest.mark.parametrize("name", GUIDES)
def test_masked_data_in_inference_mode(name: str) -> None:
    guide = GUIDES[name]()
    for role in ("used", "unused", "used"):
        with torch.inference_mode():
            x, seen, of_data = data(), SEEN.clone(), OF_DATA[role].clone()
            found = IWAE_ELBO(2).loss(model, guide, x, seen, of_data)
        assert found == pytest.approx(-log_evidence(data(), SEEN).sum().item(), abs=1e-9)


@pytest.mark.parametrize("flat", [True, False])
@pytest.mark.parametrize("vectorize", [True, False])
def test_minibatch_drawn_in_the_model(flat: bool, vectorize: bool) -> None:
    """Two rows of 14 are masked: what they enter is found out on the minibatch of the run."""
    x = torch.linspace(-2.0, 2.5, 14)
    seen = torch.ones(14, dtype=torch.bool)
    seen[[3, 8]] = False
    batches = []

    def subsampled(x: Tensor) -> None:
        with pyro.plate("data", 14, subsample_size=4) as index:
            batches.append(index)
            model(x[index], seen[index], ALL[:1] if flat else seen[index])

    def model(x: Tensor, of_latent: Tensor, of_data: Tensor) -> None:
        with poutine.mask(mask=of_latent):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
        with poutine.mask(mask=of_data):
            pyro.sample("x", dist.Normal(z, NOISE), obs=x)

    guide = AutoNormal(subsampled)
    guide(x)
    loc, scale = posterior(x, seen)
    with torch.no_grad():
        guide.locs.z.copy_(loc)
        guide.scales.z = scale
    loss, with_masked = IWAE_ELBO(2, vectorize_particles=vectorize), 0
    for _ in range(25):
        found = loss.loss(subsampled, guide, x)
        batch = batches[-1]
        exact = -14 / 4 * log_evidence(x[batch], seen[batch]).sum().item()
        assert found == pytest.approx(exact, abs=1e-9)
        with_masked += not seen[batch].all()
    assert 3 < with_masked < 22


def test_random_masks_are_refused() -> None:
    """Another run masks nothing, and shows nothing of the masked entries."""
    masks = [SEEN, ALL]  # the structure run has the last

    def changing(x: Tensor) -> None:
        model(x, masks.pop() if masks else ALL, SEEN)

    with pytest.raises(ValueError, match="'z' has another mask in each run"):
        IWAE_ELBO(1).loss(changing, by_hand, data())


def test_a_first_call_that_fails_leaves_nothing() -> None:
    """After it, calls without masks do not read any."""
    runs = []

    class Failing(Posterior):
        fails = True

        def forward(self, x: Tensor) -> Tensor:
            if self.fails:
                raise RuntimeError("no rows")
            return super().forward(x)

    def counted(x: Tensor, mask: Tensor | None = None) -> None:
        runs.append(mask)
        with pyro.plate("data", len(x)), poutine.mask(mask=True if mask is None else mask):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("x", dist.Normal(z, NOISE), obs=x)

    guide, x = AmortizedGuide(counted, Failing()), data()
    with pytest.raises(RuntimeError, match="no rows"):
        guide(x, SEEN)
    guide.encoder.fails = False
    guide(x)
    runs.clear()
    guide(x)
    assert not runs
    exact = -log_evidence(x, SEEN).sum().item()
    assert Trace_ELBO().loss(counted, guide, x, SEEN) == pytest.approx(exact, abs=1e-9)
