"""Pyro's hidden Markov models under losses: beside TraceEnum_ELBO, of more samples, trained."""

from collections.abc import Callable
from functools import partial
from typing import Any

import pyro
import pytest
import torch
from pyro import poutine
from pyro.infer import ELBO, SVI, TraceEnum_ELBO
from pyro.infer.autoguide import AutoDelta
from pyro.optim import Adam
from torch import Tensor

from pyro_recursive import IWAE_ELBO, CompiledSVI, fit
from tests.models.chains import CHAINS, Chain, global_latents, in_a_plate, music
from tests.oracles.recordings import Pinned, Recorded

over = pytest.mark.parametrize("chain", CHAINS, ids=lambda chain: chain.name)
ROW = {chain.name: chain for chain in CHAINS}


def made(chain: Chain) -> tuple[Callable, Callable, tuple[Tensor, Tensor]]:
    """Return model, guide and data, with all parameters in the store."""
    pyro.clear_param_store()
    pyro.set_rng_seed(7)
    guide, args = chain.guide(chain.model), chain.args()
    IWAE_ELBO(1).loss(chain.model, guide, *args)
    return chain.model, guide, args


def value_and_gradient(loss: ELBO, model: Callable, guide: Callable, args: tuple) -> Tensor:
    pyro.set_rng_seed(3)
    value = loss.differentiable_loss(model, guide, *args)
    leaves = list(dict(pyro.get_param_store().named_parameters()).values())
    found = torch.autograd.grad(value, leaves, allow_unused=True, materialize_grads=True)
    return torch.cat([value.detach().reshape(1), *map(torch.flatten, found)])


def check_beside_pyro(model: Callable, guide: Callable, args: tuple) -> None:
    found, expected = (
        value_and_gradient(loss, model, guide, args)
        for loss in (IWAE_ELBO(1), TraceEnum_ELBO(max_plate_nesting=2))
    )
    assert (found != 0).sum() > 2 and found.isfinite().all()
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-10)


@over
def test_one_sample_equals_trace_enum_elbo(chain: Chain) -> None:
    check_beside_pyro(*made(chain))


def test_minibatches_of_one_sample_equal_trace_enum_elbo() -> None:
    model = partial(in_a_plate, batch=2)
    check_beside_pyro(model, global_latents(model), music())


@over
def test_more_samples_are_a_tighter_bound(chain: Chain) -> None:
    """In one pass as one by one, on the same draws; by the mean of independent draws."""
    model, guide, args = made(chain)
    with Recorded() as recorded, torch.no_grad():
        one_pass = IWAE_ELBO(8).loss(model, guide, *args)
    drawn = {
        n: v for n, v in recorded.values.items() if f"{n}_unconstrained" not in recorded.values
    }
    with Pinned(drawn, {}, total=8):
        looped = IWAE_ELBO(8, vectorize_particles=False).loss(model, guide, *args)
    assert looped == pytest.approx(one_pass, rel=1e-10)
    one, eight = (-IWAE_ELBO(K, num_estimates=400).loss(model, guide, *args) for K in (1, 8))
    assert eight > one - (1e-9 if chain.name == "discrete, discrete" else 0.0)


def trained(make: Callable[..., Any], chain: Chain) -> list[Tensor]:
    model, guide, args = made(chain)
    svi = make(model, guide, Adam({"lr": 0.02}), IWAE_ELBO(1))
    losses = [svi.step(*args) for _ in range(4)]
    parameters = [value.detach() for _, value in pyro.get_param_store().named_parameters()]
    return [torch.tensor(losses), *parameters, torch.rand(())]


@pytest.mark.quick("discrete, continuous")
@pytest.mark.parametrize("name", ["one_by_one", "two_chains", "discrete, continuous"])
def test_compiled_steps_are_those_of_svi(name: str) -> None:
    found = trained(partial(CompiledSVI, engine="graph", strict=True), ROW[name])
    for one, other in zip(trained(SVI, ROW[name]), found, strict=True):
        torch.testing.assert_close(other, one, rtol=1e-10, atol=1e-10)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["two_chains", "discrete, discrete"])
def test_fit_climbs_and_compiles(name: str) -> None:
    """The mode of the global latents, as in Pyro's example: no random numbers."""
    found = []
    for compile in (False, "graph"):
        pyro.clear_param_store()
        model, args = ROW[name].model, ROW[name].args()
        guide: Any = ROW[name].guide(model)
        if name == "two_chains":
            guide = AutoDelta(poutine.block(model, expose=["moves", "other_moves", "chances"]))
        history = fit(
            model,
            guide,
            args,
            loss=IWAE_ELBO(1),
            epochs=8,
            optimizer=partial(torch.optim.Adam, lr=0.05),
            shuffle=False,
            progress=False,
            compile=compile,
        )
        found.append(torch.tensor(history.loss))
    torch.testing.assert_close(*found, rtol=1e-10, atol=1e-10)
    assert found[0][-1] < found[0][0]
