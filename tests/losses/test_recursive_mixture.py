"""The loss of growing mixtures: gradients of each stage by quadrature, and what a step changes.

Where draws are pinned to nodes, equality is to rounding.
"""

import logging
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from functools import partial
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.infer import SVI, Trace_ELBO
from torch import Tensor, nn

from pyro_recursive import (
    MISELBO,
    SIWAE_ELBO,
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
from pyro_recursive.tracing.handlers import KLWarmup
from pyro_recursive.tracing.program import Program
from tests.models.small import normal_global, normal_rows, ring, square_rows
from tests.oracles.bitwise import same
from tests.oracles.mixtures import (
    ALIKE,
    LOGITS,
    PLACES,
    UNLIKE,
    Derivatives,
    assert_same,
    bimodal,
    derivatives,
    expectation,
    grid,
    log_component,
    log_joint,
    mixture_elbo,
    pinned,
    put,
    setting,
    two_modes,
)

FIRST, PROPOSE, REFINE, JOINT = (0, 1, 0, 1, 0), (1, 1, 0, 1, 0), (2, 1, 0, 1, 1), (3, 1, 0, 1, 1)
STAGES = {"first": FIRST, "propose": PROPOSE, "refine": REFINE, "joint": JOINT}
LATER = pytest.mark.parametrize("progress", [PROPOSE, REFINE, JOINT], ids=list(STAGES)[1:])
LOGIT = LOGITS[:1]
SHARE = stick_breaking(LOGIT)[1].exp()
growing = partial(setting, kind=RecursiveMixtureGuide)


def mixture_derivatives(kl: float = 1.0) -> Derivatives:
    """Differentiate the ELBO of the mixture."""
    return derivatives(lambda t, p, logit: mixture_elbo(t, p, stick_breaking(logit), kl), LOGIT)


def alone_derivatives(kl: float = 1.0) -> Derivatives:
    """Differentiate the ELBO of the first component."""
    return derivatives(lambda t, p, _: mixture_elbo(t, p[:1], torch.zeros(1), kl), LOGIT)


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


def gradients_of(value: Tensor, inputs: Any) -> tuple[Tensor, ...]:
    return torch.autograd.grad(value, list(inputs), allow_unused=True, materialize_grads=True)


def cases() -> Iterator[tuple[dict[str, Any], tuple[int, ...], Sequence[Tensor | None]]]:
    """Yield options of the loss, the progress, and minus the loss's derivatives by quadrature."""
    whole, alone = mixture_derivatives(), alone_derivatives()
    exact, guide_only = whole.second / SHARE, {"update": "guide"}
    yield {}, FIRST, (alone.theta, alone.first, None, None)  # an ELBO with one component
    yield {}, REFINE, (whole.theta, None, exact, whole.logits)
    yield guide_only, REFINE, (None, None, exact, whole.logits)
    yield guide_only, PROPOSE, (None, None, climbed(skewed(0.1)), None)
    yield {"update": "alternating"}, (2, 2, 0, 1, 1), (None, None, exact, whole.logits)
    yield {"update": "alternating"}, (2, 3, 0, 1, 1), (whole.theta, None, None, None)
    for update in ("simultaneous", "alternating", "guide"):
        yield {"update": update}, JOINT, whole
    for objective, log_r in OBJECTIVES.items():
        options = {"objective": objective, "proposal": objective}
        yield options, REFINE, (whole.theta, None, climbed(log_r), whole.logits)
        yield options, PROPOSE, (alone.theta, None, climbed(log_r), None)


@pytest.mark.quick("unlike")
@FAMILIES
def test_gradients_of_each_stage(families: tuple[str, str]) -> None:
    """The joint stage is the stratified ELBO; exact refinement is its gradient over the weight."""
    eps, weight = grid(1)
    for options, progress, expected in cases():
        s = growing(len(weight), families=families, progress=progress)
        assert_same(s.gradients(RecursiveMixture_ELBO(1, **options), eps[0], weight), expected)


@pytest.mark.parametrize("progress", [PROPOSE, REFINE], ids=["propose", "refine"])
def test_the_clamp_is_of_each_row(progress: tuple[int, ...]) -> None:
    """One row's component is beyond the clamp, and climbs its ELBO; the other one's is not."""
    noise = torch.special.ndtri((torch.arange(200) + 0.5) / 200)
    gradients = {}
    objectives = {"clamped": Clamped(0.5), "free": Clamped(1e6), "elbo": "elbo"}
    for name, objective in objectives.items():
        s = growing(2, progress=progress)
        s.guide.component(1).free_local.data[0] = torch.tensor([1.1, -0.6])  # beside the first
        loss = RecursiveMixture_ELBO(200, objective=objective, proposal=objective)
        both = noise.repeat_interleave(2)  # the model has draws of the first component
        s.gradients(loss, both[:, None].expand(-1, 2), torch.ones(2))
        gradients[name] = s.guide.component(1).free_local.grad
    torch.testing.assert_close(gradients["clamped"][0], gradients["free"][0])
    torch.testing.assert_close(gradients["clamped"][1], gradients["elbo"][1])
    assert (gradients["free"] - gradients["elbo"]).abs().amin(0).max() > 0.1


@FAMILIES
@pytest.mark.parametrize("objective", ["exact", "skew"])
@LATER
def test_looped_equals_vectorised(
    progress: tuple[int, ...], objective: str, families: tuple[str, str]
) -> None:
    noise, results = torch.randn(6, 5), []
    for vectorize in (True, False):
        s = growing(5, families=families, progress=progress)
        loss = RecursiveMixture_ELBO(3, objective=objective, vectorize_particles=vectorize)
        with pinned(noise):
            value = loss.differentiable_loss(s.model, s.guide)
        results.append((value.detach(), *gradients_of(value, s.parameters())))
    torch.testing.assert_close(results[0], results[1], atol=1e-12, rtol=1e-10)


@pytest.mark.parametrize("objective", ["exact", "skew", "relbo"])
def test_a_users_scale_multiplies_everything(objective: str) -> None:
    noise, found = torch.randn(8, 5), []
    for scale in (1.0, 3.0):
        s = growing(5, progress=REFINE)
        model, guide = (poutine.scale(program, scale=scale) for program in (s.model, s.guide))
        loss = RecursiveMixture_ELBO(4, objective=objective)
        loss.loss(model, guide)
        with pinned(noise):
            value = loss.differentiable_loss(model, guide)
        parameters = (s.theta, s.guide.component(1).free_local, s.logits())
        gradients = torch.autograd.grad(value, parameters)
        pyro.set_rng_seed(1)
        gain = loss.gain(model, guide)
        found.append((value.detach(), *gradients, torch.tensor(gain[:2])))
    torch.testing.assert_close(found[1], tuple(3 * each for each in found[0]))


@pytest.mark.parametrize("kl", [1.0, 0.2])
def test_gain_by_quadrature(kl: float) -> None:
    """With a weight b of the KL term, ``b * log(1 + exp(difference / b))`` is the ceiling."""
    rows = 20
    s = growing(rows, progress=REFINE, schedule=Schedule(draws=20_000))
    theta = s.theta[0].detach()
    whole = mixture_elbo(theta, PLACES, stick_breaking(LOGIT), kl)
    before = mixture_elbo(theta, PLACES[:1], torch.zeros(1), kl)
    alone = mixture_elbo(theta, PLACES[1:], torch.zeros(1), kl)
    with KLWarmup(kl):
        found = RecursiveMixture_ELBO(1).gain(s.model, s.guide)
    assert abs(found.mean - rows * (whole - before)) < 4.5 * found.standard_error
    ceiling = rows * kl * torch.nn.functional.softplus((alone - before) / kl)
    assert found.ceiling == pytest.approx(ceiling.item(), rel=0.1)


KL = 0.2
WARM_CASES = {
    "first": (RecursiveMixture_ELBO(1), FIRST),
    "refine": (RecursiveMixture_ELBO(1), REFINE),
    "refine the guide": (RecursiveMixture_ELBO(1, update="guide"), REFINE),
    "joint": (RecursiveMixture_ELBO(1), JOINT),
    "joint MISELBO": (RecursiveMixture_ELBO(1, joint=MISELBO(1)), JOINT),
}


@pytest.mark.quick("refine")
@pytest.mark.parametrize("name", WARM_CASES)
def test_kl_warm_up_weighs_the_prior_and_the_mixture(name: str) -> None:
    """The gradients are those of the ELBO with a weight of its KL term; so is the value."""
    eps, weight = grid(1)
    loss, progress = WARM_CASES[name]
    whole, alone = mixture_derivatives(KL), alone_derivatives(KL)
    expected: Sequence[Tensor | None] = whole
    if progress == FIRST:
        expected = (alone.theta, alone.first, None, None)
    elif progress == REFINE:
        theta = None if loss.update == "guide" else whole.theta
        expected = (theta, None, whole.second / SHARE, whole.logits)
    s = growing(len(weight), progress=progress)
    with KLWarmup(KL):
        assert_same(s.gradients(loss, eps[0], weight), expected)


@pytest.mark.parametrize("stage", [FIRST, REFINE, JOINT], ids=["first", "refine", "joint"])
def test_the_value_of_a_step_has_the_weight_of_the_kl_term(stage: tuple[int, ...]) -> None:
    """A posterior that is the prior has no KL term, whatever its weight."""

    def model() -> None:
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        pyro.sample("x", dist.Normal(z, 1.0), obs=torch.tensor(0.0))

    schedule = Schedule(first=9, propose=9, refine=9, joint=9)
    guide = RecursiveMixtureGuide(model, 2, paths=0, schedule=schedule)
    guide.prepare()
    put(guide, torch.zeros(2, 2))
    guide.progress.copy_(torch.tensor(stage))
    loss = RecursiveMixture_ELBO(2000, max_plate_nesting=0)
    with KLWarmup(0.1):
        value = loss.differentiable_loss(model, guide).item()
    assert value == pytest.approx(0.5 * math.log(2 * math.pi) + 0.5, abs=0.07)  # 4.5 errors


@pytest.mark.parametrize("objective", ["exact", "skew", "relbo", Clamped(1.0)], ids=str)
@LATER
def test_a_constrained_support_changes_nothing(progress: tuple[int, ...], objective: Any) -> None:
    """A log-normal latent and its logarithm are one model, if all Jacobians are counted."""
    found = []
    for prior, log in ((dist.Normal, lambda z: z), (dist.LogNormal, torch.log)):
        pyro.clear_param_store()
        pyro.set_rng_seed(1)

        def model(prior: Any = prior, log: Callable = log) -> None:
            z = log(pyro.sample("z", prior(0.0, 3.0)))
            pyro.sample("x", dist.Normal(z**2, 1.0), obs=torch.tensor(4.0))

        schedule = Schedule(first=9, propose=9, refine=9, joint=9, draws=50)
        guide = RecursiveMixtureGuide(model, 2, paths=0, schedule=schedule)
        guide.prepare()
        put(guide, PLACES)
        guide.progress.copy_(torch.tensor(progress))
        loss = RecursiveMixture_ELBO(4, objective=objective, proposal=objective, update="guide")
        loss.loss(model, guide)
        with pinned(torch.randn(8, 1)[: 4 if progress == PROPOSE else 8]):
            value = loss.differentiable_loss(model, guide)
        each = [value.detach(), *gradients_of(value, guide.parameters())]
        program = Program(model, guide, ())
        if progress == PROPOSE:
            place_component(program, guide)
            each.append(guide.component(1).free_global.detach())
        else:
            each.append(torch.tensor(loss.gain(model, guide)))
            each.append(best_log_weights(loss._draw_members(program, guide), "corrective"))
        found.append(tuple(each))
    torch.testing.assert_close(found[0], found[1], atol=1e-8, rtol=1e-8)


def test_the_exact_gradient_is_exact_for_parameters_that_rows_share() -> None:
    """A row counts as much as the component weighs in it: the bound's own gradient, rescaled."""
    model = partial(square_rows, prior=1.3, noise=0.8)
    x = torch.tensor([[-1.0], [1.0]])
    weights = torch.nn.Linear(1, 1)
    weights.weight.data.fill_(3.0)
    encoders = [torch.nn.Linear(1, 2) for _ in range(2)]
    components = [AmortizedGuide(model, encoder) for encoder in encoders]
    schedule = Schedule(first=1, propose=1, refine=99)
    guide = RecursiveMixtureGuide(model, components, weights=weights, schedule=schedule)
    guide.prepare(x)
    guide.end_stage(), guide.end_stage()
    share = guide.component_weights(x)[:, 1].mean().detach()
    differences = []
    for _ in range(20):
        gradients = []
        for loss in (RecursiveMixture_ELBO(4000), Stratified_ELBO(4000, estimator="stl")):
            value = loss.differentiable_loss(model, guide, x)
            found = torch.autograd.grad(value, list(encoders[1].parameters()))
            gradients.append(torch.cat([part.flatten() for part in found]))
        differences.append(gradients[1] - share * gradients[0])
    mean, error = torch.stack(differences).mean(0), torch.stack(differences).std(0) / 20**0.5
    assert (mean.abs() < 4.5 * error).all()
    assert error.max() < 0.05 * gradients[1].abs().max()


# --- A loss of its own for joint stages


def in_joint_stage(members: Sequence[int], families: Sequence[str] = 3 * ALIKE[:1]) -> Any:
    """Return a guide of three components with a table of weights, and rows of data."""
    x = torch.randn(6, 2).abs() + 1
    components = [AmortizedGuide(rows_model, family=family) for family in families]
    schedule = Schedule(first=1, propose=1, refine=1, joint=9)
    guide = RecursiveMixtureGuide(rows_model, components, plate="data", schedule=schedule)
    guide.prepare(x)
    with torch.no_grad():
        for parameter in guide.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    guide.progress.copy_(torch.tensor([5, 1, 0, *(m in members for m in range(3))]))
    return guide, x


def gradients_by_name(guide: Any, loss: Any, x: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
    """Return a step's value, and the gradients that it has."""
    loss.loss(rows_model, guide, x)  # has a look at the plates
    pyro.set_rng_seed(1)
    named = {**dict(guide.named_parameters()), "loc": pyro.param("loc").unconstrained()}
    for parameter in named.values():
        parameter.grad = None
    value = torch.as_tensor(loss.loss_and_grads(rows_model, guide, x))
    return value, {
        name.removesuffix("_unconstrained"): parameter.grad
        for name, parameter in named.items()
        if parameter.grad is not None
    }


JOINT_LOSSES = {
    "MISELBO": MISELBO(3, num_estimates=2),
    "SIWAE": SIWAE_ELBO(3),
    "SIWAE looped": SIWAE_ELBO(2, num_estimates=2, vectorize_particles=False),
    "stratified": Stratified_ELBO(4),
}


@pytest.mark.quick("MISELBO-alike")
@FAMILIES
@pytest.mark.parametrize("name", JOINT_LOSSES)
def test_a_joint_loss_is_that_of_an_equal_mixture(name: str, families: tuple[str, str]) -> None:
    """Of the members alone, with the same draws: value, all gradients, and none of the others."""
    families = (families[0], *families)
    guide, x = in_joint_stage((0, 2), families)
    joint = JOINT_LOSSES[name]
    value, found = gradients_by_name(guide, RecursiveMixture_ELBO(1, joint=joint), x)
    logits = guide.weights.local_1.detach()
    places = [f"components.{m}.free_local" for m in (0, 2)]
    assert set(found) == {*places, "weights.local_1", "loc"}

    members = [AmortizedGuide(rows_model, family=families[m]) for m in (0, 2)]
    equal = MixtureGuide(rows_model, members, plate="data")
    equal.prepare(x)
    inside = 8 * torch.tanh(logits / 8)
    log_weights = stick_breaking(inside)
    with torch.no_grad():
        for own, m in zip(members, (0, 2), strict=True):
            own.free_local.copy_(guide.component(m).free_local)
        equal.weights.local.copy_(8 * torch.atanh(log_weights / 8))
    expected_value, expected = gradients_by_name(equal, joint, x)
    assert_equal = partial(torch.testing.assert_close, rtol=1e-12, atol=1e-12)
    assert_equal(value, expected_value)
    assert_equal(found["loc"], expected["loc"])
    for column, place in enumerate(places):
        assert_equal(found[place], expected[f"components.{column}.free_local"])
    # By the logit e of log-weights (log(1 - e), log e): those of softmax logits, by the chain rule.
    by_logits = expected["weights.local"] / (1 - (log_weights / 8) ** 2)
    slopes = torch.cat([-inside.sigmoid(), (-inside).sigmoid()], -1) * (1 - (inside / 8) ** 2)
    assert_equal(found["weights.local_1"], (by_logits * slopes).sum(-1, keepdim=True))
    assert found["weights.local_1"].abs().max() > 1e-3


def test_one_sample_in_each_logarithm_is_the_default_joint_stage() -> None:
    guide, x = in_joint_stage((0, 1, 2))
    joint = MISELBO(1, num_estimates=3, estimator="stl")
    value, found = gradients_by_name(guide, RecursiveMixture_ELBO(3, joint=joint), x)
    default, expected = gradients_by_name(guide, RecursiveMixture_ELBO(3), x)
    assert torch.equal(value, default) and found.keys() == expected.keys()
    assert all(torch.equal(each, expected[name]) for name, each in found.items())


def test_a_joint_loss_is_for_joint_stages_alone() -> None:
    """Other stages train as without it, and what is evaluated is the ELBO."""
    guide, x = in_joint_stage((0, 1))
    losses = RecursiveMixture_ELBO(2, joint=SIWAE_ELBO(50)), RecursiveMixture_ELBO(2)

    def values(progress: list[int], evaluate: bool) -> list[Tensor]:
        found = []
        for loss in losses:
            guide.progress.copy_(torch.tensor(progress))
            loss.loss(rows_model, guide, x)  # has a look at the plates
            pyro.set_rng_seed(1)
            with torch.set_grad_enabled(not evaluate):
                found.append(loss.differentiable_loss(rows_model, guide, x).detach())
        return found

    for progress in ([0, 0, 0, 1, 0, 0], [2, 0, 0, 1, 1, 0], [5, 1, 0, 1, 1, 0]):
        assert torch.equal(*values(progress, evaluate=True))
        is_joint = guide.stage.kind == "joint"
        assert torch.equal(*values(progress, evaluate=False)) is not is_joint


# --- Flows as components

FLOW_PLACES = [[0.9, 0.3, -0.4, -0.6], [-0.2, 1.1, -0.5, 0.1]]
CLIMBS: list[Any] = ["exact", "skew", "relbo", Clamped(0.5)]
on_ring = partial(ring, torch.tensor(3.0, dtype=torch.float64), prior=2.0, noise=1.5)


def climbing(kind: str | None, stage: str, objective: Any, noise: Tensor) -> list[Tensor]:
    """Return the loss, and its gradients by locations and log-scales and by the weight's logit."""
    pyro.clear_param_store()
    components: list[Any] = [AmortizedGuide(on_ring) for _ in range(2)]
    if kind is not None:
        components = [FlowGuide(on_ring, kind, hidden=(4,), transforms=2) for _ in range(2)]
    schedule = Schedule(first=9, propose=9, refine=9, joint=9)
    guide = RecursiveMixtureGuide(on_ring, components, paths=0, epsilon=0.3, schedule=schedule)
    guide.prepare()
    heads = [c.free_global if kind is None else c.flow_global.bias for c in components]
    for head, place in zip(heads, FLOW_PLACES, strict=True):
        head.data.copy_(torch.tensor(place))
    guide.progress.copy_(torch.tensor(STAGES[stage]))
    loss = RecursiveMixture_ELBO(4, objective=objective, proposal=objective, update="guide")
    loss.loss(on_ring, guide)  # has a look at the plates

    def standard(shape: Any, dtype: Any, device: Any) -> Tensor:
        return noise[: shape[0]].reshape(shape)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.distributions.normal, "_standard_normal", standard)
        value = loss.differentiable_loss(on_ring, guide)
    return [value.detach(), *gradients_of(value, [*heads, *guide.weights.parameters()])]


KINDS = [*(("coupling", stage) for stage in STAGES), ("spline", "refine")]
KINDS += [("iaf", "refine"), ("maf", "propose")]


@pytest.mark.quick(3)
@pytest.mark.parametrize(("kind", "stage"), KINDS)
def test_flows_climb_as_the_gaussians_that_they_start_as(kind: str, stage: str) -> None:
    """Held or not, drawn or scored at others' draws: same noise, same value and gradients."""
    noise = torch.randn(8, 2)
    for objective in CLIMBS if kind == "coupling" else CLIMBS[:1]:
        expected = climbing(None, stage, objective, noise)
        assert any(gradient.abs().max() > 0.1 for gradient in expected[1:])
        torch.testing.assert_close(
            climbing(kind, stage, objective, noise), expected, atol=1e-8, rtol=1e-8
        )


# --- What a step changes


def train(guide: Any, loss: Any, steps: int, model: Callable = bimodal, *args: Any) -> list[str]:
    """Train by Adam; return the kinds of the stages of all steps."""
    svi = SVI(model, guide, pyro.optim.Adam({"lr": 0.05}), loss)
    met = []
    for _ in range(steps):
        met.append(guide.stage.kind)
        svi.step(*args)
    return met


def test_loss_never_advances() -> None:
    guide = RecursiveMixtureGuide(
        bimodal, 2, paths=0, schedule=Schedule(first=2, propose=2, refine=2)
    )
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


def rows_model(x: Tensor) -> None:
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Normal(0.0, 2.0))
        loc = pyro.param("loc", lambda: torch.tensor(0.3))
        pyro.sample("x", dist.Normal(z**2 + loc, 1.0), obs=x[:, 0])


def guide_of(count: int, encoders: bool = True, **options: Any) -> RecursiveMixtureGuide:
    if not encoders:
        return RecursiveMixtureGuide(rows_model, count, plate="data", **options)
    components = [AmortizedGuide(rows_model, nn.Linear(2, 2)) for _ in range(count)]
    return RecursiveMixtureGuide(rows_model, components, **options)


def _owner(name: str) -> Any:
    parts = name.split(".")
    return int(parts[1]) if parts[0] == "components" else "weights" if len(parts) > 1 else "model"


KINDS_OF_WEIGHTS = [(False, None), (True, None), (True, "shared"), (False, "shared")]


@pytest.mark.parametrize("update", ["simultaneous", "alternating", "guide"])
@pytest.mark.parametrize(("encoders", "weights"), KINDS_OF_WEIGHTS)
@pytest.mark.usefixtures("accepting")
def test_what_is_held_stays_bitwise_the_same(
    encoders: bool, weights: str | None, update: str
) -> None:
    """No step moves what it does not train, and an acceptance test moves nothing."""
    x = torch.randn(6, 2).abs() + 1
    schedule = Schedule(first=4, propose=4, refine=5, cycles=1, cycle=4, joint=3, draws=64)
    guide = guide_of(3, encoders, schedule=schedule, weights=weights)
    guide.prepare(x)
    loss = RecursiveMixture_ELBO(2, update=update)
    svi = SVI(rows_model, guide, pyro.optim.Adam({"lr": 0.05}), loss)

    def snapshot() -> dict[str, Tensor]:
        named = {**dict(guide.named_parameters()), "loc": pyro.param("loc")}
        return {name: value.detach().clone() for name, value in named.items()}

    svi.step(x)
    for _ in range(guide.num_steps - 1):
        stage, number, is_trial = guide.stage, guide.steps_taken, guide.is_trial
        before = snapshot()
        svi.step(x)
        moved = {name for name, value in snapshot().items() if not torch.equal(value, before[name])}
        turn = ("guide", "model")[number % 2] if update == "alternating" else update
        expected: set[Any] = {"model"} if turn != "guide" else set()
        if turn != "model":
            weighed = stage.kind in ("refine", "cycle") and stage.component > 0
            expected |= {stage.component, "weights"} if weighed else {stage.component}
        if stage.component is None:
            expected = {"model", "weights", 0, 1, 2}
        elif update == "guide":  # the weights of other components are held, too
            logits = {name for name in moved if _owner(name) == "weights"}
            assert all(f"{stage.component - 1}" in name for name in logits)
        new = {stage.component} if number == 0 else set()  # its start may be searched for
        owners = {_owner(name) for name in moved}
        assert owners - new == (set() if is_trial else expected - new)
    assert guide.members == (0, 1, 2)


def test_gradients_of_turns_add_up() -> None:
    """A parameter that a step does not train keeps its gradient, unless Pyro left it at zero."""
    x = torch.randn(6, 2).abs() + 1
    loss, found = RecursiveMixture_ELBO(2, update="alternating"), list[dict[str, Tensor | None]]()
    for turns in ("guide", "model", "guide model", "zeros model", "guide model model"):
        pyro.clear_param_store()
        pyro.set_rng_seed(2)
        guide = guide_of(2, schedule=Schedule(first=9))
        guide.prepare(x)
        loss.loss(rows_model, guide, x)  # makes the model's parameter
        named = {**dict(guide.named_parameters()), "loc": pyro.param("loc").unconstrained()}
        for turn in turns.split():
            if turn == "zeros":
                for parameter in named.values():
                    parameter.grad = torch.zeros_like(parameter)
                continue
            pyro.set_rng_seed(3)
            guide.progress[1] = 2 + (turn == "model")  # no step that searches for a start
            loss.loss_and_grads(rows_model, guide, x)
        found.append({name: parameter.grad for name, parameter in named.items()})
    of_guide, of_model, both, alone, twice = found
    trained = {name for name, grad in of_guide.items() if grad is not None}
    assert trained and not trained & {name for name, grad in of_model.items() if grad is not None}
    assert same(both, of_model | {name: of_guide[name] for name in trained})
    assert same(alone, of_model)
    assert of_model["loc"] is not None
    assert same(twice, both | {"loc": 2 * of_model["loc"]})


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


@pytest.mark.parametrize("stage", ["first", "propose", "refine", "joint"])
def test_a_density_of_zero_is_reported_at_the_users_line(stage: str) -> None:
    """The bound is -inf where a draw of the mixture has no density, not NaN."""

    def model() -> None:
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        pyro.factor("f", torch.where(z > 0, 0.0, -torch.inf))

    guide = RecursiveMixtureGuide(
        model, 2, paths=0, schedule=Schedule(first=9, propose=9, refine=9)
    )
    guide.prepare()
    put(guide, [[-9.0, 0.0], [9.0, -1.0]])
    guide.progress.copy_(torch.tensor(STAGES[stage]))
    loss = RecursiveMixture_ELBO(2)
    with pytest.warns(UserWarning, match="The bound is -inf") as caught:
        value = loss.differentiable_loss(model, guide)
    assert caught[0].filename == __file__
    assert value.item() == math.inf
    with pytest.warns(UserWarning, match="The bound is -inf") as caught:
        assert loss.loss(model, guide) == math.inf
    assert caught[0].filename == __file__


# --- Acceptance


def test_an_exact_first_component_ends_growth() -> None:
    """Another component cannot gain: it is dropped ``1 + patience`` times, the first one kept."""
    model, x = normal_rows, torch.tensor(1.1)
    schedule = Schedule(first=1, propose=10, refine=10, patience=2, draws=2000)
    guide = RecursiveMixtureGuide(model, 3, paths=0, schedule=schedule)
    guide.prepare(x)
    put(guide, [[0.55, -0.5 * math.log(2)]])
    guide.end_stage()
    loss = RecursiveMixture_ELBO(4)
    with pytest.warns(UserWarning, match=r"3 components 2 have no part .*dropped: \[1, 2\]"):
        stages = train(guide, loss, 61, model, x)
    assert stages == (["propose"] * 10 + ["refine"] * 10) * 3 + ["joint"]
    assert guide.members == (0,)
    assert [(trial.component, trial.is_kept) for trial in guide.trials] == [(1, False)] * 3
    assert all(trial.gain.mean < 2 * trial.gain.standard_error for trial in guide.trials)


@pytest.mark.parametrize("estimator", ["stl", "pathwise"])
def test_the_first_stage_has_the_estimator_of_the_loss(estimator: str) -> None:
    """Sticking the landing has no noise at the exact posterior, 1 / (1 / 1.5**2 + 1 / 0.7**2)."""
    model, x = partial(normal_rows, prior=1.5, noise=0.7), torch.tensor([[1.3], [-0.4]])
    gain = 1.5**2 / (1.5**2 + 0.7**2)
    head = nn.Linear(1, 2)
    head.weight.data.copy_(torch.tensor([[gain], [0.0]]))
    head.bias.data.copy_(torch.tensor([0.0, math.log(0.7 * gain**0.5)]))
    components = [AmortizedGuide(model, each) for each in (head, nn.Linear(1, 2))]
    guide = RecursiveMixtureGuide(model, components)
    loss = RecursiveMixture_ELBO(8, estimator=estimator)
    loss.differentiable_loss(model, guide, x).backward()
    noise = max(parameter.grad.abs().max().item() for parameter in head.parameters())
    assert noise < 1e-12 if estimator == "stl" else noise > 0.05


@pytest.mark.slow
def test_a_component_that_an_exact_posterior_does_not_need_is_dropped() -> None:
    """In every run with the settings of the README, from noise, on to the first acceptance test."""
    model, x = normal_global, torch.tensor([1.7, 0.4, 1.1])
    schedule = Schedule(first=200, propose=50, refine=150, patience=0)
    for seed in range(6):
        pyro.clear_param_store()
        pyro.set_rng_seed(seed)
        guide = RecursiveMixtureGuide(model, 2, paths=0, schedule=schedule)
        with pytest.warns(UserWarning, match=r"dropped: \[1\]"):
            train(guide, RecursiveMixture_ELBO(8), guide.num_steps, model, x)
        assert guide.members == (0,), seed


def test_min_gain_ends_growth() -> None:
    """The ceiling of a proposal decides whether there is another one."""
    for min_gain, kind in ((0.0, "propose"), (1e3, "joint")):
        pyro.clear_param_store()
        schedule = Schedule(
            first=2, propose=2, refine=2, confidence=1e9, min_gain=min_gain, draws=100
        )
        guide = RecursiveMixtureGuide(bimodal, 2, paths=0, schedule=schedule)
        with pytest.warns(UserWarning, match="dropped") if min_gain else nullcontext():
            train(guide, RecursiveMixture_ELBO(2), 6)
        assert guide.stage.kind == kind and guide.members == (0,)


def test_the_holdout_decides() -> None:
    """Training data need the second mode, those of the test do not."""

    def model(x: Tensor, mass: float) -> None:
        with pyro.plate("data", len(x)):
            two_modes([(1 - mass, -2.0, 0.5), (mass, 2.0, 0.5)], prior=3.0)()

    x, needed, useless = torch.zeros(3, 1), 0.5, 1e-12
    kept = []
    for holdout in (None, (x, useless), (x, needed)):
        pyro.clear_param_store()
        schedule = Schedule(first=1, propose=1, refine=1, draws=600)
        guide = RecursiveMixtureGuide(model, 2, plate="data", schedule=schedule)
        guide.prepare(x, needed)
        guide.end_stage(), guide.end_stage()
        put(guide, [[loc, math.log(0.5)] for loc in (-2.0, 2.0)])
        train(guide, RecursiveMixture_ELBO(2, holdout=holdout), 1, model, x, needed)
        kept.append(guide.members)
    assert kept == [(0, 1), (0,), (0, 1)]


def test_a_test_has_draws_for_the_rows_that_it_is_on(caplog: pytest.LogCaptureFixture) -> None:
    """2,000 in all, and at least 32 for each row, whatever the guide's first call was on."""
    caplog.set_level(logging.INFO, "pyro_recursive")
    for few, many in ((2, 100), (100, 2)):
        guide = guide_of(2, name=f"from_{few}")
        guide.prepare(torch.randn(few, 2))
        guide.progress.copy_(torch.tensor(REFINE))
        for holdout in (None, (torch.randn(many, 2),)):
            caplog.clear()
            loss = RecursiveMixture_ELBO(1, holdout=holdout)
            loss.gain(rows_model, guide, torch.randn(many, 2))
            assert f": {1000 if many == 2 else 32} draws of each" in caplog.messages[0]
    new = guide_of(2, name="new")
    assert new.num_draws((torch.randn(40, 2),), {}) == 50


# --- Options


def test_options_are_checked() -> None:
    for name in ("objective", "proposal", "update", "weights"):
        with pytest.raises(ValueError, match=r"must be one of .*got 'other'"):
            RecursiveMixture_ELBO(2, **{name: "other"})
    with pytest.raises(ValueError, match="needs all draws of a row at once"):
        RecursiveMixture_ELBO(2, objective=Clamped(1.0), vectorize_particles=False)
    RecursiveMixture_ELBO(1, objective=Clamped(1.0), vectorize_particles=False)
    for weights in ("line_search", "corrective"):  # at the first step
        loss = RecursiveMixture_ELBO(2, weights=weights)
        with pytest.raises(ValueError, match="Rows have weights of their own"):
            loss.differentiable_loss(rows_model, guide_of(3), torch.randn(4, 2))


AROUND = {"alone": nullcontext, "scaled": partial(poutine.scale, scale=0.5)}
AROUND |= {"scaled up": partial(poutine.scale, scale=4.0), "warm-up": partial(KLWarmup, 0.5)}


@pytest.mark.parametrize("around", AROUND)
@pytest.mark.parametrize("weights", ["line_search", "corrective"])
@pytest.mark.parametrize("count", [2, 3])
def test_weights_are_set_to_their_optimum(weights: str, count: int, around: str) -> None:
    """The masses of the modes, for any scale of the loss; their powers where KL has a weight."""
    masses = torch.tensor([0.5, 0.2, 0.3])[:count]
    masses, modes = masses / masses.sum(), (-4.0, 0.0, 4.0)[:count]
    parts = [(m, loc, 0.5) for m, loc in zip(masses.tolist(), modes, strict=True)]
    model = two_modes(parts, prior=1e4)
    if around == "warm-up":
        masses = (2 * masses.log()).softmax(-1)
    schedule = Schedule(first=1, propose=1, refine=1, draws=4000)
    guide = RecursiveMixtureGuide(model, count, paths=0, schedule=schedule)
    guide.prepare()
    put(guide, [[mode, math.log(0.5)] for mode in modes])
    guide.progress.copy_(torch.tensor([2 * (count - 1), 0, 0, *[1] * count]))
    if weights == "line_search":  # the others have the right proportions
        guide.set_log_weights(
            torch.cat([0.9 * masses[:-1] / masses[:-1].sum(), masses.new_tensor([0.1])]).log()
        )
    with AROUND[around]():
        RecursiveMixture_ELBO(4, weights=weights).differentiable_loss(model, guide)
    found = guide.component_weights().detach()
    torch.testing.assert_close(found, masses, atol=5e-3, rtol=0)
    assert len(guide.members) == count
