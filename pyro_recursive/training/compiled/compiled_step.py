"""The compiled step of calls of one form: how it is made, and how it takes over a call."""

import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from typing import Any

import pyro
import torch
from pyro import poutine
from pyro.poutine.block_messenger import BlockMessenger
from pyro.poutine.condition_messenger import ConditionMessenger
from pyro.poutine.mask_messenger import MaskMessenger
from pyro.poutine.messenger import Messenger
from pyro.poutine.scale_messenger import ScaleMessenger
from pyro.poutine.substitute_messenger import SubstituteMessenger
from pyro.poutine.uncondition_messenger import UnconditionMessenger
from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_unflatten

from pyro_recursive.tracing.graphs.gradients import trace_gradients
from pyro_recursive.tracing.graphs.host_reads import SKIPPED
from pyro_recursive.tracing.graphs.python_state import SCALARS, PythonState
from pyro_recursive.tracing.graphs.unsupported import Unsupported
from pyro_recursive.tracing.handlers import KLWarmup
from pyro_recursive.tracing.isolation import random_state, set_random_state
from pyro_recursive.tracing.minibatch import MinibatchRows, minibatch_rows
from pyro_recursive.training.compiled.engines import Engine, EngineName, make_engine
from pyro_recursive.training.compiled.flat import FlatGroup
from pyro_recursive.training.compiled.step_graph import MAX_BLOCK, MinibatchTable, StepGraph

# Handlers around a step that have no effect but on the program inside.
KNOWN: tuple[type[Messenger], ...] = (
    *(BlockMessenger, ConditionMessenger, KLWarmup, MaskMessenger, ScaleMessenger),
    *(SubstituteMessenger, UnconditionMessenger),
)


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
        self.leaves: Sequence[Any] = args
        self.spec: Any = None
        self.others: list[Any] = []
        self.inputs = list(args)
        if kwargs or not all(type(each) is Tensor for each in args):
            self.leaves, self.spec = tree_flatten((args, kwargs))
            self.others = [each for each in self.leaves if not isinstance(each, Tensor)]
            self.inputs = [each for each in self.leaves if isinstance(each, Tensor)]
        self.rows, self.handlers = minibatch_rows(), list(poutine.runtime._PYRO_STACK)
        self.weights = [h for h in self.handlers if type(h) is KLWarmup]
        if self.rows is not None and self.rows.index is not None:
            self.inputs.append(self.rows.index)

    @property
    def key(self) -> Any:
        """What a graph is known by: the form of the tensors, the values of all else."""
        forms = [(t.shape, t.dtype, t.device) for t in self.inputs]
        rows = self.rows and (self.rows.index is None, self.rows.total)
        handlers = tuple(
            (type(h), None if type(h) is KLWarmup else _content(vars(h))) for h in self.handlers
        )
        modes = torch.get_default_dtype(), torch.is_grad_enabled(), torch.is_autocast_enabled()
        given = self.spec, _content(self.others), tuple(forms)
        return *given, rows, handlers, self.table is not None, modes

    def check(self) -> None:
        """Raise Unsupported where a step does more than train on its arguments."""
        for handler in self.handlers:
            if type(handler) not in KNOWN:
                raise Unsupported(f"{type(handler).__name__} around a step may see its sites")
        if any(each.requires_grad for each in self.inputs):
            raise Unsupported("an argument requires a gradient")

    @property
    def roots(self) -> dict[str, Any]:
        """What else its Python values are reached from."""
        found = {f"argument {n}": each for n, each in enumerate(self.others)}
        return found | {type(h).__name__: h for h in self.handlers if h not in self.weights}

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
                yield (tuple(leaves), {}) if self.spec is None else _unflatten(leaves, self.spec)
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
        call.check()
        self.training, self.left = training, MAX_BLOCK  # steps until its stage ends
        self._is_undone = False
        self.state = PythonState(training.loss.roots | call.roots)
        known = _parameters(self.state)
        self._frozen = [parameter for parameter in known if not parameter.requires_grad]
        # Tensors that are not contiguous, or lie elsewhere in a later call, are copied.
        traced = [each.detach().contiguous() for each in call.inputs]
        self.inputs, self._owns = traced, [not each.is_contiguous() for each in call.inputs]
        self.table: MinibatchTable | None = None
        self.weights = [
            torch.tensor(float(handler.weight), dtype=torch.float64) for handler in call.weights
        ]

        def run() -> Tensor:
            with call.given(traced, self.weights) as (args, kwargs), site:
                return training.loss.differentiable(*args, **kwargs)

        site = _LastSite()
        try:
            with _restored(_movable(self.state)):
                gradients = trace_gradients(
                    run, [*traced, *self.weights], lambda: site.name, training.others()
                )
            for entry in self.state.settle():
                if not entry.is_private:
                    raise Unsupported(f"{entry.name} changes in each run of model or guide")
            self.groups = groups_of(gradients.parameters)
            if call.table is not None:
                index, columns = call.table[:1].repeat(MAX_BLOCK, 1), call.columns
                is_numbered = len(traced) > len(columns)
                self.table = MinibatchTable(index, len(columns), is_numbered)
                self.inputs = [each.detach() for each in columns]
                self._owns = [False] * len(columns)
            self.step = StepGraph(
                gradients,
                self.groups,
                [*self.inputs, *self.weights],
                table=self.table,
                clip_norm=training.clip_norm,
                is_guarded=training.is_guarded,
            )
        except Unsupported:
            raise
        except Exception as error:
            raise Unsupported(_reason(error, site.name)) from error
        plan = gradients.plan
        self.first_draws = [draw.filling(out) for draw, out in plan.slices(self.step.draws)]
        with self.undone():
            plan.fill(self.step.draws, self.step.block)
            self.engine: Engine = make_engine(self.step, engine)
        self._places = self._constants_at()

    def outdated(self, call: Call) -> str | None:
        """Return what has changed since the graph was made, if it is not right for a call."""
        if (changed := self.state.changed()) is not None:
            return changed
        for handler, weight in zip(call.weights, self.weights, strict=True):
            weight.fill_(float(handler.weight))
        if any(parameter.requires_grad for parameter in self._frozen):
            return "which parameters are trained"
        if not self.step.gradients.is_valid([*call.inputs, *self.weights]):
            return "what is read of the arguments, or which parameters have gradients,"
        return None

    @contextmanager
    def undone(self) -> Iterator[None]:
        """Undo after the block what steps change: parameters, states, constants, draws."""
        tensors, state = [*self.step.changed, *self.step.gradients.constants], random_state()
        done = [group.done for group in self.groups]
        rates = [(m.group, m.group["lr"]) for group in self.groups for m in group.members]
        self._is_undone = True
        try:
            with _restored(tensors):
                yield
        finally:
            self._is_undone = False
            for group, count in zip(self.groups, done, strict=True):
                group.done = count
            for options, rate in rates:
                options["lr"] = rate
            set_random_state(state)

    def prepare(self, call: Call, write_counts: Callable[[], None] = lambda: None) -> None:
        """Take over the arguments of a call and what the optimiser has now.

        ``write_counts`` gives it the steps that other graphs have counted.
        """
        for group in self.groups:
            if not (group.is_current and group.is_bound):
                write_counts()
                group.bind()
                group.read_counts()
            group.read_rates()
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
        """Work on copies of the arguments from here on."""
        self.inputs, self._owns = [each.clone() for each in self.inputs], [True] * len(self._owns)
        self.step.inputs = [*self.inputs, *self.weights]
        self._rebind()

    def _rebind(self) -> None:
        with self.undone():
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
        for group in self.groups:
            group.advance(count)
        if not self._is_undone:
            self.training.loss.advance(count)
        return self.step.losses[:count]


class _LastSite(Messenger):
    """Knows the site that a program has reached."""

    name: str | None = None

    def _pyro_sample(self, msg: Any) -> None:
        self.name = msg["name"]


def _content(value: Any) -> Any:
    """Return what tells a value from another one: numbers and their containers by what they are."""
    if isinstance(value, SCALARS):
        return type(value), value
    if isinstance(value, dict):
        return tuple((key, _content(each)) for key, each in value.items())
    if isinstance(value, list | tuple):
        return tuple(map(_content, value))
    if isinstance(value, partial):
        return _content((value.func, value.args, value.keywords))
    return id(value)


def _unflatten(leaves: list[Any], spec: Any) -> tuple[tuple, dict[str, Any]]:
    args, kwargs = tree_unflatten(leaves, spec)
    return args, kwargs


def _reason(error: Exception, site: str | None) -> str:
    """Say in one line what was raised and where."""
    frames = [
        frame
        for frame in traceback.extract_tb(error.__traceback__)
        if not any(part in frame.filename for part in SKIPPED)
    ]
    text = " ".join(str(error).split())[:120]
    where = f" at site '{site}'" if site else ""
    line = f" ({frames[-1].filename.rpartition('/')[2]}:{frames[-1].lineno})" if frames else ""
    return f"{type(error).__name__}{where}{line}: {text}"


def _parameters(state: PythonState) -> list[Tensor]:
    """Return the parameters of all modules and in Pyro's store."""
    found = list(vars(pyro.get_param_store())["_params"].values())
    for module in state.modules:
        found += module.parameters(recurse=False)
    return found


def _movable(state: PythonState) -> list[Tensor]:
    """Return what runs may change in place: parameters, and buffers in training, each once."""
    found = _parameters(state)
    for module in state.modules:
        found += module.buffers(recurse=False) if module.training else ()
    return list({id(each): each for each in found}.values())


@contextmanager
def _restored(tensors: Sequence[Tensor]) -> Iterator[None]:
    """Give tensors their values back after the block, in place, where these have changed."""
    before = [each.detach().clone() for each in tensors]
    try:
        yield
    finally:
        with torch.no_grad():
            for each, old in zip(tensors, before, strict=True):
                if not torch.equal(each, old):
                    each.copy_(old)
