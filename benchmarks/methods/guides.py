"""What the benchmark of guides compares: each method is a model, a guide and a loss.

All have the same decoder with the same initial weights, and take at most `DRAWS` samples per image
and step. Gradients stick to the landing, except those of the inverse autoregressive flow, which
scores other draws than its own only at the cost of one pass per latent; "VAE pathwise" is its
counterpart.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from pyro.infer import ELBO
from torch import Tensor, nn

from benchmarks.report import BASELINE
from benchmarks.run import Method, Methods, Settings, Task, count
from benchmarks.tasks.images import VAE, tanh_network
from pyro_recursive import (
    MISELBO,
    MIWAE_ELBO,
    SIWAE_ELBO,
    AmortizedGuide,
    FlowGuide,
    MixtureGuide,
    RecursiveMixture_ELBO,
    RecursiveMixtureGuide,
    Schedule,
    Stratified_ELBO,
    VampPrior,
)
from pyro_recursive.bounds.estimators import EstimatorName
from pyro_recursive.bounds.mixture_objectives import Clamped
from pyro_recursive.losses.mixture import MixtureLoss

DRAWS = 4
CLAMP = Clamped(5.0)  # nats: the constant of the paper's objective, for which no value is published


class EqualDraws(RecursiveMixture_ELBO):
    """The loss of recursive mixtures, with as many draws in all as the other methods take.

    A mixture that ends with one member has all draws of ``joint`` in it: those of MISELBO share a
    logarithm, so that its bound is then IWAE's.
    """

    def differentiable_loss(self, model: Callable, guide: Any, *args: Any, **kwargs: Any) -> Tensor:
        """Divide the draws among the components that this step has."""
        guide.prepare(*args, **kwargs)
        components = {*guide.members, guide.stage.component} - {None}
        self.num_estimates = max(1, DRAWS // len(components))
        if self.joint is not None:
            self.joint.num_particles = self.num_estimates
        return super().differentiable_loss(model, guide, *args, **kwargs)


def schedule(steps: int, number: int, joint: bool = True) -> Schedule:
    """Divide training: 40% for the first component, 20% for all together at the end.

    A component that is not kept ends the growth, and what is left is for those that there are.
    """
    first, last = round(0.4 * steps), round(0.2 * steps) * joint
    each = (steps - first - last) // (number - 1)
    propose = max(1, round(0.3 * each))
    refine = max(1, each - propose)
    return Schedule(first=max(1, first), propose=propose, refine=refine, joint=last, patience=0)


def early(steps: int, number: int) -> Schedule:
    """Divide training for a model that learns, too: early growth, and a long joint phase."""
    return Schedule.fractions(steps, number, patience=0)


def earliest(steps: int, number: int) -> Schedule:
    """Divide training that may stop long before the last step: the growth of a tenth as many."""
    return early(max(steps // 10, 20 * number), number)


def encoder_of(task: Task, settings: Settings, hidden: int | None = None) -> nn.Sequential:
    """Return a new encoder, ``[rows, pixels]`` to ``[rows, 2 latent]``."""
    return tanh_network(task.train.shape[-1], hidden or settings.hidden, 2 * settings.latent)


def width_of(encoders: int, task: Task, settings: Settings) -> int:
    """Return the hidden width that gives one encoder the parameters of several."""
    goal = encoders * count(encoder_of(task, settings))
    inputs, outputs = task.train.shape[-1], 2 * settings.latent
    linear = inputs + outputs + 2  # parameters: h**2 + linear * h + outputs
    return round(((linear**2 / 4 + goal - outputs) ** 0.5) - linear / 2)


def _plain(
    vae: VAE,
    task: Task,
    settings: Settings,
    estimator: EstimatorName = "stl",
    encoder: nn.Module | None = None,
) -> Method:
    guide = AmortizedGuide(vae.model, encoder or vae.encoder, name=f"{vae.name}guide")
    return Method(vae, guide, MIWAE_ELBO(DRAWS, 1, estimator=estimator))


def _wide(vae: VAE, task: Task, settings: Settings, number: int = 4) -> Method:
    encoder = encoder_of(task, settings, width_of(number, task, settings))
    return _plain(vae, task, settings, encoder=encoder)


def mixture(
    vae: VAE, task: Task, settings: Settings, number: int, shared: bool = False
) -> MixtureGuide:
    """Return a mixture of Gaussians with an encoder each, or with a head each on one trunk."""
    networks = [vae.encoder, *(encoder_of(task, settings) for _ in range(number - 1))]
    trunk = vae.encoder[:-1] if shared else None
    parts = [AmortizedGuide(vae.model, net[-1] if shared else net) for net in networks]
    name = f"{vae.name}guide"
    return MixtureGuide(vae.model, parts, weights="linear", trunk=trunk, name=name)


def _mixture(
    vae: VAE,
    task: Task,
    settings: Settings,
    number: int,
    shared: bool = False,
    make_loss: Callable[[int], ELBO] = partial(Stratified_ELBO, estimator="stl"),  # noqa: B008
) -> Method:
    guide = mixture(vae, task, settings, number, shared)
    return Method(vae, guide, make_loss(DRAWS // number))


def _recursive(
    vae: VAE,
    task: Task,
    settings: Settings,
    number: int,
    stages: Callable[[int, int], Schedule] = schedule,
    make_joint: Callable[[int], MixtureLoss] | None = None,
    **options: Any,
) -> Method:
    encoders = [vae.encoder, *(encoder_of(task, settings) for _ in range(number - 1))]
    guide = RecursiveMixtureGuide(
        vae.model,
        [AmortizedGuide(vae.model, encoder) for encoder in encoders],
        schedule=stages(settings.steps(len(task.train)), number),
        weights="linear",
        name=f"{vae.name}guide",
    )
    joint = make_joint(DRAWS // number) if make_joint else None
    loss = EqualDraws(1, holdout=(task.validation[:100],), joint=joint, **options)
    return Method(vae, guide, loss)


def _flow(vae: VAE, task: Task, settings: Settings, kind: str, estimator: EstimatorName) -> Method:
    guide = FlowGuide(vae.model, kind, encoder=vae.encoder, name=f"{vae.name}guide")
    return Method(vae, guide, MIWAE_ELBO(DRAWS, 1, estimator=estimator))


def _vamp(
    vae: VAE,
    task: Task,
    settings: Settings,
    recursive: bool,
    own: bool = False,
    stages: Callable[[int, int], Schedule] = schedule,
) -> Method:
    # A recursive mixture and its prior have an encoder each: a parameter has one objective.
    encoder = encoder_of(task, settings) if recursive or own else vae.encoder
    few = settings.dataset.startswith("digits")
    order = torch.randperm(len(task.train) // task.repeats)[: 100 if few else 200]
    vae.prior = VampPrior(encoder, task.train[order], bounds=(0.0, 1.0))
    if recursive:
        return _recursive(vae, task, settings, 2, stages)
    return _plain(vae, task, settings, estimator="pathwise")


METHODS: Methods = {
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
    "recursive 4 clamped": partial(_recursive, number=4, objective=CLAMP, proposal=CLAMP),
    "boosting 4": partial(
        _recursive,
        number=4,
        stages=partial(schedule, joint=False),
        objective="relbo",
        proposal="relbo",
    ),
    "IAF": partial(_flow, kind="iaf", estimator="pathwise"),
    "coupling flow": partial(_flow, kind="coupling", estimator="stl"),
    "VAE VampPrior": partial(_vamp, recursive=False),
    "recursive 2 VampPrior": partial(_vamp, recursive=True),
}

LONGER: Methods = {  # of the study of recursive mixtures, beside these
    "recursive 2 early": partial(_recursive, number=2, stages=early),
    "recursive 4 early": partial(_recursive, number=4, stages=early),
    "recursive 2 MISELBO": partial(_recursive, number=2, stages=early, make_joint=MISELBO),
    "mixture 2 MISELBO": partial(_mixture, number=2, make_loss=MISELBO),
    "mixture 2 SIWAE": partial(_mixture, number=2, make_loss=SIWAE_ELBO),
    "VAE VampPrior own encoder": partial(_vamp, recursive=False, own=True),
}

TO_CONVERGENCE: Methods = {  # of the study that trains until nothing improves
    **{name: METHODS[name] for name in (BASELINE, "VAE wide")},
    "VAE wide 2": partial(_wide, number=2),
    "mixture 2": METHODS["mixture 2"],
    "mixture 2 shared": partial(_mixture, number=2, shared=True),
    "mixture 2 MISELBO": LONGER["mixture 2 MISELBO"],
    "mixture 4": METHODS["mixture 4"],
    "recursive 2": partial(_recursive, number=2, stages=earliest),
    "recursive 4": partial(_recursive, number=4, stages=earliest),
    "recursive 2 MISELBO": partial(_recursive, number=2, stages=earliest, make_joint=MISELBO),
    "coupling flow": METHODS["coupling flow"],
    "IAF": METHODS["IAF"],
    "VAE VampPrior": LONGER["VAE VampPrior own encoder"],
    "recursive 2 VampPrior": partial(_vamp, recursive=True, stages=earliest),
}
