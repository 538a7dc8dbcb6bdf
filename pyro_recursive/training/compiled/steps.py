"""The compiled steps of one program: which calls share one, when one is made, and when given up."""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from pyro_recursive.tracing.user_warnings import warn_user
from pyro_recursive.training.compiled.compiled_step import Call, CompiledStep
from pyro_recursive.training.compiled.engines import EngineName
from pyro_recursive.training.compiled.flat import FlatGroup, OwnerOf, Unsupported, flat_groups

MAX_GRAPHS = 8  # of calls of one form, before these run eagerly
# Of the loss, and of the norm of an update: Adam turns rounding errors into whole steps.
TOLERANCES = {torch.float64: (1e-9, 1e-6), torch.float32: (1e-4, 5e-2)}


class Training(NamedTuple):
    """What is trained: the loss with its graph, a whole eager step, and all that they read.

    ``eager`` takes a step on a call and returns its loss, a scalar in nats; ``owner`` finds the
    optimiser of a parameter; ``clip_norm`` is the largest norm of all gradients together. With
    ``is_guarded`` steps change nothing after a loss or gradient that is not finite.
    """

    differentiable: Callable[..., Tensor]
    eager: Callable[[Call], Tensor]
    owner: OwnerOf
    roots: dict[str, Any]
    clip_norm: float | None = None
    is_guarded: bool = False


class CompiledSteps:
    """The compiled steps of a training, by the form of the call."""

    def __init__(self, training: Training, engine: EngineName, strict: bool) -> None:
        self.training, self.engine, self.strict = training, engine, strict
        self._steps: dict[Any, CompiledStep | None] = {}
        self._graphs: dict[Any, int] = {}  # how many were made of calls of a form
        self._groups: dict[tuple[int, ...], list[FlatGroup]] = {}

    def find(self, call: Call) -> CompiledStep | Tensor:
        """Return the compiled step of a call, or the loss of an eager step that was taken."""
        key = call.key
        if key not in self._graphs:  # the first step creates parameters and optimisers
            self._graphs[key] = 0
            return self._eager(call)
        step = self._steps.get(key)
        changed = None if step is None else step.state.changed()
        if step is not None and changed is None:
            return step
        if self.engine == "eager" or (step is None and key in self._steps):
            return self._eager(call)
        if changed is not None and self._graphs[key] >= MAX_GRAPHS:
            self._give_up(key, Unsupported(f"{changed} has changed {MAX_GRAPHS} times"))
            return self._eager(call)
        self._graphs[key] += 1
        try:
            step = CompiledStep(self.training, call, self._flat, self.engine)
        except Unsupported as error:
            self._give_up(key, error)
            return self._eager(call)
        self._steps[key] = step
        return self._compared(key, step, call)

    def _compared(self, key: Any, step: CompiledStep, call: Call) -> Tensor:
        """Take an eager step and return its loss; give up a compiled step that differs."""
        step.prepare(call)
        start = [group.values.clone() for group in step.groups]
        with step.undone():
            loss = step.take().item()
            ends = [group.values.clone() for group in step.groups]
        result = self._eager(call)
        expected = result.item()
        tight, loose = TOLERANCES.get(start[0].dtype, (1e-3, 1e-1))
        is_same = abs(loss - expected) <= tight * (1 + abs(expected))
        for group, before, after in zip(step.groups, start, ends, strict=True):
            error = (after - group.values).norm()
            is_same &= bool(error <= loose * (group.values - before).norm() + tight**2)
        if not is_same:
            text = f"a compiled step differs from an eager one (losses {loss:.7g}, {expected:.7g})"
            self._give_up(key, Unsupported(text))
        return result

    def _flat(self, parameters: list[Tensor]) -> list[FlatGroup]:
        key = tuple(map(id, parameters))
        if key not in self._groups:
            self._groups[key] = flat_groups(parameters, self.training.owner)
        return self._groups[key]

    def _give_up(self, key: Any, error: Unsupported) -> None:
        if self.strict:
            raise error
        self._steps[key] = None
        warn_user(f"Training steps run eagerly: {error}.")

    def _eager(self, call: Call) -> Tensor:
        groups = [group for each in self._groups.values() for group in each]
        for group in groups:
            group.write_counts()
        loss = self.training.eager(call)
        for group in groups:
            group.read_counts()
        return loss
