"""What the benchmark of refinement compares: each method is a model, a guide, a loss, a schedule.

All have the same decoder with the same initial weights, one draw for each row and step, and
pathwise gradients. What refines takes the same number of steps, in training and in testing, at a
step size that is learned.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

from torch import Tensor, nn

from benchmarks.methods.guides import schedule
from benchmarks.run import Method
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

BASELINE = "VAE"


@dataclass(frozen=True)
class Setup:
    """What all methods share.

    ``make_vae`` returns a new one, with ``model``, ``encoder`` and ``decoder``, for a name that
    tells its parameters from another's; ``updates`` is the length of training, ``refinements`` that
    of a refinement.
    """

    make_vae: Callable[[str], Any]
    holdout: Tensor
    latent: int
    hidden: int
    updates: int
    refinements: int
    name: str = ""


def _plain(setup: Setup, vae: Any, aggressive: bool = False) -> Method:
    guide = AmortizedGuide(vae.model, vae.encoder, name=f"{setup.name}guide")
    return Method(vae, guide, MIWAE_ELBO(1, 1), Aggressive() if aggressive else None)


def _refined(
    setup: Setup,
    vae: Any,
    mode: str,
    start: nn.Module | None = None,
    update: Update | None = None,
) -> Method:
    guide = SemiAmortizedGuide(
        vae.model,
        AmortizedGuide(vae.model, start or vae.encoder),
        mode=mode,
        steps=setup.refinements,
        update=update or GradientUpdate(learn_rate=True),
        name=f"{setup.name}guide",
    )
    return Method(vae, guide, MIWAE_ELBO(1, 1))


def _svi(setup: Setup, vae: Any) -> Method:
    return _refined(setup, vae, "svi", FixedStart(2 * setup.latent))


def _iterative(setup: Setup, vae: Any) -> Method:
    features = setup.make_vae(setup.name).encoder  # its output is what the network is told
    update = LearnedUpdate((setup.hidden, setup.hidden), features=features)
    return _refined(setup, vae, "first_order", FixedStart(2 * setup.latent), update)


def _recursive(setup: Setup, vae: Any) -> Method:
    encoders = [vae.encoder, setup.make_vae(setup.name).encoder]
    guide = RecursiveMixtureGuide(
        vae.model,
        [AmortizedGuide(vae.model, encoder) for encoder in encoders],
        schedule=schedule(setup.updates, 2),
        weights="shared",
        name=f"{setup.name}guide",
    )
    return Method(vae, guide, RecursiveMixture_ELBO(1, holdout=(setup.holdout,)))


METHODS: dict[str, Callable[[Setup, Any], Method]] = {
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


def build(name: str, setup: Setup) -> Method:
    """Return a method with new networks."""
    return METHODS[name](setup, setup.make_vae(setup.name))
