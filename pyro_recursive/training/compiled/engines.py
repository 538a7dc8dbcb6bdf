"""Engines: how the steps of a graph run, from the fastest to the one that always can."""

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from functools import cache
from typing import Any, Literal, Protocol, get_args

import torch
from torch import Tensor

from pyro_recursive.tracing.graphs.compiler import NotCompiled
from pyro_recursive.tracing.graphs.kernels import (
    Compiled,
    KernelCalls,
    NotRecordable,
    compile_graph,
)
from pyro_recursive.tracing.graphs.unsupported import Unsupported, as_unsupported
from pyro_recursive.training.compiled.capture import captured
from pyro_recursive.training.compiled.loop_graph import loop_graph
from pyro_recursive.training.compiled.step_graph import StepGraph

EngineName = Literal["auto", "replay", "loop", "flat", "graph", "eager"]
Undone = Callable[[], AbstractContextManager]
CHECKED = 3  # steps of a new engine that are compared with those of the graph
# Relative ones, of the loss and of the norm of an update: Adam divides gradients by their size, so
# that those of rounding errors alone are updates of full size.
TOLERANCES = {torch.float64: (1e-9, 1e-6), torch.float32: (1e-4, 5e-2)}
COARSE = 1e-3, 1e-1  # of other dtypes


def check_engine(**given: Any) -> None:
    """Raise ValueError where an argument is not the name of an engine."""
    names = get_args(EngineName)
    for argument, engine in given.items():
        if engine not in names:
            text = ", ".join(map(repr, names))
            raise ValueError(f"{argument} must be an engine ({text}), got {engine!r}.")


def tolerances(step: StepGraph) -> tuple[float, float]:
    """Return the tolerances of the loss and of updates, the largest of all parameters."""
    return max(TOLERANCES.get(group.values.dtype, COARSE) for group in step.groups)


class Engine(Protocol):
    """Takes a number of steps in place, from the number ``step.index`` of the block on."""

    name: str

    def run(self, count: int) -> None: ...

    def rebind(self) -> None:
        """Work on the tensors that the step has now; may change what steps change."""
        ...


class CallEngine:
    """Calls a function of the step's tensors once a step: compiled code, or the graph itself."""

    def __init__(self, step: StepGraph, function: Compiled, name: str) -> None:
        self.step, self.function, self.name = step, function, name
        self.rebind()

    def rebind(self) -> None:
        self.tensors = self.step.tensors

    def run(self, count: int) -> None:
        with torch.no_grad():
            for _ in range(count):
                self.function(*self.tensors)


class ReplayEngine:
    """Repeats the kernel calls of one compiled step; on a GPU, a CUDA graph of them."""

    name = "replay"

    def __init__(self, step: StepGraph, compiled: Compiled) -> None:
        self.step, self.compiled = step, compiled
        self.rebind()

    def rebind(self) -> None:
        tensors = self.step.tensors
        self.step.index.zero_()  # a whole block may have been taken: the next step has no draws
        if self.step.index.is_cuda:
            replay = captured(self.step.module, self.compiled, tensors, self.step.index)
            self._repeat: Callable[[int], None] = replay
            return
        calls = KernelCalls(self.compiled, tensors)
        known = calls.pointers()
        if any(each.data_ptr() not in known for each in self.step.changed):
            raise NotRecordable("the compiled step works on a copy of its state")
        self._repeat = calls.repeat

    def run(self, count: int) -> None:
        self._repeat(count)


class LoopEngine:
    """Calls a compiled loop around the step, in C++, once for all steps."""

    name = "loop"

    def __init__(self, step: StepGraph) -> None:
        if step.index.is_cuda:
            raise NotRecordable("a loop on a GPU waits for the end of each step")
        self.step, self.count = step, torch.ones_like(step.index)
        self.rebind()
        index = next(n for n, each in enumerate(self.tensors) if each is step.index)
        graph = loop_graph(step.module, self.tensors, index)
        self.function = compile_graph(graph, [self.count, *self.tensors], cpp_wrapper=True)

    def rebind(self) -> None:
        self.tensors = self.step.tensors

    def run(self, count: int) -> None:
        torch.add(self.step.index, count, out=self.count)
        with torch.no_grad():
            self.function(self.count, *self.tensors)


def make_engine(step: StepGraph, wanted: EngineName, undone: Undone) -> Engine:
    """Return the engine asked for, or the fastest that takes the steps of the graph.

    Steps that are taken inside ``undone`` are undone. Raises Unsupported if there is none.
    """
    graph, reason = CallEngine(step, step.module, "graph"), ""
    with as_unsupported(of="the graph of a step: "):
        expected = _taken(graph, step, undone)
        if wanted == "graph":
            return graph
        losses = _losses(graph, step, undone)
    compiled = cache(lambda: compile_graph(step.module, step.tensors))
    makers: dict[str, Callable[[], Engine]] = {
        "replay": lambda: ReplayEngine(step, compiled()),
        "loop": lambda: LoopEngine(step),
        "flat": lambda: CallEngine(step, compiled(), "flat"),
    }
    for name in makers if wanted == "auto" else (wanted,):
        try:
            with undone():
                engine = makers[name]()
            found, own = _taken(engine, step, undone), _losses(engine, step, undone)
        except NotCompiled:
            raise
        except Exception as error:
            reason = (
                f"engine '{name}': {type(error).__name__}: {' '.join(str(error).split())[:200]}"
            )
            continue
        tight, _ = tolerances(step)
        is_close = torch.allclose(own, losses, rtol=tight, atol=tight, equal_nan=True)
        if is_close and _is_same(step, found, expected):
            return engine
        reason = f"engine '{name}' takes other steps than the graph"
    raise Unsupported(reason)


def _taken(engine: Engine, step: StepGraph, undone: Undone) -> list[tuple[Tensor, Tensor]]:
    """Return what some steps change, before and after them."""
    changed = step.changed
    before = [each.clone() for each in changed]
    with undone():
        step.index.zero_()
        engine.run(min(CHECKED, step.block))
        return [(old, each.clone()) for old, each in zip(before, changed, strict=True)]


def _losses(engine: Engine, step: StepGraph, undone: Undone) -> Tensor:
    """Return the losses of some steps from the same parameters, ``[steps]``.

    Each has draws and, of a table, rows of its own. They have no rounding errors of updates.
    """
    found = []
    for number in range(min(CHECKED, step.block)):
        with undone():
            step.index.fill_(number)
            engine.run(1)
            found.append(step.losses[number].clone())
    return torch.stack(found)


def _is_same(
    step: StepGraph,
    found: Sequence[tuple[Tensor, Tensor]],
    expected: Sequence[tuple[Tensor, Tensor]],
) -> bool:
    tight, loose = tolerances(step)
    for (before, one), (_, other) in zip(found, expected, strict=True):
        if not other.is_floating_point():
            if not torch.equal(one, other):
                return False
            continue
        is_finite = other.isfinite()
        if not torch.equal(one.isfinite(), is_finite):
            return False
        error, change, size = (
            torch.where(is_finite, each, 0.0).norm()
            for each in (one - other, other - before, before)
        )
        if not error <= loose * change + tight**2 * (1 + size):
            return False
    return True
