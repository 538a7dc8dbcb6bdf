"""What guides cost: a step of training, and inference, each beside the plain VAE's."""

from collections.abc import Callable, Iterable, Mapping
from functools import partial
from typing import Any

import pyro
import torch
from torch import Tensor

from benchmarks.guide_methods import BASELINE, Method, Setup, build, mixture
from benchmarks.timing import interleaved, medians, ratios
from benchmarks.vae import VAE
from pyro_recursive import MixtureGuide

SetupOf = Callable[..., Setup]
Costs = dict[str, dict[str, float]]


def time_steps(
    names: Iterable[str],
    setup: SetupOf,
    batch: Tensor,
    optimizer: Callable[..., torch.optim.Optimizer],
    repeats: int,
) -> Costs:
    """Time a training step of every method, interleaved; of recursive mixtures a joint one."""
    pyro.clear_param_store()
    steps = {
        name: step_of(_grown(name, setup, batch), batch, optimizer)
        for name in _with_baseline(names)
    }
    return costs_of(steps, repeats, calls=3, baseline=BASELINE)


def time_inference(
    names: Iterable[str], setup: SetupOf, batch: Tensor, repeats: int
) -> dict[str, Costs]:
    """Time q(z | x) with one draw: of all methods, then of mixtures of 1 to 4 components."""
    pyro.clear_param_store()
    guides = {name: _grown(name, setup, batch).guide for name in _with_baseline(names)}
    mixtures = {
        f"{number} {kind}": _mixture(number, kind == "shared trunk", setup(f"{number} {kind}"))
        for kind in ("encoders", "shared trunk")
        for number in (1, 2, 3, 4)
    }
    found = {}
    for rows in (len(batch), 1):
        x = batch[:rows]
        found[f"methods, batch {rows}"] = _latencies(guides, x, repeats, BASELINE)
        found[f"mixtures, batch {rows}"] = _latencies(mixtures, x, repeats, "1 encoders")
    return found


def _with_baseline(names: Iterable[str]) -> list[str]:
    return list(dict.fromkeys([BASELINE, *names]))


def _grown(name: str, setup: SetupOf, batch: Tensor) -> Method:
    """Return a method with networks of its own; a recursive mixture with all its components."""
    method = build(name, setup(name))
    grow(method.guide, batch)
    return method


def grow(guide: Any, batch: Tensor) -> None:
    """Prepare a guide; give a recursive mixture all its components."""
    guide.prepare(batch)
    while getattr(guide, "stage", None) is not None and guide.stage.kind != "joint":
        guide.end_stage()


def _mixture(number: int, shared: bool, setup: Setup) -> MixtureGuide:
    vae = VAE(setup.images.mean(0), setup.hidden, setup.latent, name=setup.name)
    return mixture(setup, vae, number, shared)


def step_of(
    method: Any, batch: Tensor, optimizer: Callable[..., torch.optim.Optimizer]
) -> Callable[[], object]:
    """Return one step of a method."""
    stepper, loss, model = optimizer(method.parameters()), method.loss, method.vae.model

    def step() -> None:
        stepper.zero_grad()
        loss.loss_and_grads(model, method.guide, batch)
        stepper.step()

    return step


def _latencies(guides: dict[str, Any], x: Tensor, repeats: int, baseline: str) -> Costs:
    calls = {name: partial(infer, guide, x) for name, guide in guides.items()}
    return costs_of(calls, repeats, calls=10, baseline=baseline)


@torch.no_grad()
def infer(guide: Callable, x: Tensor) -> object:
    """Return what a guide samples."""
    return guide(x)


def costs_of(
    steps: Mapping[str, Callable[[], object]], repeats: int, calls: int, baseline: str
) -> Costs:
    """Return medians of milliseconds and of ratios to the baseline, timed side by side."""
    timings = interleaved(steps, repeats, calls)
    return {"ms": medians(timings), "ratio": ratios(timings, baseline)}
