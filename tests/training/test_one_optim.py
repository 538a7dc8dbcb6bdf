"""`OneOptim` makes the updates of Pyro's optimisers, with one torch optimiser for all."""

from collections.abc import Callable
from copy import deepcopy
from typing import Any

import pyro
import pyro.distributions as dist
import pyro.optim
import pytest
import torch
from pyro.infer import SVI, Trace_ELBO
from pyro.infer.autoguide import AutoNormal

from pyro_recursive import CompiledSVI
from pyro_recursive.training import OneOptim


def model(extra: bool = True) -> None:
    pyro.sample("a", dist.Normal(1.0, 1.0).expand([3]).to_event(1))
    pyro.sample("b", dist.Normal(pyro.param("late", torch.tensor(0.3)) if extra else 0.0, 1.0))


Make = Callable[[], Any]


def options(name: str) -> dict[str, Any]:
    return {"lr": 0.05 if "locs" in name else 0.01}


PAIRS: dict[str, tuple[Make, Make]] = {
    "Adam": (
        lambda: pyro.optim.Adam({"lr": 0.02}),
        lambda: OneOptim(torch.optim.Adam, {"lr": 0.02, "fused": True}),
    ),
    "by name, clipped": (
        lambda: pyro.optim.Adam(options, {"clip_norm": 0.3}),
        lambda: OneOptim(torch.optim.Adam, options, {"clip_norm": 0.3}),
    ),
    "momentum": (
        lambda: pyro.optim.SGD({"lr": 0.02, "momentum": 0.8}),
        lambda: OneOptim(torch.optim.SGD, {"lr": 0.02, "momentum": 0.8}),
    ),
}


def trained(
    optim: Any, make: Any = SVI, saved: Any = None, extra: tuple[int, ...] = (3, 4, 5, 9)
) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """Train; some steps alone meet a parameter. Return the values and the optimiser's state."""
    pyro.clear_param_store()
    torch.manual_seed(0)
    guide = AutoNormal(model)
    if saved is not None:
        optim.set_state(saved)
    svi = make(model, guide, optim, Trace_ELBO())
    for step in range(12):
        svi.step(extra=step in extra)
    values = {n: p.detach().clone() for n, p in pyro.get_param_store().named_parameters()}
    return values, deepcopy(optim.get_state())


@pytest.mark.parametrize(("pyros", "ours"), PAIRS.values(), ids=PAIRS)
def test_updates_are_those_of_one_optimiser_each(pyros: Make, ours: Make) -> None:
    (expected, one), (found, other) = trained(pyros()), trained(ours())
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-12)
    assert other.keys() == one.keys()
    # Saved by either, loaded by the other.
    expected, _ = trained(pyros(), saved=other)
    found, _ = trained(ours(), saved=one)
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-12)


@pytest.mark.slow
def test_compiled_steps_know_it() -> None:
    def compiled(*args: Any) -> CompiledSVI:
        return CompiledSVI(*args, engine="graph", strict=True)

    pyros, ours = PAIRS["Adam"]
    (expected, _), (found, _) = trained(pyros(), extra=()), trained(ours(), compiled, extra=())
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-12)
