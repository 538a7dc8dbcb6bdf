"""Steps of refinement: clipping, learned updates, starts; what semi-amortised guides refuse."""

import math
from collections.abc import Callable
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer import Trace_ELBO, TraceEnum_ELBO
from pyro.infer.autoguide import AutoNormal
from torch import Tensor, nn

from pyro_recursive import AmortizedGuide, MixtureGuide, SemiAmortizedGuide
from pyro_recursive.guides.semi_amortized.updates import FixedStart, GradientUpdate, LearnedUpdate
from tests.oracles.refinement import (
    ROWS,
    SIZE,
    TAKEN_UP,
    assert_all_close,
    at_params,
    fixed_noise,
    masked,
    model_of,
    network,
    params_in,
    row_gradient,
    semi,
    shake,
    trained,
    way,
)

# --- Gradient steps


def test_an_outlier_leaves_the_others_alone() -> None:
    x, results = torch.randn(3, 3), []
    update = GradientUpdate(0.05, clip=2.0)
    guide = semi(model_of(network()), FixedStart(4), seed=5, update=update)
    for size in (1.0, 1e6):
        results.append(guide.refine(torch.cat([x[:1], size * x[1:2], x[2:]])))
    one, other = (found.params for found in results)
    assert (one == other).all(-1).tolist() == [True, False, True]
    assert (other[1].norm() <= 5 * 0.05 / (1 - update.momentum) * 2 * 2**0.5).all()
    assert [found.clipped[1] == 1 for found in results] == [False, True]


def test_the_share_of_clipped_steps() -> None:
    net, encoder, x = network(), nn.Linear(3, 2 * SIZE), torch.randn(ROWS, 3)
    x *= torch.logspace(-1, 2, ROWS)[:, None]
    update = GradientUpdate(0.05, clip=8.0)
    found = semi(model_of(net), encoder, steps=6, seed=5, update=update).refine(x)
    _, steps = way(net, x, encoder(x), fixed_noise(5, 6, 1), update, estimator="stl")
    norms = torch.stack([torch.stack([b.norm(dim=-1) for b in g.chunk(2, -1)]) for g in steps])
    expected = (norms.amax(1) > 8).double().mean(0)
    assert len(expected.unique()) > 1
    assert_all_close([found.clipped], [expected])


def test_a_fixed_start_is_the_same_for_all_rows() -> None:
    start, x = torch.tensor([0.5, -0.5, -1.0, -1.0]), torch.randn(ROWS, 3)
    model = model_of(network())
    guide = semi(model, FixedStart(4, start), mode="svi", seed=5)
    for _ in range(2):
        found = guide.refine(x, steps=2)
        assert torch.equal(found.start, start.expand(ROWS, -1))
        assert (found.params[0] != found.params[1]).all()
        Trace_ELBO().loss_and_grads(model, guide, x)  # nothing is kept
    with_zeros = FixedStart(4).to(torch.float32)
    assert with_zeros(torch.ones(2, 3)).dtype == torch.float64
    assert with_zeros(torch.ones(2, 3, dtype=torch.long)).dtype == torch.float32


# --- Learned updates


@pytest.mark.parametrize("loss", ["trace", "dreg"])
def test_what_a_learned_update_learns(loss: str) -> None:
    """Each step climbs the bound that it leads to; what it is fed with are constants."""
    net, x = network(), torch.randn(ROWS, 3)
    model, encoder = model_of(net), nn.Linear(3, 2 * SIZE)
    update = LearnedUpdate(hidden=(6,))
    guide = semi(model, encoder, update=update, steps=3, seed=5)
    guide.prepare(x)
    shake(update)
    parameters = [*encoder.parameters(), *update.parameters()]
    found = trained(TAKEN_UP[loss](), model, guide, x, parameters)[1]
    params = encoder(x)
    climbed = torch.zeros(())
    for each in fixed_noise(5, 3, 1):
        gradient = row_gradient(net, x, params, each, "stl")
        climbed = climbed + (params * gradient).sum()
        params, _ = update(params.detach(), gradient, None, (SIZE, SIZE), x)
    _, _, by_params = at_params(TAKEN_UP[loss](), model, net, params, x)
    expected = torch.autograd.grad((params * by_params).sum() - climbed, parameters)
    assert all(e.ne(0).any() for e in expected)
    assert_all_close(found, expected)


class Network(nn.Linear):
    """Notes what it is told of the rows."""

    def forward(self, inputs: Tensor) -> Tensor:
        self.told = inputs.detach()
        return super().forward(inputs)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_row_without_data(dtype: torch.dtype) -> None:
    """It starts at its posterior, with a gradient of exactly zero."""
    torch.set_default_dtype(dtype)
    x = torch.tensor([1.0, -1.0])  # the second one is masked
    network = Network(1 + 2 * 2 + 2, 4)
    found = {}
    for name, update in {
        "fixed": GradientUpdate(),
        "learned": LearnedUpdate(network=network),
    }.items():
        start = AmortizedGuide(masked, FixedStart(2))
        options: dict[str, Any] = {"update": update, "mode": "second_order", "name": name}
        found[name] = params_in(SemiAmortizedGuide(masked, start, steps=1, **options), x).squeeze(
            -2
        )
    assert found["fixed"][1].eq(0).all() and found["fixed"][0].ne(0).all()
    told = network.told.reshape(2, -1)
    assert told[1, [3, 5]].eq(0).all()
    assert (told[1, [4, 6]] > -20).all() and (told[1, [4, 6]] < -7).all()
    assert (found["learned"].abs() < 20).all()


class Counts(nn.Module):
    """An encoder of integers."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.table = nn.Embedding(5, size)

    def forward(self, x: Any) -> Tensor:
        return self.table(x["codes"] if isinstance(x, dict) else x).sum(-2)


def test_features_of_inputs_that_are_no_real_numbers() -> None:
    net = network()

    def model(x: Tensor) -> None:
        model_of(net)(x.double())

    x = torch.randint(5, (ROWS, 3))
    for inputs, got in ((None, r"torch.int64"), (lambda x: {"codes": x}, "dict")):
        base = AmortizedGuide(model, Counts(4), inputs=inputs)
        with pytest.raises(ValueError, match=rf"inputs of type {got}\. .*features="):
            SemiAmortizedGuide(model, base, update=LearnedUpdate())(x)
    features = Counts(2)
    guide = semi(model, Counts(4), update=LearnedUpdate((5,), features), name="counts")
    guide.prepare(x)
    shake(guide)
    trained(Trace_ELBO(), model, guide, x, list(guide.parameters()))
    assert features.table.weight.grad.ne(0).any()


# --- Refusals


def called(model: Callable, guide: Any, **options: Any) -> Any:
    return SemiAmortizedGuide(model, guide, **options)(torch.randn(ROWS, 3))


def used(model: Callable) -> MixtureGuide:
    guide = MixtureGuide(model, [AmortizedGuide(model, nn.Linear(3, 4)) for _ in range(2)])
    guide(torch.randn(ROWS, 3))
    return guide


def autoguides(model: Callable) -> MixtureGuide:
    return MixtureGuide(model, [AutoNormal(model)] * 2, weights="shared", plate="data")


REFUSED: dict[str, tuple[Callable[[Callable], Any], str]] = {
    "mode": (lambda m: semi(m, mode="third_order"), r"mode must be .*got 'third_order'"),
    "estimator": (lambda m: semi(m, estimator="dreg"), r"estimator must be .*got 'dreg'"),
    "direct": (lambda m: semi(m, mode="distill", direct=0.1), "need a mode of"),
    "learned": (lambda m: semi(m, mode="svi", update=LearnedUpdate()), "need a mode of"),
    "rate": (lambda m: GradientUpdate(rate=0.0), "Need rate=0.0 > 0"),
    "momentum": (lambda m: GradientUpdate(momentum=1.0), "momentum=1.0 < 1"),
    "clip": (lambda m: GradientUpdate(clip=0.0), "clip=0.0 > 0"),
    "twice": (lambda m: SemiAmortizedGuide(m, semi(m)), "cannot be refined again"),
    "component": (lambda m: MixtureGuide(m, [semi(m)]), "cannot be a component of a mixture"),
    "used": (lambda m: SemiAmortizedGuide(m, used(m)), "run by itself: it keeps its names"),
    "autoguides": (lambda m: called(m, autoguides(m)), "AutoNormal.*Use AmortizedGuide"),
    "no_rows": (lambda m: called(m, AmortizedGuide(m)), "Refinement needs rows.*plate="),
    "tables": (
        lambda m: called(m, MixtureGuide(m, 2, plate="data"), mode="svi"),
        "MixtureGuide has no table to keep rows in",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refused_with_a_remedy(name: str) -> None:
    make, message = REFUSED[name]
    with pytest.raises((ValueError, TypeError, NotImplementedError), match=message):
        make(model_of(network()))


def test_inference_mode_is_refused() -> None:
    guide, x = semi(model_of(network()), test_steps=0), torch.randn(ROWS, 3)
    with torch.inference_mode(), pytest.raises(RuntimeError, match=r"Use torch\.no_grad\(\)"):
        guide(x)
    guide.eval()
    with torch.inference_mode():
        assert guide(x)["z"].shape == (ROWS, SIZE)


def test_a_site_without_the_plate_of_the_draws_is_refused() -> None:
    def model(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
        pyro.sample("total", dist.Normal(z.sum(-1), 0.7), obs=x.sum(-1))

    def refined(draws: int) -> Tensor:
        base = AmortizedGuide(model, FixedStart(2), plate="data")
        return SemiAmortizedGuide(model, base, draws=draws).refine(torch.randn(3)).params

    assert refined(1).shape == (3, 2)
    with pytest.raises(ValueError, match=r"'total' has batch shape .*no plate.*draws=1"):
        refined(3)


def test_discrete_latents_are_refused() -> None:
    def model(x: Tensor, enumerate: str | None = None) -> None:
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            k = pyro.sample("k", dist.Bernoulli(0.4), infer={"enumerate": enumerate})
            pyro.sample("x", dist.Normal(z + k, 1.0), obs=x[:, 0])

    x = torch.randn(ROWS, 3)
    with pytest.raises(NotImplementedError, match=r"'k' is discrete. Enumerate it"):
        semi(model, nn.Linear(3, 2))(x)
    guide = semi(model, nn.Linear(3, 2), name="other")
    loss = TraceEnum_ELBO(max_plate_nesting=1)
    assert math.isfinite(loss.loss(model, guide, x, enumerate="parallel"))
    with pytest.raises(NotImplementedError, match=r"'k' is not this guide's.*Marginalise it"):
        loss.loss(model, guide, x)
