"""Guides that grow: stages, members and their weights, what is dropped, conditional encoders."""

import copy
from collections.abc import Callable
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.infer import SVI
from pyro.infer.autoguide import AutoNormal
from torch import Tensor, nn

from pyro_recursive import (
    IWAE_ELBO,
    AmortizedGuide,
    FlowGuide,
    RecursiveMixture_ELBO,
    RecursiveMixtureGuide,
    Schedule,
)
from pyro_recursive.bounds.mixture_objectives import Gain
from pyro_recursive.guides.mixture import recursive
from tests.models.small import square_rows
from tests.oracles.mixtures import bimodal
from tests.oracles.quadrature import log_normal

X = torch.tensor([[1.3, 0.2], [-0.4, 1.1], [2.0, -0.5], [0.6, 0.3], [-1.2, 0.7]]).double()


def guide_of(count: int, **options: Any) -> RecursiveMixtureGuide:
    """Return a growing mixture of linear encoders over two features."""
    components = [AmortizedGuide(square_rows, nn.Linear(2, 2)) for _ in range(count)]
    return RecursiveMixtureGuide(square_rows, components, **options)


@pytest.fixture
def accepting(monkeypatch: pytest.MonkeyPatch) -> None:
    """Keep every component."""
    monkeypatch.setattr(Gain, "is_clear", lambda gain, *limits: True)


# --- The stages


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
    guide.count_step()  # goes on for ever
    assert guide.stage == ("joint", None, 0) and guide.members == (0, 1, 2)
    assert guide.steps_left == guide.stage_steps_left == 0


@pytest.mark.parametrize("number", [2, 4])
@pytest.mark.parametrize("steps", [60, 1000, 12345])
def test_fractions_of_training_take_all_of_it(steps: int, number: int) -> None:
    schedule = Schedule.fractions(
        steps, number, first=0.2, propose=0.01, refine=0.04, cycles=1, cycle=3
    )
    stages = schedule.stages(number)
    assert sum(stage.steps for stage in stages) == steps
    wanted = [0.2, *(number - 1) * [0.01, 0.04], *number * [3 / steps]]
    found = [stage.steps / steps for stage in stages[:-1]]
    assert found == pytest.approx(wanted, abs=0.5 / steps)


def test_steps_left() -> None:
    """Those of the schedule, counted down, less those that a dropped component had before it."""
    schedule = Schedule(first=2, propose=1, refine=3, cycles=2, cycle=5, joint=4, patience=0)
    guide = RecursiveMixtureGuide(bimodal, 3, schedule=schedule)
    for taken in range(guide.num_steps):
        assert guide.steps_left == guide.num_steps - taken
        assert guide.is_growing == (taken < 2 + 2 * (1 + 3))
        guide.count_step()
    guide = RecursiveMixtureGuide(bimodal, 3, schedule=schedule)
    for _ in range(2 + 1):
        guide.count_step()
    shown = "stage='refine', steps_left=41, component=1, steps_taken=0, failures=0"
    assert f"members=(0, 1) of 3, {shown}" in repr(guide)
    guide.drop(retry=False)
    for taken in range(2 * 5 + 4):
        assert (guide.steps_left, guide.is_growing) == (2 * 5 + 4 - taken, False)
        guide.count_step()
    assert guide.steps_left == 0 and guide.stage.kind == "joint"


def test_progress_stays_on_the_cpu() -> None:
    """It is read in each step, without waiting for a device."""
    guide = RecursiveMixtureGuide(bimodal, 3)
    guide.prepare()
    guide.end_stage(), guide.end_stage(), guide.count_step()
    guide.to("meta")
    assert guide.component(0).free_global.device.type == "meta"
    assert guide.progress.tolist() == [2, 1, 0, 1, 1, 0]


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


@pytest.mark.parametrize("kind", ["shared", "linear"])
def test_components_without_a_part_are_reported_once(kind: str) -> None:
    """Also by a guide into which the state was loaded; its repr names them."""
    schedule = Schedule(first=1, propose=1, refine=1)
    guide = guide_of(4, weights=kind, schedule=schedule)
    guide.prepare(X)
    guide.progress.copy_(torch.tensor([7, 99, 0, 1, 1, 1, 0]))  # the last one was dropped
    with torch.no_grad():
        for name, parameter in guide.weights.named_parameters():  # the second one has died
            if "0" in name and "weight" not in name:
                parameter.fill_(-100.0)
    loss = RecursiveMixture_ELBO(1)
    message = r"of 4 components 2 have no part .*dropped: \[3\]; weight below 0.001: \[1\]"
    with pytest.warns(UserWarning, match=message) as caught:
        loss.differentiable_loss(square_rows, guide, X)
    assert caught[0].filename == __file__
    assert "members=(0, 1, 2) of 4, dropped=(3,), dead=(1,), stage='joint'" in repr(guide)
    for _ in range(2):
        guide.progress[1] = 99  # the next step looks again
        loss.differentiable_loss(square_rows, guide, X)
    pyro.clear_param_store()
    other = guide_of(4, weights=kind, schedule=schedule)
    other.prepare(X)
    assert "dropped" not in repr(other)
    other.load_state_dict(guide.state_dict())
    state = torch.get_rng_state()
    with pytest.warns(UserWarning, match=message):
        IWAE_ELBO(2).loss(square_rows, other, X)
    assert "dropped=(3,), dead=(1,)" in repr(other)
    other.load_state_dict(guide.state_dict())
    torch.set_rng_state(state)
    first = other(X)["z"]
    torch.set_rng_state(state)
    assert torch.equal(other(X)["z"], first)  # a look moves no random state


def learning() -> None:
    pyro.sample("z", dist.Normal(pyro.param("loc", lambda: torch.tensor(0.3)), 1.0))


def learning_rows(x: Tensor) -> None:
    pyro.param("loc", lambda: torch.tensor(0.3))
    square_rows(x)


def look(guide: RecursiveMixtureGuide, model: Callable, *weights: float) -> None:
    """Take a step that looks at the weights, of which component 1 of three has these in rows.

    They are its shares of what the last component leaves.
    """
    odds = torch.tensor(weights).logit()
    with torch.no_grad():
        guide.weights.local_0.copy_((8 * (odds / 8).atanh())[:, None].expand(len(X), 1))
    guide.progress[1] = 99
    RecursiveMixture_ELBO(1).loss_and_grads(model, guide, X)


def joint_guide(model: Callable, **options: Any) -> RecursiveMixtureGuide:
    encoders = [Told(2 * m * ("conditional" in options)) for m in range(3)]
    components = [AmortizedGuide(model, encoder) for encoder in encoders]
    schedule = Schedule(first=1, propose=1, refine=1)
    guide = RecursiveMixtureGuide(model, components, weights="table", schedule=schedule, **options)
    guide.prepare(X)
    guide.progress.copy_(torch.tensor([5, 0, 0, 1, 1, 1]))
    return guide


@pytest.mark.filterwarnings("ignore:.*have no part in the mixture")
@pytest.mark.parametrize("is_resumed", [False, True])
def test_a_member_without_weight_is_dropped_after_many_rows(
    is_resumed: bool, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The others' weights keep their proportions; a guide that goes on from a state is as far."""
    monkeypatch.setattr(recursive, "ROWS", 5 * len(X))
    guide = joint_guide(learning_rows)
    before = guide.component_weights(X).detach()
    one_row = torch.full((len(X),), 6e-4)
    one_row[-1] = 0.4
    for weights in ([6e-4], [6e-4], one_row.tolist(), *[[6e-4]] * 4):
        look(guide, learning_rows, *weights)
    assert guide.members == (0, 1, 2) and guide.dead == (1,)
    if is_resumed:
        state = copy.deepcopy(guide.state_dict())
        pyro.clear_param_store()
        guide = joint_guide(learning_rows)
        guide.load_state_dict(state)
        guide(X)  # reports, and counts nothing
        assert guide.progress.tolist() == state["progress"].tolist()
    with caplog.at_level("INFO", logger="pyro_recursive"):
        look(guide, learning_rows, 6e-4)
    assert "Component 1 has lost its weight, and is dropped." in caplog.messages
    assert guide.members == (0, 2) and guide.left_out == (1,) and guide.dead == ()
    assert guide.stage.kind == "joint" and guide.steps_taken == 100
    torch.testing.assert_close(guide.component_weights(X)[:, 1], before[:, 2])
    loss = RecursiveMixture_ELBO(2)
    for component in guide.components:
        component.encoder.zero_grad()
    loss.loss_and_grads(learning_rows, guide, X)
    grads = [component.encoder.linear.weight.grad for component in guide.components]
    assert grads[1] is None or not grads[1].any()
    assert grads[0].any() and grads[2].any()


@pytest.mark.filterwarnings("ignore:.*have no part in the mixture")
def test_members_of_fixed_models_those_that_others_read_and_given_weights_stay(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(recursive, "ROWS", 5 * len(X))
    kept: list[dict[str, Any]] = [{"conditional": True}, {"learn_weights": False}]
    for model, options in ((square_rows, {}), *((learning_rows, each) for each in kept)):
        pyro.clear_param_store()
        guide = joint_guide(model, **options)
        for _ in range(7):
            look(guide, model, 6e-4)
        assert guide.members == (0, 1, 2) and guide.dead == (1,)


@pytest.mark.filterwarnings("ignore:.*have no part in the mixture")
def test_a_member_of_global_latents_without_weight_is_dropped_after_five_looks() -> None:
    guide = RecursiveMixtureGuide(learning, 2, schedule=Schedule(first=1, propose=1, refine=1))
    guide.prepare()
    guide.progress.copy_(torch.tensor([3, 0, 0, 1, 1]))
    for _ in range(5):
        assert guide.members == (0, 1)
        guide.set_log_weights(torch.tensor([1 - 6e-4, 6e-4]).log())
        guide.progress[1] = 99
        RecursiveMixture_ELBO(1).loss_and_grads(learning, guide)
    assert guide.members == (0,)


# --- Members and weights


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
    for weights in ([0.5, 0.3, 0.2], [1.0, 1e-30, 1e-30], [1e-30, 1e-30, 1.0], [0.0, 0.0, 1.0]):
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


@pytest.mark.parametrize("count", [2, 3])
@pytest.mark.parametrize("kind", ["shared", "linear"])
def test_a_retry_starts_anew(count: int, kind: str) -> None:
    """A dropped component loses its weight, and its encoder; the others do not."""
    guide = guide_of(count, weights=kind)
    guide.prepare(X)
    start = [parameter.detach().clone() for parameter in guide.weights.parameters()]
    for parameter in guide.weights.parameters():
        parameter.data.add_(1.0)
    before = [component.encoder.weight.clone() for component in guide.components]
    guide.end_stage(), guide.end_stage()
    guide.drop(retry=True)
    per_logit = len(start) // (count - 1)
    for index, parameter in enumerate(guide.weights.parameters()):
        moved = 0.0 if index < per_logit else 1.0
        torch.testing.assert_close(parameter.detach(), start[index] + moved)
    pairs = zip(guide.components, before, strict=True)
    kept = [torch.equal(component.encoder.weight, old) for component, old in pairs]
    assert kept == [m != 1 for m in range(count)]


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
    encoders = [Told(2 * m) for m in range(3)]
    components = [AmortizedGuide(square_rows, encoder) for encoder in encoders]
    schedule = Schedule(first=2, propose=2, refine=2, joint=9)
    guide = RecursiveMixtureGuide(square_rows, components, conditional=True, schedule=schedule)
    svi = SVI(square_rows, guide, pyro.optim.Adam({"lr": 0.05}), RecursiveMixture_ELBO(2))
    for _ in range(10):
        svi.step(X)
    assert guide.stage.kind == "joint"
    guide(X)
    first, second, third = (encoder.told[-1] for encoder in encoders)
    assert first == () and second[0].shape == (5, 2) and third[0].shape == (5, 4)
    assert not second[0].requires_grad and not third[0].requires_grad
    outputs = [encoders[0](X), encoders[1](X, *second)]
    torch.testing.assert_close(third[0], torch.cat(outputs, -1))
    # No component's objective moves an earlier one: even if they are not held.
    guide.zero_grad()
    mixture = guide.posterior(guide.groups[0], guide.new_call((X,), {}))
    mixture.parameters[2].sum().backward()
    grads = [encoder.linear.weight.grad for encoder in encoders]
    assert all(grad is None or not grad.any() for grad in grads[:2])
    assert grads[2].abs().sum() > 0
    # A dropped component's parameters are replaced by zeros.
    guide.progress[4] = 0
    guide(X)
    torch.testing.assert_close(encoders[2].told[-1][0], torch.cat([outputs[0], 0 * outputs[0]], -1))


@pytest.mark.usefixtures("accepting")
def test_a_trunk_trains_first_and_jointly_only() -> None:
    trunk = nn.Linear(2, 2)
    schedule = Schedule(first=3, propose=3, refine=3, cycles=1, cycle=2, joint=3)
    guide = guide_of(2, trunk=trunk, schedule=schedule)
    guide.prepare(X)
    calls: list[int] = []
    hook = trunk.register_forward_hook(lambda *_: calls.append(1))
    guide(X)
    assert calls == [1]
    hook.remove()
    svi = SVI(square_rows, guide, pyro.optim.Adam({"lr": 0.05}), RecursiveMixture_ELBO(2))
    for _ in range(guide.num_steps):
        kind, before = guide.stage.kind, trunk.weight.detach().clone()
        svi.step(X)
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
        stage, test = guide.stage, guide.is_trial
        before = [copy.deepcopy(flow.state_dict()) for flow in flows]
        svi.step()
        moved = [
            any(not torch.equal(value, old[name]) for name, value in flow.state_dict().items())
            for flow, old in zip(flows, before, strict=True)
        ]
        assert moved == [m == stage.component and not test for m in range(2)]
    assert guide.members == (0, 1)


# --- Refusals


def test_components_must_not_share_parameters() -> None:
    rows, body, heads = square_rows, nn.Linear(2, 4), [nn.Linear(4, 2) for _ in range(2)]
    shared = [AmortizedGuide(rows, nn.Sequential(body, head)) for head in heads]
    with pytest.raises(ValueError, match=r"share parameter 'encoder.0.weight'.*trunk="):
        RecursiveMixtureGuide(rows, shared)
    apart = [AmortizedGuide(rows, head) for head in heads]
    with pytest.raises(ValueError, match=r"share parameter '0.weight'"):
        RecursiveMixtureGuide(rows, apart, weights=nn.Sequential(heads[0], nn.Linear(2, 1)))
    apart = [AmortizedGuide(rows, nn.Linear(4, 2)) for _ in range(2)]
    RecursiveMixtureGuide(rows, apart, trunk=body)(torch.randn(3, 2))


REFUSED: dict[str, tuple[Callable[[], Any], str]] = {
    "fractions": (lambda: Schedule.fractions(100, 4, first=0.9), "108 of 100 steps"),
    "first": (lambda: Schedule(first=0), "first must be at least 1"),
    "draws": (lambda: Schedule(draws=-1), "draws must be at least 0"),
    "one": (lambda: RecursiveMixtureGuide(bimodal, 1), "at least 2 components"),
    "epsilon": (lambda: RecursiveMixtureGuide(bimodal, 2, epsilon=1.0), "epsilon must lie in"),
    "auto": (
        lambda: RecursiveMixtureGuide(bimodal, [AutoNormal(bimodal)] * 2),
        "AmortizedGuide or FlowGuide, got AutoNormal",
    ),
    "conditional": (
        lambda: RecursiveMixtureGuide(bimodal, 2, conditional=True),
        "conditional=True needs AmortizedGuide",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refused_with_a_remedy(name: str) -> None:
    make, message = REFUSED[name]
    with pytest.raises((ValueError, TypeError), match=message):
        make()
