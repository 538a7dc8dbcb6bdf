"""The compiled steps of one program: which calls share one, when one is made, and when given up."""

import math
import os
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from pyro_recursive.tracing.graphs.artifacts import ArtifactFolder
from pyro_recursive.tracing.graphs.calls import Call
from pyro_recursive.tracing.graphs.compiler import (
    CompilePolicy,
    NotWorthCompiling,
    compile_policy,
    is_any_known,
)
from pyro_recursive.tracing.graphs.unsupported import Unsupported
from pyro_recursive.tracing.user_warnings import warn_user
from pyro_recursive.training.compiled.compiled_step import CompiledStep
from pyro_recursive.training.compiled.engines import EngineName, tolerances
from pyro_recursive.training.compiled.flat import (
    FlatGroup,
    NoOptimiser,
    Owners,
    flat_groups,
)
from pyro_recursive.training.compiled.losses import TracedLoss

# On one core of an AMD EPYC, models of 280 to 3,700 operations: seconds to compile a graph, and for
# each of its operations; seconds of an eager step for each. On a slower core, all are longer.
SECONDS, SECONDS_EACH, EAGER_EACH = 4.0, 8e-3, 7e-6
TRACING = 200  # eager steps that take as long as tracing a graph, to see whether it is known
FEWEST = math.ceil(SECONDS_EACH / EAGER_EACH)  # steps that a graph of any size needs
MAX_GRAPHS = 8  # of calls of one form, before these run eagerly
MAX_KEPT = 4  # of these
MAX_FORMS = 64
MAX_ATTEMPTS = 8  # to compare a compiled step with an eager one


def steps_to_earn(operations: int) -> int:
    """Return how many eager steps take as long as compiling a graph, whose steps take no time."""
    each = max(operations, 1)
    return math.ceil((SECONDS + SECONDS_EACH * each) / (EAGER_EACH * each))


class Training(NamedTuple):
    """What is trained: the loss with its graph, and a whole eager step.

    ``eager`` takes a step on a call and returns its loss, a scalar in nats; ``owners`` finds
    optimisers of parameters; ``others`` returns parameters that it has beside those of the loss,
    and may change for their gradient of zero; ``clip_norm`` is the largest norm of all gradients
    together. With ``is_guarded`` steps change nothing after a loss or gradient that is not finite;
    with ``is_summed`` they add up the values of the parameters.
    """

    loss: TracedLoss
    eager: Callable[[Call], Tensor]
    owners: Owners
    others: Callable[[], list[Tensor]] = list
    clip_norm: float | None = None
    is_guarded: bool = False
    is_summed: bool = False


class CompiledSteps:
    """The compiled steps of a training, by the form of the call."""

    def __init__(
        self,
        training: Training,
        engine: EngineName,
        strict: bool,
        cache: str | os.PathLike | None = None,
        shows_progress: bool = True,
    ) -> None:
        self.training, self.engine, self.strict = training, engine, strict
        self.shows_progress = shows_progress
        self.folder = None if cache is None else ArtifactFolder(cache)
        self._eager_steps: dict[Any, int] = {}  # of calls of a form, since a graph was made
        self._needed: dict[Any, int] = {}  # how many steps earn back the next one
        self._steps: dict[Any, list[CompiledStep]] = {}  # of calls of a form, the last one first
        self._eager_forms: set[Any] = set()
        self._is_full = False  # calls of more than MAX_FORMS forms were seen
        self._attempts: dict[Any, int] = {}  # to compare steps of calls of a form
        self._graphs: dict[Any, int] = {}  # how many were made of calls of a form
        self._groups: dict[tuple[int, ...], list[FlatGroup]] = {}

    def find(self, call: Call, coming: int = 1) -> CompiledStep | Tensor:
        """Return the compiled step of a call, prepared, or the loss of an eager step taken.

        ``coming`` is how many such calls are known to come, this one among them.
        """
        stage, left = self.training.loss.stage()
        key = call.key, stage
        if left == 0 or self.engine == "eager" or key in self._eager_forms:
            return self.training.eager(call)
        if key not in self._graphs:  # the first step creates parameters and optimisers
            self._add_form(key)
            return self.training.eager(call)
        outdated = None
        for step in self._steps.setdefault(key, []):
            try:
                outdated = step.outdated(call)
                if outdated is None:
                    step.prepare(call)
            except NoOptimiser:
                return self.training.eager(call)
            except Unsupported as error:
                outdated = str(error)
            if outdated is None:
                if any(group.has_gradients for group in step.groups):
                    return self.training.eager(call)
                if not step.is_compared:
                    return self._compared(key, step, call)
                step.left = left
                return step
        if outdated is not None and self._graphs[key] >= MAX_GRAPHS:
            text = f"{MAX_GRAPHS} graphs were made, and a new one is needed because of: {outdated}"
            self._give_up(key, Unsupported(text))
            return self.training.eager(call)
        policy = self._policy(key, min(coming, left))
        if policy is None:
            return self._wait(key, call)
        try:
            with compile_policy(policy):
                step = CompiledStep(self.training, call, self._flat, self.engine)
            step.prepare(call)
        except NotWorthCompiling as error:
            self._needed[key] = steps_to_earn(error.operations)
            return self._wait(key, call)
        except NoOptimiser:
            return self.training.eager(call)
        except Unsupported as error:
            self._give_up(key, error)
            return self.training.eager(call)
        self._graphs[key] += 1
        self._steps[key] = [step, *self._steps[key]][:MAX_KEPT]
        for counts in (self._eager_steps, self._needed):
            counts.pop(key, None)
        if any(group.has_gradients for group in step.groups):
            return self.training.eager(call)
        return self._compared(key, step, call)

    def _add_form(self, key: Any) -> None:
        """Note calls of a new form; of too many, the first one that was seen once is forgotten."""
        if len(self._graphs) >= MAX_FORMS:
            if not self._is_full:
                text = f"arguments have had {MAX_FORMS} forms or values; pass numbers that change"
                self._tell(Unsupported(f"{text} as tensors, or use KLWarmup"))
            self._is_full = True
            once = (k for k, n in self._graphs.items() if n == 0 and k not in self._eager_steps)
            if (first := next(once, None)) is None:
                return
            del self._graphs[first]
        self._graphs[key] = 0

    def _policy(self, key: Any, coming: int) -> CompilePolicy | None:
        """Return the compile policy, or None if too few steps are expected."""
        if self.engine != "auto" or self.strict:
            return CompilePolicy(self.folder, shows=self.shows_progress)
        steps = self._eager_steps.get(key, 0) + coming
        fewest = 0 if self.folder is not None else TRACING if is_any_known() else FEWEST
        if steps < self._needed.get(key, fewest):
            return None
        return CompilePolicy(
            self.folder, lambda operations: steps >= steps_to_earn(operations), self.shows_progress
        )

    def _wait(self, key: Any, call: Call) -> Tensor:
        """Take an eager step, as too few are known to come to compile."""
        self._eager_steps[key] = self._eager_steps.get(key, 0) + 1
        return self.training.eager(call)

    def _compared(self, key: Any, step: CompiledStep, call: Call) -> Tensor:
        """Take an eager step and return its loss; give up a compiled step that differs.

        Where both losses are infinite, as by design of some losses, their updates are compared.
        """
        changed = set(map(id, step.step.changed))
        constants = [each for each in step.step.gradients.constants if id(each) in changed]
        start = [group.values.clone() for group in step.groups]
        with step.undone():
            loss = step.take().item()
            ends = [group.values.clone() for group in step.groups]
            moved = [each.detach().clone() for each in constants]  # buffers
        result = self.training.eager(call)
        expected = result.item()
        tight, loose = tolerances(step.step)
        pairs = list(zip(step.groups, start, strict=True))  # a logit may be -inf from the start
        is_finite = all(bool((g.values.isfinite() | ~b.isfinite()).all()) for g, b in pairs)
        has_moved = any(not torch.equal(g.values, before) for g, before in pairs)
        is_infinite = loss == expected and has_moved and not self.training.is_guarded
        if not (is_finite and (is_infinite or math.isfinite(expected))):
            self._attempts[key] = self._attempts.get(key, 0) + 1
            if self._attempts[key] >= MAX_ATTEMPTS:
                text = f"the loss {expected:.7g} or its update is not finite"
                self._give_up(key, Unsupported(f"no step could be compared, as {text}"))
            return result  # the next step is compared
        self._attempts.pop(key, None)
        step.is_compared = True
        is_same = loss == expected or abs(loss - expected) <= tight * (1 + abs(expected))
        for group, before, after in zip(step.groups, start, ends, strict=True):
            finite = group.values.isfinite()
            is_same &= torch.equal(after.isfinite(), finite)
            error, change = (
                torch.where(finite, each, 0.0).norm()
                for each in (after - group.values, group.values - before)
            )
            is_same &= bool(error <= loose * change + tight**2)
        for found, own in zip(moved, constants, strict=True):
            is_same &= torch.allclose(found, own.to(found), rtol=tight, atol=tight, equal_nan=True)
        if not is_same:
            text = f"a compiled step differs from an eager one (losses {loss:.7g}, {expected:.7g})"
            self._give_up(key, Unsupported(text))
        return result

    def _flat(self, parameters: list[Tensor]) -> list[FlatGroup]:
        key = tuple(map(id, parameters))
        try:
            for group in self._groups.get(key, ()):
                group.refresh()
        except NoOptimiser:
            raise
        except Unsupported:  # options of the optimiser are others now
            del self._groups[key]
        if key not in self._groups:
            self._groups[key] = flat_groups(
                parameters, self.training.owners, self.training.is_summed
            )
        return self._groups[key]

    def _give_up(self, key: Any, error: Unsupported) -> None:
        self._tell(error)
        self._steps.pop(key, None)
        self._eager_forms.add(key)

    def _tell(self, error: Unsupported) -> None:
        """Warn why steps run eagerly, or raise that."""
        if self.strict:
            raise error
        warn_user(f"Training steps run eagerly: {error}.")
