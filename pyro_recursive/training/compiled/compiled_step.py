"""The compiled step of calls of one form: how it is made, and how it takes over a call."""

import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from pyro import poutine
from pyro.poutine.messenger import Messenger
from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_unflatten

from pyro_recursive.tracing.handlers import KLWarmup
from pyro_recursive.tracing.isolation import random_state, set_random_state
from pyro_recursive.tracing.minibatch import MinibatchRows, minibatch_rows
from pyro_recursive.training.compiled.engines import Engine, EngineName, make_engine
from pyro_recursive.training.compiled.flat import FlatGroup, Unsupported
from pyro_recursive.training.compiled.gradients import trace_gradients
from pyro_recursive.training.compiled.python_state import PythonState
from pyro_recursive.training.compiled.step_graph import MAX_BLOCK, MinibatchTable, StepGraph


class Call:
    """The arguments of one call: its tensors, and all else that a graph depends on.

    With ``columns`` and a ``table`` of numbers of their rows, ``[steps, rows]``, a graph takes the
    rows of each step by itself; the arguments are those of the first.
    """

    def __init__(
        self,
        args: tuple,
        kwargs: dict[str, Any],
        columns: tuple[Tensor, ...] = (),
        table: Tensor | None = None,
    ) -> None:
        self.args, self.kwargs, self.columns, self.table = args, kwargs, columns, table
        self.leaves, self.spec = tree_flatten((args, kwargs))
        self.rows, self.handlers = minibatch_rows(), list(poutine.runtime._PYRO_STACK)
        self.weights = [h for h in self.handlers if isinstance(h, KLWarmup)]
        self.inputs = [each for each in self.leaves if isinstance(each, Tensor)]
        if self.rows is not None and self.rows.index is not None:
            self.inputs.append(self.rows.index)

    @property
    def key(self) -> Any:
        """What a graph is known by: the form of the tensors, the values of all else."""
        rest = tuple(
            (type(each), each) if isinstance(each, int | float | str | None) else id(each)
            for each in self.leaves
            if not isinstance(each, Tensor)
        )
        forms = tuple((t.shape, t.dtype, t.device) for t in self.inputs)
        rows = self.rows and (self.rows.index is None, self.rows.total)
        handlers = tuple(map(type, self.handlers))
        is_table = self.table is not None
        return self.spec, rest, forms, rows, handlers, is_table, torch.get_default_dtype()

    @contextmanager
    def given(self, inputs: list[Tensor], weights: list[Tensor]) -> Iterator[tuple[tuple, dict]]:
        """Yield the arguments with other tensors, inside their rows and weights of latents."""
        tensors = iter(inputs)
        leaves = [next(tensors) if isinstance(each, Tensor) else each for each in self.leaves]
        rows: AbstractContextManager = nullcontext()
        if self.rows is not None and self.rows.index is not None:
            rows = MinibatchRows(next(tensors), self.rows.total)
        before = [handler.weight for handler in self.weights]
        try:
            for handler, weight in zip(self.weights, weights, strict=True):
                handler.weight = weight  # type: ignore[assignment]
            with rows:
                yield tree_unflatten(leaves, self.spec)
        finally:
            for handler, value in zip(self.weights, before, strict=True):
                handler.weight = value


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
        others = [handler for handler in call.handlers if handler not in call.weights]
        roots = training.roots | {type(handler).__name__: handler for handler in others}
        self.state = PythonState(roots)
        traced = [each.detach() for each in call.inputs]
        self.inputs, self.owns_inputs = traced, False
        self.table: MinibatchTable | None = None
        self.weights = [
            torch.tensor(float(handler.weight), dtype=torch.float64) for handler in call.weights
        ]

        def run() -> Tensor:
            with call.given(traced, self.weights) as (args, kwargs), site:
                return training.differentiable(*args, **kwargs)

        site = _LastSite()
        try:
            with _restored_buffers(self.state):
                gradients = trace_gradients(run, [*traced, *self.weights])
        except Exception as error:
            raise Unsupported(_reason(error, site.name)) from error
        moving = self.state.settle()
        for entry in moving:
            if not entry.is_private:
                raise Unsupported(f"{entry.name} changes in each run of model or guide")
        self.groups = groups_of(gradients.parameters)
        if call.table is not None:
            index, columns = call.table[:1].repeat(MAX_BLOCK, 1), call.columns
            self.table = MinibatchTable(index, len(columns), is_numbered=len(traced) > len(columns))
            self.inputs = [each.detach() for each in columns]
        self.step = StepGraph(
            gradients,
            self.groups,
            [*self.inputs, *self.weights],
            table=self.table,
            clip_norm=training.clip_norm,
            is_guarded=training.is_guarded,
        )
        plan = gradients.plan
        self.first_draws = plan.slices(self.step.draws)
        with self.undone():
            plan.fill(self.step.draws, self.step.block)
            self.engine: Engine = make_engine(self.step, engine)

    @contextmanager
    def undone(self) -> Iterator[None]:
        """Undo after the block what steps change: parameters, states, constants, draws."""
        tensors = [*self.step.changed, *self.step.gradients.constants]
        before, state = [each.clone() for each in tensors], random_state()
        done = [group.done for group in self.groups]
        rates = [(m.group, m.group["lr"]) for group in self.groups for m in group.members]
        try:
            yield
        finally:
            with torch.no_grad():
                for each, old in zip(tensors, before, strict=True):
                    if not torch.equal(each, old):
                        each.copy_(old)
            for group, count in zip(self.groups, done, strict=True):
                group.done = count
            for options, rate in rates:
                options["lr"] = rate
            set_random_state(state)

    def prepare(self, call: Call) -> None:
        """Take over the arguments of a call and what the optimiser has now."""
        for group in self.groups:
            if not group.is_bound:
                group.bind()
                group.read_counts()
            group.read_rates()
        for handler, weight in zip(call.weights, self.weights, strict=True):
            weight.fill_(float(handler.weight))
        inputs: Sequence[Tensor] = call.inputs
        if self.table is not None and call.table is not None:
            inputs = call.columns
            rows = call.table[: self.step.block]
            self.table.index[: len(rows)] = rows
        if all(map(_is_same, inputs, self.inputs)):
            return
        if not self.owns_inputs:
            self.owns_inputs, self.inputs = True, [each.clone() for each in self.inputs]
            self.step.inputs = [*self.inputs, *self.weights]
            with self.undone():
                self.engine.rebind()
        with torch.no_grad():
            for new, old in zip(inputs, self.inputs, strict=True):
                old.copy_(new)

    def take(self) -> Tensor:
        """Take a step with the random numbers of an eager one; return the loss, a view."""
        for draw, out in self.first_draws:
            draw.fill(out)
        return self._run(1)

    def take_many(self, count: int) -> Tensor:
        """Take steps, at most a block of them; return their losses, a view."""
        count = min(count, self.step.block)
        self.step.gradients.plan.fill(self.step.draws, count)
        return self._run(count)

    def _run(self, count: int) -> Tensor:
        self.step.index.zero_()
        self.engine.run(count)
        for group in self.groups:
            group.advance(count)
        return self.step.losses[:count]


def _is_same(new: Tensor, old: Tensor) -> bool:
    return new.data_ptr() == old.data_ptr() and new.stride() == old.stride()


class _LastSite(Messenger):
    """Knows the site that a program has reached."""

    name: str | None = None

    def _pyro_sample(self, msg: Any) -> None:
        self.name = msg["name"]


def _reason(error: Exception, site: str | None) -> str:
    """Say in one line what was raised and where."""
    frames = [
        frame
        for frame in traceback.extract_tb(error.__traceback__)
        if "/torch/" not in frame.filename and "/compiled/" not in frame.filename
    ]
    text = " ".join(str(error).split())[:120]
    where = f" at site '{site}'" if site else ""
    line = f" ({frames[-1].filename.rpartition('/')[2]}:{frames[-1].lineno})" if frames else ""
    return f"{type(error).__name__}{where}{line}: {text}"


@contextmanager
def _restored_buffers(state: PythonState) -> Iterator[None]:
    """Restore the buffers of modules in training mode after the block."""
    training = [module for module in state.modules if module.training]
    buffers = [buffer for module in training for buffer in module.buffers(recurse=False)]
    before = [buffer.clone() for buffer in buffers]
    try:
        yield
    finally:
        with torch.no_grad():
            for buffer, old in zip(buffers, before, strict=True):
                buffer.copy_(old)
