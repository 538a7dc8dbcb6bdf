"""Mixtures that grow: gradients of each stage by quadrature, the stages, and what is found.

Where draws are pinned to nodes, equality is to rounding; trained mixtures are compared with the
divergences that quadrature and a deterministic optimiser gave for the same components.
"""

import copy
import math
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.infer import SVI, Trace_ELBO
from pyro.infer.autoguide import AutoNormal
from torch import Tensor, nn

from pyro_recursive import (
    AmortizedGuide,
    FlowGuide,
    MixtureGuide,
    RecursiveMixture_ELBO,
    RecursiveMixtureGuide,
    Schedule,
    Stratified_ELBO,
)
from pyro_recursive.bounds.mixture_objectives import Clamped, Gain, Skew, stick_breaking
from pyro_recursive.losses.component_search import place_component
from pyro_recursive.losses.recursive_mixture import best_log_weights
from pyro_recursive.tracing.handlers import current_assignment
from pyro_recursive.tracing.program import Program
from tests.oracles.bitwise import same
from tests.oracles.mixtures import (
    ALIKE,
    LOGITS,
    PLACES,
    UNLIKE,
    Derivatives,
    Setting,
    derivatives,
    expectation,
    grid,
    log_component,
    log_joint,
    mixture_elbo,
    pinned,
    setting,
)
from tests.oracles.quadrature import log_normal
from tests.oracles.training import interrupt_at, outcome, run

PROPOSE, REFINE, JOINT = (1, 1, 0, 1, 0), (2, 1, 0, 1, 1), (3, 1, 0, 1, 1)
LOGIT = LOGITS[:1]
SHARE = stick_breaking(LOGIT)[1].exp()
growing = partial(setting, kind=RecursiveMixtureGuide)


def assert_same(found: Derivatives, expected: Sequence[Tensor | None]) -> None:
    for name, one, other in zip(Derivatives._fields, found, expected, strict=True):
        assert (one is None) == (other is None), name
        if one is not None:
            torch.testing.assert_close(one, other, atol=1e-6, rtol=1e-6, msg=name)


def mixture_derivatives() -> Derivatives:
    """Differentiate the ELBO of the mixture."""
    return derivatives(lambda t, p, logit: mixture_elbo(t, p, stick_breaking(logit)), LOGIT)


def climbed(log_r: Callable[[Tensor, Tensor, Tensor], Tensor]) -> Tensor:
    """Differentiate ``E_q[log p - log R]`` by the second component; R of both and the weights."""

    def objective(theta: Tensor, places: Tensor, logits: Tensor) -> Tensor:
        def gain(z: Tensor) -> Tensor:
            first, second = (log_component(z, place) for place in places)
            return log_joint(z, theta) - log_r(first, second, stick_breaking(logits))

        return expectation(places[1], gain)

    found = derivatives(objective, LOGIT).second
    assert found is not None
    return found


def skewed(epsilon: float) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    shares = math.log1p(-epsilon), math.log(epsilon)
    return lambda first, second, _: torch.logaddexp(first + shares[0], second + shares[1])


OBJECTIVES: dict[Any, Callable[[Tensor, Tensor, Tensor], Tensor]] = {
    "skew": skewed(0.1),
    Skew(0.3): skewed(0.3),
    "elbo": lambda first, second, _: second,
    "relbo": lambda first, second, _: first + second,
    Clamped(1e6, strength=0.3): lambda first, second, _: 0.3 * first + 0.7 * second,
}
FAMILIES = pytest.mark.parametrize("families", [ALIKE, UNLIKE], ids=["alike", "unlike"])


@pytest.fixture
def accepting(monkeypatch: pytest.MonkeyPatch) -> None:
    """Keep every component."""
    monkeypatch.setattr(Gain, "is_clear", lambda gain, *limits: True)


# --- Gradients


@FAMILIES
def test_exact_refinement(families: tuple[str, str]) -> None:
    """The component's gradient is that of the mixture's ELBO, over its weight."""
    eps, weight = grid(1)
    s = growing(len(weight), families=families, progress=REFINE)
    whole = mixture_derivatives()
    expected = (whole.theta, None, whole.second / SHARE, whole.logits)
    assert_same(s.gradients(RecursiveMixture_ELBO(1), eps[0], weight), expected)
    undetached = climbed(lambda *parts: (torch.stack(parts[:2], -1) + parts[2]).logsumexp(-1))
    assert (undetached - expected[2]).abs().max() > 0.1


@FAMILIES
@pytest.mark.parametrize("objective", OBJECTIVES, ids=str)
def test_other_objectives(objective: Any, families: tuple[str, str]) -> None:
    eps, weight = grid(1)
    whole, second = mixture_derivatives(), climbed(OBJECTIVES[objective])
    s = growing(len(weight), families=families, progress=REFINE)
    loss = RecursiveMixture_ELBO(1, objective=objective, proposal=objective)
    assert_same(s.gradients(loss, eps[0], weight), (whole.theta, None, second, whole.logits))
    s = growing(len(weight), families=families, progress=PROPOSE)

    def first_alone(theta: Tensor, places: Tensor, logits: Tensor) -> Tensor:
        return mixture_elbo(theta, places[:1], torch.zeros(1))

    theta = derivatives(first_alone, LOGIT).theta
    assert_same(s.gradients(loss, eps[0], weight), (theta, None, second, None))


def test_joint_stage_is_the_stratified_elbo() -> None:
    eps, weight = grid(1)
    s = growing(len(weight), progress=JOINT)
    assert_same(s.gradients(RecursiveMixture_ELBO(1), eps[0], weight), mixture_derivatives())


def test_first_stage_is_an_elbo_with_one_component() -> None:
    eps, weight = grid(1)
    s = growing(len(weight), progress=(0, 1, 0, 1, 0))

    def alone(theta: Tensor, places: Tensor, logits: Tensor) -> Tensor:
        return mixture_elbo(theta, places[:1], torch.zeros(1))

    expected = derivatives(alone, LOGIT)
    found = s.gradients(RecursiveMixture_ELBO(1), eps[0], weight)
    assert found.logits is None or not found.logits.any()
    assert_same(found._replace(logits=None), (expected.theta, expected.first, None, None))


@pytest.mark.parametrize("progress", [PROPOSE, REFINE], ids=["propose", "refine"])
def test_the_clamp_is_of_each_row(progress: tuple[int, ...]) -> None:
    """One row's component is beyond the clamp, and climbs its ELBO; the other one's is not."""
    noise = torch.special.ndtri((torch.arange(200) + 0.5) / 200)
    gradients = {}
    objectives = {"clamped": Clamped(0.5), "free": Clamped(1e6), "elbo": "elbo"}
    for name, objective in objectives.items():
        s = growing(2, progress=progress)
        with torch.no_grad():
            s.guide.component(1).free_local[0] = torch.tensor([1.1, -0.6])  # beside the first
        loss = RecursiveMixture_ELBO(200, objective=objective, proposal=objective)
        both = noise.repeat_interleave(2)  # the model has draws of the first component
        s.gradients(loss, both[:, None].expand(-1, 2), torch.ones(2))
        gradients[name] = s.guide.component(1).free_local.grad
    torch.testing.assert_close(gradients["clamped"][0], gradients["free"][0])
    torch.testing.assert_close(gradients["clamped"][1], gradients["elbo"][1])
    assert (gradients["free"] - gradients["elbo"]).abs().amin(0).max() > 0.1


@FAMILIES
@pytest.mark.parametrize("objective", ["exact", "skew"])
@pytest.mark.parametrize("progress", [PROPOSE, REFINE, JOINT], ids=["propose", "refine", "joint"])
def test_looped_equals_vectorised(
    progress: tuple[int, ...], objective: str, families: tuple[str, str]
) -> None:
    noise, results = torch.randn(6, 5), []
    for vectorize in (True, False):
        s = growing(5, families=families, progress=progress)
        loss = RecursiveMixture_ELBO(3, objective=objective, vectorize_particles=vectorize)
        loss.loss(s.model, s.guide)  # has a look at the plates

        def standard(shape: Any, dtype: Any, device: Any) -> Tensor:
            particle = current_assignment().particle
            return (noise if particle is None else noise[particle]).unsqueeze(-1).reshape(shape)

        with pytest.MonkeyPatch.context() as patch:
            for module in ("normal", "multivariate_normal"):
                patch.setattr(f"torch.distributions.{module}._standard_normal", standard)
            value = loss.differentiable_loss(s.model, s.guide)
        grads = torch.autograd.grad(value, s.parameters(), allow_unused=True)
        results.append((value.detach(), *(torch.zeros(1) if g is None else g for g in grads)))
    torch.testing.assert_close(results[0], results[1], atol=1e-12, rtol=1e-10)


def test_what_an_update_leaves_alone() -> None:
    eps, weight = grid(1)
    whole = mixture_derivatives()
    guide_only = (None, None, whole.second / SHARE, whole.logits)
    model_only = (whole.theta, None, None, None)
    cases = [
        ("guide", REFINE, guide_only),
        ("alternating", (2, 2, 0, 1, 1), guide_only),
        ("alternating", (2, 3, 0, 1, 1), model_only),
        ("alternating", JOINT, whole),
        ("guide", JOINT, whole),
    ]
    for update, progress, expected in cases:
        s = growing(len(weight), progress=progress)
        assert_same(s.gradients(RecursiveMixture_ELBO(1, update=update), eps[0], weight), expected)
    s = growing(len(weight), progress=PROPOSE)
    found = s.gradients(RecursiveMixture_ELBO(1, update="guide"), eps[0], weight)
    assert_same(found, (None, None, climbed(skewed(0.1)), None))


@pytest.mark.parametrize("objective", ["exact", "skew", "relbo"])
def test_a_users_scale_multiplies_everything(objective: str) -> None:
    noise, found = torch.randn(8, 5), []
    for scale in (1.0, 3.0):
        s = growing(5, progress=REFINE)
        model, guide = (poutine.scale(program, scale=scale) for program in (s.model, s.guide))
        loss = RecursiveMixture_ELBO(4, objective=objective)
        scaled = Setting(model, guide, s.theta)
        loss.loss(model, guide)
        with pinned(noise):
            value = loss.differentiable_loss(scaled.model, scaled.guide)
        parameters = (s.theta, s.guide.component(1).free_local, s.logits())
        gradients = torch.autograd.grad(value, parameters)
        pyro.set_rng_seed(1)
        gain = loss.gain(model, guide)
        found.append((value.detach(), *gradients, torch.tensor(gain[:2])))
    torch.testing.assert_close(found[1], tuple(3 * each for each in found[0]))


def test_gain_by_quadrature() -> None:
    rows = 20
    s = growing(rows, progress=REFINE, schedule=Schedule(draws=20_000))
    theta = s.theta[0].detach()
    whole = mixture_elbo(theta, PLACES, stick_breaking(LOGIT))
    before = mixture_elbo(theta, PLACES[:1], torch.zeros(1))
    alone = mixture_elbo(theta, PLACES[1:], torch.zeros(1))
    found = RecursiveMixture_ELBO(1).gain(s.model, s.guide)
    assert abs(found.mean - rows * (whole - before)) < 4.5 * found.standard_error
    ceiling = rows * torch.nn.functional.softplus(alone - before)
    assert found.ceiling == pytest.approx(ceiling.item(), rel=0.1)


@pytest.mark.parametrize("objective", ["exact", "skew", "relbo", Clamped(1.0)], ids=str)
@pytest.mark.parametrize("progress", [PROPOSE, REFINE, JOINT], ids=["propose", "refine", "joint"])
def test_a_constrained_support_changes_nothing(progress: tuple[int, ...], objective: Any) -> None:
    """A log-normal latent and its logarithm are one model, if all Jacobians are counted."""
    found = []
    for constrained in (False, True):
        pyro.clear_param_store()
        pyro.set_rng_seed(1)

        def model(constrained: bool = constrained) -> None:
            prior = dist.LogNormal if constrained else dist.Normal
            z = pyro.sample("z", prior(0.0, 3.0))
            z = z.log() if constrained else z
            pyro.sample("x", dist.Normal(z**2, 1.0), obs=torch.tensor(4.0))

        schedule = Schedule(first=9, propose=9, refine=9, joint=9, draws=50)
        guide = RecursiveMixtureGuide(model, 2, schedule=schedule)
        guide.prepare()
        for m, place in enumerate(PLACES):
            guide.component(m).free_global.data.copy_(place)
        guide.progress.copy_(torch.tensor(progress))
        loss = RecursiveMixture_ELBO(4, objective=objective, proposal=objective, update="guide")
        loss.loss(model, guide)
        with pinned(torch.randn(8, 1)[: 4 if progress == PROPOSE else 8]):
            value = loss.differentiable_loss(model, guide)
        grads = torch.autograd.grad(value, list(guide.parameters()), allow_unused=True)
        each = [value.detach(), *(torch.zeros(1) if g is None else g for g in grads)]
        if progress != PROPOSE:
            each.append(torch.tensor(loss.gain(model, guide)))
            draws = loss._draw_members(Program(model, guide, ()), guide)
            guide.set_log_weights(best_log_weights(draws, "corrective"))
            each.append(guide.component_weights().detach())
        for seed in range(5 if progress == PROPOSE else 0):
            pyro.set_rng_seed(seed)
            place_component(Program(model, guide, ()), guide)
            each.append(guide.component(1).free_global.detach().clone())
        found.append(tuple(each))
    torch.testing.assert_close(found[0], found[1], atol=1e-8, rtol=1e-8)


# --- The stages


def bimodal() -> None:
    z = pyro.sample("z", dist.Normal(0.0, 3.0))
    pyro.sample("x", dist.Normal(z**2, 1.0), obs=torch.tensor(4.0))


def kinds(guide: RecursiveMixtureGuide) -> list[tuple[str, int | None, tuple[int, ...]]]:
    """Count steps to the end; return the stages met, and the members in them."""
    met = []
    while guide.stage.steps:
        met.append((guide.stage.kind, guide.stage.component, guide.members))
        for _ in range(guide.stage.steps):
            guide.count_step()
    return met


def test_stages_and_members() -> None:
    schedule = Schedule(first=2, propose=1, refine=3, cycles=2, cycle=1, joint=4)
    guide = RecursiveMixtureGuide(bimodal, 3, schedule=schedule)
    assert guide.num_steps == 2 + 2 * (1 + 3) + 2 * 3 + 4
    assert kinds(guide) == [
        ("first", 0, (0,)),
        ("propose", 1, (0,)),
        ("refine", 1, (0, 1)),
        ("propose", 2, (0, 1)),
        ("refine", 2, (0, 1, 2)),
        *[("cycle", m, (0, 1, 2)) for _ in range(2) for m in range(3)],
        ("joint", None, (0, 1, 2)),
    ]
    assert guide.stage == ("joint", None, 0)
    guide.count_step()  # goes on for ever
    assert guide.stage == ("joint", None, 0) and guide.members == (0, 1, 2)


def test_steps_left() -> None:
    """Those of the schedule, counted down, less those that a dropped component had before it."""
    schedule = Schedule(first=2, propose=1, refine=3, cycles=2, cycle=5, joint=4, patience=0)
    guide = RecursiveMixtureGuide(bimodal, 3, schedule=schedule)
    for taken in range(guide.num_steps):
        assert guide.steps_left == guide.num_steps - taken
        assert guide.is_growing == (taken < 2 + 2 * (1 + 3))
        guide.count_step()
    guide.count_step()
    assert guide.steps_left == guide.stage_steps_left == 0
    guide = RecursiveMixtureGuide(bimodal, 3, schedule=schedule)
    for _ in range(2 + 1):
        guide.count_step()
    guide.drop(retry=False)
    for taken in range(2 * 5 + 4):
        assert (guide.steps_left, guide.is_growing) == (2 * 5 + 4 - taken, False)
        guide.count_step()
    assert guide.steps_left == 0 and guide.stage.kind == "joint"


def test_it_says_how_far_it_has_grown() -> None:
    guide = RecursiveMixtureGuide(bimodal, 3, schedule=Schedule(first=4, propose=2, refine=3))
    for _ in range(4 + 2 + 1):
        guide.count_step()
    shown = "stage='refine', steps_left=7, component=1, steps_taken=1, failures=0"
    assert f"members=(0, 1) of 3, {shown}" in repr(guide)
    guide.prepare()
    guide.to("meta")  # the schedule is read in each step, without waiting for a device
    assert guide.component(0).free_global.device.type == "meta"
    assert guide.progress.tolist() == [2, 1, 0, 1, 1, 0]


@pytest.mark.parametrize("other", [Trace_ELBO(), Stratified_ELBO(1)])
def test_another_loss_does_not_grow_it(other: Any) -> None:
    guide = RecursiveMixtureGuide(bimodal, 2, schedule=Schedule(first=9, propose=9, refine=9))
    train(guide, other, 20)
    assert guide.members == (0,) and guide.steps_left == guide.num_steps == 27


def test_the_guide_is_a_mixture_of_its_members() -> None:
    """A component on trial starts from the share epsilon; one being proposed has none."""
    guide = RecursiveMixtureGuide(bimodal, 3, epsilon=0.2)
    guide.prepare()
    z = torch.tensor(0.7)
    shares = {(0,): [1.0], (0, 1): [0.8, 0.2], (0, 2): [0.8, 0.2], (0, 1, 2): [0.64, 0.16, 0.2]}
    for members, expected in shares.items():
        guide.progress[3:] = torch.tensor([float(m in members) for m in range(3)])
        assert guide.members == members
        torch.testing.assert_close(guide.component_weights().detach(), torch.tensor(expected))
        places = torch.stack([guide.component(m).free_global.detach() for m in members])
        density = log_normal(z, places[:, 0], places[:, 1].exp())
        trace = poutine.trace(poutine.condition(guide, data={"z": z})).get_trace()
        exact = (density + torch.tensor(expected).log()).logsumexp(-1)
        torch.testing.assert_close(trace.log_prob_sum(), exact)


def test_weights_stay_where_they_have_a_gradient() -> None:
    guide = RecursiveMixtureGuide(bimodal, 3)
    guide.prepare()
    guide.progress[3:] = 1
    for weights in ([0.5, 0.3, 0.2], [1.0, 1e-30, 1e-30], [1e-30, 1e-30, 1.0]):
        guide.set_log_weights(torch.tensor(weights).log())
        found = guide.component_weights().detach()
        torch.testing.assert_close(found, torch.tensor(weights), atol=1e-3, rtol=0)
        guide.component_weights().log().sum().backward()
        for parameter in guide.weights.parameters():
            assert parameter.grad is not None and parameter.grad.isfinite().all()
            parameter.grad = None
    with torch.no_grad():
        for parameter in guide.weights.parameters():
            parameter.fill_(1e6)
    assert guide.component_weights().min() > 1e-8


def test_a_proposal_scatters_all_rows_where_there_is_a_minibatch() -> None:
    """Those that are not in the minibatch would stay where they are."""
    x = torch.randn(6)

    def model(x: Tensor, size: int) -> None:
        with pyro.plate("data", 6, subsample_size=size) as rows:
            z = pyro.sample("z", dist.Normal(0.0, 3.0))
            pyro.sample("x", dist.Normal(z, 0.5), obs=x[rows])

    for size in (3, 6):
        pyro.clear_param_store()
        guide = RecursiveMixtureGuide(model, 2, plate="data", schedule=Schedule(first=1))
        guide.prepare(x, size)
        guide.end_stage()
        before = guide.component(1).free_local.detach().clone()
        place_component(Program(model, guide, (x, size)), guide)
        after = guide.component(1).free_local
        assert (after != before).any(-1).all()
        if size == 3:  # around the first component, with its scales
            assert (after[:, 1] - guide.component(0).free_local[:, 1]).abs().max() < 1e-12


def test_a_dropped_component_is_tried_again_and_skipped_by_cycles() -> None:
    schedule = Schedule(first=1, propose=2, refine=2, cycles=1, cycle=1, joint=1, patience=2)
    guide = RecursiveMixtureGuide(bimodal, 3, schedule=schedule)
    guide.prepare()
    guide.end_stage()
    for failures in range(3):
        assert guide.stage[:2] == ("propose", 1) and guide.progress[2] == failures
        assert guide.starts_component and guide.members == (0,)
        guide.end_stage()
        assert guide.stage[:2] == ("refine", 1) and guide.members == (0, 1)
        guide.drop(retry=True)
    # Growth has ended: nothing proposes the third one, and cycles are over the first alone.
    assert [stage[:2] for stage in kinds(guide)] == [("cycle", 0), ("joint", None)]
    assert guide.members == (0,)


def test_without_a_hope_growth_ends_at_once() -> None:
    guide = RecursiveMixtureGuide(bimodal, 3, schedule=Schedule(patience=5))
    for _ in range(4):
        guide.end_stage()
    assert guide.stage[:2] == ("refine", 2)
    guide.drop(retry=False)
    assert guide.stage.kind == "joint" and guide.members == (0, 1)


@pytest.mark.parametrize("count", [2, 3])
@pytest.mark.parametrize("kind", ["shared", "linear"])
def test_a_dropped_component_loses_its_weight(count: int, kind: str) -> None:
    x = torch.randn(4, 2)
    guide = RecursiveMixtureGuide(
        rows_model,
        [AmortizedGuide(rows_model, nn.Linear(2, 2)) for _ in range(count)],
        weights=kind,
    )
    guide.prepare(x)
    start = [parameter.detach().clone() for parameter in guide.weights.parameters()]
    with torch.no_grad():
        for parameter in guide.weights.parameters():
            parameter.add_(1.0)
    guide.end_stage()
    guide.end_stage()
    guide.drop(retry=True)
    per_logit = len(start) // (count - 1)
    for place, parameter in enumerate(guide.weights.parameters()):
        moved = 0.0 if place < per_logit else 1.0
        torch.testing.assert_close(parameter.detach(), start[place] + moved)


def test_a_retry_gives_an_encoder_new_weights() -> None:
    encoders = [nn.Sequential(nn.Linear(2, 4), nn.Tanh(), nn.Linear(4, 2)) for _ in range(2)]
    components = [AmortizedGuide(rows_model, encoder) for encoder in encoders]
    guide = RecursiveMixtureGuide(rows_model, components)
    guide.prepare(torch.randn(4, 2))
    guide.end_stage()
    guide.end_stage()
    before = copy.deepcopy(encoders)
    guide.drop(retry=True)
    assert torch.equal(before[0][0].weight, encoders[0][0].weight)
    assert not torch.equal(before[1][0].weight, encoders[1][0].weight)


def train(guide: Any, loss: Any, steps: int, model: Callable = bimodal, *args: Any) -> list[str]:
    """Train by Adam; return the kinds of the stages of all steps."""
    svi = SVI(model, guide, pyro.optim.Adam({"lr": 0.05}), loss)
    met = []
    for _ in range(steps):
        met.append(guide.stage.kind)
        svi.step(*args)
    return met


def test_loss_never_advances() -> None:
    guide = RecursiveMixtureGuide(bimodal, 2, schedule=Schedule(first=2, propose=2, refine=2))
    loss = RecursiveMixture_ELBO(2)
    for _ in range(8):
        progress = guide.progress.tolist()
        loss.loss(bimodal, guide)
        with torch.no_grad():
            loss.differentiable_loss(bimodal, guide)
        if len(guide.members) > 1:
            loss.gain(bimodal, guide)
        Trace_ELBO().loss(bimodal, guide)
        assert guide.progress.tolist() == progress
        train(guide, loss, 1)


def test_the_step_of_the_acceptance_test_moves_nothing() -> None:
    guide = RecursiveMixtureGuide(bimodal, 2, schedule=Schedule(first=2, propose=2, refine=3))
    loss = RecursiveMixture_ELBO(2)
    train(guide, loss, 6)
    assert guide.stage.kind == "refine" and guide.stage_steps_left == 1
    for parameter in guide.parameters():
        parameter.grad = None
    value = loss.differentiable_loss(bimodal, guide)
    value.backward()  # as a loop of one's own would
    assert guide.stage.kind != "refine"
    assert all(parameter.grad is None for parameter in guide.parameters())


def rows_model(x: Tensor) -> None:
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Normal(0.0, 2.0))
        loc = pyro.param("loc", lambda: torch.tensor(0.3))
        pyro.sample("x", dist.Normal(z**2 + loc, 1.0), obs=x[:, 0])


def grown(encoders: bool, update: str, weights: str | None = None) -> set[Any]:
    """Train through all stages, and see that no step moves what it does not train.

    Return where a weight has moved that a stage holds.
    """
    x = torch.randn(6, 2).abs() + 1
    pyro.clear_param_store()
    schedule = Schedule(first=4, propose=4, refine=5, cycles=1, cycle=4, joint=3, draws=64)
    components: Any = 3
    if encoders:
        components = [AmortizedGuide(rows_model, nn.Linear(2, 2)) for _ in range(3)]
    options = {} if encoders else {"plate": "data"}
    guide = RecursiveMixtureGuide(
        rows_model, components, schedule=schedule, weights=weights, **options
    )
    guide.prepare(x)
    svi = SVI(
        rows_model,
        guide,
        pyro.optim.Adam({"lr": 0.05}),
        RecursiveMixture_ELBO(2, update=update),
    )

    def snapshot() -> dict[str, Tensor]:
        found = {name: p.detach().clone() for name, p in guide.named_parameters()}
        if "loc" in pyro.get_param_store():
            found["loc"] = pyro.param("loc").detach().clone()
        return found

    wrong: set[Any] = set()
    svi.step(x)
    for _ in range(guide.num_steps - 1):
        stage, number, test = guide.stage, guide.steps_taken, guide.stage_steps_left == 1
        before = snapshot()
        svi.step(x)
        moved = {name for name, value in snapshot().items() if not torch.equal(value, before[name])}
        owners = {_owner(name) for name in moved}
        if stage.kind == "refine" and test:
            assert not moved
        elif stage.component is None:
            assert owners == {"model", "weights", 0, 1, 2}
        else:
            trains_model = update == "simultaneous" or (update == "alternating" and number % 2)
            trains_guide = update != "alternating" or number % 2 == 0
            weighed = stage.kind in ("refine", "cycle") and stage.component > 0 and trains_guide
            expected = {"model"} if trains_model else set()
            expected |= {stage.component} if trains_guide else set()
            expected |= {"weights"} if weighed else set()
            new = {stage.component} if number == 0 else set()  # put somewhere, perhaps
            assert owners - new == expected - new
            places = {name for name in moved if _owner(name) == "weights"}
            wrong |= {(stage, name) for name in places if _place(name) != stage.component - 1}
    assert guide.members == (0, 1, 2)
    return wrong


def _owner(name: str) -> Any:
    parts = name.split(".")
    return int(parts[1]) if parts[0] == "components" else "weights" if len(parts) > 1 else "model"


def _place(name: str) -> int:
    """Return the number of a logit from its parameter's name."""
    return int(next(c for c in name if c.isdigit()))


@pytest.mark.parametrize("update", ["simultaneous", "alternating", "guide"])
@pytest.mark.parametrize(
    ("encoders", "weights"), [(False, None), (True, None), (True, "shared"), (False, "shared")]
)
@pytest.mark.usefixtures("accepting")
def test_what_is_held_stays_bitwise_the_same(
    encoders: bool, weights: str | None, update: str
) -> None:
    grown(encoders, update, weights)


@pytest.mark.usefixtures("accepting")
@pytest.mark.parametrize(("encoders", "weights"), [(False, None), (True, None), (True, "shared")])
def test_held_weights_stay_bitwise_the_same(encoders: bool, weights: str | None) -> None:
    assert grown(encoders, "guide", weights) == set()


def test_an_exact_first_component_ends_growth() -> None:
    """Another component cannot gain: it is dropped ``1 + patience`` times, the first one kept."""

    def conjugate() -> None:
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        pyro.sample("x", dist.Normal(z, 1.0), obs=torch.tensor(1.1))

    schedule = Schedule(first=1, propose=10, refine=10, patience=2, draws=2000)
    guide = RecursiveMixtureGuide(conjugate, 3, schedule=schedule)
    guide.prepare()
    exact = torch.tensor([0.55, -0.5 * math.log(2)])
    guide.component(0).free_global.data.copy_(exact)
    guide.end_stage()
    loss = RecursiveMixture_ELBO(4)
    met = train(guide, loss, 60, conjugate)
    assert met == (["propose"] * 10 + ["refine"] * 10) * 3
    assert guide.members == (0,) and guide.stage.kind == "joint"
    assert torch.equal(guide.component(0).free_global, exact)
    assert train(guide, loss, 1, conjugate) == ["joint"]
    assert [(trial.component, trial.is_kept) for trial in guide.trials] == [(1, False)] * 3
    assert all(trial.gain.mean < 2 * trial.gain.standard_error for trial in guide.trials)


def test_min_gain_ends_growth() -> None:
    """The ceiling of a proposal decides whether there is another one."""
    for min_gain, kind in ((0.0, "propose"), (1e3, "joint")):
        pyro.clear_param_store()
        schedule = Schedule(
            first=2, propose=2, refine=2, confidence=1e9, min_gain=min_gain, draws=100
        )
        guide = RecursiveMixtureGuide(bimodal, 2, schedule=schedule)
        train(guide, RecursiveMixture_ELBO(2), 6)
        assert guide.stage.kind == kind and guide.members == (0,)


def test_the_holdout_decides() -> None:
    """Training data need the second mode, those of the test do not."""

    def model(x: Tensor, mass: Tensor) -> None:
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(0.0, 3.0))
            parts = torch.stack([log_normal(z, -2.0, 0.5), log_normal(z, 2.0, 0.5)], -1)
            masses = torch.stack([1 - mass, mass]).log()
            pyro.factor("f", (parts + masses).logsumexp(-1) - log_normal(z, 0.0, 3.0))

    x = torch.zeros(3, 1)
    needed, useless = torch.tensor(0.5), torch.tensor(1e-12)
    kept = []
    for holdout in (None, (x, useless), (x, needed)):
        pyro.clear_param_store()
        guide = RecursiveMixtureGuide(
            model, 2, plate="data", schedule=Schedule(first=1, propose=1, refine=1, draws=600)
        )
        guide.prepare(x, needed)
        guide.end_stage()
        guide.end_stage()
        with torch.no_grad():
            for m, loc in enumerate((-2.0, 2.0)):
                place = torch.tensor([loc, math.log(0.5)]).expand(3, 2)
                guide.component(m).free_local.copy_(place)
        loss = RecursiveMixture_ELBO(2, holdout=holdout)
        train(guide, loss, 1, model, x, needed)
        kept.append(guide.members)
    assert kept == [(0, 1), (0,), (0, 1)]


# --- Checkpoints


def growing_program(count: int = 3) -> dict[str, Any]:
    torch.manual_seed(3)
    schedule = Schedule(first=2, propose=2, refine=3, joint=2, draws=64)
    components = [AmortizedGuide(rows_model, nn.Linear(2, 2)) for _ in range(count)]
    guide = RecursiveMixtureGuide(rows_model, components, schedule=schedule)
    return {
        "model": rows_model,
        "guide": guide,
        "data": (torch.randn(12, 2),),
        "loss": RecursiveMixture_ELBO(2),
    }


@pytest.mark.usefixtures("accepting")
def test_interrupt_and_resume_equals_no_interrupt(tmp_path: Path) -> None:
    path, other = tmp_path / "whole.pt", tmp_path / "broken.pt"
    expected = outcome(run(growing_program, checkpoint=path, epochs=5), path)
    for call in (4, 8, 13):
        other.unlink(missing_ok=True)
        with pytest.raises(KeyboardInterrupt):
            run(growing_program, checkpoint=other, epochs=5, transform=interrupt_at(call))
        pyro.set_rng_seed(99)
        resumed = run(growing_program, checkpoint=other, epochs=5, resume=True, seed=None)
        assert same(outcome(resumed, other), expected), f"interrupted in call {call}"


@pytest.mark.usefixtures("accepting")
def test_progress_is_part_of_the_state() -> None:
    arguments = growing_program()
    guide, (x,) = arguments["guide"], arguments["data"]
    train(guide, RecursiveMixture_ELBO(2), 8, rows_model, x)
    assert guide.stage[:2] == ("propose", 2) and guide.members == (0, 1)
    state = guide.state_dict()
    for other in (copy.deepcopy(guide), growing_program()["guide"]):
        pyro.clear_param_store()
        other.prepare(x)
        other.load_state_dict(state)
        assert (other.stage, other.steps_taken, other.members) == (
            guide.stage,
            guide.steps_taken,
            guide.members,
        )


# --- Encoders


class Told(nn.Module):
    """An encoder that records what it is told of earlier components."""

    def __init__(self, extra: int) -> None:
        super().__init__()
        self.linear, self.told = nn.Linear(2 + extra, 2), []

    def forward(self, x: Tensor, *extra: Tensor) -> Tensor:
        self.told.append(extra)
        return self.linear(torch.cat([x, *extra], -1))


@pytest.mark.usefixtures("accepting")
def test_conditional_encoders() -> None:
    x = torch.randn(5, 2)
    encoders = [Told(2 * m) for m in range(3)]
    components = [AmortizedGuide(rows_model, encoder) for encoder in encoders]
    schedule = Schedule(first=2, propose=2, refine=2, joint=9)
    guide = RecursiveMixtureGuide(rows_model, components, conditional=True, schedule=schedule)
    guide.prepare(x)
    loss = RecursiveMixture_ELBO(2)
    train(guide, loss, 10, rows_model, x)
    assert guide.stage.kind == "joint"
    guide(x)
    first, second, third = (encoder.told[-1] for encoder in encoders)
    assert first == () and second[0].shape == (5, 2) and third[0].shape == (5, 4)
    assert not second[0].requires_grad and not third[0].requires_grad
    outputs = [encoders[0](x), encoders[1](x, *second)]
    torch.testing.assert_close(third[0], torch.cat(outputs, -1))
    # No component's objective moves an earlier one: even if they are not held.
    for parameter in guide.parameters():
        parameter.grad = None
    mixture = guide.posterior(guide.groups[0], guide.new_call((x,), {}))
    mixture.parameters[2].sum().backward()
    grads = [encoder.linear.weight.grad for encoder in encoders]
    assert grads[0] is None or not grads[0].any()
    assert grads[1] is None or not grads[1].any()
    assert grads[2].abs().sum() > 0
    # What a dropped component would have said is zeros.
    guide.progress[4] = 0
    guide(x)
    torch.testing.assert_close(encoders[2].told[-1][0], torch.cat([outputs[0], 0 * outputs[0]], -1))


@pytest.mark.usefixtures("accepting")
def test_a_trunk_trains_first_and_jointly_only() -> None:
    class Trunk(nn.Linear):
        calls = 0

        def forward(self, x: Tensor) -> Tensor:
            Trunk.calls += 1
            return super().forward(x)

    x, trunk = torch.randn(5, 2), Trunk(2, 2)
    schedule = Schedule(first=3, propose=3, refine=3, cycles=1, cycle=2, joint=3)
    components = [AmortizedGuide(rows_model, nn.Linear(2, 2)) for _ in range(2)]
    guide = RecursiveMixtureGuide(rows_model, components, trunk=trunk, schedule=schedule)
    guide.prepare(x)
    Trunk.calls = 0
    guide(x)
    assert Trunk.calls == 1
    svi = SVI(rows_model, guide, pyro.optim.Adam({"lr": 0.05}), RecursiveMixture_ELBO(2))
    for _ in range(guide.num_steps):
        kind, before = guide.stage.kind, trunk.weight.detach().clone()
        svi.step(x)
        assert torch.equal(before, trunk.weight) == (kind not in ("first", "joint")), kind


@pytest.mark.usefixtures("accepting")
def test_flows_grow_too() -> None:
    def model() -> None:
        z = pyro.sample("z", dist.Normal(torch.zeros(2), 3.0).to_event(1))
        pyro.sample("x", dist.Normal((z**2).sum(-1), 1.0), obs=torch.tensor(4.0))

    flows = [FlowGuide(model, "coupling", hidden=(8,)) for _ in range(2)]
    schedule = Schedule(first=2, propose=2, refine=4)
    guide = RecursiveMixtureGuide(model, flows, schedule=schedule)
    guide.prepare()
    svi = SVI(model, guide, pyro.optim.Adam({"lr": 0.05}), RecursiveMixture_ELBO(4))
    for _ in range(8):
        stage, test = guide.stage, guide.stage.kind == "refine" and guide.stage_steps_left == 1
        before = [copy.deepcopy(flow.state_dict()) for flow in flows]
        svi.step()
        moved = [
            any(not torch.equal(value, old[name]) for name, value in flow.state_dict().items())
            for flow, old in zip(flows, before, strict=True)
        ]
        assert moved == [m == stage.component and not test for m in range(2)]
    assert guide.members == (0, 1)


# --- Options


def test_options_are_checked() -> None:
    for wrong in (
        {"objective": "rme"},
        {"proposal": "other"},
        {"update": "none"},
        {"weights": "1"},
    ):
        with pytest.raises(ValueError, match="must be one of"):
            RecursiveMixture_ELBO(2, **wrong)
    with pytest.raises(ValueError, match="needs all draws of a row at once"):
        RecursiveMixture_ELBO(2, objective=Clamped(1.0), vectorize_particles=False)
    RecursiveMixture_ELBO(1, objective=Clamped(1.0), vectorize_particles=False)
    for name in ("first", "propose", "refine"):
        with pytest.raises(ValueError, match=f"{name} must be positive"):
            Schedule(**{name: 0})
    with pytest.raises(ValueError, match="draws must not be negative"):
        Schedule(draws=-1)
    with pytest.raises(ValueError, match="at least 2 components, got 1"):
        RecursiveMixtureGuide(bimodal, 1)
    with pytest.raises(ValueError, match=r"epsilon must lie in \[0.001, 0.999\]"):
        RecursiveMixtureGuide(bimodal, 2, epsilon=1.0)
    with pytest.raises(TypeError, match="AmortizedGuide or FlowGuide, got AutoNormal"):
        RecursiveMixtureGuide(bimodal, [AutoNormal(bimodal), AutoNormal(bimodal)])
    with pytest.raises(ValueError, match="conditional=True needs AmortizedGuide"):
        RecursiveMixtureGuide(bimodal, 2, conditional=True)
    with pytest.raises(TypeError, match="train other mixtures with Stratified_ELBO"):
        RecursiveMixture_ELBO(2).differentiable_loss(bimodal, MixtureGuide(bimodal, 2))


@pytest.mark.parametrize("weights", ["line_search", "corrective"])
def test_weights_that_cannot_be_set_are_refused_at_the_first_step(weights: str) -> None:
    x = torch.randn(4, 2)
    components = [AmortizedGuide(rows_model, nn.Linear(2, 2)) for _ in range(3)]
    guide = RecursiveMixtureGuide(rows_model, components)
    with pytest.raises(ValueError, match="only where all rows share one vector"):
        RecursiveMixture_ELBO(2, weights=weights).differentiable_loss(rows_model, guide, x)


@pytest.mark.parametrize("weights", ["line_search", "corrective"])
@pytest.mark.parametrize("count", [2, 3])
def test_weights_are_set_to_their_optimum(weights: str, count: int) -> None:
    masses = torch.tensor([0.5, 0.2, 0.3])[:count]
    masses, modes = masses / masses.sum(), torch.tensor([-4.0, 0.0, 4.0])[:count]

    def model() -> None:
        z = pyro.sample("z", dist.Normal(0.0, 4.0))
        parts = log_normal(z[..., None], modes, 0.5) + masses.log()
        pyro.factor("f", parts.logsumexp(-1) - log_normal(z, 0.0, 4.0))

    schedule = Schedule(first=1, propose=1, refine=1, draws=4000)
    guide = RecursiveMixtureGuide(model, count, schedule=schedule)
    guide.prepare()
    with torch.no_grad():
        for m in range(count):
            guide.component(m).free_global.copy_(torch.tensor([modes[m], math.log(0.5)]))
    guide.progress.copy_(torch.tensor([2 * (count - 1), 0, 0, *[1] * count]))
    if weights == "line_search":  # the others have the right proportions
        guide.set_log_weights(
            torch.cat([0.9 * masses[:-1] / masses[:-1].sum(), masses.new_tensor([0.1])]).log()
        )
    RecursiveMixture_ELBO(4, weights=weights).differentiable_loss(model, guide)
    found = guide.component_weights().detach()
    torch.testing.assert_close(found, masses, atol=5e-3, rtol=0)
    assert len(guide.members) == count


# --- What is found

# Masses, locations and scales; the divergence of the best single normal.
TARGETS = {
    "separated": ((0.5, -3.0, 0.6), (0.5, 3.0, 0.6)),
    "overlapping": ((0.7, -1.2, 0.6), (0.3, 1.2, 0.8)),
    "minor mode": ((0.9, 0.0, 1.0), (0.1, 4.0, 0.5)),
    "scale mixture": ((0.5, 0.0, 0.4), (0.5, 0.0, 2.0)),
}
ALONE = {"separated": 0.6931, "overlapping": 0.2105, "minor mode": 0.0985, "scale mixture": 0.1627}
WIDE = torch.linspace(-15, 15, 6001, dtype=torch.float64)


def log_target(parts: Sequence[Sequence[float]], z: Tensor) -> Tensor:
    masses, locs, scales = torch.tensor(parts).T
    return (log_normal(z[..., None], locs, scales) + masses.log()).logsumexp(-1)


def divergence(parts: Sequence[Sequence[float]], places: Tensor, log_weights: Tensor) -> Tensor:
    log_q = (log_normal(WIDE[:, None], places[:, 0], places[:, 1].exp()) + log_weights).logsumexp(
        -1
    )
    return (log_q.exp() * (log_q - log_target(parts, WIDE))).sum() * (WIDE[1] - WIDE[0])


def minimise(
    function: Callable[[Tensor], Tensor], starts: Sequence[Tensor]
) -> tuple[float, Tensor]:
    """Return the lowest of the minima that a deterministic optimiser finds, and where it is."""
    found = []
    for start in starts:
        point = start.clone().requires_grad_()
        lbfgs = torch.optim.LBFGS([point], max_iter=200, line_search_fn="strong_wolfe")

        def closure(point: Tensor = point, lbfgs: Any = lbfgs) -> Tensor:
            lbfgs.zero_grad()
            value = function(point)
            value.backward()
            return value

        lbfgs.step(closure)
        found.append((function(point).item(), point.detach()))
    return min(found, key=lambda pair: pair[0])


def grow(
    model: Callable, places: Sequence[Tensor], loss: Any, steps: int, **options: Any
) -> RecursiveMixtureGuide:
    """Train the second component from a given place beside a given first one."""
    schedule = Schedule(first=1, propose=steps, refine=steps, **options)
    guide = RecursiveMixtureGuide(model, len(places), schedule=schedule)
    guide.prepare()
    guide.end_stage()
    guide.count_step()  # what the first step does is choose another place
    for m, place in enumerate(places):
        guide.component(m).free_global.data.copy_(place)
    decay = 0.01 ** (1 / (2 * steps))

    def rates(name: str) -> dict[str, float]:
        return {"lr": 0.5 if "weights" in name else 0.05, "lrd": decay}

    svi = SVI(model, guide, pyro.optim.ClippedAdam(rates), loss)
    for _ in range(2 * steps - 1):
        svi.step()
    assert torch.equal(guide.component(0).free_global, places[0])
    return guide


def as_model(parts: Sequence[Sequence[float]]) -> Callable:
    def model() -> None:
        z = pyro.sample("z", dist.Normal(0.0, 4.0))
        pyro.factor("f", log_target(parts, z) - log_normal(z, 0.0, 4.0))

    return model


def best_single(parts: Sequence[Sequence[float]]) -> tuple[float, Tensor]:
    starts = [torch.tensor([loc, 0.0]) for loc in (-3.0, -1.0, 0.0, 1.0, 3.0)]
    return minimise(lambda place: divergence(parts, place[None], torch.zeros(1)), starts)


def reached(guide: RecursiveMixtureGuide, parts: Sequence[Sequence[float]]) -> float:
    """Return the divergence of the members."""
    places = torch.stack([guide.component(m).free_global.detach() for m in guide.members])
    return divergence(parts, places, guide.component_weights().detach().log()).item()


# The objective; the divergences that it ends with by quadrature, on the four targets.
TABLE = [
    ("exact", (0.0000, 0.0947, 0.0013, 0.0561)),
    ("skew", (0.0000, 0.1016, 0.0020, 0.0612)),
    (Clamped(0.5), (0.0000, 0.1124, 0.0826, 0.0770)),
    ("relbo", (0.6931, 0.2094, 0.0929, 0.1627)),
]
CELLS = [
    pytest.param(objective, name, value, id=f"{objective}-{name}")
    for objective, row in TABLE
    for name, value in zip(TARGETS, row, strict=True)
]
STARTS = {
    "separated": (2.0, -0.5),
    "overlapping": (-2.0, -0.5),
    "minor mode": (3.0, -0.5),
    "scale mixture": (0.3, -0.5),
}


@pytest.mark.slow
@pytest.mark.parametrize(("objective", "name", "expected"), CELLS)
def test_divergence_of_two_components(objective: Any, name: str, expected: float) -> None:
    """The exact objective wins; the boosting objective has no optimum here, and gains nothing."""
    parts = TARGETS[name]
    single, first = best_single(parts)
    assert single == pytest.approx(ALONE[name], abs=1e-4)
    proposal = "skew" if objective == "exact" else objective
    loss = RecursiveMixture_ELBO(32, objective=objective, proposal=proposal, update="guide")
    guide = grow(as_model(parts), [first, torch.tensor(STARTS[name])], loss, 300)
    found = reached(guide, parts)
    if objective == "relbo":
        assert found > 0.9 * single
    elif isinstance(objective, Clamped):
        # With 32 draws the clamp is a soft switch, and may end nearer to the optimum.
        assert found < expected + 0.002
    else:
        assert found == pytest.approx(expected, abs=0.001)


@pytest.mark.slow
@pytest.mark.parametrize("mass", [0.5, 0.3])
def test_weight_and_gain_of_a_second_mode(mass: float) -> None:
    parts = ((1 - mass, -3.0, 0.6), (mass, 3.0, 0.6))
    first = torch.tensor([-3.0, math.log(0.6)])
    alone = divergence(parts, first[None], torch.zeros(1)).item()
    assert alone == pytest.approx(-math.log(1 - mass), abs=1e-4)
    loss = RecursiveMixture_ELBO(16, update="guide")
    guide = grow(as_model(parts), [first, torch.tensor([1.5, 0.0])], loss, 200)
    assert reached(guide, parts) < 1e-3
    assert guide.component_weights().detach()[1].item() == pytest.approx(mass, abs=0.02)
    gain = loss.gain(as_model(parts), guide)
    assert gain.mean == pytest.approx(alone, abs=0.05)


@pytest.mark.slow
def test_a_squared_latent_gains_log_2() -> None:
    """A hundred observations make both modes 0.0025 wide."""
    x = torch.full((100,), 4.0)

    def model() -> None:
        z = pyro.sample("z", dist.Normal(0.0, 5.0))
        with pyro.plate("data", 100):
            pyro.sample("x", dist.Normal(z**2, 0.1), obs=x)

    first = torch.tensor([2.0, math.log(0.0025)])
    loss = RecursiveMixture_ELBO(8, update="guide")
    guide = grow(model, [first, torch.tensor([-1.0, -4.0])], loss, 400)
    gain = loss.gain(model, guide)
    assert guide.members == (0, 1)
    assert guide.component(1).free_global[0].item() == pytest.approx(-2.0, abs=1e-3)
    assert gain.mean == pytest.approx(math.log(2), abs=max(4.5 * gain.standard_error, 0.01))


@pytest.mark.slow
def test_a_correlated_normal_by_two_without_correlation() -> None:
    """The best second component beside the best first one, by quadrature in two dimensions."""
    rho = 0.9
    target = dist.MultivariateNormal(torch.zeros(2), torch.tensor([[1.0, rho], [rho, 1.0]]))
    axis = torch.linspace(-5, 5, 121)
    plane = torch.stack(torch.meshgrid(axis, axis, indexing="ij"), -1)
    area = (axis[1] - axis[0]) ** 2

    def missing(places: Tensor, log_weights: Tensor) -> Tensor:
        normals = dist.Normal(places[:, :2], places[:, 2:].exp()).to_event(1)
        log_q = (normals.log_prob(plane[:, :, None]) + log_weights).logsumexp(-1)
        return (log_q.exp() * (log_q - target.log_prob(plane))).sum() * area

    first = torch.tensor([0.0, 0.0, 0.5 * math.log(1 - rho**2), 0.5 * math.log(1 - rho**2)])
    alone = missing(first[None], torch.zeros(1)).item()
    assert alone == pytest.approx(-0.5 * math.log(1 - rho**2), abs=1e-4)

    def of_second(point: Tensor) -> Tensor:
        return missing(torch.stack([first, point[:4]]), stick_breaking(point[4:]))

    start = torch.tensor([0.7, 0.7, -0.7, -0.7])
    best, _ = minimise(of_second, [torch.cat([start, torch.zeros(1)])])

    def model() -> None:
        z = pyro.sample("z", dist.Normal(torch.zeros(2), 2.0).to_event(1))
        prior = dist.Normal(torch.zeros(2), 2.0).to_event(1)
        pyro.factor("f", target.log_prob(z) - prior.log_prob(z))

    guide = grow(model, [first, start], RecursiveMixture_ELBO(32, update="guide"), 300)
    places = torch.stack([guide.component(m).free_global.detach() for m in range(2)])
    found = missing(places, guide.component_weights().detach().log()).item()
    assert best < alone - 0.2
    assert found == pytest.approx(best, abs=0.005)


@pytest.mark.parametrize("name", ["separated", "minor mode"])
def test_a_proposal_starts_in_the_mode_that_is_missing(name: str) -> None:
    parts = TARGETS[name]
    _, first = best_single(parts)
    places = []
    for _ in range(8):
        pyro.clear_param_store()
        guide = RecursiveMixtureGuide(as_model(parts), 2, schedule=Schedule(first=1))
        guide.prepare()
        guide.component(0).free_global.data.copy_(first)
        guide.end_stage()
        place_component(Program(as_model(parts), guide, ()), guide)
        places.append(guide.component(1).free_global[0].detach())
        assert torch.equal(guide.component(0).free_global, first)
    distance = (torch.stack(places) - parts[1][1]).abs()
    assert (distance < 1.5).sum() >= 6


def test_the_exact_gradient_is_exact_for_parameters_that_rows_share() -> None:
    """A row counts as much as the component weighs in it: the bound's own gradient, rescaled."""

    def model(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(0.0, 1.3))
            pyro.sample("x", dist.Normal(z**2, 0.8), obs=x[:, 0])

    x = torch.tensor([[-1.0], [1.0]])
    weights = torch.nn.Linear(1, 1)
    with torch.no_grad():
        weights.weight.fill_(3.0)
    encoders = [torch.nn.Linear(1, 2) for _ in range(2)]
    components = [AmortizedGuide(model, encoder) for encoder in encoders]
    schedule = Schedule(first=1, propose=1, refine=9)
    guide = RecursiveMixtureGuide(model, components, weights=weights, schedule=schedule)
    guide.prepare(x)
    guide.end_stage(), guide.end_stage()
    gradients = []
    for loss in (RecursiveMixture_ELBO(40_000), Stratified_ELBO(40_000, estimator="stl")):
        value = loss.differentiable_loss(model, guide, x)
        found = torch.autograd.grad(value, list(encoders[1].parameters()))
        gradients.append(torch.cat([part.flatten() for part in found]))
    share = guide.component_weights(x)[:, 1].mean()
    error = (gradients[1] - share * gradients[0]).abs().max()
    assert error < 0.12  # of about 2: four standard errors of 40,000 draws


@pytest.mark.parametrize("scale", [0.3, 1.0])
def test_a_scaled_program_can_grow(scale: float) -> None:
    def model() -> None:
        with poutine.scale(scale=scale):
            bimodal()

    guide = RecursiveMixtureGuide(bimodal, 2, schedule=Schedule(first=1, propose=2, refine=2))
    guide.prepare()
    scaled = poutine.scale(guide, scale)
    losses = [RecursiveMixture_ELBO(2).loss_and_grads(model, scaled) for _ in range(5)]
    assert all(math.isfinite(loss) for loss in losses)


def test_a_search_stays_away_from_where_the_model_overflows() -> None:
    def model() -> None:
        z = pyro.sample("z", dist.Normal(0.0, 60.0))
        pyro.sample("x", dist.Poisson(z.exp()), obs=torch.tensor(3.0))

    guide = RecursiveMixtureGuide(model, 2, schedule=Schedule(first=1, propose=2, refine=2))
    guide.prepare()
    guide.end_stage()
    with torch.no_grad():
        guide.component(0).free_global.copy_(torch.tensor([1.1, -0.5]))
    place_component(Program(model, guide), guide)
    assert guide.component(1).free_global[0] < 10


def test_evaluation_in_inference_mode_leaves_training_alone() -> None:
    guide = MixtureGuide(bimodal, 2)
    guide.prepare()
    with torch.inference_mode():
        Stratified_ELBO(2).loss(bimodal, guide)
    assert Stratified_ELBO(2).loss_and_grads(bimodal, guide) > -1e9
