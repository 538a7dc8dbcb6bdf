"""What encoder, model and update learn in each mode: refinement in plain torch, differences."""

import math
import warnings
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.infer import SVI, Trace_ELBO
from torch import Tensor, nn

from pyro_recursive import IWAE_ELBO, MIWAE_ELBO, AmortizedGuide, SemiAmortizedGuide, log_marginal
from pyro_recursive.guides.gaussian_families import FAMILIES
from pyro_recursive.guides.row_families import GaussianRows, MixtureRows
from pyro_recursive.guides.semi_amortized.refinement import divergence
from pyro_recursive.guides.semi_amortized.updates import FixedStart, GradientUpdate, LearnedUpdate
from pyro_recursive.tracing.handlers import KLWarmup
from tests.oracles.refinement import (
    BASES,
    ROWS,
    SIZE,
    TAKEN_UP,
    Watched,
    assert_all_close,
    at_params,
    fixed_noise,
    gradients,
    hierarchy,
    kl,
    model_of,
    network,
    params_in,
    semi,
    shake,
    trained,
    way,
)

# --- The encoder's and the model's gradient in first order and the modes with terms of their own


class Case:
    """A guide with fixed draws, its parameters along the way by hand, and the loss at their end."""

    def __init__(
        self, loss: str, full: int | None = None, around: Callable = nullcontext, **options: Any
    ) -> None:
        self.net, self.encoder, self.around = network(), nn.Linear(3, 2 * SIZE), around
        self.x, self.model, self.loss = (
            torch.randn(ROWS, 3),
            model_of(self.net, full),
            TAKEN_UP[loss](),
        )
        self.update = GradientUpdate(rate=0.04, momentum=0.5, clip=6.0)
        options = {"steps": 4, "draws": 2, "direct": 0.3, **options}
        self.guide = semi(self.model, self.encoder, update=self.update, seed=5, **options)
        self.guide.prepare(self.x)

    def check(self, term: Callable, weight: float = 1.0, end: float = 1.0) -> None:
        """Compare to the model's gradient at the end of the way, and the encoder's.

        This is ``end`` times that at the end, straight through, and that of a term of start, end
        and the steps' gradients.
        """
        parameters = [*self.encoder.parameters(), *self.net.parameters()]
        with self.around():
            loss, found = trained(self.loss, self.model, self.guide, self.x, parameters)
            pyro.set_rng_seed(3)
            assert self.loss.loss(self.model, self.guide, self.x) == pytest.approx(loss.item())
        noise, start = fixed_noise(5, 4, 2), self.encoder(self.x)
        options = {"estimator": self.guide.estimator, "weight": weight}
        params, steps = way(self.net, self.x, start, noise, self.update, **options)
        with self.around():
            value, by_model, by_params = at_params(
                self.loss, self.model, self.net, params[-1], self.x
            )
        objective = end * (start * by_params).sum() + term(start, params[-1], steps)
        expected = torch.autograd.grad(objective, list(self.encoder.parameters()))
        assert loss.item() == pytest.approx(value.item())
        assert_all_close(found, [*expected, *by_model], atol=1e-9, rtol=1e-9)


FEW = ("trace", "dreg", "mean_field")
FIRST_ORDER: dict[str, tuple[str, dict[str, Any], dict[str, float]]] = {
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
    "steps_pathwise": ("trace", {"estimator": "pathwise"}, {}),
    "no_direct": ("trace", {"direct": 0.0}, {"direct": 0.0}),
}


@pytest.mark.quick(*TAKEN_UP, "dreg-of_12", "trace-scaled", "mean_field-warm_up", "no_direct")
@pytest.mark.parametrize("case", FIRST_ORDER)
def test_first_order(case: str) -> None:
    """The gradient at the end, straight to the encoder, and that of the start; not of the steps."""
    loss, options, known = FIRST_ORDER[case]
    factor = known.get("direct", 0.3) * known.get("scale", 1.0)
    Case(loss, **options).check(
        lambda start, end, steps: -factor * (start * steps[0]).sum(), known.get("weight", 1.0)
    )


TERMS: dict[str, Callable[[Tensor, Tensor, list[Tensor]], Tensor]] = {
    "distill": lambda start, end, steps: kl(start, end).sum(),
    "distill_reverse": lambda start, end, steps: kl(end, start).sum(),
    "vae_svi": lambda start, end, steps: -(start * steps[0]).sum(),
    "svi": lambda start, end, steps: 0 * start.sum(),
}


@pytest.mark.parametrize("loss", ["trace", "mean_field", "renyi", "dreg"])
@pytest.mark.parametrize("mode", TERMS)
def test_other_modes(mode: str, loss: str) -> None:
    """The encoder learns from a term of its own, the model from the bound where rows end."""
    case = Case(loss, full=12, mode=mode, direct=None)
    case.check(lambda *parts: 12 / ROWS * TERMS[mode](*parts), end=0.0)


def test_divergence_of_mixtures() -> None:
    """Without a closed form: from draws, by quadrature."""
    family = MixtureRows([GaussianRows(FAMILIES["diagonal"], 1)] * 2)
    first, second = torch.tensor([[-0.5, -0.3, 1.0, 0.2, 0.4, -0.1]]), torch.randn(1, 6)
    points = torch.arange(-12, 12, 0.01)[:, None, None]
    log_p, log_q = (family.log_prob(params, points) for params in (first, second))
    expected = (log_p.exp() * (log_p - log_q)).sum(0) * 0.01
    draws = torch.stack(
        [divergence(family, first, second, noise) for noise in torch.randn(400, 50, 2, 1, 1)]
    )
    error = (draws.mean(0) - expected) / (draws.std(0) / len(draws) ** 0.5)
    assert error.abs().max() < 4
    assert draws.std(0) < expected  # they tell it from zero


# --- Tables of rows


def test_svi_keeps_rows_by_their_place_in_the_data() -> None:
    net, x = network(), torch.randn(6, 3)
    index = torch.tensor([4, 1])
    model = model_of(net, subsample=index)
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
    before = table.free_local.detach().clone()
    noise = fixed_noise(5, 3, 1)
    params, _ = way(net, x[index], before[index], noise, update, estimator="stl")

    svi.evaluate_loss(x)
    guide.refine(x)
    log_marginal(model, guide, x, num_particles=10)
    with torch.no_grad():
        guide(x)
    guide.eval()
    svi.step(x)
    assert torch.equal(table.free_local, before)

    guide.train()
    svi.step(x)
    others = torch.tensor([0, 2, 3, 5])
    assert torch.equal(table.free_local[others], before[others])
    assert_all_close([table.free_local[index]], [params[-1]])


def test_svi_keeps_rows_of_two_plates() -> None:
    x = torch.randn(3, 4)

    def model(x: Tensor) -> None:
        with pyro.plate("row", 3, subsample_size=2, dim=-2) as i, pyro.plate("column", 4, dim=-1):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x[i])

    table = AmortizedGuide(model, plate="row")
    guide = SemiAmortizedGuide(model, table, mode="svi", update=GradientUpdate(0.1), steps=200)
    guide.prepare(x)
    expected = table.free_local.detach().clone()
    index = poutine.trace(guide).get_trace(x).nodes["row"]["value"]
    assert len(index) == 2
    log_scale = torch.full((2, 4), -0.5 * math.log(2))
    expected[index] = torch.stack([x[index] / 2, log_scale], -1)  # their posteriors
    assert_all_close([table.free_local], [expected])


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


# --- Second order


def assert_slopes(
    found: Sequence[Tensor], function: Callable[[], Tensor], parameters: Sequence[Tensor]
) -> None:
    """Compare gradients to central differences, along a random direction in each parameter."""
    for gradient, parameter in zip(found, parameters, strict=True):
        direction, step, values = torch.randn_like(parameter), 1e-5, []
        with torch.no_grad():
            for sign in (1, -2):
                parameter.add_(sign * step * direction)
                values.append(float(function().detach()))
            parameter.add_(step * direction)
        slope = (values[0] - values[1]) / (2 * step)
        assert (gradient * direction).sum().item() == pytest.approx(slope, rel=2e-6, abs=1e-6)


def unrolled(model: Callable, guide: Any, **options: Any) -> SemiAmortizedGuide:
    update = GradientUpdate(rate=0.02, momentum=0.6, clip=8.0, learn_rate=True)
    settings = {"steps": 3, "draws": 2, "mode": "second_order", "direct": 0.0, "update": update}
    return SemiAmortizedGuide(model, guide, **{**settings, **options})


def check_pipeline(loss: Any, model: Callable, guide: Any, x: Tensor, parameters: Any) -> None:
    """Compare the gradient of a loss with one seed to its differences."""

    def value() -> Tensor:
        pyro.set_rng_seed(3)
        return loss.differentiable_loss(model, guide, x)

    found = gradients(value(), parameters)
    assert all(g.ne(0).any() for g in found)
    assert_slopes(found, value, parameters)


@pytest.mark.quick(1)
@pytest.mark.parametrize(
    ("estimator", "checkpoint"), [("stl", True), ("pathwise", False), ("stl", False)]
)
def test_second_order_is_the_derivative_of_the_pipeline(estimator: str, checkpoint: bool) -> None:
    net, encoder, x = network(), nn.Linear(3, 2 * SIZE), 2 * torch.randn(ROWS, 3)
    model = model_of(net)
    options: dict[str, Any] = {"estimator": estimator, "checkpoint": checkpoint}
    guide = unrolled(model, AmortizedGuide(model, encoder), **options)
    clipped = guide.refine(x).clipped  # some rows, some steps
    assert 0 < clipped.mean() < 1
    parameters = [*encoder.parameters(), *net.parameters(), guide.update.log_rate]
    for loss in (Trace_ELBO(2), IWAE_ELBO(3)):
        check_pipeline(loss, model, guide, x, parameters)


@pytest.mark.parametrize("vectorize", [True, False])
def test_second_order_through_global_values(vectorize: bool) -> None:
    x = torch.randn(4)
    base = AmortizedGuide(hierarchy, nn.Linear(1, 2), inputs=lambda x: x[:, None])
    guide = unrolled(hierarchy, base)
    guide.prepare(x)
    loss = MIWAE_ELBO(2, 1, vectorize_particles=vectorize)
    check_pipeline(loss, hierarchy, guide, x, list(guide.parameters()))


def learned(model: Callable) -> SemiAmortizedGuide:
    update = LearnedUpdate(hidden=(4,), features=nn.Linear(3, 2))
    return unrolled(model, AmortizedGuide(model, FixedStart(2 * SIZE)), update=update, seed=5)


LONGER = {"low_rank", "unlike", "maf"}
CASES = [
    pytest.param(base, estimator, marks=[pytest.mark.slow] if base in LONGER else [])
    for base in BASES
    for estimator in ("stl", "pathwise")
]


@pytest.mark.parametrize(("base", "estimator"), [*CASES, ("learned", "stl")])
def test_second_order_of_every_family(base: str, estimator: str) -> None:
    """The derivative of the parameters that are reached by every parameter of guide and model."""
    net, x = network(), torch.randn(ROWS, 3)
    model = model_of(net)
    if base == "learned":
        guide = learned(model)
    else:
        guide = unrolled(model, BASES[base](model), seed=5, estimator=estimator, steps=2)
    guide.prepare(x)
    shake(guide)
    parameters = [*guide.parameters(), *net.parameters()]
    direction = torch.randn_like(params_in(guide, x))

    def ahead() -> Tensor:
        return (direction * params_in(guide, x)).sum()

    found = gradients(ahead(), parameters)
    assert all(g.ne(0).any() for g in found)
    assert_slopes(found, ahead, parameters)


def test_checkpoints_hold_no_more_for_more_steps() -> None:
    net, x = network(), torch.randn(ROWS, 3)
    encoder, found = nn.Linear(3, 2 * SIZE), {}
    for steps in (2, 6):
        for checkpoint in (False, True):
            pyro.clear_param_store()
            watched = Watched(net)
            model = model_of(watched)
            base = AmortizedGuide(model, encoder)
            guide = unrolled(model, base, steps=steps, checkpoint=checkpoint)
            guide.prepare(x)
            watched.calls, watched.held = 0, []
            pyro.set_rng_seed(1)
            loss = Trace_ELBO(max_plate_nesting=1).differentiable_loss(model, guide, x)
            assert checkpoint or watched.calls == steps + 1
            alive = watched.alive()
            results = gradients(loss, [*encoder.parameters(), *net.parameters()])
            # The random state goes on alike.
            found[steps, checkpoint] = (alive, [loss, *results, torch.randn(())])
    assert [found[key][0] for key in found] == [3, 1, 7, 1]
    for steps in (2, 6):
        assert_all_close(found[steps, False][1], found[steps, True][1], atol=0, rtol=1e-12)


# --- Global latents


@pytest.mark.parametrize("mode", ["first_order", "second_order"])
def test_sticking_the_landing_through_global_values(mode: str) -> None:
    """A second run of the guide refines again: its rows depend on what stands for the globals."""
    x, encoder = torch.randn(4), nn.Linear(1, 2)
    base = AmortizedGuide(hierarchy, encoder, inputs=lambda x: x[:, None])
    update = GradientUpdate(0.1, clip=math.inf)
    guide = SemiAmortizedGuide(
        hierarchy, base, mode=mode, update=update, steps=3, seed=5, direct=0.0
    )
    guide.prepare(x)
    parameters = [*encoder.parameters(), base.free_global]
    outer = {1: torch.randn(1), 4: torch.randn(4, 1)}

    def log_q(params: Tensor, z: Tensor) -> Tensor:
        loc, log_scale = params.unbind(-1)
        return dist.Normal(loc, log_scale.exp()).log_prob(z)

    def log_joint(w: Tensor, z: Tensor) -> Tensor:
        return dist.Normal(w, 0.8).log_prob(z) + dist.Normal(z, 1.0).log_prob(x)

    def refined(w: Tensor, params: Tensor) -> Tensor:
        start, velocity = params, torch.zeros(())
        for noise in fixed_noise(5, 3, 1, size=1):
            path, density = params.view_as(params), params.view_as(params)
            loc, log_scale = path.unbind(-1)
            z = loc + log_scale.exp() * noise[..., 0]
            gain = log_joint(w, z) - log_q(density, z)
            (found,) = torch.autograd.grad(gain.sum(), path, create_graph=True)
            velocity = update.momentum * velocity + found
            params = params + update.rate * velocity
        return params if mode == "second_order" else start + (params - start).detach()

    free = base.free_global
    w = free[0] + free[1].exp() * outer[1]
    start = encoder(x[:, None])
    loc, log_scale = refined(w, start).unbind(-1)
    z = loc + log_scale.exp() * outer[4][:, 0]
    constant = start.detach().requires_grad_()
    held = log_q(refined(w, constant), z).sum() + log_q(free.detach()[None], w).sum()
    prior = dist.Normal(0.3, 1.0).log_prob(w).sum()
    expected = [-g for g in gradients(prior + log_joint(w, z).sum() - held, parameters)]

    def standard(shape: Any, dtype: Any, device: Any) -> Tensor:
        return outer[len(torch.empty(shape).squeeze(-1).flatten())].reshape(shape)

    loss = MIWAE_ELBO(1, 1, estimator="stl")
    loss.loss(hierarchy, guide, x)
    with pytest.MonkeyPatch.context() as patch, warnings.catch_warnings():
        patch.setattr(torch.distributions.normal, "_standard_normal", standard)
        warnings.filterwarnings("ignore", "Plate 'data' encloses")
        found = trained(loss, hierarchy, guide, x, parameters)[1]
    assert_all_close(found, expected)
