"""Scenarios of training steps, taken under compiled steps and under `pyro.infer.SVI`."""

from collections.abc import Callable
from functools import partial
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer import SVI
from pyro.optim import Adam
from torch import Tensor
from torch.distributions import constraints

from pyro_recursive import IWAE_ELBO, CompiledSVI

X = torch.tensor([1.0, -0.5, 2.0, 0.3], dtype=torch.float64)
Scenario = Callable[[Callable[..., Any]], list[Any]]


def traced(*args: Any) -> CompiledSVI:
    return CompiledSVI(*args, engine="graph", strict=True)


def results(scenario: Scenario, make: Callable[..., Any]) -> list[Tensor]:
    """Return what a scenario returns, all parameters, and the next random number."""
    pyro.clear_param_store()
    torch.manual_seed(0)
    found = [torch.as_tensor(each, dtype=torch.float64) for each in scenario(make)]
    store = pyro.get_param_store().named_parameters()
    return [*found, *(value.detach().clone() for _, value in store), torch.rand(())]


def check(scenario: Scenario, make: Callable[..., Any] = traced) -> list[Tensor]:
    """Compare a scenario under compiled steps with one under `SVI`."""
    expected, found = results(scenario, SVI), results(scenario, make)
    assert len(expected) == len(found)
    for one, other in zip(expected, found, strict=True):
        torch.testing.assert_close(other, one, rtol=1e-10, atol=1e-12)
    return found


def check_eager(scenario: Scenario, message: str) -> None:
    """Compare a scenario with `SVI`, of which one form of call runs eagerly."""
    with pytest.warns(UserWarning, match=f"Training steps run eagerly: {message}"):
        check(scenario, partial(CompiledSVI, engine="graph"))


def adam() -> Adam:
    return Adam({"lr": 0.05})


def shifted(x: Tensor, shift: Any = 0.0) -> None:
    """A local latent in each row, and data around it and a shift."""
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        pyro.sample("x", dist.Normal(z + shift, 1.0), obs=x)


def guide(x: Tensor, *rest: Any) -> None:
    loc = pyro.param("loc", lambda: torch.tensor(0.1))
    scale = pyro.param("scale", lambda: torch.tensor(0.8), constraint=constraints.positive)
    with pyro.plate("data", len(x)):
        pyro.sample("z", dist.Normal(loc, scale))


def before_and_after(model: Callable, change: Callable[[], Any], *args: Any) -> Scenario:
    """Take steps, change something, and take steps."""

    def scenario(make: Callable[..., Any]) -> list[Any]:
        svi = make(model, guide, adam(), IWAE_ELBO(3))
        losses = [svi.step(*(args or (X,))) for _ in range(4)]
        change()
        return losses + [svi.step(*(args or (X,))) for _ in range(4)]

    return scenario
