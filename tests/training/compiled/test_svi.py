"""Compiled steps are the steps of `pyro.infer.SVI`."""

from collections.abc import Callable
from functools import partial
from typing import Any

import pyro
import pyro.distributions as dist
import pyro.optim
import pytest
import torch
from pyro.infer import SVI, Trace_ELBO
from pyro.infer.autoguide import AutoNormal
from pyro.optim.clipped_adam import ClippedAdam
from torch import Tensor

from pyro_recursive import IWAE_ELBO, AmortizedGuide
from pyro_recursive.tracing.graphs import host_reads
from pyro_recursive.training.compiled import flat
from pyro_recursive.training.compiled.svi import CompiledSVI

pytestmark = pytest.mark.filterwarnings("ignore:Plate 'schools' encloses")

Y = torch.tensor([28.0, 8.0, -3.0, 7.0, -1.0, 1.0, 18.0, 12.0])
ERROR = torch.tensor([15.0, 10.0, 16.0, 11.0, 9.0, 11.0, 10.0, 18.0])
DATA = Y.double(), ERROR.double()


def eight_schools(y: Tensor, error: Tensor) -> None:
    mean = pyro.sample("mean", dist.Normal(0.0, 5.0))
    spread = pyro.sample("spread", dist.HalfCauchy(5.0))
    with pyro.plate("schools", len(y)):
        effect = pyro.sample("effect", dist.Normal(0.0, 1.0))
        pyro.sample("y", dist.Normal(mean + spread * effect, error), obs=y)


def trained(make: Callable[..., Any], optim: Any, loss: Any, steps: int = 20) -> tuple[Any, ...]:
    """Return the losses of some steps, the parameters after them and the next random number."""
    pyro.clear_param_store()
    torch.manual_seed(0)
    svi = make(eight_schools, AutoNormal(eight_schools), optim(), loss())
    losses = [svi.step(*DATA) for _ in range(steps)]
    values = [p.detach().clone() for _, p in pyro.get_param_store().named_parameters()]
    return torch.tensor(losses), torch.cat([v.reshape(-1) for v in values]), torch.rand(())


def traced(*args: Any) -> CompiledSVI:
    return CompiledSVI(*args, engine="graph", strict=True)


def check_same(make: Callable[..., Any], optim: Any, loss: Any) -> None:
    for expected, found in zip(trained(SVI, optim, loss), trained(make, optim, loss), strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-12)


OPTIMISERS = {
    "Adam": lambda: pyro.optim.Adam({"lr": 0.01, "weight_decay": 0.1, "amsgrad": True}),
    "AdamW": lambda: pyro.optim.AdamW({"lr": 0.01, "betas": (0.8, 0.95)}),
    "SGD": lambda: pyro.optim.SGD({"lr": 1e-4}),
    "momentum": lambda: pyro.optim.SGD({"lr": 1e-4, "momentum": 0.9, "nesterov": True}),
    "dampened": lambda: pyro.optim.SGD({"lr": 1e-4, "momentum": 0.9, "dampening": 0.3}),
    "RMSprop": lambda: pyro.optim.RMSprop({"lr": 0.01, "centered": True, "momentum": 0.5}),
    "Adagrad": lambda: pyro.optim.Adagrad({"lr": 0.01, "lr_decay": 0.1}),
    "ClippedAdam": lambda: pyro.optim.ClippedAdam({"lr": 0.02, "lrd": 0.9, "clip_norm": 0.5}),
    "clipped": lambda: pyro.optim.Adam({"lr": 0.01}, {"clip_norm": 1.0, "clip_value": 0.4}),
    "each its own": lambda: pyro.optim.Adam(
        lambda name: {"lr": 0.02 if "loc" in name else 0.005, "betas": (0.9, 0.99)}
    ),
}


@pytest.mark.quick("Adam")
@pytest.mark.parametrize("optim", OPTIMISERS.values(), ids=OPTIMISERS)
def test_steps_of_each_optimiser_are_those_of_svi(optim: Any) -> None:
    check_same(traced, optim, partial(IWAE_ELBO, 4, estimator="dreg"))


@pytest.mark.quick("ClippedAdam")
@pytest.mark.parametrize("optim", ["Adam", "ClippedAdam", "clipped", "each its own"])
def test_large_parameters_have_buffers_of_their_own(
    optim: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(flat, "LARGE", 8)
    check_same(traced, OPTIMISERS[optim], partial(IWAE_ELBO, 4, estimator="dreg"))


@pytest.mark.slow
def test_learning_rate_of_one_optimiser_decays_once(monkeypatch: pytest.MonkeyPatch) -> None:
    def losses(engine: Any) -> Tensor:
        pyro.clear_param_store()
        torch.manual_seed(0)
        guide = AutoNormal(eight_schools)
        guide(*DATA)
        adam = ClippedAdam(guide.parameters(), lr=0.1, lrd=0.7)
        svi = CompiledSVI(eight_schools, guide, adam, IWAE_ELBO(1), engine=engine, strict=True)
        return torch.tensor([svi.step(*DATA) for _ in range(8)])

    monkeypatch.setattr(flat, "LARGE", 8)
    torch.testing.assert_close(losses("graph"), losses("eager"), rtol=1e-10, atol=1e-12)


def test_data_of_rows_with_parameters_are_not_read_in_each_step(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    read, make = list[Tensor](), host_reads.ReadValues.__init__

    def note(self: Any, graph: Any, values: list[Tensor]) -> None:
        read.extend(values)
        make(self, graph, values)

    monkeypatch.setattr(host_reads.ReadValues, "__init__", note)
    guide = AmortizedGuide(eight_schools)
    svi = traced(eight_schools, guide, pyro.optim.Adam({"lr": 0.01}), Trace_ELBO())
    for _ in range(3):
        svi.step(*DATA)
    assert not read


@pytest.mark.slow
def test_replayed_kernels_take_the_steps_of_svi() -> None:
    def replayed(*args: Any) -> CompiledSVI:
        return CompiledSVI(*args, engine="replay", strict=True)

    check_same(replayed, OPTIMISERS["Adam"], partial(IWAE_ELBO, 4, estimator="dreg"))
