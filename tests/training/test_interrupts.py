"""Ctrl-C, functions of the user inside `fit`, and optimisers that have modes."""

import os
import signal
import threading
from functools import partial
from pathlib import Path
from typing import Any

import prodigyopt
import pyro
import pytest
import schedulefree
import torch
from pyro.infer import SVI, Trace_ELBO
from pyro.infer.autoguide import AutoDelta
from torch import Tensor

from pyro_recursive import log_marginal
from pyro_recursive.training import History, NonFiniteError
from pyro_recursive.training.interrupts import Interrupts
from tests.oracles.bitwise import same
from tests.oracles.training import (
    ROWS,
    Scripted,
    auto_normal,
    normal_data,
    normal_model,
    outcome,
    run,
    store,
)

pytestmark = pytest.mark.usefixtures("in_the_foreground")

told = partial(pytest.warns, UserWarning, match="Training was interrupted in epoch")


def press_ctrl_c(*_: Any) -> None:
    os.kill(os.getpid(), signal.SIGINT)


# --- Ctrl-C


def test_ctrl_c_ends_training_after_the_step(tmp_path: Path) -> None:
    """The history so far is returned; the file continues bit for bit."""
    path, other = tmp_path / "whole.pt", tmp_path / "broken.pt"
    expected = outcome(run(auto_normal, checkpoint=path), path)
    steps: list[int] = []

    def at_step_8(step: int, loss: Tensor) -> None:
        steps.append(step)
        if step == 8:
            press_ctrl_c()

    with told() as caught:
        history = run(auto_normal, checkpoint=other, on_step=at_step_8)
    assert caught[0].filename == run.__code__.co_filename
    assert steps == list(range(1, 9))
    assert history.epoch == [1, 2] and history.interrupted and not history.stopped_early
    assert repr(history).startswith("History(2 epochs, interrupted;")
    params = [pyro.param(name).unconstrained() for name in store()]
    assert all(parameter.grad is None for parameter in params)
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    assert same(outcome(run(auto_normal, checkpoint=other, resume=True), other), expected)


@pytest.mark.parametrize("where", ["validation", "on_epoch"])
def test_the_best_weights_are_put_back(where: str) -> None:
    scripted = Scripted([5.0, 3.0, 4.0, 3.5, 3.2])
    inner = scripted.loss

    def loss(*args: Any) -> float:
        if where == "validation" and len(scripted.seen) == 3:
            press_ctrl_c()  # in the fourth validation, whose value is still computed
        return inner(*args)

    def on_epoch(epoch: int, history: History) -> None:
        if where == "on_epoch" and epoch == 3:
            press_ctrl_c()

    scripted.loss = loss  # type: ignore[method-assign]
    options = {"validation": normal_data()[:4], "validation_loss": scripted, "patience": 9}
    with told():
        history = run(auto_normal, **options, epochs=9, on_epoch=on_epoch)
    assert history.epoch == ([1, 2, 3, 4] if where == "validation" else [1, 2, 3])
    assert history.best_epoch == 2 and same(store(), scripted.seen[1])


def test_a_second_ctrl_c_comes_at_once() -> None:
    with Interrupts() as interrupts:
        press_ctrl_c()
        assert interrupts.is_pending
        with pytest.raises(KeyboardInterrupt):
            press_ctrl_c()
        with pytest.raises(KeyboardInterrupt):
            interrupts.check()


def test_other_threads_and_handlers_are_left_alone() -> None:
    seen: list[int] = []
    before = signal.signal(signal.SIGINT, lambda number, frame: seen.append(number))
    try:
        with Interrupts() as interrupts:
            press_ctrl_c()
            interrupts.check()
        assert seen == [signal.SIGINT]
    finally:
        signal.signal(signal.SIGINT, before)
    thread = threading.Thread(target=lambda: run(auto_normal, epochs=1))
    thread.start()
    thread.join()
    assert store()


# --- Functions of the user


def test_functions_see_each_step_and_epoch(tmp_path: Path) -> None:
    """What they draw changes nothing; the file of the epoch is there."""
    expected = outcome(run(auto_normal, checkpoint=tmp_path / "a.pt"), tmp_path / "a.pt")
    losses: list[Tensor] = []
    epochs: list[int] = []
    arguments, path = auto_normal(), tmp_path / "b.pt"

    def on_step(step: int, loss: Tensor) -> None:
        losses.append(loss)
        assert len(losses) == step

    def on_epoch(epoch: int, history: History) -> None:
        assert path.exists() and history.epoch[-1] == epoch
        epochs.append(epoch)
        log_marginal(normal_model, arguments["guide"], normal_data(), num_particles=3)
        assert torch.rand(()) < 1

    found = run(lambda: arguments, checkpoint=path, on_step=on_step, on_epoch=on_epoch)
    assert same(outcome(found, path), expected)
    assert epochs == [1, 2, 3, 4] and not losses[0].requires_grad
    means = torch.stack(losses).reshape(4, 3).mean(1)
    assert found.loss == pytest.approx(means.tolist())


# --- What is not finite


def test_an_infinite_loss_is_no_finite_one() -> None:
    """Not NaN, and with a gradient that is finite."""

    class Infinite(Trace_ELBO):
        def loss_and_grads(self, *args: Any) -> float:
            return super().loss_and_grads(*args) + torch.inf

    with pytest.raises(NonFiniteError, match="not finite in step 1, epoch 1"):
        run(auto_normal, loss=Infinite())


# --- Optimisers without a learning rate

EXACT = normal_data().sum() / (1 / 2.0**2 + ROWS)  # the mode of the conjugate posterior


def point() -> dict[str, Any]:
    return {**auto_normal(), "guide": AutoDelta(normal_model)}


def schedule_free(parameters: Any, **options: Any) -> torch.optim.Optimizer:
    optimizer = schedulefree.AdamWScheduleFree(parameters, **options)
    optimizer.train()
    return optimizer


@pytest.mark.slow
@pytest.mark.parametrize("name", ["prodigy", "schedule-free"])
def test_optimisers_without_a_learning_rate(name: str, tmp_path: Path) -> None:
    """With fit, bit for bit resumed, and by PyroOptim with SVI: the mode of the posterior."""
    make: Any = partial(prodigyopt.Prodigy, lr=1.0)
    if name == "schedule-free":
        make = partial(schedulefree.AdamWScheduleFree, lr=0.05)
    quiet = {"transform": None, "batch_size": None, "optimizer": make, "loss": Trace_ELBO()}
    path, other = tmp_path / "whole.pt", tmp_path / "parts.pt"
    expected = outcome(run(point, **quiet, epochs=300, checkpoint=path), path)
    assert store()["AutoDelta.mean"].item() == pytest.approx(EXACT.item(), abs=0.02)
    run(point, **quiet, epochs=150, checkpoint=other)
    parts = run(point, **quiet, epochs=300, checkpoint=other, resume=True)
    assert same(outcome(parts, other), expected)

    pyro.clear_param_store()
    guide = AutoDelta(normal_model)
    constructor = prodigyopt.Prodigy if name == "prodigy" else schedule_free
    optim = pyro.optim.PyroOptim(constructor, {"lr": 1.0 if name == "prodigy" else 0.05})
    svi = SVI(normal_model, guide, optim, Trace_ELBO())
    for _ in range(300):
        svi.step(normal_data())
    for optimizer in optim.optim_objs.values():
        if name == "schedule-free":
            optimizer.eval()
    assert guide.median()["mean"].item() == pytest.approx(EXACT.item(), abs=0.02)


def test_schedule_free_weights_are_the_averaged_ones_where_they_are_seen() -> None:
    """In validation, the best and the last epoch: all as in the evaluation mode."""
    made: list[Any] = []

    def make(parameters: list[Tensor]) -> torch.optim.Optimizer:
        made.append(schedulefree.AdamWScheduleFree(parameters, lr=0.1))
        return made[-1]

    scripted = Scripted([3.0, 2.0, 4.0, 5.0])
    options: dict[str, Any] = {"optimizer": make, "validation": normal_data()[:4]}
    options |= {"validation_loss": scripted}
    run(point, **options, patience=9)
    assert not made[0].param_groups[0]["train_mode"]
    assert same(store(), scripted.seen[1])
    modes: list[bool] = []
    run(
        point,
        optimizer=make,
        on_step=lambda *_: modes.append(made[-1].param_groups[0]["train_mode"]),
    )
    assert all(modes)
    last = store()
    made[-1].train()
    assert not same(store(), last)
