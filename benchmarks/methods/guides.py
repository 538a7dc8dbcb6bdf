"""What the benchmark of guides compares: each method is a model, a guide and a loss.

All have the same decoder with the same initial weights, and take at most `DRAWS` samples per image
and step. Gradients stick to the landing, except those of the inverse autoregressive flow, which
scores other draws than its own only at the cost of one pass per latent; "VAE pathwise" is its
counterpart.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.run import Method, count
from benchmarks.tasks.images import VAE, tanh_network
from pyro_recursive import (
    MIWAE_ELBO,
    AmortizedGuide,
    FlowGuide,
    MixtureGuide,
    RecursiveMixture_ELBO,
    RecursiveMixtureGuide,
    Schedule,
    Stratified_ELBO,
    VampPrior,
)
from pyro_recursive.bounds.mixture_objectives import Clamped

BASELINE = "VAE"
DRAWS = 4
CLAMP = 5.0  # nats: the constant of the paper's objective, for which no value is published


@dataclass(frozen=True)
class Setup:
    """What all methods share: data, sizes of the networks, and the length of training in steps."""

    make_vae: Callable[[str], VAE]
    images: Tensor
    holdout: Tensor
    hidden: int
    latent: int
    steps: int
    pseudo_inputs: int
    name: str = ""

    def encoder(self, hidden: int | None = None) -> nn.Sequential:
        """Return a new encoder, ``[rows, pixels]`` to ``[rows, 2 latent]``."""
        return tanh_network(self.images.shape[-1], hidden or self.hidden, 2 * self.latent)

    def width_of(self, encoders: int) -> int:
        """Return the hidden width that gives one encoder the parameters of several."""
        goal = encoders * count(self.encoder())
        inputs, outputs = self.images.shape[-1], 2 * self.latent
        linear = inputs + outputs + 2  # parameters: h**2 + linear * h + outputs
        return round(((linear**2 / 4 + goal - outputs) ** 0.5) - linear / 2)


class EqualDraws(RecursiveMixture_ELBO):
    """The loss of recursive mixtures, with as many draws in all as the other methods take."""

    def differentiable_loss(self, model: Callable, guide: Any, *args: Any, **kwargs: Any) -> Tensor:
        """Divide the draws among the components that this step has."""
        guide.prepare(*args, **kwargs)
        components = {*guide.members, guide.stage.component} - {None}
        self.num_estimates = max(1, DRAWS // len(components))
        return super().differentiable_loss(model, guide, *args, **kwargs)


def _plain(setup: Setup, vae: VAE, estimator: str = "stl", hidden: int | None = None) -> Method:
    encoder = vae.encoder if hidden is None else setup.encoder(hidden)
    guide = AmortizedGuide(vae.model, encoder, name=f"{setup.name}guide")
    return Method(vae, guide, MIWAE_ELBO(DRAWS, 1, estimator=estimator))


def _wide(setup: Setup, vae: VAE) -> Method:
    return _plain(setup, vae, hidden=setup.width_of(4))


def mixture(
    setup: Setup, number: int, shared: bool = False, vae: VAE | None = None
) -> MixtureGuide:
    """Return a mixture of Gaussians with an encoder each, or with a head each on one trunk."""
    vae = vae or setup.make_vae(setup.name)
    networks = [vae.encoder, *(setup.encoder() for _ in range(number - 1))]
    trunk = vae.encoder[:-1] if shared else None
    parts = [AmortizedGuide(vae.model, net[-1] if shared else net) for net in networks]
    name = f"{setup.name}guide"
    return MixtureGuide(vae.model, parts, weights="linear", trunk=trunk, name=name)


def _mixture(setup: Setup, vae: VAE, number: int, shared: bool = False) -> Method:
    guide = mixture(setup, number, shared, vae)
    return Method(vae, guide, Stratified_ELBO(DRAWS // number, estimator="stl"))


def schedule(steps: int, number: int, joint: bool = True) -> Schedule:
    """Divide training: 40% for the first component, 20% for all together at the end.

    A component that is not kept ends the growth, and what is left is for those that there are.
    """
    first, last = round(0.4 * steps), round(0.2 * steps) * joint
    each = (steps - first - last) // (number - 1)
    propose = max(1, round(0.3 * each))
    refine = max(1, each - propose)
    return Schedule(first=max(1, first), propose=propose, refine=refine, joint=last, patience=0)


def _recursive(setup: Setup, vae: VAE, number: int, joint: bool = True, **options: Any) -> Method:
    encoders = [vae.encoder, *(setup.encoder() for _ in range(number - 1))]
    guide = RecursiveMixtureGuide(
        vae.model,
        [AmortizedGuide(vae.model, encoder) for encoder in encoders],
        schedule=schedule(setup.steps, number, joint),
        weights="linear",
        name=f"{setup.name}guide",
    )
    return Method(vae, guide, EqualDraws(1, holdout=(setup.holdout,), **options))


def _paper(setup: Setup, vae: VAE) -> Method:
    clamped = Clamped(CLAMP)
    return _recursive(setup, vae, 4, objective=clamped, proposal=clamped)


def _boosting(setup: Setup, vae: VAE) -> Method:
    return _recursive(setup, vae, 4, joint=False, objective="relbo", proposal="relbo")


def _flow(setup: Setup, vae: VAE, kind: str, estimator: str) -> Method:
    guide = FlowGuide(vae.model, kind, encoder=vae.encoder, name=f"{setup.name}guide")
    return Method(vae, guide, MIWAE_ELBO(DRAWS, 1, estimator=estimator))


def _vamp(setup: Setup, vae: VAE, encoder: nn.Module) -> None:
    order = torch.randperm(len(setup.images))[: setup.pseudo_inputs]
    vae.prior = VampPrior(encoder, setup.images[order], bounds=(0.0, 1.0))


def _plain_vamp(setup: Setup, vae: VAE) -> Method:
    _vamp(setup, vae, vae.encoder)
    return _plain(setup, vae, estimator="pathwise")


def _recursive_vamp(setup: Setup, vae: VAE) -> Method:
    _vamp(setup, vae, setup.encoder())  # its own: the loss has one objective for each parameter
    return _recursive(setup, vae, 2)


METHODS: dict[str, Callable[[Setup, VAE], Method]] = {
    BASELINE: _plain,
    "VAE pathwise": partial(_plain, estimator="pathwise"),
    "VAE wide": _wide,
    "mixture 2": partial(_mixture, number=2),
    "mixture 4": partial(_mixture, number=4),
    "mixture 4 shared": partial(_mixture, number=4, shared=True),
    "recursive 2": partial(_recursive, number=2),
    "recursive 2 alternating": partial(_recursive, number=2, update="alternating"),
    "recursive 3": partial(_recursive, number=3),
    "recursive 4": partial(_recursive, number=4),
    "recursive 4 clamped": _paper,
    "boosting 4": _boosting,
    "IAF": partial(_flow, kind="iaf", estimator="pathwise"),
    "coupling flow": partial(_flow, kind="coupling", estimator="stl"),
    "VAE VampPrior": _plain_vamp,
    "recursive 2 VampPrior": _recursive_vamp,
}


def build(name: str, setup: Setup) -> Method:
    """Return a method with new networks."""
    return METHODS[name](setup, setup.make_vae(setup.name))
