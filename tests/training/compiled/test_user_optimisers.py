"""Optimisers as users change, share and hook them: the steps are those of `SVI`."""

from collections.abc import Callable
from copy import deepcopy
from functools import partial
from types import SimpleNamespace
from typing import Any

import pyro
import pyro.optim
import pytest
import torch
from pyro.infer import SVI
from pyro.infer.autoguide import AutoNormal

from pyro_recursive import IWAE_ELBO, CompiledSVI
from tests.training.compiled.scenarios import Scenario, X, adam, check, check_eager, guide, shifted

pytestmark = pytest.mark.filterwarnings("ignore:Plate 'data' encloses")


def steps_and(
    change: Callable[[int, Any], Any], optim: Callable[[], Any] = adam, steps: int = 12
) -> Scenario:
    def scenario(make: Callable[..., Any]) -> list[Any]:
        optimizer, losses = optim(), []
        svi = make(shifted, guide, optimizer, IWAE_ELBO(3))
        for step in range(steps):
            losses.append(svi.step(X))
            change(step, optimizer)
        return losses

    return scenario


def one_cycle() -> Any:
    settings = {"optimizer": torch.optim.Adam, "optim_args": {"lr": 0.05}}
    return pyro.optim.OneCycleLR({**settings, "max_lr": 0.1, "total_steps": 30})


@pytest.mark.slow
def test_schedules_of_momentum_are_seen() -> None:
    check(steps_and(lambda step, optim: optim.step(), one_cycle, 20))


@pytest.mark.quick(1)
@pytest.mark.parametrize("options", [{"weight_decay": 0.5}, {"betas": (0.5, 0.6)}, {"eps": 0.1}])
def test_options_of_an_optimiser_may_change(options: dict[str, Any]) -> None:
    def change(step: int, optim: Any) -> None:
        for each in optim.optim_objs.values() if step == 5 else ():
            each.param_groups[0].update(options)

    check(steps_and(change))


@pytest.mark.slow
def test_clipping_may_change() -> None:
    def change(step: int, optim: Any) -> None:
        if step == 5:
            optim.pt_clip_args["clip_norm"] = 0.01

    check(steps_and(change, lambda: pyro.optim.SGD({"lr": 0.05}, {"clip_norm": 10.0})))


def test_hooks_of_an_optimiser_run() -> None:
    def change(step: int, optim: Any) -> None:
        if step == 4:
            for parameter, each in optim.optim_objs.items():
                each.register_step_post_hook(lambda *args, p=parameter: p.data.clamp_(max=0.05))

    check_eager(steps_and(change), "the optimiser has hooks")


def sgd() -> Any:
    return pyro.optim.SGD({"lr": 0.05, "momentum": 0.9, "dampening": 0.3})


@pytest.mark.quick("adam-load the state", "sgd-clear the optimisers")
@pytest.mark.parametrize("change", ["clear the state", "load the state", "clear the optimisers"])
@pytest.mark.parametrize("optim", [adam, sgd])
def test_an_optimiser_may_start_afresh(optim: Callable[[], Any], change: str) -> None:
    """An eager step makes the state anew, and compiled ones go on."""
    fresh: list[Any] = []

    def restart(step: int, optim: Any) -> None:
        if not fresh:  # as an optimiser of no steps
            first = next(iter(optim.optim_objs.values()))
            fresh.append(first.state_dict() | {"state": {}})
        if step == 6 and change == "clear the optimisers":
            optim.optim_objs.clear()
        for each in optim.optim_objs.values() if step == 6 else ():
            each.state.clear() if change == "clear the state" else each.load_state_dict(fresh[0])
        if step == 11:
            counts = [
                each.state_dict()["state"][0].get("step", 5) for each in optim.optim_objs.values()
            ]
            assert set(map(int, counts)) == {5}

    check(steps_and(restart, optim))


def test_a_parameter_may_be_trained_later() -> None:
    """Its optimiser, which was made before, has no state of it."""

    def scenario(make: Callable[..., Any]) -> list[Any]:
        module = AutoNormal(shifted)
        module(X)
        frozen = next(module.parameters())
        frozen.requires_grad_(False)
        optimizer = torch.optim.Adam(module.parameters(), lr=0.05)
        if make is SVI:
            make = partial(CompiledSVI, engine="eager")  # `SVI` takes no optimiser of torch
        svi = make(shifted, module, optimizer, IWAE_ELBO(3))
        losses = [svi.step(X) for _ in range(4)]
        frozen.requires_grad_(True)
        return losses + [svi.step(X) for _ in range(5)]

    check(scenario)


@pytest.mark.quick(1)
@pytest.mark.parametrize(
    "options", [[{"weight_decay": 0.1}, {}], [{"betas": (0.5, 0.999)}, {"betas": (0.4, 0.999)}]]
)
def test_options_of_one_parameter_may_change(options: list[dict[str, Any]]) -> None:
    """From equal to different ones, to others, and back to equal ones."""

    def change(step: int, optim: Any) -> None:
        defaults = {"weight_decay": 0.0, "betas": (0.9, 0.999)}
        if step in (3, 6, 9):
            first, second = options if step == 3 else options[::-1]
            for each, new in zip(optim.optim_objs.values(), [first, second], strict=True):
                each.param_groups[0].update(defaults if step == 9 else new)

    check(steps_and(change))


@pytest.mark.slow
def test_a_loaded_optimiser_has_its_new_learning_rate() -> None:
    def change(step: int, optim: Any) -> None:
        for each in optim.optim_objs.values():
            if step == 5:
                each.load_state_dict(each.state_dict())
            each.param_groups[0]["lr"] = 0.05 if step < 8 else 0.5

    check(steps_and(change))


@pytest.mark.quick(1)
@pytest.mark.parametrize("is_eager", [True, False])
@pytest.mark.parametrize("length", [1, 5])
def test_an_optimiser_may_serve_two(is_eager: bool, length: int) -> None:
    def scenario(make: Callable[..., Any]) -> list[Any]:
        optimizer, losses = adam(), []
        one = make(shifted, guide, optimizer, IWAE_ELBO(3))
        other = (SVI if is_eager else make)(shifted, guide, optimizer, IWAE_ELBO(2))
        for step in range(24):
            losses.append((one if step // length % 3 else other).step(X))
        return losses

    check(scenario)


def test_an_optimiser_is_up_to_date_after_a_run() -> None:
    """A copy has no hooks that would write the counts."""
    pyro.clear_param_store()
    optim = adam()
    svi = CompiledSVI(shifted, guide, optim, IWAE_ELBO(3), engine="graph", strict=True)
    svi.run(10, X)
    for each in deepcopy(list(optim.optim_objs.values())):
        assert [int(state["step"]) for state in each.state.values()] == [10]
    svi.run(3, X)
    (state,) = optim.optim_objs[pyro.param("loc")].state.values()
    assert int(state["step"]) == 13


@pytest.mark.slow
def test_model_loss_and_optimiser_may_be_replaced() -> None:
    def scenario(make: Callable[..., Any]) -> list[Any]:
        svi, losses = make(shifted, guide, adam(), IWAE_ELBO(3)), []
        for step in range(16):
            if step == 4:
                svi.model = partial(shifted, shift=3.0)
            elif step == 8:
                svi.optim = pyro.optim.SGD({"lr": 0.01})
            elif step == 12:
                loss = IWAE_ELBO(7)
                svi.loss, svi.loss_and_grads = loss, loss.loss_and_grads  # either takes one
            losses.append(svi.step(X))
        return losses

    check(scenario)


@pytest.mark.slow
@pytest.mark.parametrize("has_another_shape", [True, False])
def test_options_may_change_with_what_needs_another_graph(has_another_shape: bool) -> None:
    def scenario(make: Callable[..., Any]) -> list[Any]:
        owner, optimizer = SimpleNamespace(shift=0.0), adam()
        svi = make(lambda x: shifted(x, owner.shift), guide, optimizer, IWAE_ELBO(3))
        losses = [svi.step(X) for _ in range(5)]
        for each in optimizer.optim_objs.values():
            each.param_groups[0]["weight_decay"] = 0.5
        if not has_another_shape:
            owner.shift = 3.0
        x = X[:2] if has_another_shape else X
        return losses + [svi.step(x) for _ in range(5)] + [svi.step(X) for _ in range(5)]

    check(scenario)
