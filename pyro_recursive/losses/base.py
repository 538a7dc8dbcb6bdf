"""The base of all losses: runs of model and guide, their log-weights, a bound, an estimator."""

import math
from collections.abc import Callable
from difflib import get_close_matches
from inspect import signature
from typing import Any, Literal, NamedTuple, Never, TypedDict

import torch
from pyro.infer import ELBO
from pyro.infer.enum import get_importance_trace
from pyro.infer.util import is_validation_enabled
from pyro.util import warn_if_nan
from torch import Tensor

from pyro_recursive.bounds.bound import Bound, double, iwae
from pyro_recursive.bounds.estimators import ESTIMATORS, Estimator, EstimatorName
from pyro_recursive.losses.expected import ExpectedBound
from pyro_recursive.losses.surrogate import global_surrogate, nested_surrogate, surrogate
from pyro_recursive.tracing.arguments import check_at_least
from pyro_recursive.tracing.compatibility import (
    check_all_data,
    check_global_elbo,
    check_likelihood,
    check_runs,
)
from pyro_recursive.tracing.densities import Densities, densities
from pyro_recursive.tracing.dependence import dependence_of, independent_plates
from pyro_recursive.tracing.plates import layout_of, local_sites, structure_in
from pyro_recursive.tracing.program import Program, structure_of
from pyro_recursive.tracing.runs import ParticleRun, run_particles
from pyro_recursive.tracing.user_warnings import warn_user

GLOBAL_LATENTS = ("joint", "elbo")
VECTORIZE = (True, False, "auto", "vmap")
DEFAULTS = {
    "max_plate_nesting": math.inf,
    "vectorize_particles": True,
    "global_latents": "joint",
    "num_globals": 1,
}
NESTED = ("pathwise", "dreg")  # estimators with several global samples in one logarithm


class LossOptions(TypedDict, total=False):
    """Options of every loss but the numbers of samples, as types; see `MultiSampleELBO`."""

    estimator: EstimatorName | Estimator
    max_plate_nesting: float
    vectorize_particles: bool | Literal["auto", "vmap"]
    global_latents: Literal["joint", "elbo"]
    num_globals: int


class SampleOptions(LossOptions, total=False):
    """The same, and the number of estimates."""

    num_estimates: int


class Evaluation(NamedTuple):
    """One evaluation of a bound: its runs and their densities.

    ``local`` are the densities in the log-weights, ``shared`` those of the global latents under
    ``global_latents="elbo"``, where ``num_globals`` estimates share a logarithm. ``independent``
    are plates of score-handled sites beyond those of the weights, whose entries are independent
    given all else. ``expected`` is the expectation over latents that the guide enumerates.
    """

    bound: Bound
    runs: list[ParticleRun]
    local: Densities
    shared: Densities | None
    independent: frozenset[str] = frozenset()
    num_globals: int = 1
    expected: ExpectedBound | None = None


class LogWeightELBO(ELBO):
    """Base of the losses: minus a bound of log-weights ``[M, K, *plates]``, in nats.

    A loss keeps no state between calls; `tracing.program` remembers the structure of a program.
    Arguments are those of `MultiSampleELBO`.
    """

    def __init__(
        self,
        bound: Bound = iwae,
        *,
        estimator: EstimatorName | Estimator = "pathwise",
        num_estimates: int = 1,
        num_particles: int = 1,
        max_plate_nesting: float = math.inf,
        vectorize_particles: bool | Literal["auto", "vmap"] = True,
        global_latents: Literal["joint", "elbo"] = "joint",
        num_globals: int = 1,
        **unknown: Never,
    ) -> None:
        for name in unknown:
            known = {**SampleOptions.__annotations__, **signature(type(self)).parameters}
            near = get_close_matches(name, known, 1)
            hint = f" Did you mean '{near[0]}'?" if near else ""
            raise TypeError(f"{type(self).__name__} got an unknown option '{name}'.{hint}")
        counts = {"num_estimates": num_estimates, "num_particles": num_particles}
        check_at_least(1, **counts, num_globals=num_globals)
        super().__init__(num_particles=num_particles, vectorize_particles=vectorize_particles)
        self._bound = bound
        self.max_plate_nesting = max_plate_nesting  # Pyro's constructor would add 1 to it
        self.num_estimates = num_estimates
        self.estimator = _estimator(estimator)
        self.global_latents, self.num_globals = global_latents, num_globals
        if vectorize_particles not in VECTORIZE:
            raise ValueError(
                f"vectorize_particles must be one of {VECTORIZE}, got {vectorize_particles!r}."
            )
        if num_particles < self.estimator.min_particles:
            raise ValueError(
                f"estimator='{self.estimator.name}' needs num_particles >= "
                f"{self.estimator.min_particles}, got {num_particles}."
            )
        if global_latents not in GLOBAL_LATENTS:
            raise ValueError(
                f"global_latents must be one of {GLOBAL_LATENTS}, got {global_latents!r}."
            )
        if global_latents == "elbo" and (bound.is_split or self.estimator.wake):
            raise ValueError(
                "global_latents='elbo' needs one bound for model and guide, not PIWAE or 'rws'."
            )
        if num_globals > 1:
            self._check_nested()

    def _check_nested(self) -> None:
        """Raise where several global samples cannot share a logarithm."""
        if self.global_latents != "elbo":
            raise ValueError(f"num_globals={self.num_globals} needs global_latents='elbo'.")
        if self.estimator.name not in NESTED:
            raise ValueError(
                f"num_globals > 1 has estimators {', '.join(NESTED)}; got {self.estimator.name!r}."
            )
        if self._bound != iwae:
            raise ValueError(
                "num_globals > 1 needs the bound iwae, as in IWAE_ELBO: the exponential of "
                f"{self._bound!r} is no unbiased estimate of a density."
            )

    @property
    def bound(self) -> Bound:
        return self._bound

    def __repr__(self) -> str:
        options = ", ".join(f"{name}={value!r}" for name, value in self._options().items())
        return f"{type(self).__name__}({options})"

    def _options(self) -> dict[str, Any]:
        """Return the options by argument name; those of DEFAULTS only where they differ."""
        options = {"num_estimates": self.num_estimates, "num_particles": self.num_particles}
        options |= {"estimator": self.estimator.name}
        common = {name: getattr(self, name) for name in DEFAULTS}
        return options | {name: v for name, v in common.items() if v != DEFAULTS[name]}

    def loss(self, model: Callable, guide: Callable, *args: Any, **kwargs: Any) -> float:
        """Return minus the bound, summed over the data, in nats."""
        with torch.no_grad():
            return self._value(self._evaluate(self._program(model, guide, args, kwargs))).item()

    def differentiable_loss(
        self, model: Callable, guide: Callable, *args: Any, **kwargs: Any
    ) -> Tensor:
        """Return a scalar: its value is minus the bound, its gradient is the estimator's."""
        program = self._program(model, guide, args, kwargs)
        if not torch.is_grad_enabled():
            return self._value(self._evaluate(program))
        replay, cut_model = self.estimator.replay, self._bound.is_split
        if self.estimator.wake and structure_of(program).guide_values:
            cut_model = True  # the guide's samples count by other weights than the model's
        evaluation = self._evaluate(program, replay=replay, cut_model=cut_model)
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

    def _program(self, model: Callable, guide: Any, args: tuple, kwargs: dict[str, Any]) -> Program:
        """Return the program whose log-weights are bounded."""
        return Program(model, guide, args, kwargs)

    def _evaluate(
        self,
        program: Program,
        *,
        fresh: bool = False,
        shape: tuple[int, int] | None = None,
        **options: Any,
    ) -> Evaluation:
        """Draw M * K samples and gather their log-densities; ``shape`` overrides (M, K)."""
        shape = shape or (self.num_estimates, self.num_particles)
        (M, K), S = shape, self.num_globals
        structure, local = None, None
        if self.global_latents == "elbo":
            structure = structure_of(program, fresh=fresh)
            local = local_sites(structure)
            if check_global_elbo(structure, dependence_of(program), local, K):
                options["shared"] = frozenset(structure.guide) - local
                M = M * S
            else:  # with one local sample for each global one: S joint samples
                structure, local, K = None, None, S
        is_linear = self._bound.is_linear(M, K) and (S == 1 or local is None)
        particles, runs = run_particles(
            program,
            M,
            K,
            max_plate_nesting=self.max_plate_nesting,
            vectorize=self.vectorize_particles,
            by_value=True,
            **options,
        )
        tables = [run.table for run in runs]
        if structure is not None and not fresh:
            now, in_guide = structure_in(tables[0]), tables[0].enumerated_in_guide
            known = local, structure.guide.keys(), structure.guide_values.keys()
            if (local_sites(now), now.guide.keys(), {r.name for r in in_guide}) != known:
                # Sites depend on the arguments: find the structure of this call.
                return self._evaluate(program, fresh=True, shape=shape, **options)
        layout = layout_of(particles, tables, only=local)
        if S > 1:
            check_all_data(tables[0], S)
        check_runs(tables, layout, is_linear=is_linear)
        if not is_linear:
            check_likelihood(runs[0].model)
        in_weights, shared, expected = densities(runs, layout, only=local), None, None
        if in_weights.values is not None:
            if S > 1:
                raise NotImplementedError(
                    f"num_globals={S} and a guide that enumerates latents: use num_globals=1, or "
                    "enumerate them in the model."
                )
            expected = ExpectedBound(self.bound, in_weights)
            expected.check(program)
        if local is not None:
            outside = frozenset(record.name for record in tables[0].records) - local
            shared = densities(runs, layout_of(particles.alike, tables, only=outside), only=outside)
        independent = frozenset[str]()
        inside = {name for r in tables[0].guide if r.group == "score" for name in r.row_plates}
        if not inside <= layout.names:
            independent = independent_plates(program)
        return Evaluation(self.bound, runs, in_weights, shared, independent, S, expected)

    def _value(self, evaluation: Evaluation) -> Tensor:
        local, shared = evaluation.local, evaluation.shared
        if shared is not None and evaluation.num_globals > 1:
            values = _per_estimate(evaluation.bound, local, shared)
            total = iwae(values.unflatten(0, (-1, evaluation.num_globals))).to(local.log_weights)
            warn_if_infinite(total)
        else:
            each = self._bounds(evaluation)
            warn_if_infinite(each)
            total = local.layout.scale * each.sum()
            if shared is not None:
                total = total + shared.layout.scale * shared.log_weights.mean((0, 1)).sum()
        if is_validation_enabled():
            warn_if_nan(total, "loss")
        return -total

    def _bounds(self, evaluation: Evaluation) -> Tensor:
        """Return the bound of each entry of the plates, ``[*plates]``."""
        if evaluation.expected is not None:
            return evaluation.expected.value()
        return evaluation.bound(evaluation.local.log_weights)

    def _surrogate(self, evaluation: Evaluation) -> Tensor:
        """Return a scalar whose gradient is the estimator's, for ascent."""
        bound, runs, local, shared, independent, num_globals, expected = evaluation
        if shared is not None and num_globals > 1:
            values = _per_estimate(bound, local, shared)
            return nested_surrogate(runs, local, shared, values, num_globals, self.estimator)
        total = surrogate(
            runs,
            local,
            bound if expected is None else expected.weighted(self.estimator),
            self.estimator,
            independent=independent,
            beside=None if expected is None else expected.signal(self.estimator),
        )
        if expected is not None:
            total = total + expected.of_probabilities(self.estimator)
        total = local.layout.scale * total
        if shared is not None:
            if expected is not None:
                _refuse_scored(shared)
            each = None if expected is not None else _per_estimate(bound, local, shared)
            total = total + shared.layout.scale * global_surrogate(
                runs, shared, each, self.estimator
            )
        return total

    def _get_trace(self, model: Callable, guide: Callable, args: Any, kwargs: Any) -> Any:
        return get_importance_trace("flat", self.max_plate_nesting, model, guide, args, kwargs)


def warn_if_infinite(bounds: Tensor) -> None:
    """Warn where a bound, ``[*plates]``, is -inf, under validation; waits for the device."""
    if is_validation_enabled() and bool((dead := bounds.isneginf()).any()):
        warn_user(
            f"The bound is -inf at plate indices {dead.nonzero().tolist()[:5]}: the model's "
            "density is 0 at the guide's samples."
        )


def _per_estimate(bound: Bound, local: Densities, shared: Densities) -> Tensor:
    """Return the value of each estimate, ``[M]``; one where the bound pools them.

    In double precision: that of many data is large beside what one sample changes.
    """
    inside = bound.estimate(local.log_weights)
    outside = shared.log_weights.mean(1)
    if len(inside) < len(outside):
        outside = outside.mean(0, keepdim=True)
    scaled = local.layout.scale * inside, shared.layout.scale * outside
    return sum(double(each).reshape(len(each), -1).sum(1) for each in scaled)  # type: ignore[return-value]


def _refuse_scored(shared: Densities) -> None:
    """Raise where a guide enumerates latents beside a global one that is score-handled."""
    if shared.score is not None and shared.score.requires_grad:
        raise NotImplementedError(
            "The guide enumerates latents, and a site outside the data's plates is not "
            "reparameterised. Use global_latents='joint', or sample the enumerated ones."
        )


def _estimator(estimator: EstimatorName | Estimator) -> Estimator:
    if isinstance(estimator, Estimator):
        return estimator
    if estimator not in ESTIMATORS:
        raise ValueError(f"estimator must be one of {sorted(ESTIMATORS)}, got {estimator!r}.")
    return ESTIMATORS[estimator]
