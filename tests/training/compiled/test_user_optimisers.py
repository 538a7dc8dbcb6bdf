"""Optimisers as users change, share and hook them: the steps are those of `SVI`."""

from collections.abc import Callable
from functools import partial
from types import SimpleNamespace
from typing import Any

import pyro
import pyro.optim
import pytest
import torch
from pyro.infer import SVI

from pyro_recursive import IWAE_ELBO
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
