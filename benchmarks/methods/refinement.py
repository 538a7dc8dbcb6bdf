"""What the benchmark of refinement compares: each method is a model, a guide, a loss, a schedule.

All have the same decoder with the same initial weights, one draw for each row and step, and
pathwise gradients. What refines takes the same number of steps, in training and in testing, at a
step size that is learned.
"""

from functools import partial
from typing import Any

from torch import nn

from benchmarks.methods.guides import schedule
from benchmarks.report import BASELINE
from benchmarks.run import Method, Methods, Task
from pyro_recursive import (
    MIWAE_ELBO,
    AmortizedGuide,
    RecursiveMixture_ELBO,
    RecursiveMixtureGuide,
    SemiAmortizedGuide,
)
from pyro_recursive.guides.semi_amortized.updates import (
    FixedStart,
    GradientUpdate,
    LearnedUpdate,
    Update,
)
from pyro_recursive.training import Aggressive


def _plain(vae: Any, task: Task, settings: Any, aggressive: bool = False) -> Method:
    guide = AmortizedGuide(vae.model, vae.encoder, name=f"{vae.name}guide")
    return Method(vae, guide, MIWAE_ELBO(1, 1), Aggressive() if aggressive else None)


def _refined(
    vae: Any,
    task: Task,
    settings: Any,
    mode: str,
    start: nn.Module | None = None,
    update: Update | None = None,
) -> Method:
    guide = SemiAmortizedGuide(
        vae.model,
        AmortizedGuide(vae.model, start or vae.encoder),
        mode=mode,
        steps=settings.refinements,
        update=update or GradientUpdate(learn_rate=True),
        name=f"{vae.name}guide",
    )
    return Method(vae, guide, MIWAE_ELBO(1, 1))


def _svi(vae: Any, task: Task, settings: Any) -> Method:
    return _refined(vae, task, settings, "svi", FixedStart(2 * settings.latent))


def _iterative(vae: Any, task: Task, settings: Any) -> Method:
    features = task.make_vae(vae.name).encoder  # its output is an input of the network
    update = LearnedUpdate((settings.hidden, settings.hidden), features=features)
    start = FixedStart(2 * settings.latent)
    return _refined(vae, task, settings, "first_order", start, update)


def _recursive(vae: Any, task: Task, settings: Any) -> Method:
    encoders = [vae.encoder, task.make_vae(vae.name).encoder]
    guide = RecursiveMixtureGuide(
        vae.model,
        [AmortizedGuide(vae.model, encoder) for encoder in encoders],
        schedule=schedule(settings.steps(len(task.train)), 2),
        weights="shared",
        name=f"{vae.name}guide",
    )
    return Method(vae, guide, RecursiveMixture_ELBO(1, holdout=(task.validation[:100],)))


METHODS: Methods = {
    BASELINE: _plain,
    "SVI": _svi,
    "VAE + SVI": partial(_refined, mode="vae_svi"),
    "distilled": partial(_refined, mode="distill"),
    "first order": partial(_refined, mode="first_order"),
    "second order": partial(_refined, mode="second_order"),
    "iterative": _iterative,
    "aggressive": partial(_plain, aggressive=True),
    "recursive 2": _recursive,
}
