"""Mixtures that grow one component at a time."""

import logging
import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from pyro_recursive.bounds.mixture_objectives import Gain, Trial, stick_breaking
from pyro_recursive.guides.amortized import AmortizedGuide
from pyro_recursive.guides.base import LatentGuide
from pyro_recursive.guides.call import GuideCall
from pyro_recursive.guides.mixture.components import FreeGaussian
from pyro_recursive.guides.mixture.guide import AT_RANDOM, MixtureGuide
from pyro_recursive.guides.mixture.paths import (
    gaussians_from_paths,
    is_complete,
    learned_params,
    obstacle,
)
from pyro_recursive.guides.mixture.schedule import Schedule, Stage
from pyro_recursive.guides.packing import LatentBlock, Values
from pyro_recursive.guides.pathfinder.mixture import PathReport
from pyro_recursive.guides.starts import StartSearch, component_steps
from pyro_recursive.tracing.arguments import check_at_least
from pyro_recursive.tracing.handlers import current_assignment
from pyro_recursive.tracing.isolation import isolated, outside_of_graphs
from pyro_recursive.tracing.user_warnings import warn_user

GROWTH = ("first", "propose", "refine")  # the stages in which components are added
DEAD = 1e-3  # a member with a smaller weight has no part in a row
ROWS = 5000  # one after another in which a member has no part before it is dropped

logger = logging.getLogger(__name__)


class RecursiveMixtureGuide(MixtureGuide):
    """A mixture guide whose components are added one by one: ``Q_m = (1 - e_m) Q_m-1 + e_m q_m``.

    `pyro_recursive.RecursiveMixture_ELBO` trains each new component where the mixture so far does
    not reach, and keeps it if the bound improves. It takes `num_steps` training steps, less where
    components come from paths as in `pathfinder`; under any other loss this is a `MixtureGuide`
    over its `members` that does not grow.

    Args:
        model: a Pyro model with continuous latents.
        components: `AmortizedGuide` or `FlowGuide` components, or their number, as in
            `MixtureGuide`. They share no parameters but ``trunk``'s.
        schedule: the steps of each stage, and when a component is kept; a `Schedule`.
        epsilon: the initial weight ``e_m`` of a component.
        conditional: the encoder of the m-th component gets the detached parameters of the earlier
            ones as a second input, ``[*rows, (m - 1) n]``; zeros for those that were dropped.
            Encoders must be `AmortizedGuide`'s of one family.
        paths: of an optimiser; their Gaussians are the first members where the model has no
            parameters, components are free Gaussians of global latents, and no start is given. By
            default at least 8, enough for as many modes as components; 0: growth from noise.
        weights, learn_weights, trunk, family, plate, inputs, create_plates, name: as in
            `MixtureGuide`; the logits are those of ``e_2 .. e_M``.
        init_loc_fn, init_scale, whiten: as in `MixtureGuide`; the first component starts as that
            Gaussian, and others are searched for in its coordinates.

    `Recursive Inference for Variational Autoencoders` (Kim & Pavlovic, NeurIPS 2020).

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
        paths: int | None = None,
        **options: Any,
    ) -> None:
        check_at_least(0, paths=paths)
        if not 0.001 <= epsilon <= 0.999:
            raise ValueError(f"epsilon must lie in [0.001, 0.999], got {epsilon}.")
        super().__init__(model, components, **options)
        count = len(self.components)
        _check(self.components, conditional)
        _check_apart([*self.components, options.get("trunk"), self.weights.network])
        logit = math.log(epsilon / (1 - epsilon))
        self.weights.start_separately(torch.full((count - 1,), logit))
        self.epsilon, self.conditional, self.paths = epsilon, conditional, paths
        self.schedule = schedule or Schedule()
        self.stages = self.schedule.stages(count)
        # The index of the stage, the steps taken in it, the failures of its component, and for each
        # component 0, or for members 1 and a number: while growth goes on that of the paths which
        # have found it, later that of the rows that were last seen without it. A buffer for
        # checkpoints, on the CPU as it is read in each step.
        self.progress: Tensor
        self.register_buffer("progress", torch.zeros(3 + count, dtype=torch.long, device="cpu"))
        self.progress[3] = 1
        self.trials: list[Trial] = []  # the acceptance tests since this object was made
        self.report: PathReport | None = None  # of the paths that this object started from
        self.dead: tuple[int, ...] = ()  # members without weight, when `watch` last looked
        self._reported: set[int] = set()

    def _read(self) -> list[int]:
        with outside_of_graphs():
            return self.progress.tolist()

    @property
    def num_steps(self) -> int:
        """How many training steps the schedule has, if each component is proposed once.

        Components from paths are not proposed: `steps_left` tells.
        """
        return sum(stage.steps for stage in self.stages)

    def num_draws(self, args: tuple, kwargs: dict[str, Any]) -> int:
        """Return how many draws of each component and row the acceptance test of a call takes."""
        with isolated():
            self.get_ready(args, kwargs)
            call = self.new_call(args, kwargs)
        rows = math.prod(size for latents in self.groups for size in call.sizes(latents))
        return max(32, self.schedule.draws // rows)

    @property
    def stage(self) -> Stage:
        """The stage of training; after the last one, all components together."""
        number, _, _, *inside = self._read()
        stage = self.stages[number] if number < len(self.stages) else Stage("joint", None, 0)
        is_shared = stage.kind == "first" and sum(map(bool, inside)) > 1
        return stage._replace(component=None) if is_shared else stage

    @property
    def steps_taken(self) -> int:
        """The training steps taken in this stage."""
        return self._read()[1]

    @property
    def members(self) -> tuple[int, ...]:
        """The components that make up the mixture; one that is being proposed is not among them."""
        return tuple(m for m, inside in enumerate(self._read()[3:]) if inside)

    @property
    def left_out(self) -> tuple[int, ...]:
        """The components that are no members; none while growth goes on."""
        outside = set(range(len(self.components))) - set(self.members)
        return () if self.is_growing else tuple(sorted(outside))

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
        """The training steps left in the schedule, if no component is dropped from here on.

        They are counted by `RecursiveMixture_ELBO` alone: no other loss grows the mixture.
        """
        members, later = self.members, self.stages[int(self.progress[0]) + 1 :]
        if not self.is_growing:  # a component that was dropped is not refitted
            later = tuple(stage for stage in later if stage.component in (None, *members))
        found = [stage for stage in later if stage.kind in GROWTH and stage.component in members]
        return self.stage_steps_left + sum(stage.steps for stage in later if stage not in found)

    @property
    def starts_component(self) -> bool:
        """Whether this is the first step for a component other than the first."""
        return self.stage.kind == "propose" and self.steps_taken == 0

    @property
    def is_trial(self) -> bool:
        """Whether the next step is the acceptance test of a component."""
        return self.stage.kind == "refine" and self.stage_steps_left == 1

    @property
    def starts_from_paths(self) -> bool:
        """Whether the next step is the first of all, and may start components from paths."""
        number, taken, *_ = self._read()
        is_first = number == 0 and taken == 0 and self.paths != 0
        return is_first and (self.paths is not None or not obstacle(self))

    def start_from_paths(self, args: tuple, kwargs: dict[str, Any]) -> None:
        """Start components from paths, as members; growth ends if they leave nothing to gain.

        Raises:
            ValueError: ``paths`` are given, and components cannot start from paths.
        """
        found = gaussians_from_paths(self, self.paths, args, kwargs)
        if found is None:
            return
        self.report = found.report
        gaussians, counts = found.gaussians, found.report.num_paths
        each = zip(gaussians.loc, gaussians.scale_tril, counts, strict=True)
        for m, (loc, scale_tril, count) in enumerate(each):
            self.component(m).set_gaussian(self.groups[0], loc, scale_tril)
            self.progress[3 + m] = 1 + count
        self.set_log_weights(found.log_weights)
        self.is_computed = True
        self.end_if_complete(found.log_ratios)

    def end_if_complete(self, log_ratios: Tensor) -> None:
        """End growth if ``log p - log q`` of draws, ``[S]``, say that nothing is left to gain.

        Only where paths have found the members, as draws do not tell of modes without members.
        """
        num_paths = [number - 1 for number in self._read()[3:] if number > 1]
        if num_paths and is_complete(log_ratios, num_paths, self.schedule.min_gain):
            self._end_growth()

    def _end_growth(self) -> None:
        self._enter(sum(stage.kind in GROWTH for stage in self.stages))

    def count_step(self, count: int = 1) -> None:
        """Count training steps, and go on to the next stage after the last one of this."""
        self.progress[1] += count
        if 0 < self.stage.steps <= self.steps_taken:
            self.end_stage()

    def end_stage(self) -> None:
        """Go on to the next stage; a proposed component becomes a member, on trial."""
        # The failures are those of the component: a retry proposes it once more.
        failures = int(self.progress[2]) if self.stage.kind == "propose" else 0
        self._enter(int(self.progress[0]) + 1, failures)

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
        component, failures = self.stage.component, int(self.progress[2]) + 1
        assert component is not None
        self.progress[3 + component] = 0
        self.weights.reset(component - 1)
        if retry and failures <= self.schedule.patience:
            for module in self.components[component].modules():  # an encoder gets new weights
                reset = getattr(module, "reset_parameters", None)
                if callable(reset):
                    reset()
            first = next(i for i, s in enumerate(self.stages) if s.component == component)
            self._enter(first, failures)
        else:
            self._end_growth()

    def _enter(self, number: int, failures: int = 0) -> None:
        """Enter a stage, or the next one whose component is a member or may become one."""
        was_growing = self.is_growing
        while number < len(self.stages):
            kind, component, _ = self.stages[number]
            is_over = kind in ("propose", "refine") and component in self.members
            if not is_over and (kind != "cycle" or component in self.members):
                break
            number += 1
        self.progress[:3] = torch.tensor([number, 0, failures])
        if was_growing and not self.is_growing:
            self.progress[3:].clamp_(max=1)
        if self.stage.kind == "refine":
            self.progress[3 + (self.stage.component or 0)] = 1  # on trial

    def watch(self, *args: Any, **kwargs: Any) -> None:
        """Warn once of each component without a part; drop members that have lost theirs.

        Waits for the device. `RecursiveMixture_ELBO` calls it when growth has ended and then every
        100 steps. In joint stages of a model with parameters, members with a weight below 0.001 in
        each of 5,000 rows, those of one call after another, are dropped; where there are no rows,
        after 5 calls. On a fixed model a member may be a mode of little mass.
        Encoders of ``conditional=True`` read each other, and stay, as do members under
        ``learn_weights=False``.
        """
        rows = self._report(args, kwargs)
        if self.stage.kind != "joint" or self.conditional or not self.weights.learn:
            return
        for m in self.members:
            self.progress[3 + m] = self.progress[3 + m] + rows if m in self.dead else 1
        lost = [m for m in self.dead if self.progress[3 + m] > ROWS]
        if lost and not learned_params(self, args, kwargs):
            self.progress[[3 + m for m in lost]] = 1  # the model is run again after as many rows
            return
        for m in lost:
            self.progress[3 + m] = 0
            logger.info("Component %s has lost its weight, and is dropped.", m)
        self.dead = tuple(m for m in self.dead if m not in lost)

    def _report(self, args: tuple, kwargs: dict[str, Any]) -> int:
        """Warn once of each component without a part; return in how many rows."""
        with isolated(), torch.no_grad():
            weights = self.component_weights(*args, **kwargs)
        weights = weights.reshape(-1, weights.shape[-1])
        rows = len(weights) if len(weights) > 1 else ROWS // 5
        pairs = zip(self.members, weights.amax(0).tolist(), strict=True)
        self.dead = tuple(m for m, weight in pairs if weight < DEAD)
        new = set(self.left_out) | set(self.dead)
        if new <= self._reported:
            return rows
        self._reported |= new
        found = {"dropped": self.left_out, f"weight below {DEAD:g}": self.dead}
        lost = "; ".join(f"{name}: {list(these)}" for name, these in found.items() if these)
        warn_user(
            f"{self.name}: of {len(self.components)} components {len(new)} have no part in the "
            f"mixture ({lost}). See guide.trials."
        )
        return rows

    def get_ready(self, args: tuple, kwargs: dict[str, Any]) -> None:
        """Prepare the guide; look for components without a part in a state that was loaded."""
        was_loaded = self.is_loaded
        super().get_ready(args, kwargs)
        if was_loaded and not self.is_growing:
            self._report(args, kwargs)

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
        stage, lost = self.stage, {"dropped": self.left_out, "dead": self.dead}
        parts = "".join(f"{name}={these}, " for name, these in lost.items() if these)
        return (
            f"members={self.members} of {len(self.components)}, {parts}stage='{stage.kind}', "
            f"steps_left={self.steps_left}, component={stage.component}, "
            f"steps_taken={self.steps_taken}, failures={int(self.progress[2])}"
        )

    def log_weights(self, latents: LatentBlock, call: GuideCall, members: Sequence[int]) -> Tensor:
        """Return the logarithms of the members' weights in a group, ``[*batch, J]``.

        A component that is only proposed has the weight epsilon beside them.
        """
        inside = [m for m in members if m in self.members]
        frozen = (current_assignment() or AT_RANDOM).frozen
        moving = {m - 1 for column, m in enumerate(inside) if column not in frozen}
        held = set(range(len(self.components) - 1)) - moving
        logits = self.weights.logits(latents, call, held)
        if len(inside) < len(self.components):
            logits = logits[..., [m - 1 for m in inside[1:]]]
        log_weights = stick_breaking(logits)
        if len(inside) == len(members):
            return log_weights
        share = torch.full_like(log_weights[..., :1], math.log(self.epsilon))
        return torch.cat([log_weights.detach() + math.log1p(-self.epsilon), share], -1)

    def free_log_weights(self, latents: LatentBlock) -> Tensor:
        """Return the logarithms of the members' weights in all rows, ``[*rows, J]``."""
        logits = self.weights.all_rows(latents)
        return stick_breaking(logits[..., [m - 1 for m in self.members[1:]]])

    def component_steps(self, start: Tensor) -> Tensor:
        """Return the distances from a common start, none for the first: it is trained alone."""
        return torch.cat(
            [torch.zeros_like(start)[None], component_steps(len(self.components) - 1, start)]
        )

    def center_outputs(self, search: StartSearch, guide: LatentGuide) -> None:
        """Move the encoders of all components, if they take nothing but the inputs."""
        if not self.conditional:
            super().center_outputs(search, guide)

    def earlier_params(self, m: int, known: dict[int, Tensor], rows: Sequence[int]) -> list[Tensor]:
        """Return a conditional component's second input: the parameters of all earlier ones."""
        if not self.conditional or m == 0:
            return []
        zeros = torch.zeros_like(known[0])
        earlier = torch.cat([known.get(j, zeros).detach() for j in range(m)], -1)
        return [earlier.reshape(*rows, -1)]

    def set_log_weights(self, log_weights: Tensor) -> None:
        """Set the members' weights, ``[J]``, where all rows share them."""
        log_weights = log_weights.clamp(min=-1e30)  # weights of 0 have a share, too
        share = (log_weights - log_weights.logcumsumexp(-1)).clamp(max=0.0)
        logits = share[1:] - torch.log(-torch.expm1(share[1:]))
        self.weights.set_vector([m - 1 for m in self.members[1:]], logits)

    def check_shared_weights(self) -> None:
        """Raise ValueError where rows have weights of their own."""
        self.weights.vector()

    def free_component(self) -> FreeGaussian | None:
        """Return the component in training, if it is a Gaussian with parameters of its own.

        None where there are two groups of latents.
        """
        component = self.component(self.stage.component or 0)
        if not isinstance(component, AmortizedGuide) or component.by_row or len(self.groups) > 1:
            return None
        (latents,) = self.groups
        by_weights = self.paths != 0 and not latents.rows
        parts = component, self.component(0), latents
        return FreeGaussian(*parts, latents.rows, latents.size, by_weights)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        """Move everything but the progress to another device."""
        progress = self.progress
        super()._apply(fn, recurse)
        self.progress = progress
        return self


def _check(components: Sequence[nn.Module], conditional: bool) -> None:
    if len(components) < 2:
        raise ValueError("A recursive mixture needs at least 2 components.")
    for component in components:
        if not isinstance(component, LatentGuide):
            raise TypeError(
                "Components of a recursive mixture must be AmortizedGuide or FlowGuide, got "
                f"{type(component).__name__}."
            )
        if conditional and not (isinstance(component, AmortizedGuide) and component.by_row):
            raise ValueError("conditional=True needs AmortizedGuide components with encoders.")


def _check_apart(parts: Sequence[Any]) -> None:
    """Raise where parts share a parameter: training one would change the others."""
    seen: set[nn.Parameter] = set()
    for part in parts:
        own = dict(part.named_parameters()) if isinstance(part, nn.Module) else {}
        for name, parameter in own.items():
            if parameter in seen:
                raise ValueError(
                    f"Two components share parameter '{name}'. Put what all share into trunk=."
                )
        seen.update(own.values())
