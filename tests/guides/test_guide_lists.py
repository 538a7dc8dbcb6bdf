"""Guides of the package as parts of Pyro's AutoGuideList, which makes the plates of all."""

from collections.abc import Callable
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.infer import SVI, Predictive, Trace_ELBO, TraceEnum_ELBO
from pyro.infer.autoguide import AutoDelta, AutoDiscreteParallel, AutoGuideList, AutoNormal
from torch import Tensor, nn

from pyro_recursive import (
    IWAE_ELBO,
    AmortizedGuide,
    FlowGuide,
    MixtureGuide,
    RecursiveMixtureGuide,
    SemiAmortizedGuide,
    log_marginal,
)

X = torch.tensor([[1.5], [-0.3], [0.8], [2.4], [-1.1]], dtype=torch.float64)


def model(x: Tensor) -> None:
    """g ~ N(0, 1), w ~ N(0, 1); z_i ~ N(g, 1), x_i ~ N(z_i + w, 1)."""
    g = pyro.sample("g", dist.Normal(0.0, 1.0))
    w = pyro.sample("w", dist.Normal(0.0, 1.0))
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Normal(g, 1.0))
        pyro.sample("x", dist.Normal(z + w, 1.0), obs=x[:, 0])


def of(*latents: str) -> Callable:
    """Return the model with these latents alone, and its data."""
    hidden = [name for name in ("g", "w", "z") if name not in latents]
    return poutine.block(model, hide=hidden)


class Posterior(nn.Module):
    """The exact posterior of z_i given both globals: N((g + x_i - w) / 2, 1 / 2)."""

    def __init__(self, g: float, w: float) -> None:
        super().__init__()
        self.shift = g - w
        self.scale = nn.Parameter(torch.tensor(0.5**0.5))

    def forward(self, x: Tensor) -> Tensor:
        loc = (x[..., 0] + self.shift) / 2
        return torch.stack([loc, self.scale.log().expand_as(loc)], -1)


def globals_at(g: float, w: float) -> AutoDelta:
    at = {"g": torch.tensor(g), "w": torch.tensor(w)}
    return AutoDelta(of("g", "w"), init_loc_fn=lambda site: at[site["name"]])


def local_part(g: float, w: float) -> AmortizedGuide:
    return AmortizedGuide(of("z"), Posterior(g, w), plate="data")


def listed(*parts: Any, create_plates: Any = None) -> AutoGuideList:
    guide = AutoGuideList(model, create_plates=create_plates)
    for part in parts:
        guide.append(part)
    return guide


def exact(g: float, w: float, x: Tensor = X) -> Tensor:
    """log p(g, w) + sum_i log p(x_i | g, w): the bound at a point mass and exact posteriors."""
    prior = dist.Normal(0.0, 1.0).log_prob(torch.tensor([g, w])).sum()
    return prior + dist.Normal(g + w, 2**0.5).log_prob(x[:, 0]).sum()


@pytest.mark.filterwarnings("ignore:Plate 'data' encloses latent site 'z' but not 'g'")
@pytest.mark.parametrize("in_order", [True, False])
@pytest.mark.parametrize(("g", "w"), [(0.2, -0.4), (1.3, 0.6)])
def test_map_globals_and_amortised_locals(in_order: bool, g: float, w: float) -> None:
    parts = [globals_at(g, w), local_part(g, w)]
    guide = listed(*(parts if in_order else parts[::-1]))
    losses = Trace_ELBO(), Trace_ELBO(3, vectorize_particles=True), IWAE_ELBO(4)
    for loss in losses:
        assert loss.loss(model, guide, X) == pytest.approx(-exact(g, w).item())
    assert log_marginal(model, guide, X, num_particles=8).item() == pytest.approx(
        exact(g, w).item()
    )
    svi = SVI(model, guide, pyro.optim.Adam({"lr": 0.01}), IWAE_ELBO(4, estimator="dreg"))
    assert svi.step(X) == pytest.approx(-exact(g, w).item())
    drawn = Predictive(model, guide=guide, num_samples=3)(X)
    assert drawn["z"].shape == (3, 5)
    found = guide(X)
    assert found.keys() == {"g", "w", "z"} and found["z"].shape == (5,)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:Plate 'data' encloses latent site 'z' but not 'g'")
def test_map_globals_are_learnt_beside_exact_locals() -> None:
    """The mode of p(g, w, x) in closed form, at which g = w."""

    class Encoder(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.loc = nn.Parameter(torch.zeros(()))

        def forward(self, x: Tensor) -> Tensor:
            loc = x[..., 0] / 2 + self.loc
            return torch.stack([loc, torch.full_like(loc, 0.5).log() / 2], -1)

    guide = listed(globals_at(0.0, 0.0), AmortizedGuide(of("z"), Encoder(), plate="data"))
    loss = IWAE_ELBO(16, estimator="dreg")
    svi = SVI(model, guide, pyro.optim.Adam({"lr": 0.05}), loss)
    for _ in range(200):
        svi.step(X)
    # The derivative by g is -g + sum_i (x_i - g - w) / 2, and so for w.
    mode = X.sum().item() / (2 + 2 * len(X))
    found = guide.median(X)
    assert (found["g"] + found["w"]).item() == pytest.approx(2 * mode, abs=0.05)
    assert (found["g"] - found["w"]).item() == pytest.approx(0.0, abs=0.2)
    torch.testing.assert_close(found["z"], X[:, 0] / 2, atol=0.1, rtol=0)


PARTS: dict[str, Callable[[], list[Any]]] = {
    "normal": lambda: [AutoNormal(of("g", "w")), local_part(0.0, 0.0)],
    "two of ours": lambda: [AmortizedGuide(of("g", "w")), local_part(0.0, 0.0)],
    "three of ours": lambda: [AmortizedGuide(of("g")), local_part(0.0, 0.0), FlowGuide(of("w"))],
    "mixtures": lambda: [
        MixtureGuide(of("g"), 2),
        MixtureGuide(of("w"), 2),
        MixtureGuide(of("z"), [local_part(0.0, 0.0), local_part(0.1, 0.0)], plate="data"),
    ],
    "mixture of Pyro's": lambda: [
        AmortizedGuide(of("g", "w")),
        MixtureGuide(of("z"), [AutoNormal(of("z")), AutoNormal(of("z"))]),
    ],
    "tables": lambda: [
        AmortizedGuide(of("g", "w")),
        RecursiveMixtureGuide(of("z"), 2, plate="data"),
    ],
    "refined": lambda: [
        globals_at(0.0, 0.0),
        SemiAmortizedGuide(poutine.condition(model, {"g": torch.zeros(()), "w": torch.zeros(())}),
                           local_part(0.0, 0.0), steps=2),
    ],
}  # fmt: skip


@pytest.mark.quick(4)
@pytest.mark.filterwarnings("ignore:Plate 'data' encloses latent site 'z' but not 'g'")
@pytest.mark.parametrize("name", PARTS)
def test_parts_sample_as_alone(name: str) -> None:
    """The log-density of the list is the sum of its parts', by themselves with the same draws."""
    guide = listed(*PARTS[name]())
    guide(X)
    trace = poutine.trace(guide).get_trace(X)
    trace.compute_log_prob()
    values = {n: s["value"] for n, s in trace.iter_stochastic_nodes()}
    assert {"g", "w", "z"} <= values.keys()
    total = trace.log_prob_sum()
    alone = list(guide)
    guide.plates = {"data": pyro.plate("data", len(X), dim=-1)}
    parts = [poutine.trace(poutine.condition(part, values)).get_trace(X) for part in alone]
    assert sum(part.log_prob_sum() for part in parts).item() == pytest.approx(total.item())
    for loss in (Trace_ELBO(), IWAE_ELBO(3, estimator="vimco")):
        assert SVI(model, guide, pyro.optim.Adam({"lr": 0.01}), loss).step(X) > 0
    names = set(dict(guide.named_parameters()))
    stored = {n.replace("$$$", ".") for n in pyro.get_param_store()}
    assert {f"AutoGuideList.{n}".removesuffix("_unconstrained") for n in names} >= stored
    assert all(part.name == type(part).__name__ for part in alone if hasattr(part, "site_prefix"))


def subsampled(x: Tensor) -> None:
    w = pyro.sample("w", dist.Normal(0.0, 1.0))
    with pyro.plate("data", len(x), subsample_size=2) as index:
        z = pyro.sample("z", dist.Normal(x[index, 0], 0.001))
        pyro.sample("x", dist.Normal(z + w, 1.0), obs=x[index, 0])


def test_rows_of_a_subsampled_plate_are_shared() -> None:
    class Copy(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return torch.stack([x[..., 0], torch.full_like(x[..., 0], -20.0)], -1)

    guide = AutoGuideList(subsampled)
    guide.append(AutoNormal(poutine.block(subsampled, hide=["z"])))
    guide.append(AmortizedGuide(poutine.block(subsampled, hide=["w"]), Copy(), plate="data"))
    for _ in range(4):
        trace = poutine.trace(guide).get_trace(X)
        index = trace.nodes["data"]["value"]
        torch.testing.assert_close(trace.nodes["z"]["value"], X[index, 0], atol=1e-6, rtol=0)
    assert IWAE_ELBO(2, global_latents="elbo").loss(subsampled, guide, X) > 0


def test_discrete_latents_are_enumerated_beside_ours() -> None:
    """k_i ~ Bernoulli(.3), m ~ N(0, 2), x_i ~ N(m + 2 k_i, 1): the ELBO at m by enumeration."""

    def mixture(x: Tensor) -> None:
        m = pyro.sample("m", dist.Normal(0.0, 2.0))
        with pyro.plate("data", len(x)):
            k = pyro.sample("k", dist.Bernoulli(0.3), infer={"enumerate": "parallel"})
            pyro.sample("x", dist.Normal(m + 2 * k, 1.0), obs=x)

    with pytest.raises(NotImplementedError, match="of its own in an AutoGuideList"):
        AmortizedGuide(lambda: pyro.sample("k", dist.Bernoulli(0.3)))()
    guide = AutoGuideList(mixture)
    guide.append(AmortizedGuide(poutine.block(mixture, hide=["k"])))
    guide.append(AutoDiscreteParallel(poutine.block(mixture, expose=["k"])))
    x = torch.tensor([0.3, 2.2, -1.0])
    guide(x)
    guide[0].free_global.data.copy_(torch.tensor([0.4, -20.0]))
    pyro.set_rng_seed(5)
    loss = TraceEnum_ELBO(max_plate_nesting=1).loss(mixture, guide, x)
    pyro.set_rng_seed(5)
    site = poutine.trace(guide[0]).get_trace(x).nodes["m"]  # the same draw
    share = torch.stack([1 - guide[1].k_probs, guide[1].k_probs])
    kinds = torch.tensor([0.0, 1.0])[:, None]
    log_p = dist.Normal(site["value"] + 2 * kinds, 1.0).log_prob(x)
    log_p = log_p + dist.Bernoulli(0.3).log_prob(kinds)
    elbo = (share * (log_p - share.log())).sum() - site["fn"].log_prob(site["value"])
    elbo = elbo + dist.Normal(0.0, 2.0).log_prob(site["value"])
    assert loss == pytest.approx(-elbo.item())


# --- Sizes that change


def plates(x: Tensor) -> pyro.plate:
    return pyro.plate("data", len(x))


def test_sizes_follow_the_plates_of_the_list() -> None:
    guide = listed(globals_at(0.2, 0.1), local_part(0.2, 0.1), create_plates=plates)
    for x in (X, X[:3], X):
        assert Trace_ELBO().loss(model, guide, x) == pytest.approx(-exact(0.2, 0.1, x).item())


def test_a_size_that_the_list_does_not_follow_is_refused() -> None:
    guide = listed(globals_at(0.2, 0.1), local_part(0.2, 0.1))
    guide(X)
    with pytest.raises(ValueError, match="'data' of the AutoGuideList has 5 entries"):
        guide(X[:3])


def test_plates_are_given_to_the_list() -> None:
    part = AmortizedGuide(of("z"), Posterior(0.0, 0.0), plate="data", create_plates=plates)
    with pytest.raises(ValueError, match="Give create_plates= to the AutoGuideList"):
        listed(globals_at(0.0, 0.0), part)(X)


def test_a_first_call_that_fails_leaves_no_parameters() -> None:
    """Under the names that parts have in a list, and that a guide has by name=."""

    class Fails(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.zeros(()))

        def forward(self, x: Tensor) -> Tensor:
            raise RuntimeError("no")

    def two(x: Tensor) -> None:
        g = pyro.sample("g", dist.Normal(0.0, 1.0))
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(g, 1.0))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x[:, 0])

    alone = AmortizedGuide(two, Fails(), plate="data", name="own")
    inside = AutoGuideList(two)
    inside.append(AmortizedGuide(two, Fails(), plate="data"))
    for guide in (alone, inside):
        with pytest.raises(RuntimeError, match="no"):
            guide(X)
        assert not list(pyro.get_param_store().keys())
