"""What encoder and model learn in each mode, by refinement written out in plain torch."""

import math
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.infer import SVI, Trace_ELBO
from torch import Tensor, nn

from pyro_recursive import IWAE_ELBO, AmortizedGuide, SemiAmortizedGuide, log_marginal
from pyro_recursive.guides.gaussian_families import FAMILIES
from pyro_recursive.guides.row_families import GaussianRows, MixtureRows
from pyro_recursive.guides.semi_amortized import guide as semi_amortized
from pyro_recursive.guides.semi_amortized.refinement import divergence
from pyro_recursive.guides.semi_amortized.row_elbo import LocalBound
from pyro_recursive.guides.semi_amortized.updates import GradientUpdate
from pyro_recursive.tracing.handlers import KLWarmup
from tests.oracles.refinement import (
    BASES,
    NOISE,
    POSTERIOR,
    ROWS,
    SIZE,
    TAKEN_UP,
    V,
    W,
    X,
    assert_all_close,
    at_numbers,
    fixed_noise,
    hierarchy,
    kl,
    model_of,
    network,
    semi,
    subsampled,
    trained,
    way,
)


class Case:
    """A guide with fixed draws, its numbers along the way by hand, and the loss at their end."""

    def __init__(
        self, loss: Any, full: int | None = None, around: Callable = nullcontext, **options: Any
    ) -> None:
        self.net, self.encoder = network(), nn.Linear(3, 2 * SIZE)
        self.x, self.model, self.loss = torch.randn(ROWS, 3), model_of(self.net, full), loss
        self.around = around
        self.update = GradientUpdate(rate=0.04, momentum=0.5, clip=6.0)
        options = {"steps": 4, "draws": 2, "direct": 0.3, **options}
        self.guide = semi(self.model, self.encoder, update=self.update, seed=5, **options)
        self.guide.prepare(self.x)
        self.parameters = [*self.encoder.parameters(), *self.net.parameters()]

    def gradients(self) -> tuple[Tensor, list[Tensor], list[Tensor]]:
        """Return the loss, and its gradients by encoder and by model."""
        with self.around():
            loss, found = trained(self.loss, self.model, self.guide, self.x, self.parameters)
            pyro.set_rng_seed(3)
            assert self.loss.loss(self.model, self.guide, self.x) == pytest.approx(loss.item())
        return loss, found[:2], found[2:]

    def expected(
        self, direct: float = 0.3, weight: float = 1.0, scale: float = 1.0
    ) -> tuple[Tensor, list[Tensor], list[Tensor]]:
        """Return the same: the gradients at the end of the way, and ``direct`` at its start."""
        noise = fixed_noise(5, self.guide.steps, self.guide.draws)
        options = {"estimator": self.guide.estimator, "weight": weight}
        start = self.encoder(self.x)
        numbers, found = way(self.net, self.x, start, noise, self.update, **options)
        with self.around():
            loss, by_model, by_numbers = at_numbers_of(self, numbers[-1])
        upward = by_numbers - direct * scale * found[0]
        return loss, list(torch.autograd.grad(start, self.encoder.parameters(), upward)), by_model


def at_numbers_of(case: Case, numbers: Tensor) -> tuple[Tensor, list[Tensor], Tensor]:
    return at_numbers(case.loss, case.model, case.net, numbers, case.x)


def assert_as_expected(case: Case, **options: Any) -> None:
    for found, expected in zip(case.gradients(), case.expected(**options), strict=True):
        torch.testing.assert_close(found, expected, atol=1e-9, rtol=1e-9)


FEW = ("trace", "dreg", "mean_field")
FIRST_ORDER = {
    **{loss: (loss, {}, {}) for loss in TAKEN_UP},
    # As part of 12 rows each counts three times.
    **{f"{loss}-of_12": (loss, {"full": 12}, {"scale": 12 / ROWS}) for loss in TAKEN_UP},
    # A scale on guide and model is none of the rows' business, and scales what they climb.
    **{
        f"{loss}-scaled": (loss, {"around": lambda: poutine.scale(scale=0.25)}, {"scale": 0.25})
        for loss in FEW
    },
    # Rows climb the bound that is being trained, and so does the encoder by its start.
    **{
        f"{loss}-warm_up": (loss, {"around": lambda: KLWarmup(0.2)}, {"weight": 0.2})
        for loss in FEW
    },
    "steps_stl": ("trace", {"estimator": "stl"}, {}),
    "steps_pathwise": ("trace", {"estimator": "pathwise"}, {}),
}


@pytest.mark.parametrize("case", FIRST_ORDER)
def test_first_order(case: str) -> None:
    """The gradient at the end, straight to the encoder, and that of the start; not of the steps."""
    loss, options, expected = FIRST_ORDER[case]
    assert_as_expected(Case(TAKEN_UP[loss](), **options), **expected)


@pytest.mark.parametrize("loss", ["trace", "stl_single"])
def test_first_order_with_scaled_programs(loss: str) -> None:
    case = Case(TAKEN_UP[loss]())
    bare = case.gradients()
    case.model, case.guide = (poutine.scale(f, scale=0.25) for f in (case.model, case.guide))
    for found, expected in zip(case.gradients(), bare, strict=True):
        one, other = (each if isinstance(each, list) else [each] for each in (found, expected))
        assert_all_close(one, [0.25 * tensor for tensor in other])


def test_without_the_direct_term() -> None:
    case = Case(Trace_ELBO(), direct=0.0)
    assert_as_expected(case, direct=0.0)
    names = poutine.trace(case.guide).get_trace(case.x).nodes
    assert not [name for name in names if name.endswith("_direct")]


def test_the_direct_term_does_not_change_the_loss() -> None:
    values = []
    for direct in (0.0, 0.1, 3.0):
        pyro.clear_param_store()
        pyro.set_rng_seed(0)
        case = Case(IWAE_ELBO(2, estimator="dreg"), direct=direct)
        values.append(case.gradients()[0])
    assert values[0] == values[1] == values[2]


@pytest.mark.parametrize("loss", ["trace", "mean_field", "renyi", "dreg"])
@pytest.mark.parametrize("mode", ["distill", "distill_reverse", "vae_svi", "svi"])
def test_other_modes(mode: str, loss: str) -> None:
    """The encoder learns from a term of its own, the model from the bound where rows end."""
    case = Case(TAKEN_UP[loss](), full=12, mode=mode, direct=None)
    noise = fixed_noise(5, 4, 2)
    start = case.encoder(case.x)
    numbers, steps = way(case.net, case.x, start, noise, case.update, estimator="stl")
    expected_loss, by_model, _ = at_numbers_of(case, numbers[-1])
    terms = {
        "distill": kl(start, numbers[-1]).sum(),
        "distill_reverse": kl(numbers[-1], start).sum(),
        "vae_svi": -(start * steps[0]).sum(),
        "svi": 0 * start.sum(),
    }
    expected = torch.autograd.grad(12 / ROWS * terms[mode], case.encoder.parameters())
    value, by_encoder, found = case.gradients()
    assert value.item() == pytest.approx(expected_loss.item())
    assert_all_close(found, by_model)
    assert_all_close(by_encoder, expected)


def test_divergence_of_mixtures() -> None:
    """Without a closed form: from draws, by quadrature."""
    family = MixtureRows((GaussianRows(FAMILIES["diagonal"], 1),) * 2)
    first, second = torch.tensor([[-0.5, -0.3, 1.0, 0.2, 0.4, -0.1]]), torch.randn(1, 6)
    points = torch.arange(-12, 12, 0.01)[:, None, None]
    log_p, log_q = (family.log_prob(numbers, points) for numbers in (first, second))
    expected = (log_p.exp() * (log_p - log_q)).sum(0) * 0.01
    draws = torch.stack(
        [divergence(family, first, second, noise) for noise in torch.randn(400, 50, 2, 1, 1)]
    )
    error = (draws.mean(0) - expected) / (draws.std(0) / len(draws) ** 0.5)
    assert error.abs().max() < 4
    assert draws.std(0) < expected  # they tell it from zero


@pytest.mark.parametrize("seed", [None, 3])
def test_a_divergence_has_draws_of_its_own(seed: int | None, monkeypatch: Any) -> None:
    """Where they had moved the rows, it would be biased."""
    model, seen = model_of(network()), []
    guide = SemiAmortizedGuide(model, BASES["mixture"](model), mode="distill", seed=seed, steps=1)

    def noted(family: Any, first: Tensor, second: Tensor, noise: Tensor) -> Tensor:
        seen.append(noise)
        return divergence(family, first, second, noise)

    def step(bound: Any, numbers: Tensor, noise: Tensor, **options: Any) -> Tensor:
        seen.append(noise)
        return torch.zeros_like(numbers)

    monkeypatch.setattr(semi_amortized, "divergence", noted)
    monkeypatch.setattr(LocalBound, "gradient", step)
    guide(torch.randn(ROWS, 3))
    step_noise, own = seen
    assert not (own == step_noise).any()


def test_svi_keeps_rows_by_their_place_in_the_data() -> None:
    net, x = network(), torch.randn(6, 3)
    index = torch.tensor([4, 1])
    model = subsampled(net, 2, subsample=index)
    table = AmortizedGuide(
        model,
        plate="data",
        create_plates=lambda x: pyro.plate("data", len(x), subsample=index),
        init_scale=0.5,
    )
    update = GradientUpdate(0.02)
    guide = SemiAmortizedGuide(model, table, mode="svi", seed=5, update=update, steps=3)
    svi = SVI(model, guide, pyro.optim.SGD({"lr": 0.0}), Trace_ELBO(max_plate_nesting=1))
    guide.prepare(x)
    noise = fixed_noise(5, 3, 1)
    before = table.free_local.detach().clone()
    numbers, _ = way(net, x[index], before[index], noise, update, estimator="stl")

    svi.evaluate_loss(x)
    guide.refine(x)
    with torch.no_grad():
        guide(x)
    guide.eval()
    svi.step(x)
    assert torch.equal(table.free_local, before)

    guide.train()
    svi.step(x)
    others = torch.tensor([0, 2, 3, 5])
    assert torch.equal(table.free_local[others], before[others])
    assert_all_close([table.free_local[index]], [numbers[-1]])


def test_svi_keeps_rows_of_two_plates() -> None:
    x = torch.randn(3, 4)

    def model(x: Tensor) -> None:
        with pyro.plate("row", 3, subsample_size=2, dim=-2) as i, pyro.plate("column", 4, dim=-1):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x[i])

    table = AmortizedGuide(model, plate="row")
    guide = SemiAmortizedGuide(model, table, mode="svi", update=GradientUpdate(0.1), steps=200)
    guide.prepare(x)
    before = table.free_local.detach().clone()
    index = poutine.trace(guide).get_trace(x).nodes["row"]["value"]
    assert len(index) == 2
    for row in range(3):
        if row in index:
            exact = torch.stack([x[row] / 2, torch.full((4,), -0.5 * math.log(2))], -1)
            assert_all_close([table.free_local[row]], [exact])
        else:
            assert torch.equal(table.free_local[row], before[row])


def test_svi_comes_to_the_posterior() -> None:
    def model(x: Tensor) -> None:
        with pyro.plate("data", len(x), subsample_size=2) as index:
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("x", dist.Normal(W * z, NOISE), obs=x[index])

    table = AmortizedGuide(model, plate="data")
    guide = SemiAmortizedGuide(model, table, mode="svi", update=GradientUpdate(0.1))
    svi = SVI(model, guide, pyro.optim.Adam({"lr": 0.1}), Trace_ELBO())
    for _ in range(60):
        svi.step(X)
    exact = torch.stack([POSTERIOR, torch.full((3,), 0.5 * math.log(V))], -1)
    assert_all_close([table.free_local], [exact], atol=1e-6, rtol=0)


def test_svi_keeps_the_mean_over_particles() -> None:
    """Each has rows of its own where it has global values of its own."""
    x, base = torch.randn(4), AmortizedGuide(hierarchy, plate="data", init_scale=1.0)
    update = GradientUpdate(0.1)
    guide = SemiAmortizedGuide(hierarchy, base, mode="svi", update=update, steps=200)
    guide.prepare(x)
    with pyro.plate("particles", 5, dim=-2):
        w = guide(x)["w"]
    exact = (w.mean() / 0.64 + x) / (1 / 0.64 + 1)
    assert_all_close([base.free_local[:, 0]], [exact], atol=1e-6, rtol=0)


def test_a_look_does_not_move_the_table() -> None:
    x = torch.randn(ROWS, 3)
    model = model_of(network())
    guide = SemiAmortizedGuide(model, AmortizedGuide(model, plate="data"), mode="svi")
    guide.prepare(x)
    before = guide.guide.free_local.detach().clone()
    log_marginal(model, guide, x, num_particles=10)
    IWAE_ELBO(2).loss(model, guide, x)
    assert_all_close([guide.guide.free_local], [before], atol=0, rtol=0)
    IWAE_ELBO(2).loss_and_grads(model, guide, x)
    assert (guide.guide.free_local != before).any()
