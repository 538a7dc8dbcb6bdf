"""Losses for mixture guides that take every component equally often and weigh what it gives.

With components ``q_m``, weights ``w_m`` and the mixture ``Q = sum_m w_m q_m``, T samples
``z_mt ~ q_m`` each, and ``r_mt = p(x, z_mt) / Q(z_mt)``:

    Stratified_ELBO   sum_m w_m mean_t log r_mt
    SIWAE_ELBO        log sum_m w_m mean_t r_mt
    MISELBO           sum_m w_m log mean_t r_mt

All are lower bounds on log p(x), with gradients for the weights and no score function.
"""

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

from pyro import poutine
from torch import Tensor

from pyro_recursive import bounds
from pyro_recursive.bounds.bound import Weighted
from pyro_recursive.bounds.estimators import ESTIMATORS, Estimator
from pyro_recursive.losses.multi_sample import Evaluation, MultiSampleELBO
from pyro_recursive.losses.surrogate import surrogate
from pyro_recursive.tracing.densities import Densities, guide_group
from pyro_recursive.tracing.handlers import ComponentAssignment
from pyro_recursive.tracing.plates import PlateLayout
from pyro_recursive.tracing.program import Program
from pyro_recursive.tracing.runs import ParticleRun
from pyro_recursive.tracing.sites import plates_of, sites

__all__ = [
    "MISELBO",
    "SIWAE_ELBO",
    "Stratified_ELBO",
    "applied",
    "log_mixture_weights",
    "mixture_of",
    "whole_density",
]


class MISELBO(MultiSampleELBO):
    """The multiple importance sampling ELBO, ``sum_m w_m log mean_t p(x, z_mt) / Q(z_mt)``.

    ``Q`` is the whole mixture in every term, so that the bound is above the weighted mean of the
    components' own; for T = 1 the difference is the weighted Jensen-Shannon divergence between
    them, in [0, log M] nats. The source has equal weights.

    Arguments:
        num_particles: T, the samples of each component; M T in all, M being the guide's number.
        estimator: ``"pathwise"``; for T = 1 also ``"stl"``, which has less variance.
        max_plate_nesting, vectorize_particles: as in `MultiSampleELBO`.

    Raises:
        TypeError: the guide is no mixture of this package.
        ValueError: another estimator than these.
        NotImplementedError: the guide has a mixture over global latents and another one over those
            of each row; or a plate of the mixture does not enclose all sites.

    Source: `Multiple Importance Sampling ELBO and Deep Ensembles of Variational Approximations`
    (Kviman et al., arXiv 2202.10951).

    >>> import pyro, pyro.distributions as dist, torch
    >>> from pyro_recursive import MixtureGuide
    >>> def model():
    ...     z = pyro.sample("z", dist.Normal(0.0, 3.0))
    ...     pyro.sample("x", dist.Normal(z**2, 1.0), obs=torch.tensor(4.0))
    >>> MISELBO(4).loss(model, MixtureGuide(model, 2)) > 0
    True
    """

    estimators: tuple[str, ...] = ("pathwise", "stl")

    def __init__(self, num_particles: int = 1, **options: Any) -> None:
        super().__init__(bounds.iwae, num_particles=num_particles, **options)
        if self.global_latents != "joint":
            raise ValueError("stratified losses take one mixture, and no global_latents='elbo'")
        # Inside a logarithm, what a sample is worth depends on its component: the parameters in
        # log Q have a gradient then that is not zero on average.
        allowed = self.estimators if num_particles == 1 else ("pathwise",)
        if self.estimator.name not in allowed:
            raise ValueError(
                f"{type(self).__name__} with {num_particles} samples of each component inside the "
                f"logarithm has an estimator in {allowed}, got {self.estimator.name!r}"
            )

    def _evaluate(self, program: Program, *, fresh: bool = False, **options: Any) -> Evaluation:
        count = len(mixture_of(program.guide).members)
        options.setdefault("assignment", ComponentAssignment(self._components(count)))
        options.setdefault("shape", self._shape(count))
        if options.get("replay") == "paths" and mixture_of(program.guide).holds_densities:
            # The guide leaves out what a second run of it would take away.
            options["replay"], options["assignment"].stop_density_gradient = "none", True
        evaluation = super()._evaluate(program, fresh=fresh, **options)
        _check_rows(evaluation.runs[0], evaluation.local.layout)
        return evaluation

    def _shape(self, count: int) -> tuple[int, int]:
        """Return how many estimates there are, and how many samples inside each logarithm."""
        return self.num_estimates * count, self.num_particles

    def _components(self, count: int) -> tuple[int, ...]:
        """Return the component of every sample: estimates take turns."""
        turn = [m for m in range(count) for _ in range(self.num_particles)]
        return tuple(turn * self.num_estimates)

    def _value(self, evaluation: Evaluation) -> Tensor:
        local, weights = _weighed(evaluation.local, self.num_estimates)
        bound = Weighted(self.bound, weights.detach())
        return -local.layout.scale * bound(local.log_weights).sum()

    def _surrogate(self, evaluation: Evaluation) -> Tensor:
        local, weights = _weighed(evaluation.local, self.num_estimates)
        bound = Weighted(self.bound, weights.detach())
        total = surrogate(evaluation.runs, local, bound, applied(self.estimator, evaluation))
        gain = self.bound.estimate(local.log_weights)
        return local.layout.scale * (total + (weights * gain).mean(0).sum())


class Stratified_ELBO(MISELBO):
    """The ELBO of a mixture guide with S draws from each of its components.

    ``sum_m w_m mean_s [log p(x, z_ms) - log Q(z_ms)]``: unbiased for the ELBO of the mixture, with
    low-variance gradients for model, components and weights. ``estimator="stl"`` holds the
    parameters inside ``log Q`` fixed, which is exact here, as their expected gradient there is
    zero, and has no noise where the mixture is exact. Arguments and errors are `MISELBO`'s.

    Source: `Automatic Differentiation Variational Inference with Mixtures` (Morningstar et al.,
    arXiv 2003.01687).

    >>> Stratified_ELBO(4).num_estimates
    4
    """

    def __init__(self, num_particles: int = 1, **options: Any) -> None:
        super().__init__(1, num_estimates=num_particles, **options)

    def _options(self) -> dict[str, Any]:
        options = super()._options() | {"num_particles": self.num_estimates}
        del options["num_estimates"]
        return options


class SIWAE_ELBO(MISELBO):
    """The stratified importance-weighted bound, ``log sum_m w_m mean_t p(x, z_mt) / Q(z_mt)``.

    Tighter than `MISELBO` with the same samples. Arguments and errors are `MISELBO`'s; only
    ``estimator="pathwise"``.

    Source: `Automatic Differentiation Variational Inference with Mixtures` (Morningstar et al.,
    arXiv 2003.01687).

    >>> SIWAE_ELBO(8).num_particles
    8
    """

    estimators: tuple[str, ...] = ("pathwise",)

    def _shape(self, count: int) -> tuple[int, int]:
        return self.num_estimates, self.num_particles * count

    def _components(self, count: int) -> tuple[int, ...]:
        return tuple(list(range(count)) * self.num_particles * self.num_estimates)

    def _count(self, evaluation: Evaluation) -> int:
        return evaluation.local.layout.particles.num_particles // self.num_particles

    def _value(self, evaluation: Evaluation) -> Tensor:
        local = _proposed(evaluation.local, self._count(evaluation))
        return -local.layout.scale * self.bound(local.log_weights).sum()

    def _surrogate(self, evaluation: Evaluation) -> Tensor:
        local = _proposed(evaluation.local, self._count(evaluation))
        return local.layout.scale * surrogate(evaluation.runs, local, self.bound, self.estimator)


def applied(estimator: Estimator, evaluation: Evaluation) -> Estimator:
    """Return the estimator for runs whose guide has held its densities, if it has."""
    return estimator if evaluation.runs[0].guide_cuts else ESTIMATORS["pathwise"]


def mixture_of(guide: Callable) -> Any:
    """Return the mixture guide under handlers.

    Raises TypeError where there is none.
    """
    bare = poutine.unwrap(guide)
    if not hasattr(bare, "members"):
        raise TypeError(
            "A stratified loss needs a mixture guide of this package (MixtureGuide, "
            f"RecursiveMixtureGuide), got {type(bare).__name__}"
        )
    return bare


def _check_rows(run: ParticleRun, layout: PlateLayout) -> None:
    """Raise where the components' draws cannot be told apart by row."""
    shared = {frame.name for frame in layout.plates}
    for site in sites(run.guide):
        if guide_group(site) != "score":
            continue
        if not (site["is_observed"] and site["infer"].get("is_auxiliary")):
            raise NotImplementedError(
                f"Guide site '{site['name']}' is not reparameterised, and stratified losses have "
                "no gradient for it. Use an ordinary loss with estimator='vimco'."
            )
        rows = plates_of(site).keys()
        if rows != shared:
            raise NotImplementedError(
                f"The guide has one mixture for each row of plates {sorted(rows)}, and the plates "
                f"that enclose every site of model and guide are {sorted(shared)}, so that its "
                "draws cannot be weighed row by row. Give the mixture plate= accordingly, or use "
                "an ordinary loss with estimator='vimco'."
            )


def log_mixture_weights(local: Densities) -> Tensor:
    """Return the logarithm of the weight of each sample's component, ``[M, K, *plates]``.

    Without the scales and masks that a user put on the guide.
    """
    assert local.score is not None  # the components' site
    return local.score if local.score_rest is None else local.score + local.score_rest


def whole_density(local: Densities, correction: Tensor | float = 0.0) -> Densities:
    """Return densities with all of log Q in one part, plus a correction."""
    assert local.density is not None and local.score is not None
    density = local.density + local.score + correction
    return replace(local, density=density, score=None, density_rest=None, score_rest=None)


def _weighed(local: Densities, num_estimates: int) -> tuple[Densities, Tensor]:
    """Return densities with log Q in one part, and M times each estimate's weight."""
    count = local.layout.particles.num_estimates // num_estimates
    weights = count * log_mixture_weights(local)[:, 0].exp()
    return whole_density(local), weights.expand(weights.shape[0], *local.layout.shape)


def _proposed(local: Densities, count: int) -> Densities:
    """Return densities that weigh a sample by M times its component's weight."""
    return whole_density(local, -log_mixture_weights(local) - math.log(count))
