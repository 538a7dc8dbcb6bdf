"""Where a NaN or an infinity comes from."""

from pathlib import Path
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.infer import Trace_ELBO
from pyro.infer.autoguide import AutoNormal
from torch import Tensor

from pyro_recursive.training import NonFiniteError
from pyro_recursive.training.nan_search import FirstNonFiniteSite
from tests.oracles.training import (
    ROWS,
    Counted,
    auto_normal,
    normal_data,
    normal_model,
    quiet,
    run,
    store,
)


def nan_data() -> dict[str, Any]:
    data = normal_data()
    data[5] = torch.nan
    return {**auto_normal(), "data": data}


def nan_after_some_steps() -> dict[str, Any]:
    def guide(x: Tensor) -> None:
        loc = pyro.param("loc", torch.tensor(0.1))
        scale = pyro.param("scale", torch.tensor(0.5))
        shrinks = torch.where(x[0] == normal_data()[8], torch.nan, 1.0)
        pyro.sample("mean", dist.Normal(loc, scale * shrinks))

    return {**auto_normal(), "guide": guide, "shuffle": False}


def impossible_data() -> dict[str, Any]:
    def model(x: Tensor) -> None:
        normal_model(x)
        pyro.sample("y", dist.Uniform(0.0, 1.0), obs=torch.tensor(2.0))

    return {**auto_normal(), "model": model}


def nan_gradient() -> dict[str, Any]:
    def guide(x: Tensor) -> None:
        slope = pyro.param("slope", torch.tensor(0.0))
        loc = pyro.param("loc", torch.tensor(0.1))
        pyro.sample("mean", dist.Normal(loc + slope.abs().sqrt(), 1.0))

    return {**auto_normal(), "guide": guide}


def nan_parameter() -> dict[str, Any]:
    pyro.param("bad", torch.tensor(torch.nan))

    def guide(x: Tensor) -> None:
        pyro.sample("mean", dist.Normal(pyro.param("bad"), 1.0))

    return {**auto_normal(), "guide": guide}


def singular_model() -> dict[str, Any]:
    def model(x: Tensor) -> None:
        mean = pyro.sample("mean", dist.Normal(0.0, 2.0))
        pyro.factor("before", mean * torch.nan)
        torch.linalg.cholesky(mean.expand(2, 2) * torch.nan)

    return {**auto_normal(), "model": model}


BROKEN = {
    "data": (nan_data, r"data tensor '0'; model site 'x', its value is NaN or infinite \(data\)"),
    "guide scale": (nan_after_some_steps, r"step 3, epoch 1.*guide site 'mean', its distribution "
                    "parameter 'scale' is NaN"),
    "impossible data": (impossible_data, "model site 'y', its log_prob is -inf"),
    "gradient": (nan_gradient, "the gradient of parameter 'slope'"),
    "parameter": (nan_parameter, "parameter 'bad'; guide site 'mean', its distribution parameter"),
    "linear algebra": (singular_model, "model site 'before', its distribution parameter"),
}  # fmt: skip


@quiet
@pytest.mark.parametrize("validate", [True, False])
@pytest.mark.parametrize("name", BROKEN)
def test_the_site_of_a_nan_is_named_and_parameters_stay(name: str, validate: bool) -> None:
    program, message = BROKEN[name]
    before: list[dict[str, Tensor]] = []

    def look(*batch: Tensor) -> tuple[Tensor, ...]:
        before.append(store())
        return batch

    taken = Counted.steps
    with pyro.validation_enabled(validate), pytest.raises(NonFiniteError, match=message):
        run(program, transform=look, optimizer=Counted)
    assert Counted.steps - taken == len(before) - 1
    after, params = store(), pyro.get_param_store()
    assert all(
        torch.equal(after[name], value) for name, value in before[-1].items() if value == value
    )
    assert all(params[name].unconstrained().grad is None for name in params)


@quiet
@pytest.mark.parametrize("validate", [True, False])
def test_a_nan_is_found_under_the_draws_of_its_step(validate: bool) -> None:
    seen: list[str] = []

    def model(x: Tensor) -> None:
        mean = pyro.sample("mean", dist.Normal(0.0, 2.0))
        seen.append(f"draw {mean.item():.8f}")
        # Only the draw of this step shows the fault.
        pyro.factor(seen[-1], torch.where(mean > 1.5, torch.nan, 0.0))

    def guide(x: Tensor) -> None:
        pyro.sample("mean", dist.Normal(pyro.param("loc", torch.tensor(0.0)), 1.0))

    arguments = {**auto_normal(), "model": model, "guide": guide}
    problem = pytest.raises(NonFiniteError, match="model site 'draw")
    with pyro.validation_enabled(validate), problem as caught:
        run(lambda: arguments, epochs=100)
    assert len(seen) > 3
    assert seen[-1] == seen[-2]
    assert seen[-1] in str(caught.value)


@quiet
def test_sparse_checks_find_it_by_the_end_of_the_epoch(tmp_path: Path) -> None:
    path = tmp_path / "run.pt"
    with pyro.validation_enabled(False), pytest.raises(NonFiniteError, match="'mean'"):
        run(nan_after_some_steps, check_every=100, checkpoint=path, transform=None)
    assert not path.exists()


def test_masked_nans_are_nobody_s_fault() -> None:
    def model(x: Tensor) -> None:
        mean = pyro.sample("mean", dist.Normal(0.0, 2.0))
        with pyro.plate("data", ROWS, subsample=x), poutine.mask(mask=~x.isnan()):
            pyro.sample("x", dist.Normal(mean, 1.0), obs=x)
        pyro.factor("late", torch.tensor(torch.inf))

    data = normal_data()
    data[5] = torch.nan
    arguments = {**auto_normal(), "model": model, "guide": AutoNormal(model), "data": data}
    with pyro.validation_enabled(False), pytest.raises(NonFiniteError, match="model site 'late'"):
        run(lambda: arguments, batch_size=None)


class Infinite(Trace_ELBO):
    """A loss, or a gradient, that is infinite without any NaN."""

    def __init__(self, gradient: bool) -> None:
        super().__init__()
        self.gradient = gradient

    def loss_and_grads(self, *args: Any, **kwargs: Any) -> float:
        loss = super().loss_and_grads(*args, **kwargs)
        if not self.gradient:
            return loss + torch.inf
        (pyro.param("root", torch.tensor(0.0)) ** 0.5).backward()
        return loss


@pytest.mark.parametrize("check_every", [1, 100])
def test_an_infinity_without_a_nan_is_found(check_every: int) -> None:
    options = {"check_every": check_every, "epochs": 1, "batch_size": None}
    with pytest.raises(NonFiniteError, match="the gradient of parameter 'root'"):
        run(auto_normal, loss=Infinite(gradient=True), **options)
    with pytest.raises(NonFiniteError, match="only the sum overflows"):
        run(auto_normal, loss=Infinite(gradient=False), **options)


def test_a_dead_sample_is_not_blamed_for_a_nan() -> None:
    """One sample of zero density is legal; the NaN after it is the fault."""
    watch = FirstNonFiniteSite()
    with pyro.validation_enabled(False), watch:
        pyro.factor("dead", torch.tensor([0.0, -torch.inf]))
        assert watch.first == "model site 'dead', its log_prob is -inf"
        pyro.factor("wrong", torch.tensor(torch.nan))
        pyro.factor("late", torch.tensor(torch.inf))
    assert watch.first is not None and "'wrong'" in watch.first
