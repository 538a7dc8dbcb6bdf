"""The loss that grows a recursive mixture guide."""

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from pyro import poutine
from torch import Tensor

from pyro_recursive.bounds.bound import Split, Weighted, elbo
from pyro_recursive.bounds.estimators import ESTIMATORS
from pyro_recursive.bounds.mixture_objectives import (
    OBJECTIVES,
    Clamped,
    Gain,
    Objective,
    Trial,
    corrective_weights,
    gain,
    line_search,
)
from pyro_recursive.losses.component_search import propose
from pyro_recursive.losses.focus import MemberDraws, StepPlan, drawn, terms_of
from pyro_recursive.losses.mixture import Stratified_ELBO, applied, mixture_of
from pyro_recursive.losses.surrogate import surrogate
from pyro_recursive.tracing.program import Program

__all__ = ["RecursiveMixture_ELBO"]

WEIGHTS = ("gradient", "line_search", "corrective")
UPDATES = ("simultaneous", "alternating", "guide")


class RecursiveMixture_ELBO(Stratified_ELBO):
    """Trains a `RecursiveMixtureGuide` stage by stage, and the model with it.

    Each training step serves the stage that the guide's schedule is in. The component in question
    climbs ``E_q[log p(x, z) - log R(z)]``, with R that of its objective; the other components are
    held. The model climbs the ELBO of the mixture, with all components in strata. `loss` is that
    ELBO in any case. The guide grows by these steps alone: under another loss, or after fewer than
    its `num_steps`, it has the components that it has (`members`).

    Arguments:
        num_particles: S, the draws of each component; 4 or more for a clamped objective.
        objective: how a component is refined: ``"exact"`` (the exact gradient of the mixture's
            ELBO), ``"skew"``, ``"relbo"`` (boosting), ``"elbo"``, or an `Objective` of
            `bounds.mixture_objectives` such as ``Clamped(clamp=2.0)``, the paper's, whose constants
            have no default.
        proposal: how it is found in the first place; the same choices.
        update: ``"simultaneous"`` gives guide and model their gradients from the same draws;
            ``"alternating"`` trains the component in one step and the model in the next;
            ``"guide"`` trains the component only, for a model without parameters: the cheapest.
            A step that trains neither the model nor a weight draws from the component alone. The
            joint stages train everything in each step.
        weights: ``"gradient"`` learns a weight along with its component; ``"line_search"`` also
            sets it to its optimum when a component is kept, ``"corrective"`` all weights; both
            only where all rows share one vector of weights.
        holdout: the model's arguments (no keywords) for the acceptance test of new components; the
            step's own if not given, which is a test on data that were just trained on.
        max_plate_nesting, vectorize_particles: as in `MultiSampleELBO`.

    Parameters that a step does not train are left with ``grad=None``, so that no optimiser moves
    them by momentum; a gradient that another loss had left there is lost.

    Raises:
        TypeError: the guide is no `RecursiveMixtureGuide`.
        ValueError: an unknown option; a parameter is shared by model and guide, which climb
            different objectives in a simultaneous step.

    Sources: `Recursive Inference for Variational Autoencoders` (Kim & Pavlovic, NeurIPS 2020);
    `Boosting Black Box Variational Inference` (Locatello et al., arXiv 1806.02185).

    >>> RecursiveMixture_ELBO(4, objective="exact", proposal="skew").num_estimates
    4
    """

    def __init__(
        self,
        num_particles: int = 1,
        *,
        objective: str | Objective = "exact",
        proposal: str | Objective = "skew",
        update: str = "simultaneous",
        weights: str = "gradient",
        holdout: Sequence[Any] | None = None,
        **options: Any,
    ) -> None:
        super().__init__(num_particles, **{"estimator": "stl", **options})
        self.objective, self.proposal = _objective(objective), _objective(proposal)
        if not self.vectorize_particles and num_particles > 1:
            for chosen in (self.objective, self.proposal):
                if isinstance(chosen, Clamped):
                    raise ValueError(
                        "A clamped objective needs all draws of a row at once, and cannot have "
                        "vectorize_particles=False with num_particles > 1."
                    )
        if isinstance(holdout, Tensor):
            raise TypeError("holdout is a sequence of arguments: holdout=(tensor,) for a tensor")
        if update not in UPDATES:
            raise ValueError(f"update must be one of {UPDATES}, got {update!r}")
        if weights not in WEIGHTS:
            raise ValueError(f"weights must be one of {WEIGHTS}, got {weights!r}")
        self.update, self.weights, self.holdout = update, weights, holdout

    def _options(self) -> dict[str, Any]:
        own = ("objective", "proposal", "update", "weights")
        return super()._options() | {name: getattr(self, name) for name in own}

    def differentiable_loss(
        self, model: Callable, guide: Callable, *args: Any, **kwargs: Any
    ) -> Tensor:
        """Return a scalar whose gradient is that of this step's stage, and count the step.

        Its value is minus the mixture's ELBO; minus the objective, where only the component is
        trained.
        """
        if not torch.is_grad_enabled():
            return super().differentiable_loss(model, guide, *args, **kwargs)
        mixture = _recursive(guide)
        with mixture.rollback_first_call():
            return self._step(Program(model, guide, args, kwargs), mixture)

    def _step(self, program: Program, mixture: Any) -> Tensor:
        """Return the loss of a step of the stage that the mixture is in."""
        model, guide, args, kwargs = program.model, program.guide, program.args, program.kwargs
        mixture.prepare(*args, **kwargs)
        if self.weights != "gradient":
            mixture.weights.check_vector()
        if mixture.stage.kind == "refine" and mixture.stage_steps_left == 1:
            # The test is a step of its own: what it changes must not be moved once more.
            value = self.loss(model, guide, *args, **kwargs)
            self._end_trial(program, mixture)
            device = mixture.progress.device
            # A graph, but no parameter in it: who calls backward moves nothing.
            return torch.tensor(value, device=device, requires_grad=True).clone()
        if mixture.stage.component is None:
            loss = super().differentiable_loss(model, guide, *args, **kwargs)
        else:
            if mixture.starts_component:
                propose(program, mixture, vectorize=self.vectorize_particles)
            loss = self._train_component(program, mixture)
        mixture.count_step()
        return loss

    def loss_and_grads(self, model: Callable, guide: Callable, *args: Any, **kwargs: Any) -> float:
        """Return the value of `differentiable_loss`, and add its gradients to the parameters'."""
        with poutine.trace(param_only=True) as seen:
            loss = self.differentiable_loss(model, guide, *args, **kwargs)
        parameters = [site["value"].unconstrained() for site in seen.trace.nodes.values()]
        before = [parameter.grad for parameter in parameters]
        for parameter in parameters:
            parameter.grad = None
        if loss.requires_grad:
            loss.backward()
        for parameter, grad in zip(parameters, before, strict=True):
            if parameter.grad is not None and grad is not None:
                parameter.grad = parameter.grad + grad
        return loss.item()

    def gain(self, model: Callable, guide: Callable, *args: Any, **kwargs: Any) -> Gain:
        """Return what the newest member adds to the mixture's ELBO, in nats summed over the data.

        From paired draws of each component, as many as the schedule says, on ``holdout`` if there
        is any.
        """
        mixture = _recursive(guide)
        if self.holdout is not None:
            args, kwargs = tuple(self.holdout), {}
        found = self._draw_all(Program(model, guide, args, kwargs), mixture)
        return gain(
            found.log_p,
            found.log_q,
            found.others,
            found.own,
            found.log_weights,
            found.scale,
            rows_are_a_sample=self.holdout is not None or found.scale != 1,
        )

    def _train_component(self, program: Program, mixture: Any) -> Tensor:
        focus = self._focus(mixture)
        estimator = ESTIMATORS["stl" if focus.objective.held else "pathwise"]
        evaluation = self._evaluate(
            program,
            assignment=focus.assignment,
            shape=(len(focus.components), 1),
            replay=estimator.replay if focus.moves_guide else "none",
            cut_model=focus.moves_guide and focus.moves_model,
        )
        terms = terms_of(evaluation.runs, evaluation.local, focus)
        climbs = [Weighted(elbo, weights) for weights in terms.climbers(focus)]
        climb = Split(*climbs) if len(climbs) > 1 else climbs[0]
        total = surrogate(evaluation.runs, terms.local, climb, applied(estimator, evaluation))
        if focus.moves_weights:
            total = total + (terms.weights * terms.gains).mean(0).sum()
        if not focus.moves_model:
            total = _only(mixture.parameters(), total)
        scale = terms.local.layout.scale
        value = -scale * terms.value
        return value - scale * (total - total.detach()) if total.requires_grad else value

    def _focus(self, mixture: Any) -> StepPlan:
        """Return what this step trains."""
        stage, part = mixture.stage, self.update
        if part == "alternating":
            part = "model" if mixture.steps_taken % 2 else "guide"
        kinds = {"first": OBJECTIVES["elbo"], "propose": self.proposal}
        return StepPlan(
            objective=kinds.get(stage.kind, self.objective),
            members=tuple(sorted({*mixture.members, stage.component})),
            component=stage.component,
            num_draws=self.num_estimates,
            moves_guide=part != "model",
            moves_model=part != "guide",
            proposing=stage.kind == "propose",
            epsilon=mixture.epsilon,
        )

    def _end_trial(self, program: Program, mixture: Any) -> None:
        """Keep or drop the component on trial."""
        found = self.gain(program.model, program.guide, *program.args, **program.kwargs)
        schedule = mixture.schedule
        is_kept = found.is_clear(schedule.confidence, schedule.min_gain)
        mixture.trials.append(Trial(mixture.stage.component, found, is_kept))
        if is_kept:
            if self.weights != "gradient":
                self._set_weights(program, mixture)
            mixture.end_stage()
        else:
            mixture.drop(retry=found.ceiling > schedule.min_gain)

    def _set_weights(self, program: Program, mixture: Any) -> None:
        """Set weights to their optimum for the draws of a large sample."""
        found = self._draw_all(program, mixture)
        log_p, table, log_weights = found.log_p, found.table, found.log_weights
        count = log_weights.shape[-1]
        # One vector of weights for all rows: a row's draws are more draws of the components.
        log_p = log_p.movedim(1, -1).reshape(-1, count)
        table = table.movedim(1, -2).reshape(-1, count, count)
        start = log_weights.reshape(-1, count)[0]
        if self.weights == "corrective":
            best = corrective_weights(log_p, table, start).log_weights
        else:
            best = line_search(log_p, table, start, count - 1)
        mixture.set_log_weights(best)

    @torch.no_grad()
    def _draw_all(self, program: Program, mixture: Any) -> MemberDraws:
        """Draw from every member, and evaluate all members' densities at all draws."""
        focus = StepPlan.on_all(mixture.members, mixture.num_draws)
        shape = (len(focus.components), 1)
        evaluation = self._evaluate(program, assignment=focus.assignment, shape=shape)
        return drawn(evaluation.runs, evaluation.local, focus)


def _recursive(guide: Callable) -> Any:
    mixture = mixture_of(guide)
    if not hasattr(mixture, "count_step"):
        raise TypeError(
            "RecursiveMixture_ELBO needs a RecursiveMixtureGuide, got "
            f"{type(mixture).__name__}; train other mixtures with Stratified_ELBO"
        )
    return mixture


def _objective(objective: str | Objective) -> Objective:
    if isinstance(objective, Objective):
        return objective
    if objective in OBJECTIVES:
        return OBJECTIVES[objective]
    more = " 'rme' is Clamped(clamp=...), whose constant has no default." * (objective == "rme")
    raise ValueError(
        f"objective and proposal must be one of {sorted(OBJECTIVES)} or an Objective of "
        f"pyro_recursive.bounds.mixture_objectives, got {objective!r}.{more}"
    )


def _only(parameters: Iterable[Tensor], objective: Tensor) -> Tensor:
    """Return a scalar with an objective's gradient in some parameters, and none in others."""
    leaves = [parameter for parameter in parameters if parameter.requires_grad]
    grads = torch.autograd.grad(objective, leaves, allow_unused=True)
    pairs = [(g, leaf) for g, leaf in zip(grads, leaves, strict=True) if g is not None]
    return torch.stack([(g * leaf).sum() for g, leaf in pairs]).sum()
