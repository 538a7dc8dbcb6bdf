"""Mixtures that grow one component at a time."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from pyro import poutine
from torch import Tensor, nn

from pyro_recursive.bounds.mixture_objectives import Gain, Trial, stick_breaking
from pyro_recursive.guides.amortized import AmortizedGuide
from pyro_recursive.guides.base import LatentGuide
from pyro_recursive.guides.call import GuideCall
from pyro_recursive.guides.mixture.guide import MixtureGuide
from pyro_recursive.guides.mixture.schedule import Schedule, Stage
from pyro_recursive.guides.packing import LatentBlock, Values
from pyro_recursive.tracing.handlers import current_assignment

GROWTH = ("first", "propose", "refine")  # the stages in which components are added


class RecursiveMixtureGuide(MixtureGuide):
    """A mixture guide whose components are added one by one: ``Q_m = (1 - e_m) Q_m-1 + e_m q_m``.

    `pyro_recursive.RecursiveMixture_ELBO` trains each new component where the mixture so far does
    not reach, in `pyro.infer.SVI` or `pyro_recursive.fit`, and keeps it if the bound improves. It
    takes `num_steps` training steps, of which `steps_left` remain; under any other loss this is a
    `MixtureGuide` over its `members` that does not grow. All parameters exist from the start.

    Args:
        model: a Pyro model with continuous latents.
        components: `AmortizedGuide` or `FlowGuide` components, one encoder each; or their number,
            for Gaussians with parameters of their own.
        schedule: the steps of each stage, and when a component is kept; a `Schedule`.
        epsilon: the initial weight ``e_m`` of a component.
        conditional: the encoder of the m-th component gets the detached parameters of the earlier
            ones as a second input, ``[*rows, (m - 1) n]``; zeros for those that were dropped.
            Encoders must be `AmortizedGuide`'s of one family.
        weights, learn_weights, trunk, family, plate, inputs, create_plates, name: as in
            `MixtureGuide`; the logits are those of ``e_2 .. e_M``.

    Raises:
        ValueError: fewer than two components; components share parameters other than ``trunk``'s.
        TypeError: a component is neither `AmortizedGuide` nor `FlowGuide`.

    `Recursive Inference for Variational Autoencoders` (Kim & Pavlovic, NeurIPS 2020); `Variational
    Boosting: Iteratively Refining Posterior Approximations` (Miller et al., ICML 2017).

    >>> import pyro, pyro.distributions as dist
    >>> from pyro.infer import SVI
    >>> from pyro_recursive import RecursiveMixture_ELBO
    >>> def model():
    ...     z = pyro.sample("z", dist.Normal(0.0, 3.0))
    ...     pyro.sample("x", dist.Normal(z**2, 1.0), obs=torch.tensor(4.0))
    >>> guide = RecursiveMixtureGuide(model, 2, schedule=Schedule(first=20, propose=10, refine=10))
    >>> svi = SVI(model, guide, pyro.optim.Adam({"lr": 0.05}), RecursiveMixture_ELBO(4))
    >>> losses = [svi.step() for _ in range(guide.num_steps)]
    >>> guide.stage.kind
    'joint'
    """

    def __init__(
        self,
        model: Callable,
        components: int | Sequence[LatentGuide],
        *,
        schedule: Schedule | None = None,
        epsilon: float = 0.1,
        conditional: bool = False,
        **options: Any,
    ) -> None:
        if not 0.001 <= epsilon <= 0.999:
            raise ValueError(f"epsilon must lie in [0.001, 0.999], got {epsilon}.")
        super().__init__(model, components, **options)
        _check(self.components, conditional)
        shared = [options.get("trunk"), self.weights.network]
        _check_apart([*self.components, *filter(None, shared)])
        logit = math.log(epsilon / (1 - epsilon))
        self.weights.start_separately(torch.full((len(self.components) - 1,), logit))
        self.epsilon, self.conditional = epsilon, conditional
        self.schedule = schedule or Schedule()
        self.stages = self.schedule.stages(len(self.components))
        # The index of the stage, the steps taken in it, the failures of its component, and which
        # components are members: a buffer for checkpoints, on the CPU as it is read in each step.
        size = 3 + len(self.components)
        self.progress: Tensor
        self.register_buffer("progress", torch.zeros(size, dtype=torch.long, device="cpu"))
        self.progress[3] = 1
        self.trials: list[Trial] = []  # the acceptance tests since this object was made

    @property
    def num_steps(self) -> int:
        """How many training steps the schedule has, if no component is tried twice."""
        return self.schedule.total(len(self.components))

    @property
    def num_draws(self) -> int:
        """How many draws of each component and row the acceptance test takes."""
        rows = math.prod(frame.size for latents in self.groups for frame in latents.rows)
        return max(32, self.schedule.draws // rows)

    @property
    def stage(self) -> Stage:
        """The stage of training; after the last one, all components together."""
        number = self._state()[0]
        return self.stages[number] if number < len(self.stages) else Stage("joint", None, 0)

    @property
    def steps_taken(self) -> int:
        """The training steps taken in this stage."""
        return self._state()[1]

    @property
    def members(self) -> tuple[int, ...]:
        """The components that make up the mixture; one that is being proposed is not among them."""
        return tuple(m for m, inside in enumerate(self._state()[3:]) if inside)

    @property
    def is_growing(self) -> bool:
        """Whether components may still be added."""
        return self.stage.kind in GROWTH

    @property
    def stage_steps_left(self) -> int:
        """The training steps left in this stage; 0 after the last one."""
        return max(self.stage.steps - self.steps_taken, 0)

    @property
    def steps_left(self) -> int:
        """The training steps left in the schedule, if no component is dropped from here on."""
        number, members = self._state()[0], self.members
        later = self.stages[number + 1 :]
        if not self.is_growing:  # a component that was dropped is not refitted
            later = tuple(s for s in later if s.component is None or s.component in members)
        return self.stage_steps_left + sum(stage.steps for stage in later)

    @property
    def starts_component(self) -> bool:
        """Whether this is the first step for a component other than the first."""
        return self.stage.kind == "propose" and self.steps_taken == 0

    @property
    def is_trial(self) -> bool:
        """Whether the next step is the acceptance test of a component."""
        return self.stage.kind == "refine" and self.stage_steps_left == 1

    def count_step(self) -> None:
        """Count a training step, and go on to the next stage after the last one of this."""
        state = self._state()
        state[1] += 1
        self._write(state)
        if 0 < self.stage.steps <= state[1]:
            self.end_stage()

    def end_stage(self) -> None:
        """Go on to the next stage; a proposed component becomes a member, on trial."""
        stage = self.stage
        state = self._state()
        # The failures are those of the component: a retry proposes it once more.
        self._enter(state, state[0] + 1, state[2] if stage.kind == "propose" else 0)

    def end_trial(self, gain: Gain) -> bool:
        """Keep or drop the component on trial, by what it gains; return whether it is kept."""
        component, schedule = self.stage.component, self.schedule
        assert component is not None
        is_kept = gain.is_clear(schedule.confidence, schedule.min_gain)
        self.trials.append(Trial(component, gain, is_kept))
        if is_kept:
            self.end_stage()
        else:
            self.drop(retry=gain.ceiling > schedule.min_gain)
        return is_kept

    def drop(self, retry: bool) -> None:
        """Drop the component on trial; with ``retry`` propose it again, as patience allows."""
        stage, state = self.stage, self._state()
        assert stage.component is not None
        state[3 + stage.component] = 0
        failures = state[2] + 1
        self.weights.reset(stage.component - 1)
        if retry and failures <= self.schedule.patience:
            self._renew(stage.component)
            first = next(i for i, s in enumerate(self.stages) if s.component == stage.component)
            self._enter(state, first, failures)
            return
        grown = [i for i, s in enumerate(self.stages) if s.kind in GROWTH]
        self._enter(state, grown[-1] + 1)

    def forward(self, *args: Any, **kwargs: Any) -> Values:
        """Sample the model's latent sites; return their values."""
        found = super().forward(*args, **kwargs)
        # Register every parameter with Pyro in every call, for runs that are resumed.
        for m in set(range(len(self.components))) - set(self.members):
            for name, _ in self.components[m].named_parameters():
                getattr(self.components[m], name.split(".")[0].removesuffix("_unconstrained"))
        return found

    def extra_repr(self) -> str:
        """Return the state of the schedule."""
        stage, (_, taken, failures, *_) = self.stage, self._state()
        return (
            f"members={self.members} of {len(self.components)}, stage='{stage.kind}', "
            f"steps_left={self.steps_left}, component={stage.component}, steps_taken={taken}, "
            f"failures={failures}"
        )

    def log_weights(self, latents: LatentBlock, call: GuideCall, members: Sequence[int]) -> Tensor:
        """Return the logarithms of the members' weights in a group, ``[*batch, J]``.

        A component that is only proposed has the weight epsilon beside them.
        """
        proposed = [m for m in members if m not in self.members]
        inside = [m for m in members if m in self.members]
        assignment = current_assignment()
        frozen = assignment.frozen if assignment is not None else frozenset()
        moving = {m - 1 for column, m in enumerate(inside) if column not in frozen}
        held = set(range(len(self.components) - 1)) - moving
        logits = self.weights.logits(latents, call, held)
        if len(inside) < len(self.components):
            logits = logits[..., [m - 1 for m in inside[1:]]]
        log_weights = stick_breaking(logits)
        if not proposed:
            return log_weights
        share = torch.full_like(log_weights[..., :1], math.log(self.epsilon))
        return torch.cat([log_weights.detach() + math.log1p(-self.epsilon), share], -1)

    def parameters_of(
        self, latents: LatentBlock, call: GuideCall, members: Sequence[int], frozen: frozenset[int]
    ) -> Tensor:
        """Return the parameters of Gaussian members, ``[J, *batch, num_parameters]``."""
        if not self.conditional:
            return super().parameters_of(latents, call, members, frozen)
        known: dict[int, Tensor] = {}
        rows = call.sizes(latents)
        for column, m in enumerate(members):
            with torch.set_grad_enabled(torch.is_grad_enabled() and column not in frozen):
                extra = _so_far(known, m, rows)
                known[m] = self.component(m).variational_params(latents, call, *extra)
        return torch.stack(torch.broadcast_tensors(*known.values()))

    def set_log_weights(self, log_weights: Tensor) -> None:
        """Set the members' weights, ``[J]``, where all rows share them."""
        share = log_weights - log_weights.logcumsumexp(-1)
        logits = share[1:] - torch.log(-torch.expm1(share[1:]))
        self.weights.set_vector([m - 1 for m in self.members[1:]], logits)

    def check_shared_weights(self) -> None:
        """Raise ValueError where rows have weights of their own."""
        self.weights.check_vector()

    def free_component(self) -> "FreeGaussian | None":
        """Return the component in training, if it is a Gaussian with parameters of its own.

        None where there are two groups of latents.
        """
        component = self.component(self.stage.component or 0)
        if not isinstance(component, AmortizedGuide) or component.by_row or len(self.groups) > 1:
            return None
        (latents,) = self.groups
        return FreeGaussian(component, self.component(0), latents, latents.rows, latents.size)

    def _renew(self, m: int) -> None:
        """Give the encoder of a component new initial weights."""
        for module in self.components[m].modules():
            reset = getattr(module, "reset_parameters", None)
            if callable(reset):
                reset()

    def _enter(self, state: list[int], number: int, failures: int = 0) -> None:
        """Enter a stage, or the next one whose component is a member or may become one."""
        while number < len(self.stages):
            stage = self.stages[number]
            if stage.kind != "cycle" or state[3 + (stage.component or 0)]:
                break
            number += 1
        state[:3] = [number, 0, failures]
        if number < len(self.stages) and self.stages[number].kind == "refine":
            state[3 + (self.stages[number].component or 0)] = 1  # on trial
        self._write(state)

    def _state(self) -> list[int]:
        return self.progress.tolist()

    def _write(self, state: list[int]) -> None:
        self.progress.copy_(torch.tensor(state))

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        """Move everything but the progress to another device."""
        progress = self.progress
        super()._apply(fn, recurse)
        self.progress = progress
        return self


@dataclass(frozen=True)
class FreeGaussian:
    """A `tracing.protocols.FreeComponent`."""

    component: AmortizedGuide
    first: AmortizedGuide
    latents: LatentBlock
    rows: tuple[Any, ...]
    size: int

    def pack(self, trace: poutine.Trace) -> Tensor:
        """Return the latents of a trace, ``[particles, *rows, D]``."""
        values = {slot.name: trace.nodes[slot.name]["value"] for slot in self.latents.slots}
        sizes = (frame.size for frame in self.rows)
        return self.latents.pack(values).reshape(-1, *sizes, self.size)

    def place(self, loc: Tensor, scale: Tensor) -> None:
        """Set locations and scales, ``[*rows, D]`` both."""
        self.component.restart(self.latents, loc, scale)

    def scatter(self, widening: float) -> None:
        """Draw locations around the first component's, some of its scales away."""
        self.component.scatter(self.latents, self.first, widening)


def _check(components: Sequence[nn.Module], conditional: bool) -> None:
    if len(components) < 2:
        raise ValueError(f"A recursive mixture needs at least 2 components, got {len(components)}.")
    for component in components:
        if not isinstance(component, LatentGuide):
            raise TypeError(
                "Components of a recursive mixture must be AmortizedGuide or FlowGuide, got "
                f"{type(component).__name__}: use a MixtureGuide for other guides."
            )
    if conditional and not all(isinstance(c, AmortizedGuide) and c.by_row for c in components):
        raise ValueError("conditional=True needs AmortizedGuide components with encoders.")


def _check_apart(parts: Sequence[nn.Module]) -> None:
    """Raise where parts share a parameter: training one would change the others."""
    seen: set[nn.Parameter] = set()
    for part in parts:
        own = dict(part.named_parameters())
        for name, parameter in own.items():
            if parameter in seen:
                raise ValueError(
                    f"Two parts of a recursive mixture share parameter '{name}'. Give each encoder "
                    "networks of its own, or put what all share into trunk=."
                )
        seen.update(own.values())


def _so_far(known: dict[int, Tensor], m: int, rows: tuple[int, ...]) -> tuple[Tensor, ...]:
    """Return a conditional component's second input: the parameters of all earlier ones."""
    if m == 0:
        return ()
    zeros = torch.zeros_like(known[0])
    earlier = torch.cat([known.get(j, zeros).detach() for j in range(m)], -1)
    return (earlier.reshape(*rows, -1),)
