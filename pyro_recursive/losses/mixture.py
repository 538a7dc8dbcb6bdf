"""Losses of mixture guides: every component is drawn equally often, and its samples are weighed.

All are lower bounds on log p(x) in nats, with gradients for the weights and no score function.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any, Unpack

import torch
from pyro import poutine
from torch import Tensor

from pyro_recursive import bounds
from pyro_recursive.bounds.bound import Bound, Weighted
from pyro_recursive.bounds.estimators import ESTIMATORS, Estimator
from pyro_recursive.losses.base import Evaluation, LogWeightELBO, SampleOptions
from pyro_recursive.losses.surrogate import finite, surrogate
from pyro_recursive.tracing.densities import Densities, weighted
from pyro_recursive.tracing.handlers import ComponentAssignment
from pyro_recursive.tracing.plates import PlateLayout
from pyro_recursive.tracing.program import Program
from pyro_recursive.tracing.protocols import MixtureLike
from pyro_recursive.tracing.runs import ParticleRun
from pyro_recursive.tracing.sites import Site


class MixtureLoss(LogWeightELBO):
    """Base of the losses of mixture guides; a subclass says which samples share a logarithm."""

    def __init__(self, num_particles: int = 1, **options: Unpack[SampleOptions]) -> None:
        super().__init__(bounds.iwae, num_particles=num_particles, **options)
        if self.global_latents != "joint":
            raise ValueError("A loss of mixture guides has no global_latents='elbo'.")
        allowed = self._allowed_estimators()
        if self.estimator.name not in allowed:
            raise ValueError(
                f"{type(self).__name__}({num_particles}) has an estimator in {allowed}, got "
                f"{self.estimator.name!r}."
            )

    def _allowed_estimators(self) -> tuple[str, ...]:
        return "pathwise", "stl"

    @property
    def draws_per_component(self) -> int:
        return self.num_estimates * self.num_particles

    def _strata(self, count: int) -> tuple[tuple[int, ...], int]:
        """Return the component of each sample, and how many samples share a logarithm."""
        return tuple(range(count)) * self.draws_per_component, 1

    def _evaluate(self, program: Program, *, fresh: bool = False, **options: Any) -> Evaluation:
        mixture = mixture_of(program.guide)
        strata = self._strata(len(mixture.members))
        return self._evaluate_strata(program, mixture, *strata, **options)

    def _evaluate_strata(
        self,
        program: Program,
        mixture: MixtureLike,
        components: tuple[int, ...],
        num_particles: int = 1,
        *,
        replay: str = "none",
        cut_model: bool = False,
        **assignment: Any,
    ) -> Evaluation:
        """Draw a sample of each of some components; ``assignment`` as in `ComponentAssignment`."""
        # A guide that stops the gradient in its densities itself need not run a second time.
        stops = replay == "paths" and mixture.holds_densities
        evaluation = super()._evaluate(
            program,
            shape=(len(components) // num_particles, num_particles),
            replay="none" if stops else replay,
            cut_model=cut_model,
            assignment=ComponentAssignment(components, stop_density_gradient=stops, **assignment),
        )
        _check_rows(evaluation.runs[0], evaluation.local.layout)
        return evaluation

    def _weighed(self, densities: Densities) -> tuple[Densities, Bound, Tensor | None]:
        """Return densities with log Q in one part, their bound, and each estimate's weight.

        The weights, ``[E, *plates]`` with a mean of 1, are those of the estimates' components;
        None where each sample is weighed inside the logarithm.
        """
        count = densities.layout.particles.total // self.draws_per_component
        weights = count * log_mixture_weights(densities)[:, 0].exp()
        return joined_density(densities), Weighted(self.bound, weights.detach()), weights

    def _bounds(self, evaluation: Evaluation) -> Tensor:
        local, bound, _ = self._weighed(evaluation.local)
        return bound(local.log_weights)

    def _surrogate(self, evaluation: Evaluation) -> Tensor:
        local, bound, weights = self._weighed(evaluation.local)
        estimator = remaining_estimator(self.estimator, evaluation)
        total = surrogate(evaluation.runs, local, bound, estimator)
        if weights is not None:
            estimates = finite(self.bound.estimate(local.log_weights))
            total = total + (weights * estimates).mean(0).sum()
        return local.layout.scale * total


class Stratified_ELBO(MixtureLoss):
    """The ELBO of a mixture guide, from S samples of each component.

    ``sum_m w_m mean_s [log p(x, z_ms) - log Q(z_ms)]`` in nats, for components m with weights
    ``w_m`` in the mixture Q: unbiased for the ELBO, with low-variance gradients.

    Args:
        num_particles, num_estimates: their product is S; no sample shares a logarithm.
        estimator: ``"pathwise"``, or ``"stl"``, which holds the parameters inside ``log Q``
            constant: unbiased, and without noise where the mixture is exact.
        max_plate_nesting, vectorize_particles: as in `MultiSampleELBO`; errors as in `MISELBO`.

    `Automatic Differentiation Variational Inference with Mixtures` (arXiv 2003.01687).

    >>> Stratified_ELBO(4).num_particles
    4
    """


class MISELBO(MixtureLoss):
    """The multiple importance sampling ELBO, ``sum_m w_m log mean_t p(x, z_mt) / Q(z_mt)``.

    In nats; ``Q`` is the whole mixture in every term. For T = 1 it exceeds the weighted mean of the
    components' own ELBOs by their weighted Jensen-Shannon divergence.

    Args:
        num_particles: T, the samples of each component inside a logarithm.
        num_estimates: the number of independent estimates, each with T samples of each component.
        estimator: ``"pathwise"``; for T = 1 also ``"stl"``, which has less variance.
        max_plate_nesting, vectorize_particles: as in `MultiSampleELBO`.

    Raises TypeError where the guide is no mixture guide, and NotImplementedError where a plate of
    its mixture does not enclose all sites.

    `Multiple Importance Sampling ELBO and Deep Ensembles of Variational Approximations` (arXiv
    2202.10951).

    >>> MISELBO(4, num_estimates=2).num_particles
    4
    """

    def _allowed_estimators(self) -> tuple[str, ...]:
        # Inside a logarithm a sample's coefficient depends on its component, and the gradient of
        # the parameters in log Q is not zero in expectation.
        return super()._allowed_estimators() if self.num_particles == 1 else ("pathwise",)

    def _strata(self, count: int) -> tuple[tuple[int, ...], int]:
        one = [m for m in range(count) for _ in range(self.num_particles)]
        return tuple(one * self.num_estimates), self.num_particles


class SIWAE_ELBO(MixtureLoss):
    """The stratified importance-weighted bound, ``log sum_m w_m mean_t p(x, z_mt) / Q(z_mt)``.

    In nats; tighter than `MISELBO` with the same samples. Arguments and errors are `MISELBO`'s, but
    ``estimator`` is ``"pathwise"``.

    `Automatic Differentiation Variational Inference with Mixtures` (arXiv 2003.01687).

    >>> SIWAE_ELBO(8).num_particles
    8
    """

    def _allowed_estimators(self) -> tuple[str, ...]:
        return ("pathwise",)

    def _strata(self, count: int) -> tuple[tuple[int, ...], int]:
        return super()._strata(count)[0], self.num_particles * count

    def _weighed(self, densities: Densities) -> tuple[Densities, Bound, Tensor | None]:
        count = densities.layout.particles.total // self.draws_per_component
        correction = -log_mixture_weights(densities) - math.log(count)
        return joined_density(densities, correction), self.bound, None


def remaining_estimator(estimator: Estimator, evaluation: Evaluation) -> Estimator:
    """Return the estimator of runs where the guide may have stopped the density's gradient."""
    return estimator if evaluation.runs[0].guide_cuts else ESTIMATORS["pathwise"]


def mixture_of(guide: Callable) -> MixtureLike:
    """Return the mixture guide under handlers; raise TypeError where there is none."""
    bare = poutine.unwrap(guide)
    if not isinstance(bare, MixtureLike):
        raise TypeError(
            f"A stratified loss needs a mixture guide (MixtureGuide), got {type(bare).__name__}."
        )
    return bare


def _check_rows(run: ParticleRun, layout: PlateLayout) -> None:
    for record in run.table.guide:
        if record.group != "score":
            continue
        site = record.site
        if not (site["is_observed"] and site["infer"].get("is_auxiliary")):
            raise NotImplementedError(
                f"Guide site '{record.name}' is not reparameterised, as a stratified loss needs."
            )
        if record.plates.keys() != layout.names:
            raise NotImplementedError(
                f"The guide's mixture is in plates {sorted(record.plates)}, and plates "
                f"{sorted(layout.names)} enclose all sites: give it their plate=."
            )


def component_site(run: ParticleRun) -> Site:
    """Return the site of the components' numbers."""
    return next(record.site for record in run.table.guide if record.group == "score")


def density_weight(runs: Sequence[ParticleRun], layout: PlateLayout) -> Tensor:
    """Return what log Q is multiplied by in the log-weights, ``[M, K, *plates]``.

    The product of mask, the user's scale and KL warm-up's weight: 1 without them.
    """
    rows = []
    for run in runs:
        site = component_site(run)
        ones = torch.ones_like(site["value"], dtype=site["fn"].logits.dtype)
        rows.append([(site, weighted(ones, site, layout))])
    gathered = layout.gather(rows)
    assert gathered is not None
    return gathered


def log_mixture_weights(densities: Densities) -> Tensor:
    """Return the log-weight of each sample's component, without scale and mask."""
    assert densities.score is not None  # the components' site
    return densities.score + (0.0 if densities.score_rest is None else densities.score_rest)


def joined_density(densities: Densities, correction: Tensor | float = 0.0) -> Densities:
    """Return densities with all of log Q in one part, plus a correction."""
    assert densities.density is not None and densities.score is not None
    density = densities.density + densities.score + correction
    return replace(densities, density=density, score=None, density_rest=None, score_rest=None)
