"""The loss that grows a recursive mixture guide: one training step of the stage that it is in."""

import logging
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple, Unpack

import torch
from pyro import poutine, validation_enabled
from torch import Tensor

from pyro_recursive.bounds.bound import Split, Weighted, elbo
from pyro_recursive.bounds.estimators import ESTIMATORS, Estimator
from pyro_recursive.bounds.mixture_objectives import (
    OBJECTIVES,
    Clamped,
    Gain,
    Objective,
    corrective_weights,
    gain,
    line_search,
    log_mixture,
    log_others,
)
from pyro_recursive.losses.base import Evaluation, SampleOptions, warn_if_infinite
from pyro_recursive.losses.component_search import place_component
from pyro_recursive.losses.mixture import (
    MixtureLoss,
    component_site,
    density_weight,
    joined_density,
    log_mixture_weights,
    remaining_estimator,
)
from pyro_recursive.losses.surrogate import finite, surrogate
from pyro_recursive.tracing.densities import weighted
from pyro_recursive.tracing.param_store import parameters_in
from pyro_recursive.tracing.program import Program
from pyro_recursive.tracing.protocols import GrowingMixture

WEIGHTS = ("gradient", "line_search", "corrective")
UPDATES = ("simultaneous", "alternating", "guide")
WATCHED_EVERY = 100  # steps; waits for the device

logger = logging.getLogger(__name__)
_NEEDS_ALL_DRAWS = "A clamped objective needs all draws of a row at once, not a loop over samples."


class RecursiveMixture_ELBO(MixtureLoss):
    """Trains a `RecursiveMixtureGuide` stage by stage, and the model with it.

    The component in training climbs ``E_q[log p(x, z) - log R(z)]`` with its objective's reference
    R, the others are held; the model climbs the ELBO of the mixture, which is what `loss` returns,
    in nats. Parameters that a step does not train get no gradient; one that waits for the
    optimiser stays.

    Args:
        num_particles: S, the samples of each component; 4 or more for a clamped objective.
        objective: how a component is refined: ``"exact"`` (the gradient of the mixture's ELBO),
            ``"skew"``, ``"relbo"`` (boosting), ``"elbo"``, or an `Objective` of
            `bounds.mixture_objectives`, such as the paper's ``Clamped(clamp=2.0)``.
        proposal: how it is proposed; the same choices.
        joint: the loss of all components together in joint stages, with its own samples, estimator
            and plates, such as ``MISELBO(8)`` or ``SIWAE_ELBO(8)``; by default the ELBO.
        update: ``"simultaneous"`` trains guide and model on the same samples, ``"alternating"`` in
            turns, ``"guide"`` the component alone. Joint stages train everything.
        weights: ``"gradient"`` learns a weight with its component; when a component is kept,
            ``"line_search"`` also sets its weight to the optimum, ``"corrective"`` all weights.
            Both need one vector of weights for all rows.
        holdout: the model's arguments for acceptance tests; by default the step's own.
        estimator, max_plate_nesting, vectorize_particles: as in `Stratified_ELBO`.

    Raises:
        TypeError: the guide is no `RecursiveMixtureGuide`, or ``joint`` no loss of mixture guides.
        ValueError: an unknown option; model and guide share a parameter.

    `Recursive Inference for Variational Autoencoders` (Kim & Pavlovic, NeurIPS 2020); `Boosting
    Black Box Variational Inference` (Locatello et al., arXiv 1806.02185).

    >>> from pyro_recursive import MISELBO
    >>> RecursiveMixture_ELBO(4, proposal="skew", joint=MISELBO(4)).joint
    MISELBO(num_estimates=1, num_particles=4, estimator='pathwise')
    """

    def __init__(
        self,
        num_particles: int = 1,
        *,
        objective: str | Objective = "exact",
        proposal: str | Objective = "skew",
        joint: MixtureLoss | None = None,
        update: str = "simultaneous",
        weights: str = "gradient",
        holdout: Sequence[Any] | None = None,
        **options: Unpack[SampleOptions],
    ) -> None:
        options.setdefault("estimator", "stl")
        super().__init__(num_particles, **options)
        self.objective, self.proposal = _objective(objective), _objective(proposal)
        is_clamped = any(isinstance(o, Clamped) for o in (self.objective, self.proposal))
        if is_clamped and not self.vectorize_particles and self.draws_per_component > 1:
            raise ValueError(_NEEDS_ALL_DRAWS)
        if isinstance(holdout, Tensor):
            raise TypeError("holdout must be the model's arguments, got a tensor. Use (tensor,).")
        for name, value, choices in (("update", update, UPDATES), ("weights", weights, WEIGHTS)):
            if value not in choices:
                raise ValueError(f"{name} must be one of {choices}, got {value!r}.")
        if joint is not None and (
            isinstance(joint, RecursiveMixture_ELBO) or not isinstance(joint, MixtureLoss)
        ):
            raise TypeError(
                f"joint must be Stratified_ELBO, MISELBO or SIWAE_ELBO, got {type(joint).__name__}."
            )
        self.joint = joint
        self.update, self.weights, self.holdout = update, weights, holdout

    def _options(self) -> dict[str, Any]:
        own = ("objective", "proposal", "joint", "update", "weights")
        return super()._options() | {name: getattr(self, name) for name in own}

    def differentiable_loss(
        self, model: Callable, guide: Callable, *args: Any, **kwargs: Any
    ) -> Tensor:
        """Return a scalar whose gradient is that of this step's stage, and count the step.

        Its value is minus the mixture's ELBO, the objective if only the component is trained, or
        minus the bound of ``joint`` in joint stages.
        """
        if not torch.is_grad_enabled():
            return super().differentiable_loss(model, guide, *args, **kwargs)
        mixture = growing_mixture_of(guide)
        with mixture.rollback_first_call():
            mixture.prepare(*args, **kwargs)
            if self.weights != "gradient":
                mixture.check_shared_weights()
            if mixture.starts_from_paths:
                mixture.start_from_paths(args, kwargs)
            program = Program(model, guide, args, kwargs)
            if mixture.starts_component:
                # Points at which a parameter is invalid have density 0.
                with validation_enabled(False):
                    place_component(program, mixture, vectorize=self.vectorize_particles)
            if mixture.is_trial:
                loss = self._test_component(program, mixture)
            else:
                loss = self.stage_loss(model, guide, *args, **kwargs)
                mixture.count_step()
            _watch(mixture, args, kwargs)
            return loss

    def stage_loss(self, model: Callable, guide: Callable, *args: Any, **kwargs: Any) -> Tensor:
        """Return the loss of a step of this stage that is no acceptance test; it is not counted."""
        mixture, program = growing_mixture_of(guide), Program(model, guide, args, kwargs)
        if self.joint is not None and mixture.stage.kind == "joint":
            return self.joint.differentiable_loss(model, guide, *args, **kwargs)
        plan = self._plan(mixture)
        if plan is None:
            return super().differentiable_loss(model, guide, *args, **kwargs)
        return self._train_component(program, mixture, plan)

    def stage_of(self, guide: Callable) -> tuple[Any, int]:
        """Return what decides a step, and for how many steps: 0 for one that places or tests.

        So does the last step of a stage. Members without weight are looked for after the steps.
        """
        mixture = growing_mixture_of(guide)
        stage, taken, left = mixture.stage, mixture.steps_taken, mixture.stage_steps_left - 1
        if not mixture.is_growing:
            until = WATCHED_EVERY - taken % WATCHED_EVERY
            left = until if stage.steps == 0 else min(left, until)
        is_turn = self.update == "alternating" and stage.component is not None
        turn = taken % 2 if is_turn else None
        is_start = mixture.starts_component or mixture.starts_from_paths
        left = 0 if is_start else max(min(left, 1) if is_turn else left, 0)
        return (stage.kind, stage.component, mixture.members, turn), left

    def count_steps(self, guide: Callable, count: int, /, *args: Any, **kwargs: Any) -> None:
        """Count steps whose loss was `stage_loss`, the first of them on these arguments."""
        mixture = growing_mixture_of(guide)
        mixture.count_step(count)
        _watch(mixture, args, kwargs)

    def loss_and_grads(self, model: Callable, guide: Callable, *args: Any, **kwargs: Any) -> float:
        """Return the value of `differentiable_loss`, and add its gradients to the parameters'.

        A gradient of zeros, which Pyro leaves after each step, becomes None in parameters that
        this step does not train, so that optimisers skip them; other gradients stay.
        """
        with poutine.trace(param_only=True) as seen:
            loss = self.differentiable_loss(model, guide, *args, **kwargs)
        before = {parameter: parameter.grad for parameter in parameters_in(seen.trace).values()}
        for parameter in before:
            parameter.grad = None
        if loss.requires_grad:
            loss.backward()
        held = list[tuple[Tensor, Tensor]]()  # what is not trained, and the gradient that it had
        for parameter, grad in before.items():
            if grad is not None and parameter.grad is not None:
                parameter.grad = parameter.grad + grad
            elif grad is not None:
                held.append((parameter, grad))
        flags = [grad.any().to(loss) for _, grad in held]
        value, *is_any = torch.stack([loss.detach(), *flags]).tolist()  # waits for a GPU once
        for (parameter, grad), is_set in zip(held, is_any, strict=True):
            parameter.grad = grad if is_set else None
        return value

    def gain(self, model: Callable, guide: Callable, *args: Any, **kwargs: Any) -> Gain:
        """Return what the newest member adds to the mixture's ELBO, in nats summed over the data.

        From paired draws of each component, on ``holdout`` if given.
        """
        if self.holdout is not None:
            args, kwargs = tuple(self.holdout), {}
        run = self._draw_members(Program(model, guide, args, kwargs), growing_mixture_of(guide))
        scale, last = run.evaluation.local.layout.scale, run.plan.column
        component, draws = run.plan.component, run.plan.num_draws
        logger.info("Component %s: %d draws of each member in its test.", component, draws)
        log_q = run.by_member(log_mixture)
        return gain(
            run.log_p(log_q),
            log_q,
            run.by_member(lambda table, weights: log_others(table, weights, last)),
            run.by_member(lambda table, _: table[..., last]),
            run.log_weights(),
            scale,
            rows_are_a_sample=self.holdout is not None or scale != 1,
            latent_weight=run.density_weight(),
        )

    def _plan(self, mixture: GrowingMixture) -> "StepPlan | None":
        """Return what this step trains, None for all components together."""
        stage, part = mixture.stage, self.update
        if stage.component is None:
            return None
        if part == "alternating":
            part = "model" if mixture.steps_taken % 2 else "guide"
        alone = "exact" if self.estimator.replay == "paths" else "elbo"  # the same, or held
        objectives = {"first": OBJECTIVES[alone], "propose": self.proposal}
        return StepPlan(
            objective=objectives.get(stage.kind, self.objective),
            members=tuple(sorted({*mixture.members, stage.component})),
            component=stage.component,
            num_draws=self.draws_per_component,
            trains_guide=part != "model",
            trains_model=part != "guide",
            is_proposed=stage.kind == "propose",
            epsilon=mixture.epsilon,
        )

    def _train_component(
        self, program: Program, mixture: GrowingMixture, plan: "StepPlan"
    ) -> Tensor:
        estimator = ESTIMATORS["stl" if plan.objective.held else "pathwise"]
        replay = estimator.replay if plan.trains_guide else "none"
        cut_model = plan.trains_guide and plan.trains_model
        run = self._run(program, mixture, plan, replay=replay, cut_model=cut_model)
        return component_loss(run, estimator, mixture.parameters())

    def _test_component(self, program: Program, mixture: GrowingMixture) -> Tensor:
        """Keep or drop the component on trial; return minus the ELBO, whose graph is empty."""
        with torch.no_grad():
            value = self._value(self._evaluate(program))
        component = mixture.stage.component
        found = self.gain(program.model, program.guide, *program.args, **program.kwargs)
        is_kept = mixture.end_trial(found)
        outcome = "kept" if is_kept else "dropped"
        logger.info("Component %s is %s: it gains %.3g +- %.2g.", component, outcome, *found[:2])
        if is_kept and self.weights != "gradient":
            run = self._draw_members(program, mixture)
            mixture.set_log_weights(best_log_weights(run, self.weights))
        return value.requires_grad_().clone()

    @torch.no_grad()
    def _draw_members(self, program: Program, mixture: GrowingMixture) -> "PlanRun":
        members, exact = mixture.members, OBJECTIVES["exact"]
        draws = mixture.num_draws(program.args, program.kwargs)
        plan = StepPlan(exact, members, members[-1], draws, trains_guide=False)
        return self._run(program, mixture, plan)

    def _run(
        self, program: Program, mixture: GrowingMixture, plan: "StepPlan", **options: Any
    ) -> "PlanRun":
        """Draw what a plan asks for, and record the guide's tables of component densities."""
        tables: dict[int | None, tuple[Tensor, Tensor]] = {}

        def reference(
            table: Tensor, log_weights: Tensor, volume: Tensor, particle: int | None
        ) -> Tensor:
            if (
                particle is not None
                and isinstance(plan.objective, Clamped)
                and len(plan.own_draws) > 1
            ):
                raise ValueError(_NEEDS_ALL_DRAWS)
            if not particle:  # the first of a pass; one that failed is not counted
                tables.clear()
            # Recorded as densities of the sites' constrained values, as log p is.
            tables[particle] = table - volume.unsqueeze(-1), log_weights
            own = plan.own_draws if particle is None else []
            return plan.objective(table, log_weights.detach(), plan.column, own)

        evaluation = self._evaluate_strata(
            program,
            mixture,
            plan.components,
            reference=reference,
            frozen=plan.frozen,
            members=plan.members,
            **options,
        )
        return PlanRun(plan, evaluation, list(tables.values()))


@dataclass(frozen=True)
class StepPlan:
    """What a step trains: ``component``, one of ``members``, by an objective; and the model.

    One that ``is_proposed`` stands beside the mixture of the others, with the weight ``epsilon``.
    """

    objective: Objective
    members: tuple[int, ...]
    component: int
    num_draws: int
    trains_guide: bool = True
    trains_model: bool = True
    is_proposed: bool = False
    epsilon: float = 0.0

    @property
    def column(self) -> int:
        return self.members.index(self.component)

    @property
    def trains_weight(self) -> bool:
        return self.trains_guide and not self.is_proposed and len(self.members) > 1

    @property
    def frozen(self) -> frozenset[int]:
        return frozenset(range(len(self.members))) - ({self.column} if self.trains_guide else set())

    @cached_property
    def components(self) -> tuple[int, ...]:
        """The column of every draw: the component's alone where nothing else needs draws."""
        if not (self.trains_model or self.trains_weight):
            return (self.column,) * self.num_draws
        return tuple(range(len(self.members))) * self.num_draws

    @property
    def own_draws(self) -> list[int]:
        return [draw for draw, column in enumerate(self.components) if column == self.column]

    def log_mixture(self, table: Tensor, log_weights: Tensor) -> Tensor:
        """Return the log-density of the mixture, without a component that is only proposed."""
        if self.is_proposed:
            return log_others(table, log_weights, self.column)
        return log_mixture(table, log_weights)


class PlanRun(NamedTuple):
    """The draws of a plan, with a table of all members' log-densities and log-weights a run."""

    plan: StepPlan
    evaluation: Evaluation
    tables: list[tuple[Tensor, Tensor]]

    def gather(self, log_density: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
        """Return a function of the tables at each draw, scaled and masked, ``[E, *plates]``."""
        layout, rows = self.evaluation.local.layout, []
        for run, table in zip(self.evaluation.runs, self.tables, strict=True):
            site = component_site(run)
            rows.append([(site, weighted(log_density(*table), site, layout))])
        gathered = layout.gather(rows)
        assert gathered is not None
        return gathered[:, 0]

    def by_member(self, log_density: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
        """Return the same where S draws of every member take turns, ``[S, J, *rows]``."""
        return self.gather(log_density).unflatten(0, (-1, len(self.plan.members)))

    def density_weight(self) -> Tensor:
        """Return what log-densities are multiplied by in `by_member`, in its form."""
        weight = density_weight(self.evaluation.runs, self.evaluation.local.layout)
        return weight[:, 0].unflatten(0, (-1, len(self.plan.members)))

    def log_p(self, like: Tensor) -> Tensor:
        """Return log p at the draws, in the form of one of the above."""
        model = self.evaluation.local.model
        return torch.zeros_like(like) if model is None else model.reshape(like.shape)

    def log_weights(self) -> Tensor:
        """Return the members' log-weights, ``[*rows, J]``."""
        weights = log_mixture_weights(self.evaluation.local)[: len(self.plan.members), 0]
        return weights.movedim(0, -1)


def component_loss(run: PlanRun, estimator: Estimator, parameters: Iterable[Tensor]) -> Tensor:
    """Return a scalar whose gradient is that of a step which trains one component."""
    plan, evaluation = run.plan, run.evaluation
    local, scale = joined_density(evaluation.local), evaluation.local.layout.scale
    count, shape = len(set(plan.components)), (len(plan.components), *local.layout.shape)
    weights = (count * log_mixture_weights(evaluation.local)[:, 0].exp()).expand(shape)
    own = torch.tensor([float(column == plan.column) for column in plan.components])
    own = own.to(weights, non_blocking=True).reshape(-1, *[1] * (weights.dim() - 1)).expand(shape)
    log_q = run.gather(plan.log_mixture)
    gains = (run.log_p(log_q) - log_q).detach().expand(shape)
    held, each = weights.detach(), []  # bounds of the model and of the component
    if plan.trains_model:
        model = held * (1 - own) / (1 - plan.epsilon) if plan.is_proposed else held
        each.append(Weighted(elbo, model))
    if plan.trains_guide:
        guide = count * own
        if plan.objective.held:  # a row counts as much as the component weighs in it
            guide = guide * (own * held) / ((own * held).sum() / own.sum())
        each.append(Weighted(elbo, guide))
    bound = Split(*each) if len(each) > 1 else each[0]
    total = surrogate(evaluation.runs, local, bound, remaining_estimator(estimator, evaluation))
    if plan.trains_weight:
        total = total + (weights * finite(gains)).mean(0).sum()
    if plan.trains_model:
        counts = each[0].weights
        bounds = torch.where(counts == 0, counts, counts * gains).mean(0)  # not 0 times infinity
        warn_if_infinite(bounds)
        value = -scale * bounds.sum()
    else:
        total = _restricted(total, parameters)
        each_draw = torch.where(own == 0, own, local.log_weights[:, 0])
        warn_if_infinite(each_draw.sum(0))
        value = -scale * (each_draw.sum() / plan.num_draws)
    return value - scale * (total - total.detach()) if total.requires_grad else value


def best_log_weights(run: PlanRun, weights: str) -> Tensor:
    """Return the members' optimal log-weights for these draws, ``[J]``: all of them, or one share.

    One vector serves all rows, so that a row's draws are further draws of the components.
    """
    count, weight = len(run.plan.members), run.density_weight()

    def member(j: int) -> Tensor:
        found = run.by_member(lambda table, _: table[..., j])
        return torch.where(weight > 0, found / weight, 0.0)

    table = torch.stack([member(j) for j in range(count)], -1).movedim(1, -2)
    log_p, weight = (each.movedim(1, -1).reshape(-1, count) for each in (run.log_p(weight), weight))
    draws = log_p, table.reshape(-1, count, count), run.log_weights().reshape(-1, count)[0]
    if weights == "corrective":
        return corrective_weights(*draws, latent_weight=weight)
    return line_search(*draws, count - 1, latent_weight=weight)


def growing_mixture_of(guide: Callable) -> GrowingMixture:
    """Return the growing mixture under handlers; raise TypeError where there is none."""
    mixture = poutine.unwrap(guide)
    if not isinstance(mixture, GrowingMixture):
        raise TypeError(
            f"Growth needs a RecursiveMixtureGuide, got {type(mixture).__name__}: train other "
            "mixtures with Stratified_ELBO."
        )
    return mixture


def _watch(mixture: GrowingMixture, args: tuple, kwargs: dict[str, Any]) -> None:
    """Look for members without weight, when growth has ended and then at intervals."""
    if not mixture.is_growing and mixture.steps_taken % WATCHED_EVERY == 0:
        mixture.watch(*args, **kwargs)


def _objective(objective: str | Objective) -> Objective:
    if isinstance(objective, Objective):
        return objective
    if objective not in OBJECTIVES:
        raise ValueError(
            f"An objective must be one of {sorted(OBJECTIVES)} or an Objective, got {objective!r}."
        )
    return OBJECTIVES[objective]


def _restricted(objective: Tensor, parameters: Iterable[Tensor]) -> Tensor:
    """Return a scalar with an objective's gradient in some parameters, and none in others."""
    leaves = [parameter for parameter in parameters if parameter.requires_grad]
    grads = torch.autograd.grad(objective, leaves, allow_unused=True)
    pairs = [(g, leaf) for g, leaf in zip(grads, leaves, strict=True) if g is not None]
    return torch.stack([(g * leaf).sum() for g, leaf in pairs]).sum()
