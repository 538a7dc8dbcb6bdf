"""The losses: drop-in replacements for `pyro.infer.Trace_ELBO`.

`MultiSampleELBO` composes a bound and an estimator; the named losses are thin members. No loss
keeps anything from a call, so one instance serves many models; a learned beta is a parameter, and
goes on from where it is.
"""

import math
import warnings
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
from pyro.infer import ELBO
from pyro.infer.elbo import ELBOModule
from pyro.infer.enum import get_importance_trace
from pyro.infer.util import is_validation_enabled
from pyro.util import warn_if_nan
from torch import Tensor

from pyro_recursive import bounds
from pyro_recursive.bounds.bound import Bound
from pyro_recursive.bounds.estimators import ESTIMATORS, Estimator
from pyro_recursive.losses.learned_beta import LearnedBeta, check_replicates, optimal_beta
from pyro_recursive.losses.surrogate import global_surrogate, surrogate
from pyro_recursive.tracing.arguments import check_at_least
from pyro_recursive.tracing.compatibility import (
    check_runs,
    warn_if_nothing_local,
)
from pyro_recursive.tracing.densities import Densities, densities
from pyro_recursive.tracing.plates import layout_of, local_sites, structure_in
from pyro_recursive.tracing.program import Program, structure_of
from pyro_recursive.tracing.runs import ParticleRun, run_particles
from pyro_recursive.tracing.sites import sites

__all__ = ["CIWAE_ELBO", "IWAE_ELBO", "MIWAE_ELBO", "PIWAE_ELBO", "MultiSampleELBO"]

GLOBAL_LATENTS = ("joint", "elbo")
DEFAULTS = {"max_plate_nesting": math.inf, "vectorize_particles": True, "global_latents": "joint"}


class MultiSampleELBO(ELBO):
    """Any multi-sample bound with any gradient estimator, for any Pyro model and guide.

    With log-weights ``log p(x, z) - log q(z)`` of shape ``[M, K, *plates]``, where ``plates``
    enclose every sample site, the loss is ``-scale * bound(log_weights).sum()`` in nats: each datum
    has its own weights, and the subsample scale of the shared plates multiplies after the bound, so
    that minibatches are unbiased for the full data.

    Arguments:
        bound: a `pyro_recursive.bounds.Bound`.
        estimator: a name in `bounds.estimators.ESTIMATORS`: ``"pathwise"``, ``"dreg"``,
            ``"stl"`` (biased for K > 1), ``"vimco"`` and ``"score"`` (for sites that are not
            reparameterised; the others stay pathwise, or DReG with ``"dreg+vimco"``), ``"rws"`` and
            ``"rws-dreg"`` (wake-phase updates of the guide, biased); or an `Estimator`.
        num_estimates: M, the number of independent estimates.
        num_particles: K, the number of samples inside each logarithm.
        max_plate_nesting: the number of plate dims of the model; found by one run if not given.
        vectorize_particles: run all M * K samples in one pass, under one more plate on the left (so
            that a model must count its dims from the right); if False, one by one, on the same
            minibatch, for models that branch on a sample or cannot have that plate.
        global_latents: ``"joint"`` puts all latents into the weights; ``"elbo"`` gives the latents
            outside the data's plates the ELBO and the others the bound,
            ``E[log p(z_g) - log q(z_g) + sum_i bound(log-weights of datum i given z_g)]``, which is
            valid, tighter than the ELBO, and unbiased under subsampling.

    Raises:
        ValueError: a subsampled plate does not enclose every site; a latent site is missing in the
            guide; plates of model and guide differ in size; a parameter is shared by model and
            guide under PIWAE or a wake-phase estimator; under `pyro.enable_validation` (on by
            default, and a wait for the device at each site), data are NaN or infinite. Without it
            such data make the loss NaN, and an optimiser the parameters: `fit` checks in any case.
        NotImplementedError: the estimator has no gradient for a site; a site is to be enumerated.

    >>> import pyro, pyro.distributions as dist
    >>> from pyro.infer.autoguide import AutoNormal
    >>> from pyro_recursive import bounds
    >>> def model(x):
    ...     with pyro.plate("data", len(x)):
    ...         z = pyro.sample("z", dist.Normal(0.0, 1.0))
    ...         pyro.sample("x", dist.Normal(z, 1.0), obs=x)
    >>> loss = MultiSampleELBO(bounds.renyi(0.5), estimator="dreg", num_particles=8)
    >>> isinstance(loss.loss(model, AutoNormal(model), torch.zeros(3)), float)
    True
    """

    def __init__(
        self,
        bound: Bound = bounds.iwae,
        *,
        estimator: str | Estimator = "pathwise",
        num_estimates: int = 1,
        num_particles: int = 1,
        max_plate_nesting: float = math.inf,
        vectorize_particles: bool = True,
        global_latents: str = "joint",
    ) -> None:
        _check_samples(num_estimates=num_estimates, num_particles=num_particles)
        super().__init__(num_particles=num_particles, vectorize_particles=vectorize_particles)
        self.max_plate_nesting = max_plate_nesting
        self.num_estimates = num_estimates
        self._bound = bound
        self.estimator = _estimator(estimator)
        self.global_latents = global_latents
        self._check()

    @property
    def bound(self) -> Bound:
        """The bound of this call."""
        return self._bound

    def __repr__(self) -> str:
        """Return the loss with its options, those that are no default of all losses."""
        options = ", ".join(f"{name}={value!r}" for name, value in self._options().items())
        return f"{type(self).__name__}({options})"

    def _options(self) -> dict[str, Any]:
        """Return the options by the names that the loss takes them under."""
        options = {"num_estimates": self.num_estimates, "num_particles": self.num_particles}
        options |= {"estimator": self.estimator.name}
        found = {name: getattr(self, name) for name in DEFAULTS}
        return options | {name: v for name, v in found.items() if v != DEFAULTS[name]}

    def loss(self, model: Callable, guide: Callable, *args: Any, **kwargs: Any) -> float:
        """Return minus the bound, summed over the data, in nats."""
        with torch.no_grad():
            return self._value(self._evaluate(Program(model, guide, args, kwargs))).item()

    def differentiable_loss(
        self, model: Callable, guide: Callable, *args: Any, **kwargs: Any
    ) -> Tensor:
        """Return a scalar: its value is minus the bound, its gradient the estimator's."""
        program = Program(model, guide, args, kwargs)
        if not torch.is_grad_enabled():
            return self._value(self._evaluate(program))
        evaluation = self._evaluate(program, replay=self.estimator.replay, cut_model=self._splits)
        value = self._value(evaluation)
        objective = self._surrogate(evaluation)
        if not objective.requires_grad:
            return value
        return value - (objective - objective.detach())

    def loss_and_grads(self, model: Callable, guide: Callable, *args: Any, **kwargs: Any) -> float:
        """Return minus the bound in nats, and add the gradients to the parameters' ``grad``."""
        loss = self.differentiable_loss(model, guide, *args, **kwargs)
        if loss.requires_grad:
            loss.backward()
        return loss.item()

    def _evaluate(
        self,
        program: Program,
        *,
        fresh: bool = False,
        shape: tuple[int, int] | None = None,
        **options: Any,
    ) -> "Evaluation":
        """Draw M * K samples, ``shape`` where it is given, and gather their log-densities."""
        shape = shape or (self.num_estimates, self.num_particles)
        structure, local = None, None
        if self.global_latents == "elbo":
            structure = structure_of(program, fresh=fresh)
            local = local_sites(structure)
            options["shared"] = frozenset(structure.guide) - local
        particles, runs = run_particles(
            program,
            *shape,
            max_plate_nesting=self.max_plate_nesting,
            vectorize=self.vectorize_particles,
            **options,
        )
        if structure is not None and not fresh:
            now = structure_in(runs[0].table)
            if (local_sites(now), now.guide.keys()) != (local, structure.guide.keys()):
                # Sites depend on the arguments: look at this call's.
                return self._evaluate(program, fresh=True, shape=shape, **options)
        tables = [run.table for run in runs]
        layout = layout_of(particles, tables, only=local)
        is_linear = self.bound.is_linear(*shape)
        check_runs(tables, layout, is_linear=is_linear)
        if structure is not None and not is_linear:
            warn_if_nothing_local(structure, *shape)
        shared = None
        if local is not None:
            outside = _names(runs[0]) - local
            shared = densities(runs, layout_of(particles, tables, only=outside), only=outside)
        return Evaluation(runs, densities(runs, layout, only=local), shared)

    def _value(self, evaluation: "Evaluation") -> Tensor:
        """Return minus the bound, without a graph."""
        local, shared = evaluation.local, evaluation.shared
        value = self.bound(local.log_weights)
        if is_validation_enabled():
            _warn_if_dead(value)
        total = local.layout.scale * value.sum()
        if shared is not None:
            total = total + shared.layout.scale * shared.log_weights.mean((0, 1)).sum()
        if is_validation_enabled():
            warn_if_nan(total, "loss")
        return -total

    def _surrogate(self, evaluation: "Evaluation") -> Tensor:
        """Return a scalar whose gradient is the estimator's, for ascent."""
        runs, local, shared = evaluation
        total = local.layout.scale * surrogate(runs, local, self.bound, self.estimator)
        if shared is not None:
            total = total + shared.layout.scale * global_surrogate(runs, shared)
        return total

    @property
    def _splits(self) -> bool:
        return self._bound.guide is not self._bound

    def _get_trace(self, model: Callable, guide: Callable, args: Any, kwargs: Any) -> Any:
        """Return one pair of traces, as every `pyro.infer.ELBO` must."""
        return get_importance_trace("flat", self.max_plate_nesting, model, guide, args, kwargs)

    def _check(self) -> None:
        if not isinstance(self._bound, Bound):
            raise TypeError(
                "bound must be a pyro_recursive.bounds.Bound such as bounds.iwae, "
                f"got {self._bound!r}"
            )
        if self.num_particles < self._bound.min_particles:
            raise ValueError(
                f"the bound needs num_particles >= {self._bound.min_particles}, "
                f"got {self.num_particles}"
            )
        if self.num_particles < self.estimator.min_particles:
            raise ValueError(
                f"estimator='{self.estimator.name}' compares each sample with the others and needs "
                f"num_particles >= {self.estimator.min_particles}, got {self.num_particles}"
            )
        if self.global_latents not in GLOBAL_LATENTS:
            raise ValueError(
                f"global_latents must be one of {GLOBAL_LATENTS}, got {self.global_latents!r}"
            )
        if self.global_latents == "elbo" and (self._splits or self.estimator.wake):
            raise ValueError(
                "global_latents='elbo' needs one bound for model and guide: not PIWAE, and no "
                f"wake-phase estimator; got estimator='{self.estimator.name}'"
            )


class IWAE_ELBO(MultiSampleELBO):
    """``log mean_k w_k``: a bound that tightens with K.

    `Importance Weighted Autoencoders` (Burda et al., arXiv 1509.00519). The signal-to-noise ratio
    of the pathwise gradient of the guide falls as K grows; ``estimator="dreg"`` repairs that.
    Arguments and errors are those of `MultiSampleELBO`.

    >>> IWAE_ELBO(64, estimator="dreg").num_particles
    64
    """

    def __init__(self, num_particles: int, **options: Any) -> None:
        super().__init__(bounds.iwae, num_particles=num_particles, **options)


class MIWAE_ELBO(MultiSampleELBO):
    """The mean of M independent importance-weighted bounds with K samples each.

    `Tighter Variational Bounds are Not Necessarily Better` (Rainforth et al., arXiv 1802.04537).
    The same bound as `IWAE_ELBO(K)` in expectation, with gradients of 1/M the variance.

    >>> MIWAE_ELBO(8, 8).num_estimates
    8
    """

    def __init__(self, num_estimates: int, num_particles: int, **options: Any) -> None:
        super().__init__(
            bounds.miwae, num_estimates=num_estimates, num_particles=num_particles, **options
        )


class PIWAE_ELBO(MultiSampleELBO):
    """The model climbs IWAE over all M * K samples, the guide MIWAE(M, K) on the same samples.

    `Tighter Variational Bounds are Not Necessarily Better` (Rainforth et al., arXiv 1802.04537).
    One backward pass gives both gradients, so that one optimiser and one `SVI.step` do. The
    reported value is minus the tighter bound, IWAE over M * K. A parameter that model and guide
    share raises ValueError: it would have two objectives.

    >>> PIWAE_ELBO(8, 8, estimator="dreg").num_estimates
    8
    """

    def __init__(self, num_estimates: int, num_particles: int, **options: Any) -> None:
        super().__init__(
            bounds.piwae, num_estimates=num_estimates, num_particles=num_particles, **options
        )


class CIWAE_ELBO(MultiSampleELBO):
    """``beta * ELBO + (1 - beta) * IWAE`` on the same K samples, with a fixed or a learned beta.

    `Tighter Variational Bounds are Not Necessarily Better` (Rainforth et al., arXiv 1802.04537).
    The bound itself says nothing about beta: its derivative ``ELBO - IWAE`` is never positive, so
    that climbing it ends at beta = 0 and descending it at beta = 1. With ``learn_beta=True`` beta
    instead descends the mean squared error of the combined guide gradient as an estimate of IWAE's;
    `pyro_recursive.losses.learned_beta` has the criterion. The parameter ``<name>.beta`` is reached
    through Pyro, so `SVI`, `fit` and ``loss(model, guide).parameters()`` all find it; its
    current value is ``loss.beta``, and `state_dict` is what to save of it.

    Raises ValueError for beta outside [0, 1], and for ``learn_beta`` where nothing can be learned:
    beta on a boundary, K = 1, or M = 1 with a K that does not split in two halves of at least 2.

    >>> float(CIWAE_ELBO(64, beta=0.05, learn_beta=True).beta)  # doctest: +ELLIPSIS
    0.05...
    """

    def __init__(
        self,
        num_particles: int,
        *,
        beta: float = 0.5,
        learn_beta: bool = False,
        name: str = "ciwae",
        **options: Any,
    ) -> None:
        self._beta = beta
        self._learned = LearnedBeta(beta, name) if learn_beta else None
        super().__init__(bounds.ciwae(beta), num_particles=num_particles, **options)
        if learn_beta:
            check_replicates(self.num_estimates, self.num_particles, self.estimator)

    @property
    def beta(self) -> Tensor:
        """The current weight of the ELBO, detached."""
        if self._learned is None:
            return torch.as_tensor(self._beta)
        return self._learned().detach()

    def _options(self) -> dict[str, Any]:
        learned = {} if self._learned is None else {"learn_beta": True}
        return {**super()._options(), "beta": round(self.beta.item(), 4), **learned}

    @property
    def bound(self) -> Bound:
        """CIWAE at the current beta; no gradient of the bound reaches beta."""
        return self._bound if self._learned is None else bounds.ciwae(self.beta)

    def state_dict(self) -> dict[str, Tensor]:
        """Return what the loss has learned: beta, unconstrained; nothing where it is fixed."""
        return {} if self._learned is None else dict(self._learned.state_dict())

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Go on from the beta of another such loss, whatever Pyro's store has under its name.

        Raises RuntimeError where one of the two learns beta and the other does not.

        >>> trained = CIWAE_ELBO(8, beta=0.2, learn_beta=True, name="trained")
        >>> loss = CIWAE_ELBO(8, beta=0.7, learn_beta=True, name="loaded")
        >>> loss.load_state_dict(trained.state_dict())
        >>> round(loss.beta.item(), 4)
        0.2
        """
        if self._learned is not None:
            self._learned.load_state_dict(state)
        elif state:
            raise RuntimeError(
                f"The state has a learned {sorted(state)}, and this CIWAE_ELBO a fixed beta of "
                f"{self._beta}: make it with learn_beta=True."
            )

    def __call__(self, model: torch.nn.Module, guide: torch.nn.Module) -> ELBOModule:
        """Return the loss as a module; a learned beta is among its parameters."""
        module = super().__call__(model, guide)
        if self._learned is not None:
            module.add_module("learned_beta", self._learned)
        return module

    def _surrogate(self, evaluation: "Evaluation") -> Tensor:
        total = super()._surrogate(evaluation)
        if self._learned is None:
            return total
        target = optimal_beta(evaluation.runs, evaluation.local, self.estimator)
        return total - 0.5 * (self._learned() - target) ** 2


class Evaluation(NamedTuple):
    """One evaluation: the runs, the densities in the weights, and those of the global latents."""

    runs: list[ParticleRun]
    local: Densities
    shared: Densities | None


def _estimator(estimator: str | Estimator) -> Estimator:
    if isinstance(estimator, Estimator):
        return estimator
    if estimator not in ESTIMATORS:
        raise ValueError(f"estimator must be one of {sorted(ESTIMATORS)}, got {estimator!r}")
    return ESTIMATORS[estimator]


def _check_samples(**counts: Any) -> None:
    for name, count in counts.items():
        if count is None:
            raise ValueError(f"{name} must be an integer >= 1, got None.")
    check_at_least(1, **counts)


def _names(run: ParticleRun) -> frozenset[str]:
    return frozenset(site["name"] for site in sites(run.model, run.guide))


def _warn_if_dead(value: Tensor) -> None:
    """Warn, naming the plate index, where every sample has zero weight."""
    dead = value.isneginf()
    if dead.any():
        where = dead.nonzero().tolist()
        warnings.warn(
            f"The bound is -inf at plate indices {where[:5]}{'...' if len(where) > 5 else ''}: no "
            "sample of the guide has positive density under the model there.",
            stacklevel=4,
        )
