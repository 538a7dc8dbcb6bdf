"""Losses of Pyro under compiled steps have the values, and train as, under `SVI`."""

from collections.abc import Callable
from functools import partial
from typing import Any

import pyro
import pytest
import torch
from pyro.infer import (
    SVI,
    RenyiELBO,
    Trace_ELBO,
    TraceEnum_ELBO,
    TraceMeanField_ELBO,
    TraceTailAdaptive_ELBO,
)
from pyro.infer.autoguide import AutoNormal
from pyro.optim import SGD, Adam
from torch import Tensor

from pyro_recursive import CompiledSVI
from tests.models import ROWS
from tests.training.compiled.scenarios import X, adam, check, check_eager, guide, shifted

LOSSES: dict[str, Callable[..., Any]] = {
    "Trace": Trace_ELBO,
    "Trace of 3": partial(Trace_ELBO, num_particles=3, vectorize_particles=True),
    "Trace of 3, looped": partial(Trace_ELBO, num_particles=3),
    "Trace with nesting": partial(
        Trace_ELBO, num_particles=3, vectorize_particles=True, max_plate_nesting=2
    ),
    "Renyi": partial(RenyiELBO, alpha=0.3, num_particles=4, vectorize_particles=True),
    "Renyi, looped": partial(RenyiELBO, alpha=2.0, num_particles=4),
    "MeanField": TraceMeanField_ELBO,
    "MeanField of 3": partial(TraceMeanField_ELBO, num_particles=3, vectorize_particles=True),
}


def trained(row: Any, loss: Any, make: Callable[..., Any]) -> list[Tensor]:
    pyro.clear_param_store()
    torch.manual_seed(0)
    model, guide = row.build()
    svi = make(model, guide, Adam({"lr": 0.01}), loss())
    losses = [svi.step(*row.args()) for _ in range(5)]
    found = [p.detach().clone() for _, p in pyro.get_param_store().named_parameters()]
    return [torch.tensor(losses), *found, torch.rand(())]


CELLS = [
    pytest.param(loss, name, id=f"{name}-{loss}")
    for name in ("data_plate", "subsample_size", "discrete")
    for loss in LOSSES
    if name != "discrete" or "MeanField" not in loss  # which needs reparameterised sites
]


@pytest.mark.quick("subsample_size-Trace of 3", "data_plate-MeanField")
@pytest.mark.parametrize(("loss", "name"), CELLS)
def test_steps_are_those_of_svi(loss: str, name: str) -> None:
    row = next(row for row in ROWS if row.name == name)
    expected = trained(row, LOSSES[loss], SVI)
    found = trained(row, LOSSES[loss], partial(CompiledSVI, engine="graph", strict=True))
    for one, other in zip(expected, found, strict=True):
        torch.testing.assert_close(other, one, rtol=1e-10, atol=1e-12)


def test_steps_are_those_of_svi_on_parameters_of_modules_alone() -> None:
    """Under ``module_local_params``, which Pyro's store has no parameters of."""

    def scenario(make: Callable[..., Any]) -> list[Any]:
        svi = make(shifted, AutoNormal(shifted), adam(), Trace_ELBO(num_particles=2))
        return [svi.step(X) for _ in range(6)]

    with pyro.settings.context(module_local_params=True):
        check(scenario)


def test_a_loss_that_is_always_infinite_is_compared_by_its_updates(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def scenario(make: Callable[..., Any]) -> list[Any]:
        options = {"num_particles": 3, "vectorize_particles": True, "max_plate_nesting": 1}
        svi = make(shifted, guide, adam(), TraceTailAdaptive_ELBO(**options))
        return [svi.step(X) for _ in range(6)]

    eager, calls = CompiledSVI._eager, list[Any]()
    monkeypatch.setattr(CompiledSVI, "_eager", lambda *args: calls.append(1) or eager(*args))
    assert check(scenario)[0] == torch.inf
    assert len(calls) == 2  # the first step, and the one that is compared


def test_steps_that_cannot_be_compared_are_eager_after_some() -> None:
    def model(x: Tensor) -> None:
        shifted(x)
        pyro.factor("impossible", torch.tensor(-torch.inf))

    def scenario(make: Callable[..., Any]) -> list[Any]:
        svi = make(model, guide, SGD({"lr": 0.0}), Trace_ELBO())
        return [svi.step(X) for _ in range(12)]

    check_eager(scenario, "no step could be compared, as the loss inf or its update")


@pytest.mark.filterwarnings("ignore:TraceEnum_ELBO found no")
def test_trace_enum_asks_in_each_step_which_probabilities_are_zero() -> None:
    row = next(row for row in ROWS if row.name == "discrete")
    with pytest.raises(NotImplementedError, match=r"vary in each step.*util.py"):
        trained(row, TraceEnum_ELBO, partial(CompiledSVI, engine="graph", strict=True))
