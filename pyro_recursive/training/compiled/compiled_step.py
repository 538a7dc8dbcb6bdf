"""The compiled step of calls of one form: how it is made, and how it takes over a call."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from pyro_recursive.tracing.graphs.calls import Call
from pyro_recursive.tracing.graphs.gradients import trace_gradients
from pyro_recursive.tracing.graphs.python_state import PythonState, restored, undone_runs
from pyro_recursive.tracing.graphs.unsupported import LastSite, Unsupported, as_unsupported
from pyro_recursive.tracing.isolation import restored_random_state
from pyro_recursive.training.compiled.engines import CHECKED, Engine, EngineName, make_engine
from pyro_recursive.training.compiled.flat import FlatGroup, advance
from pyro_recursive.training.compiled.step_graph import MAX_BLOCK, MinibatchTable, StepGraph


class CompiledStep:
    """The compiled step of calls of one form.

    Raises Unsupported, or what the tracing raises.
    """

    def __init__(
        self,
        training: Any,
        call: Call,
        groups_of: Callable[[list[Tensor]], list[FlatGroup]],
        engine: EngineName,
    ) -> None:
        call.check()
        self.training, self.left = training, MAX_BLOCK  # steps until its stage ends
        self._is_undone, self.is_compared = False, False
        self.state = PythonState(training.loss.roots | call.roots)
        known = self.state.parameters()
        self._frozen = [parameter for parameter in known if not parameter.requires_grad]
        # Tensors that are not contiguous, or lie elsewhere in a later call, are copied.
        traced = [each.detach().contiguous() for each in call.inputs]
        self.inputs, self._owns = traced, [not each.is_contiguous() for each in call.inputs]
        device = known[0].device if known else None  # a CUDA graph keeps values on the CPU
        self.weights = [
            torch.tensor(float(handler.weight), dtype=torch.float64, device=device)
            for handler in call.weights
        ]

        def run() -> Tensor:
            with call.given(traced, self.weights) as (args, kwargs), site:
                return training.loss.differentiable(*args, **kwargs)

        site = LastSite()
        with as_unsupported(site):
            with undone_runs(self.state) as writes:
                gradients = trace_gradients(
                    run, [*traced, *self.weights], lambda: site.name, training.others()
                )
            if any(writes.reaches(each) for each in traced):
                raise Unsupported("model or guide change an argument in place")
            self.groups = groups_of(gradients.parameters)
            table: MinibatchTable | None = None
            if call.table is not None:
                index, columns = call.table[:1].repeat(MAX_BLOCK, 1), call.columns
                is_numbered = len(traced) > len(columns)
                table = MinibatchTable(index, len(columns), is_numbered)
                self.inputs = [each.detach() for each in columns]
                self._owns = [False] * len(columns)
            self.step = StepGraph(
                gradients,
                self.groups,
                [*self.inputs, *self.weights],
                table=table,
                clip_norm=training.clip_norm,
                is_guarded=training.is_guarded,
            )
        self.table, plan = self.step.table, gradients.plan
        self.first_draws = [draw.filling(out) for draw, out in plan.slices(self.step.draws)]
        with self.undone():
            plan.fill(self.step.draws, self.step.block)
        if self.table is not None and call.table is not None:  # an engine is checked on several
            rows = call.table[:CHECKED]
            self.table.index[: len(rows)] = rows
            self.table.index[self._valid(len(rows)) :] = rows[0]
        self.engine: Engine = make_engine(self.step, engine, self.undone)
        self._places: list[int] | None = self._constants_at()  # None if the engine is not bound

    def outdated(self, call: Call) -> str | None:
        """Return what has changed since the graph was made, if it is not right for a call."""
        if (changed := self.state.changed()) is not None:
            return changed
        for handler, weight in zip(call.weights, self.weights, strict=True):
            weight.fill_(float(handler.weight))
        if any(parameter.requires_grad for parameter in self._frozen):
            return "which parameters are trained"
        if not self.step.gradients.is_valid([*call.inputs, *self.weights]):
            return "what is read of the arguments, or which parameters have gradients"
        return None

    @contextmanager
    def undone(self) -> Iterator[None]:
        """Undo after the block what steps change: tensors, step counts, rates, random states."""
        done = [group.done for group in self.groups]
        rates = [(m.group, m.group["lr"]) for group in self.groups for m in group.members]
        self._is_undone = True
        try:
            with restored_random_state(), restored(self.step.changed):
                yield
        finally:
            self._is_undone = False
            for group, count in zip(self.groups, done, strict=True):
                group.done = count
            for options, rate in rates:
                options["lr"] = rate

    def prepare(self, call: Call) -> None:
        """Take over the arguments of a call and what the optimiser has now.

        Raises Unsupported where the step does not hold for these.
        """
        self.call = call
        for group in self.groups:
            group.refresh()
        if self._places != self._constants_at():  # as of parameters that another graph trains
            self._rebind()
        inputs: Sequence[Tensor] = call.inputs
        if self.table is not None and call.table is not None:
            inputs = call.columns
            rows = call.table[: self.step.block]
            self.table.index[: len(rows)] = rows
        is_elsewhere = [
            new.data_ptr() != old.data_ptr() or new.stride() != old.stride()
            for new, old in zip(inputs, self.inputs, strict=True)
        ]
        if any(here and not own for here, own in zip(is_elsewhere, self._owns, strict=True)):
            self._own_inputs()
        with torch.no_grad():
            for new, old, elsewhere in zip(inputs, self.inputs, is_elsewhere, strict=True):
                if elsewhere:
                    old.copy_(new)

    def _own_inputs(self) -> None:
        """Work on copies of the arguments from here on; a step on others is compared again."""
        self.inputs, self._owns = [each.clone() for each in self.inputs], [True] * len(self._owns)
        self.step.inputs = [*self.inputs, *self.weights]
        self._rebind()
        self.is_compared = False

    def _rebind(self) -> None:
        self._places = None
        with as_unsupported(of=f"engine '{self.engine.name}': "), self.undone():
            self.engine.rebind()
        self._places = self._constants_at()

    def _constants_at(self) -> list[int]:
        return [each.data_ptr() for each in self.step.gradients.constants]

    def take(self) -> Tensor:
        """Take a step with the random numbers of an eager one; return the loss, a view."""
        for fill in self.first_draws:
            fill()
        return self._run(1)

    def take_many(self, count: int) -> Tensor:
        """Take steps, at most a block of them; return their losses, a view."""
        count = self._valid(min(count, self.left, self.step.block))
        self.step.gradients.plan.fill(self.step.draws, count)
        return self._run(count)

    def _valid(self, count: int) -> int:
        """Return how many steps have minibatches that the graph is right for, of some."""
        if self.table is None or not self.step.gradients.reads.values:
            return count
        inputs = [*self.inputs, *self.weights]
        for number in range(1, count):
            batch = self.table.minibatch(self.table.index[number], inputs)
            if not self.step.gradients.is_valid(batch):
                return number
        return count

    def _run(self, count: int) -> Tensor:
        self.step.index.zero_()
        self.engine.run(count)
        advance(self.groups, count)
        if not self._is_undone:
            self.training.loss.advance(count, *self.call.args, **self.call.kwargs)
        return self.step.losses[:count]
