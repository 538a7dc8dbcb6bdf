"""The second run of a guide on stand-ins is left out where its densities are known without it."""

from collections.abc import Callable
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from torch import Tensor

from pyro_recursive import IWAE_ELBO, MIWAE_ELBO
from pyro_recursive.tracing import runs

X = torch.randn(5, generator=torch.Generator().manual_seed(1)).double()


def model(x: Tensor) -> None:
    with pyro.plate("data", len(x)):
        a = pyro.sample("a", dist.Normal(0.0, 1.0))
        b = pyro.sample("b", dist.LogNormal(a, 0.5))
        pyro.sample("x", dist.Normal(a, b), obs=x)


def parameters() -> tuple[Tensor, Tensor]:
    loc, scale = torch.tensor([0.3, -0.2]), torch.tensor([0.6, 0.8])
    positive = dist.constraints.positive
    return pyro.param("loc", loc), pyro.param("scale", scale, constraint=positive)


def apart(x: Tensor) -> None:
    loc, scale = parameters()
    with pyro.plate("data", len(x)):
        pyro.sample("a", dist.Normal(loc[0] * x, scale[0]))
        pyro.sample("b", dist.LogNormal(loc[1], scale[1]))


def chained(x: Tensor) -> None:
    loc, scale = parameters()
    with pyro.plate("data", len(x)):
        a = pyro.sample("a", dist.Normal(loc[0] * x, scale[0]))
        pyro.sample("b", dist.LogNormal(loc[1] + 0.1 * a, scale[1]))


def with_factor(x: Tensor) -> None:
    loc, scale = parameters()
    with pyro.plate("data", len(x)):
        a = pyro.sample("a", dist.Normal(loc[0] * x, scale[0]))
        pyro.factor("extra", 0.1 * a, has_rsample=True)
        pyro.sample("b", dist.LogNormal(loc[1], scale[1]))


def computed(x: Tensor) -> None:
    loc, scale = parameters()
    with pyro.plate("data", len(x)):
        u = pyro.sample("u", dist.Normal(loc[0] * x, scale[0]), infer={"is_auxiliary": True})
        pyro.sample("a", dist.Delta(u))
        pyro.sample("b", dist.LogNormal(loc[1], scale[1]))


def gradients(guide: Callable, loss: Any) -> tuple[list[Tensor], int]:
    """Return the gradients of a second step, and how often it runs the guide."""
    count = 0

    def counted(x: Tensor) -> None:
        nonlocal count
        count += 1
        guide(x)

    pyro.clear_param_store()
    loss.loss_and_grads(model, counted, X)
    torch.manual_seed(2)
    found = loss.differentiable_loss(model, counted, X)
    count = 0
    torch.manual_seed(2)
    found = loss.differentiable_loss(model, counted, X)
    leaves = [p for _, p in pyro.get_param_store().named_parameters()]
    return [found.detach(), *torch.autograd.grad(found, leaves)], count


RUNS: dict[Callable, int] = {apart: 1, chained: 2, with_factor: 2, computed: 2}
PAIRS = [
    (guide, estimator)
    for guide in RUNS
    for estimator in ("dreg", "stl", "rws", "rws-dreg")
    if guide is not computed or not estimator.startswith("rws")  # refused in the wake phase
]


@pytest.mark.parametrize(("guide", "estimator"), PAIRS)
def test_a_second_run_is_needed_where_a_density_depends_on_samples(
    guide: Callable, estimator: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    for loss in (IWAE_ELBO(4, estimator=estimator), MIWAE_ELBO(2, 3, estimator=estimator)):
        found, count = gradients(guide, loss)
        assert count == RUNS[guide]
        with monkeypatch.context() as patch:
            patch.setattr(runs, "_are_apart", lambda *args: False)
            twice, count = gradients(guide, loss)
        assert count == 2
        torch.testing.assert_close(found, twice, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("estimator", ["dreg", "stl"])
def test_a_density_may_begin_to_depend_on_samples(estimator: Any) -> None:
    def gradients_after(first: Callable) -> list[Tensor]:
        current = first

        def guide(x: Tensor) -> None:
            current(x)

        pyro.clear_param_store()
        loss = IWAE_ELBO(4, estimator=estimator)
        loss.loss_and_grads(model, guide, X)
        current = chained
        torch.manual_seed(2)
        found = loss.differentiable_loss(model, guide, X)
        leaves = [p for _, p in pyro.get_param_store().named_parameters()]
        return list(torch.autograd.grad(found, leaves))

    found, expected = gradients_after(apart), gradients_after(chained)
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)
