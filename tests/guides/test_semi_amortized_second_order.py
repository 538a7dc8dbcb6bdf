"""Derivatives through the steps of refinement, by finite differences and by hand."""

import math
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer import Trace_ELBO
from torch import Tensor, nn

from pyro_recursive import IWAE_ELBO, MIWAE_ELBO, AmortizedGuide, SemiAmortizedGuide
from pyro_recursive.guides.semi_amortized.updates import FixedStart, GradientUpdate, LearnedUpdate
from tests.oracles.refinement import (
    BASES,
    ROWS,
    SIZE,
    Watched,
    assert_all_close,
    at_numbers,
    fixed_noise,
    flow_of,
    gradients,
    hierarchy,
    model_of,
    network,
    numbers_in,
    semi,
    shake,
    trained,
)


def slopes(function: Callable[[], Tensor], parameters: Sequence[Tensor]) -> list[float]:
    """Return central differences of a function, along a random direction in each parameter."""
    found = []
    for parameter in parameters:
        torch.manual_seed(7)
        way, step = torch.randn_like(parameter), 1e-5
        values = []
        with torch.no_grad():
            for sign in (1, -2):
                parameter.add_(sign * step * way)
                values.append(float(function().detach()))
            parameter.add_(step * way)
        found.append((values[0] - values[1]) / (2 * step))
    return found


def assert_slopes(
    found: Sequence[Tensor], function: Callable[[], Tensor], parameters: Sequence[Tensor]
) -> None:
    along = []
    for gradient in found:
        torch.manual_seed(7)
        along.append((gradient * torch.randn_like(gradient)).sum().item())
    assert along == pytest.approx(slopes(function, parameters), rel=2e-6, abs=1e-6)


def unrolled(model: Callable, guide: Any, **options: Any) -> SemiAmortizedGuide:
    update = GradientUpdate(rate=0.02, momentum=0.6, clip=8.0, learn_rate=True)
    settings = {"steps": 3, "draws": 2, "mode": "second_order", "direct": 0.0, "update": update}
    return SemiAmortizedGuide(model, guide, **{**settings, **options})


@pytest.mark.parametrize(
    ("estimator", "checkpoint"), [("stl", False), ("pathwise", False), ("stl", True)]
)
def test_second_order_is_the_derivative_of_the_pipeline(estimator: str, checkpoint: bool) -> None:
    net, encoder, x = network(), nn.Linear(3, 2 * SIZE), 2 * torch.randn(ROWS, 3)
    model = model_of(net)
    guide = unrolled(
        model, AmortizedGuide(model, encoder), estimator=estimator, checkpoint=checkpoint
    )
    clipped = guide.refine(x).clipped  # some rows, some steps
    assert 0 < clipped.mean() < 1
    parameters = [*encoder.parameters(), *net.parameters(), guide.update.log_rate]
    for loss in (Trace_ELBO(2), IWAE_ELBO(3)):

        def value(loss: Any = loss) -> Tensor:
            pyro.set_rng_seed(3)
            return loss.differentiable_loss(model, guide, x)

        found = gradients(value(), parameters)
        assert all(g.ne(0).any() for g in found)
        assert_slopes(found, value, parameters)


LOSSES = [
    MIWAE_ELBO(2, 1, estimator="stl"),
    IWAE_ELBO(3, estimator="dreg"),
    IWAE_ELBO(2, estimator="dreg", vectorize_particles=False),
]


@pytest.mark.parametrize("loss", LOSSES)
def test_second_order_under_other_estimators(loss: Any) -> None:
    """What they say at the numbers that are reached, times the derivative of these."""
    net, encoder, x = network(), nn.Linear(3, 2 * SIZE), torch.randn(ROWS, 3)
    model = model_of(net)
    guide = unrolled(model, AmortizedGuide(model, encoder), seed=5)
    guide.prepare(x)
    parameters = [*encoder.parameters(), *net.parameters(), guide.update.log_rate]
    _, found = trained(loss, model, guide, x, parameters)
    _, direct, by_numbers = at_numbers(loss, model, net, numbers_in(guide, x), x)

    def ahead() -> Tensor:
        return (by_numbers * numbers_in(guide, x)).sum()

    for place, own in enumerate(direct, start=2):
        found[place] -= own
    assert_slopes(found, ahead, parameters)


LONGER = {"low_rank", "unlike", "maf"}


@pytest.mark.parametrize("estimator", ["stl", "pathwise"])
@pytest.mark.parametrize(
    "base", [pytest.param(b, marks=[pytest.mark.slow] if b in LONGER else []) for b in BASES]
)
def test_second_order_of_every_family(base: str, estimator: str) -> None:
    """The derivative of the numbers that are reached by every parameter of guide and model."""
    net, x = network(), torch.randn(ROWS, 3)
    model = model_of(net)
    guide = unrolled(model, BASES[base](model), seed=5, estimator=estimator, steps=2)
    guide.prepare(x)
    shake(guide)
    parameters = [*guide.parameters(), *net.parameters()]
    direction = torch.randn_like(numbers_in(guide, x))

    def ahead() -> Tensor:
        return (direction * numbers_in(guide, x)).sum()

    found = gradients(ahead(), parameters)
    assert all(g.ne(0).any() for g in found)
    assert_slopes(found, ahead, parameters)


@pytest.mark.slow
def test_second_order_of_a_flow_and_its_loss() -> None:
    net, x = network(), torch.randn(ROWS, 3)
    model = model_of(net)
    guide = unrolled(model, flow_of(model))
    guide.prepare(x)
    shake(guide)
    parameters = [*guide.parameters(), *net.parameters()]

    def value() -> Tensor:
        pyro.set_rng_seed(3)
        return Trace_ELBO(2).differentiable_loss(model, guide, x)

    assert_slopes(gradients(value(), parameters), value, parameters)


def test_checkpoints_hold_no_more_for_more_steps() -> None:
    net, x = network(), torch.randn(ROWS, 3)
    encoder, found = nn.Linear(3, 2 * SIZE), {}
    for steps in (2, 6):
        for checkpoint in (False, True):
            pyro.clear_param_store()
            watched = Watched(net)
            model = model_of(watched)
            guide = unrolled(
                model, AmortizedGuide(model, encoder), steps=steps, checkpoint=checkpoint
            )
            guide.prepare(x)
            watched.calls, watched.held = 0, []
            pyro.set_rng_seed(1)
            loss = Trace_ELBO(max_plate_nesting=1).differentiable_loss(model, guide, x)
            assert checkpoint or watched.calls == steps + 1
            alive = watched.alive()
            results = gradients(loss, [*encoder.parameters(), *net.parameters()])
            found[steps, checkpoint] = (alive, [loss, *results], torch.randn(()))
    assert [found[key][0] for key in found] == [3, 1, 7, 1]
    for steps in (2, 6):
        assert_all_close(found[steps, False][1], found[steps, True][1], atol=0, rtol=1e-12)
        assert found[steps, False][2] == found[steps, True][2]  # the random state goes on alike


def test_a_learned_update_from_a_fixed_start_in_second_order() -> None:
    net, x = network(), torch.randn(ROWS, 3)
    model = model_of(net)
    update = LearnedUpdate(hidden=(4,), features=nn.Linear(3, 2))
    base = AmortizedGuide(model, FixedStart(2 * SIZE))
    guide = unrolled(model, base, update=update)
    guide.prepare(x)
    shake(update)
    parameters = [*update.parameters(), *net.parameters()]

    def value() -> Tensor:
        pyro.set_rng_seed(3)
        return Trace_ELBO().differentiable_loss(model, guide, x)

    found = gradients(value(), parameters)
    assert all(g.ne(0).any() for g in found)
    assert_slopes(found, value, parameters)


@pytest.mark.parametrize("vectorize", [True, False])
def test_second_order_through_global_values(vectorize: bool) -> None:
    x = torch.randn(4)
    base = AmortizedGuide(hierarchy, nn.Linear(1, 2), inputs=lambda x: x[:, None])
    guide = unrolled(hierarchy, base)
    guide.prepare(x)
    parameters = list(guide.parameters())
    loss = MIWAE_ELBO(2, 1, vectorize_particles=vectorize)

    def value() -> Tensor:
        pyro.set_rng_seed(3)
        return loss.differentiable_loss(hierarchy, guide, x)

    found = gradients(value(), parameters)
    assert all(g.ne(0).any() for g in found)
    assert_slopes(found, value, parameters)


@pytest.mark.parametrize("mode", ["first_order", "second_order", "distill"])
@pytest.mark.parametrize("estimator", ["pathwise", "dreg"])
def test_looped_particles_equal_one_pass(estimator: str, mode: str) -> None:
    """Each with its own global values, steps, and what the encoder learns beside the bound."""
    x, noise = torch.randn(4), torch.randn(6, 5)
    base = AmortizedGuide(hierarchy, nn.Linear(1, 2), inputs=lambda x: x[:, None])
    guide = SemiAmortizedGuide(hierarchy, base, mode=mode, seed=5)
    guide.prepare(x)
    shake(guide)
    results = []
    for vectorize in (True, False):
        loss = MIWAE_ELBO(3, 2, estimator=estimator, vectorize_particles=vectorize)
        runs = 1 if estimator == "pathwise" else 2  # a second run of the guide draws again
        drawn = iter([each for each in ([noise] if vectorize else noise) for _ in range(runs)])
        current: dict[str, Tensor] = {}

        def standard(shape: Any, drawn: Any = drawn, current: dict = current, **_: Any) -> Tensor:
            if math.prod(shape[-2:]) == 1:  # the global latent is the first of a particle
                current["noise"] = next(drawn)
                return current["noise"][..., 0].reshape(shape)
            return current["noise"][..., 1:].reshape(shape)

        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "Plate 'data' encloses")
            loss.loss(hierarchy, guide, x)  # has a look at the plates
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(torch.distributions.normal, "_standard_normal", standard)
                value, found = trained(loss, hierarchy, guide, x, list(guide.parameters()))
        results.append([value, *found])
    assert all(each.ne(0).any() for each in results[0])
    assert_all_close(*results)


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

    def refined(w: Tensor, numbers: Tensor) -> Tensor:
        start, velocity = numbers, torch.zeros(())
        for noise in fixed_noise(5, 3, 1, size=1):
            path, density = numbers.view_as(numbers), numbers.view_as(numbers)
            loc, log_scale = path.unbind(-1)
            z = loc + log_scale.exp() * noise[..., 0]
            gain = log_joint_of_hierarchy(w, z, x) - log_q(density, z)
            (found,) = torch.autograd.grad(gain.sum(), path, create_graph=True)
            velocity = update.momentum * velocity + found
            numbers = numbers + update.rate * velocity
        return numbers if mode == "second_order" else start + (numbers - start).detach()

    free = base.free_global
    w = free[0] + free[1].exp() * outer[1]
    start = encoder(x[:, None])
    loc, log_scale = refined(w, start).unbind(-1)
    z = loc + log_scale.exp() * outer[4][:, 0]
    constant = start.detach().requires_grad_()
    held = log_q(refined(w, constant), z).sum() + log_q(free.detach()[None], w).sum()
    prior = dist.Normal(0.3, 1.0).log_prob(w).sum()
    value = prior + log_joint_of_hierarchy(w, z, x).sum() - held
    expected = [-g for g in gradients(value, parameters)]

    def standard(shape: Any, dtype: Any, device: Any) -> Tensor:
        return outer[len(torch.empty(shape).squeeze(-1).flatten())].reshape(shape)

    loss = MIWAE_ELBO(1, 1, estimator="stl")
    loss.loss(hierarchy, guide, x)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.distributions.normal, "_standard_normal", standard)
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "Plate 'data' encloses")
            found = trained(loss, hierarchy, guide, x, parameters)[1]
    assert_all_close(found, expected)


def log_joint_of_hierarchy(w: Tensor, z: Tensor, x: Tensor) -> Tensor:
    return dist.Normal(w, 0.8).log_prob(z) + dist.Normal(z, 1.0).log_prob(x)


def log_q(numbers: Tensor, z: Tensor) -> Tensor:
    loc, log_scale = numbers.unbind(-1)
    return dist.Normal(loc, log_scale.exp()).log_prob(z)


class Attention(nn.Module):
    """A decoder that fused attention would run in."""

    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(4, 2, batch_first=True)
        self.wide, self.last = nn.Linear(SIZE, 8), nn.Linear(8, 3)

    def forward(self, z: Tensor) -> Tensor:
        words = self.wide(z).unflatten(-1, (2, 4)).reshape(-1, 2, 4)
        seen = self.attention(words, words, words, need_weights=False)[0]
        return self.last(seen.reshape(*z.shape[:-1], 8))


def test_second_order_through_attention() -> None:
    x, net = torch.randn(ROWS, 3), Attention()
    guide = semi(model_of(net), mode="second_order", steps=2, seed=1)
    Trace_ELBO().loss_and_grads(model_of(net), guide, x)
    assert all(bool(p.grad.isfinite().all()) for p in guide.parameters())
