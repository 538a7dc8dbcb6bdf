"""`CompiledSVI`: the steps of `pyro.infer.SVI` as one compiled graph each."""

from collections.abc import Callable
from typing import Any

import pyro
import torch
from pyro import poutine
from pyro.infer import ELBO, RenyiELBO, Trace_ELBO
from pyro.optim import PyroOptim
from torch import Tensor
from torch.optim import Optimizer

from pyro_recursive import bounds
from pyro_recursive.losses.multi_sample import MultiSampleELBO
from pyro_recursive.tracing.user_warnings import warn_user
from pyro_recursive.training.compiled.compiled_step import Call, CompiledStep
from pyro_recursive.training.compiled.engines import EngineName
from pyro_recursive.training.compiled.flat import FlatGroup, Unsupported, flat_groups, owner_in

MAX_GRAPHS = 8  # of calls of one form, before these run eagerly
# Of the loss, and of the norm of an update: Adam turns rounding errors into whole steps.
TOLERANCES = {torch.float64: (1e-9, 1e-6), torch.float32: (1e-4, 5e-2)}


class CompiledSVI:
    """`pyro.infer.SVI` with compiled steps: loss, gradients and update are one graph."""

    def __init__(
        self,
        model: Callable,
        guide: Callable,
        optim: PyroOptim | Optimizer,
        loss: ELBO,
        *,
        engine: EngineName = "auto",
        strict: bool = False,
    ) -> None:
        self.model, self.guide, self.optim, self.loss = model, guide, optim, loss
        self._traced = equal_loss(loss)
        self.engine, self.strict = engine, strict
        self._steps: dict[Any, CompiledStep | None] = {}
        self._graphs: dict[Any, int] = {}  # how many were made of calls of a form
        self._groups: dict[tuple[int, ...], list[FlatGroup]] = {}

    def step(self, *args: Any, **kwargs: Any) -> float:
        """Take one step and return the loss before it, in nats."""
        call = Call(args, kwargs)
        found = self._step_of(call)
        if isinstance(found, CompiledStep):
            found.prepare(call)
            return found.take().item()
        return found

    def run(self, num_steps: int, *args: Any, **kwargs: Any) -> Tensor:
        """Take steps on the same arguments and return their losses, ``[num_steps]``, in nats."""
        call, losses = Call(args, kwargs), list[Tensor]()
        done = 0
        while done < num_steps:
            found = self._step_of(call)
            if isinstance(found, CompiledStep):
                found.prepare(call)
                count = min(num_steps - done, found.step.block)
                losses.append(found.take_many(count).clone())
            else:
                count = 1
                losses.append(torch.tensor([found], dtype=torch.float64))
            done += count
        return torch.cat([each.to(losses[-1].device) for each in losses])

    def evaluate_loss(self, *args: Any, **kwargs: Any) -> float:
        """Return the loss in nats, without a step."""
        with torch.no_grad():
            return self.loss.loss(self.model, self.guide, *args, **kwargs)

    def _step_of(self, call: Call) -> CompiledStep | float:
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
            step = CompiledStep(self._differentiable, call, self._roots(), self._flat, self.engine)
        except Unsupported as error:
            self._give_up(key, error)
            return self._eager(call)
        self._steps[key] = step
        return self._compared(key, step, call)

    def _compared(self, key: Any, step: CompiledStep, call: Call) -> float:
        """Take an eager step and return its loss; give up a compiled step that differs."""
        step.prepare(call)
        start = [group.values.clone() for group in step.groups]
        with step.undone():
            loss = step.take().item()
            ends = [group.values.clone() for group in step.groups]
        expected = self._eager(call)
        tight, loose = TOLERANCES.get(start[0].dtype, (1e-3, 1e-1))
        is_same = abs(loss - expected) <= tight * (1 + abs(expected))
        for group, before, after in zip(step.groups, start, ends, strict=True):
            error = (after - group.values).norm()
            is_same &= bool(error <= loose * (group.values - before).norm() + tight**2)
        if not is_same:
            text = f"a compiled step differs from an eager one (losses {loss:.7g}, {expected:.7g})"
            self._give_up(key, Unsupported(text))
        return expected

    def _differentiable(self, *args: Any, **kwargs: Any) -> Tensor:
        return self._traced.differentiable_loss(self.model, self.guide, *args, **kwargs)

    def _roots(self) -> dict[str, Any]:
        return {"model": self.model, "guide": self.guide, "loss": self.loss}

    def _flat(self, parameters: list[Tensor]) -> list[FlatGroup]:
        key = tuple(map(id, parameters))
        if key not in self._groups:
            self._groups[key] = flat_groups(parameters, owner_in(self.optim))
        return self._groups[key]

    def _give_up(self, key: Any, error: Unsupported) -> None:
        if self.strict:
            raise error
        self._steps[key] = None
        warn_user(f"Training steps run eagerly: {error}.")

    def _eager(self, call: Call) -> float:
        for groups in self._groups.values():
            for group in groups:
                group.write_counts()
        with poutine.trace(param_only=True) as captured:
            loss = self.loss.loss_and_grads(self.model, self.guide, *call.args, **call.kwargs)
        sites = captured.trace.nodes.values()
        parameters = dict.fromkeys(site["value"].unconstrained() for site in sites)
        if isinstance(self.optim, PyroOptim):
            self.optim(parameters)
        else:
            self.optim.step()
        pyro.infer.util.zero_grads(parameters)
        for groups in self._groups.values():
            for group in groups:
                group.read_counts()
        return loss


def equal_loss(loss: Any) -> Any:
    """Return the loss of this package that equals one of Pyro's; any other as it is."""
    order = {Trace_ELBO: 1.0, RenyiELBO: getattr(loss, "alpha", 0.0)}.get(type(loss))
    if order is None:
        return loss
    return MultiSampleELBO(
        bounds.renyi(order),
        estimator="score",
        num_particles=loss.num_particles,
        # Pyro's constructor counts the plate of the particles.
        max_plate_nesting=loss.max_plate_nesting
        - (loss.vectorize_particles and loss.num_particles > 1),
        vectorize_particles=loss.vectorize_particles,
    )
